//! Process 1 after the disks are mounted: it starts the agent, waits to be told what to become, and becomes that; or stays
//! and reaps.
//!
//! The agent is a second process of the same program (by `/proc/self/exe`, since the initramfs is no longer reachable by
//! path) whose name begins with `@`: systemd's last killing spree spares such processes, as it does those of an initramfs.

use std::convert::Infallible;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitOptions};

use crate::console::say;
use crate::system::NOTIFY_SOCKET;

/// How the agent is called.
const NAME: &str = "@banger-agent";

/// The word that makes the program be the agent.
pub const SERVE: &str = "serve";

/// An agent that lives shorter than this has failed; after [`MAX_FAILURES`] of them the machine goes down.
const SHORT: Duration = Duration::from_secs(5);
const MAX_FAILURES: u32 = 5;

/// Starts the agent and stays with it. Comes back only when there is no way to go on, with the reason.
pub(crate) fn run() -> String {
    let mut failures = 0;
    let mut told = false;
    loop {
        let begun = Instant::now();
        let (agent, socket) = match start_agent() {
            Ok(started) => started,
            Err(e) => return format!("can't start the agent: {e}"),
        };
        if !told {
            told = obey(socket);
        }
        reap_until(agent);
        say("the agent has ended; starting another");
        failures = if begun.elapsed() < SHORT { failures + 1 } else { 0 };
        if failures >= MAX_FAILURES {
            return "the agent ends again and again".to_owned();
        }
    }
}

/// Whether process 1 is this program still.
pub(crate) fn is_ours() -> bool {
    use std::os::unix::fs::MetadataExt;
    let file = |path| std::fs::metadata(path).map(|m| (m.dev(), m.ino()));
    matches!((file("/proc/1/exe"), file("/proc/self/exe")), (Ok(one), Ok(own)) if one == own)
}

fn start_agent() -> std::io::Result<(Pid, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let child = Command::new("/proc/self/exe")
        .arg0(NAME)
        .arg(SERVE)
        .stdin(OwnedFd::from(theirs))
        .spawn()?;
    let pid = Pid::from_raw(child.id().cast_signed()).ok_or(std::io::ErrorKind::InvalidData)?;
    Ok((pid, ours))
}

/// Waits for the agent's word. True when it said to stay, or could not be obeyed; false when the agent has gone without one.
fn obey(socket: UnixStream) -> bool {
    let mut reader = BufReader::new(&socket);
    let mut line = String::new();
    let Ok(1..) = reader.read_line(&mut line) else {
        return false;
    };
    let answer = match line.trim_end().strip_prefix("exec ") {
        Some(init) => {
            let Err(e) = become_init(init);
            say(&format!("can't execute {init}: {e}"));
            format!("error {e}\n")
        }
        None => "ok\n".to_owned(),
    };
    let _ = (&socket).write_all(answer.as_bytes());
    true
}

fn become_init(init: &str) -> Result<Infallible, std::io::Error> {
    // What the kernel did not understand of its command line is meant for the image's init.
    let args = std::env::args_os().skip(1);
    Err(Command::new(init).args(args).env("NOTIFY_SOCKET", NOTIFY_SOCKET).exec())
}

/// Reaps whatever ends, until that is the agent.
fn reap_until(agent: Pid) {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, _))) if pid == agent => return,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}
