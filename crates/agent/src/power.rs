//! Going down: through the image's init, or by ourselves.

use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::{Duration, Instant};

use banger_proto::agent::POWERS_OFF;
use rustix::event::{PollFd, PollFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, PidfdFlags};
use rustix::system::RebootCommand;

use crate::console::{announce, say};
use crate::{handover, sys};

/// How long programs have between the asking and the killing.
const ASKED: Duration = Duration::from_secs(5);

/// How long killed ones have to be gone.
const KILLED: Duration = Duration::from_secs(2);

/// `SIGRTMIN+4` and `SIGRTMIN+5`: systemd's own ways to be told to power off, and to restart.
const POWER_OFF: i32 = 38;
const RESTART: i32 = 39;

/// Whether this machine ends by a restart. Firecracker's has no power to cut: its engine ends when the guest resets the processor
/// through the keyboard controller, and its kernel line says so.
pub(crate) fn ends_by_restart() -> bool {
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    restarts(&line)
}

fn restarts(line: &str) -> bool {
    line.split_ascii_whitespace().any(|word| word == "reboot=k")
}

/// Has the init do it.
pub(crate) fn through_init(init: &str) {
    // Whatever the init does and however it ends, what was written before is on the disk.
    rustix::fs::sync();
    let by_restart = ends_by_restart();
    if by_restart {
        announce(POWERS_OFF);
    }
    if handover::is_systemd(init) {
        let signal = if by_restart { RESTART } else { POWER_OFF };
        match sys::kill(Pid::INIT, signal) {
            Ok(()) => return,
            Err(e) => say(&format!("can't signal the init: {e}")),
        }
    } else {
        let program = if by_restart { "reboot" } else { "poweroff" };
        match Command::new(program).env("PATH", crate::session::PATH).status() {
            Ok(status) if status.success() => return,
            Ok(status) => say(&format!("`{program}` failed: {status}")),
            Err(e) => say(&format!("can't run `{program}`: {e}")),
        }
    }
    down(true);
}

/// Does it without an init: end the programs, put the file systems in order, cut the power.
pub(crate) fn down(graceful: bool) {
    if graceful {
        let _ = sys::kill_all(15);
        // A stopped program hears nothing before it goes on.
        let _ = sys::kill_all(18);
        wait_for_programs(ASKED);
    }
    let _ = sys::kill_all(9);
    wait_for_programs(KILLED);
    off();
}

/// Syncs, takes the file systems out of use and cuts the power.
pub(crate) fn off() -> ! {
    rustix::fs::sync();
    let _ = rustix::mount::unmount("/root", UnmountFlags::empty());
    let _ = rustix::mount::mount_remount("/root", MountFlags::RDONLY, "");
    let _ = rustix::mount::mount_remount("/", MountFlags::RDONLY, "");
    let end = if ends_by_restart() {
        announce(POWERS_OFF);
        RebootCommand::Restart
    } else {
        RebootCommand::PowerOff
    };
    loop {
        if let Err(e) = rustix::system::reboot(end) {
            say(&format!("can't power off: {e}"));
            let _ = rustix::system::reboot(RebootCommand::Restart);
        }
        // A process 1 that came here must not end: that would be a panic instead.
        std::thread::park_timeout(Duration::from_secs(10));
    }
}

/// Waits until the programs that run now have ended.
fn wait_for_programs(limit: Duration) {
    let deadline = Instant::now() + limit;
    let mut waiting: Vec<OwnedFd> = programs()
        .into_iter()
        .filter_map(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok())
        .collect();
    while !waiting.is_empty() {
        let left = crate::system::left(deadline);
        if left.is_zero() {
            return;
        }
        let mut fds: Vec<PollFd<'_>> = waiting.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        let left = rustix::time::Timespec::try_from(left).ok();
        if rustix::event::poll(&mut fds, left.as_ref()).is_err() {
            return;
        }
        let ended: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ended = ended.into_iter();
        waiting.retain(|_| !ended.next().unwrap_or(true));
    }
}

/// Every process that runs a program (kernel threads have none), but this one and process 1.
fn programs() -> Vec<Pid> {
    let own = std::process::id();
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let numbers = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let runs =
        |pid: &i32| *pid != 1 && pid.cast_unsigned() != own && std::fs::read_link(format!("/proc/{pid}/exe")).is_ok();
    numbers.filter(runs).filter_map(Pid::from_raw).collect()
}

#[cfg(test)]
mod tests {
    use super::restarts;

    #[test]
    fn the_kernel_line_says_how_it_ends() {
        assert!(restarts("console=ttyS0 reboot=k pci=off"));
        assert!(!restarts("console=ttyS0 reboot=t") && !restarts(""));
    }
}
