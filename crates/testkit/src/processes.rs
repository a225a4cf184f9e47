//! Looking through `/proc`.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// A process as it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its start time in clock ticks since boot; with the id it names one process for ever.
    pub start: u64,
    /// Name of its program, cut at 15 bytes by the kernel.
    pub name: String,
    /// Its arguments, joined by spaces.
    pub command: String,
    /// Base name of the file it was started from; programs change their names.
    pub program: String,
}

/// Reads one process, `None` when it is gone or a zombie.
pub fn read(pid: i32) -> Option<Process> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may itself hold parentheses and spaces.
    let (head, tail) = stat.rsplit_once(')')?;
    let name = head.split_once('(')?.1.to_owned();
    let mut fields = tail.split_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    let start = fields.nth(18)?.parse().ok()?;
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let command = String::from_utf8_lossy(&command).replace('\0', " ").trim().to_owned();
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let program = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Some(Process {
        pid,
        start,
        name,
        command,
        program,
    })
}

/// Every process.
pub fn all() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter_map(read)
        .collect()
}

/// Every process but this one that has to do with one of the directories: by its command line, its environment or its
/// working directory.
pub fn naming(directories: &[&Path]) -> Vec<Process> {
    let me = std::process::id().cast_signed();
    let names = |pid: i32| {
        let cwd = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        directories.iter().any(|d| {
            let d = d.as_os_str().as_bytes();
            cwd.starts_with(Path::new(std::ffi::OsStr::from_bytes(d)))
                || contains(&command, d)
                || contains(&environment, d)
        })
    };
    all().into_iter().filter(|p| p.pid != me && names(p.pid)).collect()
}

/// Whether one text is in the other.
pub fn contains(text: &[u8], part: &[u8]) -> bool {
    !part.is_empty() && text.windows(part.len()).any(|w| w == part)
}

/// Whether this very process still runs.
pub fn alive(process: &Process) -> bool {
    read(process.pid).is_some_and(|p| p.start == process.start)
}

/// Sends a signal to this very process, if it still runs.
pub fn signal(process: &Process, signal: Signal) {
    if alive(process)
        && let Some(pid) = Pid::from_raw(process.pid)
    {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Kills a process and waits until it is gone.
pub fn kill(process: &Process) {
    signal(process, Signal::KILL);
    until(
        &format!("process {} ({}) to be gone", process.pid, process.name),
        Duration::from_secs(10),
        || !alive(process),
    );
}

/// Waits for a condition; fails naming what it waited for when the time is over.
pub fn until(what: &str, time: Duration, mut condition: impl FnMut() -> bool) {
    assert!(
        reached(time, &mut condition),
        "waited {} s in vain for {what}",
        time.as_secs_f32()
    );
}

/// Waits for a condition; says whether it came to be in time.
pub fn reached(time: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + time;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Resident memory of a process in bytes.
pub fn resident(pid: i32) -> Option<u64> {
    memory(pid, "VmRSS:")
}

/// A line of `/proc/PID/status` that counts kB, in bytes.
fn memory(pid: i32, key: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = status.lines().find_map(|l| l.strip_prefix(key))?;
    Some(kib.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_found_by_what_it_names_and_gone_when_killed() {
        let dir = Path::new("/nonexistent/testkit-processes");
        let mut child = Command::new("sleep").arg("60").env("X", dir).spawn().unwrap();
        // Between fork and exec the child still has this process's face.
        until("the child's exec", Duration::from_secs(5), || naming(&[dir]).len() == 1);
        let found = naming(&[dir]).remove(0);
        assert_eq!((found.pid, found.name.as_str()), (child.id().cast_signed(), "sleep"));
        signal(&found, Signal::KILL);
        child.wait().unwrap();
        assert!(!alive(&found) && naming(&[dir]).is_empty());
    }

    #[test]
    fn another_start_time_is_another_process() {
        let me = read(std::process::id().cast_signed()).unwrap();
        assert!(alive(&me));
        assert!(!alive(&Process {
            start: me.start + 1,
            ..me
        }));
    }
}
