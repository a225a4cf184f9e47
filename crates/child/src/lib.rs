//! Programs that the daemon starts for a while: `qemu` that copies a disk, `mmdebstrap`, `ssh-keygen`. Engines and shims are none of
//! them, for they outlive the daemon.
//!
//! * [`bind`]: the program gets a signal when the process that started it ends, however that ends (`PR_SET_PDEATHSIG`).
//! * Each carries a mark in its environment ([`MARK`]), which its own children inherit: the process that it works for and that one's
//!   state. What a program left behind, and what the signal did not reach, is found by it ([`workers`]).

mod sys;

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// The variable in the environment of these programs: `PID.STARTTIME:STATE`.
pub const MARK: &str = "BANGER_WORKER";

/// Most bytes of an environment that are read.
const MAX_ENVIRON: u64 = 1 << 20;

static OWNER: OnceLock<Vec<u8>> = OnceLock::new();

/// Says whose programs those of this process are: of the daemon that works on this state. The first call counts.
pub fn own(state: &Path) {
    let me = std::process::id();
    let start = start_time(Path::new("/proc"), me).unwrap_or_default();
    let mut mark = format!("{me}.{start}:").into_bytes();
    mark.extend_from_slice(state.as_os_str().as_bytes());
    let _ = OWNER.set(mark);
}

/// How a program is ended when the process that started it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It is asked, so that it can clean up after itself (`SIGTERM`).
    Asked,
    /// It is killed.
    Killed,
}

/// Binds a program to this process. To be called after everything that clears its environment, and the program to be started by a
/// thread that lives at least as long as the program: a worker of the runtime, or a thread that waits for it.
pub fn bind(command: &mut Command, end: End) -> &mut Command {
    if let Some(mark) = OWNER.get() {
        command.env(MARK, std::ffi::OsStr::from_bytes(mark));
    }
    let signal = match end {
        End::Asked => Signal::TERM,
        End::Killed => Signal::KILL,
    };
    sys::end_with_parent(command, signal);
    command
}

/// A program that carries the mark of a state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worker {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot.
    pub start_time: u64,
    /// What it is called.
    pub comm: String,
    /// The process that it was started for still runs.
    pub owned: bool,
}

/// All programs that were started for this state and can be looked at: those of this user.
pub fn workers(proc: &Path, state: &Path) -> io::Result<Vec<Worker>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(proc)? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Some((owner, owner_start)) = mark_of(proc, pid, state) else {
            continue;
        };
        let Some(start_time) = start_time(proc, pid) else {
            continue;
        };
        let comm = fs::read_to_string(proc.join(&name).join("comm")).unwrap_or_default();
        found.push(Worker {
            pid,
            start_time,
            comm: comm.trim().escape_default().to_string(),
            owned: self::start_time(proc, owner) == Some(owner_start),
        });
    }
    Ok(found)
}

/// Ends a program for good. One that has ended is fine.
pub fn end(worker: &Worker) -> io::Result<()> {
    let Some(pid) = i32::try_from(worker.pid).ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    // Opened before it is looked at, so that what was looked at is what is signalled.
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        opened => opened?,
    };
    if start_time(Path::new("/proc"), worker.pid) != Some(worker.start_time) {
        return Ok(());
    }
    match pidfd_send_signal(process, Signal::KILL) {
        Err(rustix::io::Errno::SRCH) => Ok(()),
        sent => sent.map_err(io::Error::from),
    }
}

/// The process that a program was started for, if it carries the mark of this state.
fn mark_of(proc: &Path, pid: u32, state: &Path) -> Option<(u32, u64)> {
    use io::Read;
    let mut environ = Vec::new();
    let file = fs::File::open(proc.join(pid.to_string()).join("environ")).ok()?;
    file.take(MAX_ENVIRON).read_to_end(&mut environ).ok()?;
    let marked = environ.split(|b| *b == 0).find_map(|variable| {
        let value = variable.strip_prefix(MARK.as_bytes())?;
        value.strip_prefix(b"=")
    })?;
    let colon = marked.iter().position(|b| *b == b':')?;
    let (owner, of) = (marked.get(..colon)?, marked.get(colon + 1..)?);
    if of != state.as_os_str().as_bytes() {
        return None;
    }
    let (pid, start) = std::str::from_utf8(owner).ok()?.split_once('.')?;
    Some((pid.parse().ok()?, start.parse().ok()?))
}

/// Start time of a process that has not ended (field 22 of `/proc/PID/stat`).
fn start_time(proc: &Path, pid: u32) -> Option<u64> {
    let text = fs::read(proc.join(pid.to_string()).join("stat")).ok()?;
    let text = String::from_utf8_lossy(&text);
    // The name may contain anything; the fields begin behind its last parenthesis.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let ended = matches!(fields.next()?, "Z" | "X");
    (!ended).then_some(())?;
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    use super::*;

    fn until(what: &str, mut condition: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < end, "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_program_ends_with_the_thread_that_started_it() {
        let (tell, told) = std::sync::mpsc::channel();
        let starter = std::thread::spawn(move || {
            let mut command = Command::new("sleep");
            command.arg("600").stdin(Stdio::null());
            let child = bind(&mut command, End::Killed).spawn().unwrap();
            let pid = child.id();
            tell.send(child).unwrap();
            std::thread::sleep(Duration::from_millis(200));
            assert!(
                start_time(Path::new("/proc"), pid).is_some(),
                "it lives as long as its starter"
            );
        });
        let mut child = told.recv().unwrap();
        starter.join().unwrap();
        until("the program to end", || {
            start_time(Path::new("/proc"), child.id()).is_none()
        });
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }

    #[test]
    fn what_was_left_behind_is_found_by_its_mark_and_ended() {
        let state = Path::new("/nowhere/banger-child-test");
        let me = std::process::id();
        let start = start_time(Path::new("/proc"), me).unwrap();
        let run = |mark: String| {
            let mut command = Command::new("sleep");
            command.arg("600").env(MARK, mark).stdin(Stdio::null());
            command.spawn().unwrap()
        };
        let mut owned = run(format!("{me}.{start}:{}", state.display()));
        let mut left = run(format!("{me}.{}:{}", start + 1, state.display()));
        let mut foreign = run(format!("{me}.{start}:{}x", state.display()));
        let seen = || workers(Path::new("/proc"), state).unwrap();
        until("both to be seen", || seen().len() == 2);
        for worker in seen() {
            assert_eq!(worker.owned, worker.pid == owned.id(), "{worker:?}");
            assert_eq!(worker.comm, "sleep");
            if !worker.owned {
                end(&worker).unwrap();
            }
        }
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(left.wait().unwrap().signal(), Some(9));
        assert!(seen().iter().all(|worker| worker.owned));
        for child in [&mut owned, &mut foreign] {
            assert!(child.try_wait().unwrap().is_none());
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
