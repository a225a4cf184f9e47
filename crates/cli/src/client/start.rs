//! Starting the daemon when none answers.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use banger_system::install::Layout;
use banger_system::units;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

use crate::client::detach;
use crate::error::{Error, Kind, Result, reason};

/// How long a daemon may take until it listens.
pub(crate) const START_DEADLINE: Duration = Duration::from_secs(10);

/// Exit status of a daemon that finds another one at work.
const ALREADY_RUNNING: i32 = 11;

/// Status of a daemon that cannot use its configuration.
const WRONG_CONFIGURATION: i32 = 2;

/// Most that is kept of what a failing daemon says.
const MAX_WORDS: usize = 16 * 1024;

/// How a start ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Started {
    /// It listens.
    Ready,
    /// Another one is there or coming up.
    AlreadyRunning,
}

/// The daemon's program: beside ours, else on the search path.
pub(crate) fn program() -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(|dir| dir.join("bangerd")))
        .filter(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from("bangerd"))
}

/// Whether systemd has the installed daemon up, or is bringing it up or down. Only for that of the host itself: a test's installation is
/// not systemd's.
pub(crate) async fn unit_is_coming(socket: &Path) -> bool {
    if socket != Layout::default().socket() {
        return false;
    }
    let asked = tokio::process::Command::new("systemctl")
        .args(["show", "--property=ActiveState,Job", units::DAEMON])
        .stdin(Stdio::null())
        .output()
        .await;
    asked.is_ok_and(|output| is_coming(&String::from_utf8_lossy(&output.stdout)))
}

/// The same, from what `systemctl show` says. A unit that has ended by itself waits as `activating` (`auto-restart`), then as `inactive` or
/// `failed` with a job, for as long as what it starts after (the helper, which may have ended as well) is not up.
fn is_coming(shown: &str) -> bool {
    let value = |key: &str| shown.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let state = value("ActiveState").unwrap_or_default();
    let job = value("Job").is_some_and(|job| !matches!(job, "" | "0"));
    job || matches!(
        state,
        "active" | "activating" | "deactivating" | "reloading" | "refreshing" | "maintenance"
    )
}

/// Starts the daemon detached and waits until it says that it is ready.
pub(crate) async fn start(program: &Path) -> Result<Started> {
    let mut command = Command::new(program);
    command
        .args(["--ready-fd", "1"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = detach::in_new_session(&mut command).spawn().map_err(|e| {
        Error::unavailable(format!(
            "cannot start the daemon `{}`: {}",
            program.display(),
            reason(&e)
        ))
        .hint("install `bangerd` beside `banger` or on the search path")
    })?;
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(Error::unavailable("the daemon was started without pipes"));
    };
    let (mut ready, mut words) = (receiver(stdout.into())?, receiver(stderr.into())?);
    let mut first = Vec::new();
    let listening = async {
        let mut buffer = [0; 256];
        while first.len() < 4096 {
            match ready.read(&mut buffer).await {
                Ok(0) | Err(_) => return false,
                Ok(n) => first.extend_from_slice(&buffer[..n]),
            }
            if let Some(end) = first.iter().position(|&b| b == b'\n') {
                return first[..end].trim_ascii() == b"ready";
            }
        }
        false
    };
    match tokio::time::timeout(START_DEADLINE, listening).await {
        Ok(true) => {
            // Nobody waits for it from here on; reaping it keeps a long session from holding a dead entry.
            std::thread::spawn(move || child.wait());
            return Ok(Started::Ready);
        }
        Ok(false) => {}
        Err(_) => {
            std::thread::spawn(move || child.wait());
            return Err(Error::new(
                Kind::Timeout,
                format!(
                    "waited {} s for the daemon to say it is ready",
                    START_DEADLINE.as_secs()
                ),
            )
            .hint("see `banger daemon logs`"));
        }
    }
    let mut said = Vec::new();
    let all = async {
        let mut limited = (&mut words).take(MAX_WORDS as u64);
        limited.read_to_end(&mut said).await
    };
    let _ = tokio::time::timeout(Duration::from_secs(1), all).await;
    let status = tokio::task::spawn_blocking(move || child.wait());
    let status = match tokio::time::timeout(Duration::from_secs(2), status).await {
        Ok(Ok(Ok(status))) => status,
        _ => {
            return Err(Error::unavailable(
                "the daemon closed its pipe without saying that it is ready",
            ));
        }
    };
    if status.code() == Some(ALREADY_RUNNING) {
        return Ok(Started::AlreadyRunning);
    }
    first.extend_from_slice(&said);
    let mut error = last_words(&String::from_utf8_lossy(&first), &status.to_string());
    if status.code() == Some(WRONG_CONFIGURATION) {
        error.kind = Kind::Invalid;
    }
    if status.code() == Some(i32::from(Kind::NoSpace.status())) {
        error.kind = Kind::NoSpace;
    }
    Err(error)
}

/// The error of a daemon that could not start: its own first line as the message, the rest below.
fn last_words(said: &str, status: &str) -> Error {
    let mut lines = said.lines().map(str::trim_end).filter(|l| !l.is_empty());
    let Some(first) = lines.next() else {
        return Error::unavailable(format!("the daemon did not start ({status}) and said nothing"));
    };
    let first = first.strip_prefix("error: ").unwrap_or(first);
    let (mut details, mut hint) = (Vec::new(), None);
    for line in lines.take(20) {
        match line.strip_prefix("hint: ") {
            Some(text) if hint.is_none() => hint = Some(text.to_owned()),
            _ => details.push(line.trim_start().to_owned()),
        }
    }
    let mut error = Error::unavailable(format!("the daemon did not start: {first}")).details(details);
    error.hint = hint;
    error
}

fn receiver(fd: OwnedFd) -> Result<Receiver> {
    Receiver::from_owned_fd(fd)
        .map_err(|e| Error::unavailable(format!("cannot read the daemon's pipe: {}", reason(&e))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A script, written by another process: open for writing here, it could be so in a child of a test beside us as well, and
    /// then cannot be run.
    fn script(dir: &Path, body: &str) -> PathBuf {
        let path = dir.join("bangerd");
        let made = Command::new("sh")
            .args([
                "-ec",
                "printf '#!/bin/sh\n%s\n' \"$1\" > \"$2\"; chmod +x \"$2\"",
                "sh",
                body,
            ])
            .arg(&path)
            .status();
        assert!(made.unwrap().success());
        path
    }

    async fn outcome(body: &str) -> Result<Started> {
        let dir = tempfile::tempdir().unwrap();
        start(&script(dir.path(), body)).await
    }

    #[test]
    fn a_unit_with_a_job_is_coming() {
        for coming in [
            "ActiveState=active\n",
            "ActiveState=activating\nJob=17\n",
            // Auto-restart has no job yet.
            "ActiveState=activating\n",
            "ActiveState=inactive\nJob=17\n",
            "Job=17\nActiveState=failed\n",
            "ActiveState=deactivating\n",
        ] {
            assert!(is_coming(coming), "{coming}");
        }
        for not in [
            "ActiveState=inactive\n",
            "ActiveState=failed\nJob=0\n",
            "ActiveState=inactive\nJob=\n",
            "",
        ] {
            assert!(!is_coming(not), "{not}");
        }
    }

    #[tokio::test]
    async fn ready_and_already_running_are_good() {
        assert_eq!(
            outcome("[ \"$1 $2\" = '--ready-fd 1' ] && echo ready").await.unwrap(),
            Started::Ready
        );
        assert_eq!(outcome("exit 11").await.unwrap(), Started::AlreadyRunning);
    }

    #[tokio::test]
    async fn a_failing_daemon_is_quoted() {
        let error = outcome("printf 'error: config.toml:3: unknown key\\n  x = 1\\nhint: remove it\\n' >&2; exit 1")
            .await
            .unwrap_err();
        assert_eq!(error.kind, Kind::Unavailable);
        assert_eq!(error.message, "the daemon did not start: config.toml:3: unknown key");
        assert_eq!(error.details, ["x = 1"]);
        assert_eq!(error.hint.as_deref(), Some("remove it"));
        let error = outcome("exit 3").await.unwrap_err();
        assert!(error.message.contains("said nothing"), "{error}");
        let error = outcome("printf 'error: no space\\n' >&2; exit 8").await.unwrap_err();
        assert_eq!(error.kind, Kind::NoSpace);
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let error = start(Path::new("/nonexistent/bangerd")).await.unwrap_err();
        assert!(error.message.contains("/nonexistent/bangerd"), "{error}");
    }

    #[tokio::test]
    async fn the_daemon_leads_a_session_of_its_own() {
        // Fields 1 and 6 of stat are the process and its session.
        let body = "read pid _ _ _ _ session _ < /proc/self/stat; [ $$ = $session ] && echo ready";
        assert_eq!(outcome(body).await.unwrap(), Started::Ready);
    }
}
