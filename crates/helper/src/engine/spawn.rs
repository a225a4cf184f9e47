//! Starts the jailer, and sees to it that nothing is left of those that have ended.
//!
//! What is started is a session of its own and gets no signal from here; when the helper ends, it goes on. How the last engine of a machine
//! ended is kept in memory for the daemon to ask, for as many machines as there can be; a helper that was started later does not know.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use banger_system::helper::EngineEnd;
use banger_system::id::MachineId;
use banger_system::net::MAX_SLOT;
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

/// An engine that was started.
struct Started {
    machine: MachineId,
    pidfd: OwnedFd,
    child: Child,
}

/// Engines that run, and how others ended.
#[derive(Default)]
struct Engines {
    running: Vec<Started>,
    /// The latest last.
    ended: VecDeque<(MachineId, EngineEnd)>,
}

impl Engines {
    /// Reaps those that have ended.
    fn reap(&mut self) {
        let ended = &mut self.ended;
        self.running.retain_mut(|started| match started.child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) => {
                ended.retain(|(machine, _)| *machine != started.machine);
                ended.push_back((started.machine.clone(), end(status)));
                false
            }
            Err(_) => false,
        });
        while self.ended.len() > MAX_SLOT as usize {
            self.ended.pop_front();
        }
    }

    fn end_of(&self, machine: &MachineId) -> Option<EngineEnd> {
        if self.running.iter().any(|started| started.machine == *machine) {
            return None;
        }
        self.ended
            .iter()
            .find(|(ended, _)| ended == machine)
            .map(|(_, end)| *end)
    }
}

fn end(status: ExitStatus) -> EngineEnd {
    EngineEnd {
        code: status.code(),
        signal: status.signal(),
    }
}

/// Children that have been started and may end at any time.
struct Reaper {
    engines: Mutex<Engines>,
    more: OwnedFd,
}

impl Reaper {
    fn engines(&self) -> MutexGuard<'_, Engines> {
        self.engines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let mut engines = self.engines();
            engines.reap();
            let running = engines.running.iter();
            let held: Vec<OwnedFd> = running.filter_map(|started| started.pidfd.try_clone().ok()).collect();
            drop(engines);
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
                engines: Mutex::default(),
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
pub(super) fn adopt(child: Child, machine: MachineId) {
    let Some(reaper) = reaper() else { return };
    let Some(pidfd) = hold(child.id()) else { return };
    reaper.engines().running.push(Started { machine, pidfd, child });
    let _ = rustix::io::write(reaper.more.as_fd(), &1u64.to_ne_bytes());
}

/// How the last engine of a machine ended. None while it runs, and where this process has not started it.
pub(super) fn ended(machine: &MachineId) -> Option<EngineEnd> {
    let mut engines = reaper()?.engines();
    // Who asks may have heard of the end before the reaper.
    engines.reap();
    engines.end_of(machine)
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
        adopt(child, MachineId::from_random([9; 8]));
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

    #[test]
    fn how_an_engine_ended_is_kept() {
        let (_read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let begun = |machine: u8, script: &str| {
            let child = start(Path::new("/bin/sh"), &["-c".into(), script.into()], &write).unwrap();
            let (id, pidfd) = (MachineId::from_random([machine; 8]), hold(child.id()).unwrap());
            adopt(child, id.clone());
            (id, pidfd)
        };
        let wait = |pidfd: &OwnedFd| {
            let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
            let time = rustix::event::Timespec::try_from(Duration::from_secs(10)).unwrap();
            assert_eq!(
                poll(&mut fds, Some(&time)),
                Ok(1),
                "waited 10 s in vain for a child's end"
            );
        };
        let (code, signal) = ((Some(7), None), (None, Some(9)));
        for (machine, script, expected) in [
            (1, "exit 7", code),
            (2, "kill -9 $$", signal),
            (1, "kill -9 $$", signal),
        ] {
            let (id, pidfd) = begun(machine, script);
            wait(&pidfd);
            let end = ended(&id).unwrap();
            assert_eq!((end.code, end.signal), expected, "{script}");
        }
        let (id, pidfd) = begun(3, "sleep 600");
        assert_eq!(ended(&id), None, "it runs");
        rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::TERM).unwrap();
        wait(&pidfd);
        assert_eq!(ended(&id).unwrap().signal, Some(15));
        assert_eq!(ended(&MachineId::from_random([4; 8])), None, "of nobody's");
    }
}
