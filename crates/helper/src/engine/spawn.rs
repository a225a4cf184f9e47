//! Starts the jailer, and sees to it that nothing is left of those that have ended.
//!
//! What is started is a session of its own and gets no signal from here; when the helper ends, it goes on.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::find::hold;

/// Starts a program by its arguments, with an empty environment, its output going to a descriptor.
pub(super) fn start(program: &Path, arguments: &[String], output: &OwnedFd) -> io::Result<Child> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::from(output.try_clone()?))
        .stderr(Stdio::from(output.try_clone()?));
    in_a_session(&mut command);
    command.spawn()
}

#[allow(unsafe_code)]
fn in_a_session(command: &mut Command) {
    // SAFETY: between fork and exec only `setsid` is called, a single system call that touches no memory of this process.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from));
    }
}

/// Children that have been started and may end at any time.
struct Reaper {
    children: Mutex<Vec<(OwnedFd, Child)>>,
    more: OwnedFd,
}

impl Reaper {
    fn run(&self) {
        loop {
            let mut children = self.children.lock().unwrap_or_else(PoisonError::into_inner);
            children.retain_mut(|(_, child)| matches!(child.try_wait(), Ok(None)));
            let held: Vec<OwnedFd> = children.iter().filter_map(|(fd, _)| fd.try_clone().ok()).collect();
            drop(children);
            let mut waited: Vec<PollFd<'_>> = held.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
            waited.push(PollFd::new(&self.more, PollFlags::IN));
            match poll(&mut waited, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
            if waited.last().is_some_and(|fd| !fd.revents().is_empty()) {
                let _ = rustix::io::read(&self.more, &mut [0u8; 8]);
            }
        }
    }
}

/// The one thread that waits for all of them.
fn reaper() -> Option<&'static Arc<Reaper>> {
    static REAPER: OnceLock<Option<Arc<Reaper>>> = OnceLock::new();
    REAPER
        .get_or_init(|| {
            let reaper = Arc::new(Reaper {
                children: Mutex::default(),
                more: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()?,
            });
            let theirs = Arc::clone(&reaper);
            std::thread::Builder::new()
                .name("reaper".into())
                .stack_size(64 << 10)
                .spawn(move || theirs.run())
                .ok()?;
            Some(reaper)
        })
        .as_ref()
}

/// Hands a child over to be waited for when it ends.
pub(super) fn adopt(child: Child) {
    let Some(reaper) = reaper() else { return };
    let Some(pidfd) = hold(child.id()) else { return };
    let mut children = reaper.children.lock().unwrap_or_else(PoisonError::into_inner);
    children.push((pidfd, child));
    drop(children);
    let _ = rustix::io::write(reaper.more.as_fd(), &1u64.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_child_has_a_session_and_no_environment_and_is_reaped() {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let script = "read -r _ _ _ _ _ sid _ </proc/self/stat; echo $sid $$; env; ls -l /proc/$$/fd | grep -c /";
        let child = start(Path::new("/bin/sh"), &["-c".into(), script.into()], &write).unwrap();
        drop(write);
        let pid = child.id();
        adopt(child);
        let mut text = String::new();
        std::fs::File::from(read).read_to_string(&mut text).unwrap();
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some(format!("{pid} {pid}").as_str()), "{text}");
        assert!(!text.contains("PATH=/usr") && !text.contains("HOME="), "{text}");
        let deadline = Instant::now() + Duration::from_secs(10);
        while Path::new(&format!("/proc/{pid}")).exists() {
            assert!(Instant::now() < deadline, "process {pid} was not reaped within 10 s");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
