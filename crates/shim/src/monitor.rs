//! The stage that stays: starts the engine, reads what it prints, waits for its end and writes that down.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use banger_proto::shim::{ExitRecord, ShimJob, ShimReport};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::ioctl_fionbio;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::log::{Log, Tail};
use crate::start;

/// More than any job needs.
const JOB_LIMIT: u64 = 1 << 20;
/// How long output gathers before it is read. A pipe holds more than comes in this time.
const GATHER: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};
/// Longest line of the engine that stays in one piece.
const LINE: usize = 1024;

/// Runs one job from standard input.
pub(crate) fn monitor() -> Result<(), String> {
    let outcome = begin();
    let (mut engine, job, mut log) = match outcome {
        Ok(started) => started,
        Err(message) => {
            let _ = report(&ShimReport::Failed {
                message: message.clone(),
            });
            return Err(message);
        }
    };
    let mut tail = Tail::default();
    let watched = watch(&mut engine, &mut log, &mut tail);
    // Whatever went wrong with reading: the engine's end is still waited for, and by nobody else.
    let status = engine.wait();
    let mut last_words = tail.lines();
    if let Err(e) = watched {
        last_words.push(format!("banger-shim: cannot read the engine's output: {e}"));
    }
    let record = record(status, last_words);
    if let Err(e) = write_record(&job.exit_record, &record) {
        log.drop_old();
        if write_record(&job.exit_record, &record).is_err() {
            log.write_engine_line(format!("cannot write the exit record: {e}").as_bytes());
        }
    }
    let _ = report(&ShimReport::Ended(record));
    Ok(())
}

/// Reads the job and starts the engine.
fn begin() -> Result<(Child, ShimJob, Log), String> {
    let mut text = Vec::new();
    io::stdin()
        .take(JOB_LIMIT)
        .read_to_end(&mut text)
        .map_err(|e| format!("cannot read the job: {e}"))?;
    let job: ShimJob = serde_json::from_slice(&text).map_err(|e| format!("cannot understand the job: {e}"))?;
    drop(text);
    let log = Log::create(&job.console_log, job.log_limit)
        .map_err(|e| format!("cannot write {}: {e}", job.console_log.display()))?;
    let mut engine = Command::new(start::SELF)
        .arg0("banger-shim")
        .arg("exec")
        .arg(&job.engine)
        .args(&job.args)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("cannot start {}: {e}", job.engine.display()))?;
    // Nobody who heard of the engine means nobody who would ever end it.
    let told = start_time(engine.id()).and_then(|start_time| {
        report(&ShimReport::Started {
            pid: engine.id(),
            start_time,
        })
    });
    if let Err(e) = told {
        let _ = engine.kill();
        let _ = engine.wait();
        return Err(format!("cannot report the engine: {e}"));
    }
    Ok((engine, job, log))
}

/// Reads console and messages until the engine ends.
fn watch(engine: &mut Child, log: &mut Log, tail: &mut Tail) -> io::Result<()> {
    let pid = i32::try_from(engine.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let mut console = Source::new(engine.stdout.take().map(OwnedFd::from))?;
    let mut messages = Source::new(engine.stderr.take().map(OwnedFd::from))?;
    let mut line = Vec::new();
    let mut over = false;
    loop {
        let last = over;
        console.drain(|bytes| log.write(bytes));
        messages.drain(|bytes| {
            tail.push(bytes);
            for piece in bytes.split_inclusive(|b| *b == b'\n') {
                line.extend_from_slice(piece);
                if piece.ends_with(b"\n") || line.len() >= LINE {
                    log.write_engine_line(line.trim_ascii_end());
                    line.clear();
                }
            }
        });
        if last {
            if !line.is_empty() {
                log.write_engine_line(line.trim_ascii_end());
            }
            return Ok(());
        }
        // Once it has ended there is one more round, for what it left in the pipes. A console writes single bytes: they are
        // left to gather, or following them would take a third of what the guest gets.
        over = wait(&ended, &[&console, &messages], None)? || wait(&ended, &[], Some(&GATHER))?;
    }
}

/// Waits for any of them; says whether the engine has ended.
fn wait(ended: &OwnedFd, sources: &[&Source], limit: Option<&Timespec>) -> io::Result<bool> {
    let mut fds = vec![PollFd::new(ended, PollFlags::IN)];
    fds.extend(
        sources
            .iter()
            .filter_map(|s| Some(PollFd::new(s.0.as_ref()?, PollFlags::IN))),
    );
    match poll(&mut fds, limit) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(!fds[0].revents().is_empty()),
        Err(e) => Err(e.into()),
    }
}

/// The reading end of a pipe, until it is closed.
struct Source(Option<File>);

impl Source {
    fn new(fd: Option<OwnedFd>) -> io::Result<Self> {
        if let Some(fd) = &fd {
            ioctl_fionbio(fd.as_fd(), true)?;
        }
        Ok(Self(fd.map(File::from)))
    }

    /// Reads what is there, but no more than a pipe holds, so that each source gets its turn.
    fn drain(&mut self, mut take: impl FnMut(&[u8])) {
        let mut buffer = [0; 8192];
        for _ in 0..16 {
            let Some(file) = self.0.as_mut() else { return };
            match file.read(&mut buffer) {
                Ok(n) if n > 0 => take(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => self.0 = None,
            }
        }
    }
}

fn record(status: io::Result<ExitStatus>, mut last_words: Vec<String>) -> ExitRecord {
    let (code, signal) = match status {
        Ok(status) => (status.code(), status.signal()),
        Err(e) => {
            last_words.push(format!("banger-shim: cannot wait for the engine: {e}"));
            (None, None)
        }
    };
    let at_ms = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(0));
    ExitRecord {
        code,
        signal,
        last_words,
        at_ms,
    }
}

/// Whole or not at all.
fn write_record(path: &Path, record: &ExitRecord) -> io::Result<()> {
    let part = path.with_extension("json.part");
    let text = serde_json::to_vec(record)?;
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&part)
        .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&part, path));
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

fn report(report: &ShimReport) -> io::Result<()> {
    let mut text = serde_json::to_vec(report)?;
    text.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&text)?;
    out.flush()
}

/// Field 22 of `/proc/PID/stat`. The child cannot have been replaced by another process: it is not waited for yet.
fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat"))?;
    let after = stat.iter().rposition(|b| *b == b')').map_or(0, |at| at + 1);
    String::from_utf8_lossy(&stat[after..])
        .split_ascii_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("/proc/{pid}/stat has no start time"),
            )
        })
}
