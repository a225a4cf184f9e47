//! What is read: an engine's output, and its metrics.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::ioctl_fionbio;

use crate::log::Log;

/// How long output gathers before it is read. A pipe holds more than comes in this time.
pub(crate) const GATHER: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};

/// The reading end of a pipe, until it is closed.
pub(crate) struct Source(Option<File>);

impl Source {
    pub(crate) fn new(fd: Option<OwnedFd>) -> io::Result<Self> {
        if let Some(fd) = &fd {
            ioctl_fionbio(fd.as_fd(), true)?;
        }
        Ok(Self(fd.map(File::from)))
    }

    /// Whether nobody writes to it any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.0.is_none()
    }

    /// Reads what is there, but no more than a pipe holds, so that each source gets its turn.
    pub(crate) fn drain(&mut self, take: impl FnMut(&[u8])) {
        if let Some(file) = self.0.as_mut()
            && !read(file, take)
        {
            self.0 = None;
        }
    }
}

/// Reads what is there, no more than a pipe holds. False at its end.
fn read(file: &mut File, mut take: impl FnMut(&[u8])) -> bool {
    let mut buffer = [0; 8192];
    for _ in 0..16 {
        match file.read(&mut buffer) {
            Ok(n) if n > 0 => take(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            _ => return false,
        }
    }
    true
}

/// A named pipe that an engine writes its metrics to, and the bounded file that they go to. Neither ever holds anything up: what
/// cannot be read or written is not there.
pub(crate) struct Metrics {
    job: banger_proto::shim::Metrics,
    pipe: Option<File>,
    log: Option<Log>,
}

impl Metrics {
    pub(crate) fn new(job: banger_proto::shim::Metrics) -> Self {
        let log = Log::fresh(&job.file, job.limit).ok();
        let mut metrics = Self { job, pipe: None, log };
        metrics.open();
        metrics
    }

    /// The pipe may be made later than this began. One that only its engine may write to has an end whenever nobody writes: that
    /// is waited over.
    fn open(&mut self) {
        let flags = i32::try_from((OFlags::NONBLOCK | OFlags::NOFOLLOW).bits()).unwrap_or(0);
        let open = |write| {
            OpenOptions::new()
                .read(true)
                .write(write)
                .custom_flags(flags)
                .open(&self.job.pipe)
                .ok()
        };
        let is_pipe = |file: &File| file.metadata().is_ok_and(|m| m.file_type().is_fifo());
        self.pipe = open(true).or_else(|| open(false)).filter(is_pipe);
    }

    /// Reads what is there.
    pub(crate) fn drain(&mut self) {
        if self.pipe.is_none() {
            self.open();
        }
        if let (Some(pipe), Some(log)) = (self.pipe.as_mut(), self.log.as_mut()) {
            read(pipe, |bytes| log.write(bytes));
        }
    }
}

/// Waits for any of them; says whether the engine has ended.
pub(crate) fn wait(
    ended: Option<&OwnedFd>,
    sources: &[&Source],
    metrics: Option<&Metrics>,
    limit: Option<&Timespec>,
) -> io::Result<bool> {
    let files = sources.iter().filter_map(|s| s.0.as_ref());
    let files = files.chain(metrics.and_then(|m| m.pipe.as_ref()));
    let mut fds: Vec<PollFd<'_>> = ended.map(|fd| PollFd::new(fd, PollFlags::IN)).into_iter().collect();
    fds.extend(files.map(|file| PollFd::new(file, PollFlags::IN)));
    match poll(&mut fds, limit) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(ended.is_some() && !fds[0].revents().is_empty()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn metrics_are_read_from_a_pipe_and_kept_within_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let job = banger_proto::shim::Metrics {
            pipe: dir.path().join("pipe"),
            file: dir.path().join("metrics"),
            limit: 4096,
        };
        let mut metrics = Metrics::new(job.clone());
        metrics.drain();
        mknodat(CWD, &job.pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        metrics.drain();
        let mut engine = File::options().write(true).open(&job.pipe).unwrap();
        for n in 0..100 {
            engine
                .write_all(format!("{{\"n\":{n},\"pad\":\"{}\"}}\n", "x".repeat(200)).as_bytes())
                .unwrap();
            metrics.drain();
        }
        let text = std::fs::read_to_string(&job.file).unwrap();
        assert!(text.lines().last().unwrap().starts_with("{\"n\":99,"));
        let old = std::fs::metadata(dir.path().join("metrics.1")).unwrap().len();
        assert!(text.len() <= 4096 && old <= 4096);
        drop(engine);
        metrics.drain();
        assert!(metrics.pipe.is_some());
    }

    #[test]
    fn what_is_no_pipe_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        std::os::unix::fs::symlink("/dev/zero", &pipe).unwrap();
        let file = dir.path().join("metrics");
        let mut metrics = Metrics::new(banger_proto::shim::Metrics { pipe, file, limit: 1 });
        metrics.drain();
        assert!(metrics.pipe.is_none() && !Path::new("/dev/zero").is_file());
    }
}
