//! Services of the image that keep something of the machine's identity, in memory or in names of files.
//!
//! *journald* reads machine id and boot id once and names its directory by them. In a template it is put away: systemd keeps
//! its sockets and starts it with the copy's first message, so a copy that logs nothing pays nothing. Where it holds the output
//! of running services (those connections end with it, unless it is restarted), and in the copy of a running machine, it is
//! told to end once the copy is itself: systemd starts it again at once and hands it those connections back.
//!
//! *sshd* has read the host keys. Its hang-up signal makes it start over.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use banger_proto::error::{ApiError, ErrorCode};
use rustix::process::Pid;

use crate::console;
use crate::freezer::pids;
use crate::personalize::edit;
use crate::personalize::place::Place;
use crate::sys;

/// How long systemd may take to stop a service.
const STOP: Duration = Duration::from_secs(20);

/// How long a program that does nothing may take.
const REHEARSAL: Duration = Duration::from_secs(2);

/// One file for each connection to journald.
const STREAMS: &str = "/run/systemd/journal/streams";

/// The processes of journald.
const JOURNALD: &str = "/sys/fs/cgroup/system.slice/systemd-journald.service/cgroup.procs";

/// Where sshd notes its number.
const SSHD: &str = "/run/sshd.pid";

const TERMINATE: i32 = 15;
const HANG_UP: i32 = 1;

/// Puts away what must not be in a template of machine `id` under systemd. Tells whether journald is gone.
pub(crate) async fn put_away(id: &str) -> Result<bool, ApiError> {
    let idle = std::fs::read_dir(STREAMS).is_ok_and(|mut streams| streams.next().is_none());
    if !idle {
        return Ok(false);
    }
    // The audit socket goes with it: the news of the stop itself would start it again. It opens one of its own.
    systemctl(&["stop", "systemd-journald-audit.socket", "systemd-journald.service"]).await?;
    let Some(name) = edit::machine_id(id) else {
        return Ok(true);
    };
    for parent in ["var/log/journal", "run/log/journal"] {
        let Ok(parent) = Place::open(Path::new("/")).and_then(|root| root.below(parent)) else {
            continue;
        };
        if let Err(e) = parent.remove_flat(&name) {
            console::say(&format!("can't remove the journal of the template's machine: {e}"));
        }
    }
    Ok(true)
}

/// Runs a program that does nothing, as the first command of a copy will be run.
pub(crate) async fn rehearse() {
    let program = tokio::process::Command::new("/bin/sh")
        .args(["-c", "exec true"])
        .env("PATH", crate::session::PATH)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    // An image without a shell has copies that do it themselves.
    let _ = tokio::time::timeout(REHEARSAL, program).await;
}

async fn systemctl(args: &[&str]) -> Result<(), ApiError> {
    let failed = |why: String| ApiError::new(ErrorCode::Guest, format!("`systemctl {}`: {why}", args.join(" ")));
    let status = tokio::process::Command::new("systemctl")
        .args(args)
        .env("PATH", crate::session::PATH)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    match tokio::time::timeout(STOP, status).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(failed(status.to_string())),
        Ok(Err(e)) => Err(failed(e.to_string())),
        Err(_) => Err(failed(format!("not done within {STOP:?}"))),
    }
}

/// Has services that hold the old identity start over as soon as they run again. `no_journal`: journald is not among them.
pub(crate) fn start_over(no_journal: bool) {
    if !no_journal {
        for pid in pids(&std::fs::read_to_string(JOURNALD).unwrap_or_default()) {
            signal(pid, TERMINATE, "systemd-journald");
        }
    }
    for pid in pids(&std::fs::read_to_string(SSHD).unwrap_or_default()) {
        signal(pid, HANG_UP, "sshd");
    }
}

/// Everything is frozen, so a number that is this program's stays so.
fn signal(pid: i32, number: i32, program: &str) {
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    if exe.file_name().is_some_and(|name| name == program)
        && let Some(pid) = Pid::from_raw(pid)
        && let Err(e) = sys::kill(pid, number)
    {
        console::say(&format!("can't signal {program}: {e}"));
    }
}
