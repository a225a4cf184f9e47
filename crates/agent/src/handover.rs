//! Between the agent and process 1: which program is to become the image's init, and how that went.
//!
//! A line each way over a socket: `exec PATH` or `stay`; nothing but the end of the socket when the program was executed (the
//! socket closes with it), `error …` when it could not be, `ok` to `stay`.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use banger_proto::agent::GuestNetwork;
use banger_proto::error::{ApiError, ErrorCode};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// What may be the image's init, in the order of preference.
const INITS: [&str; 3] = ["/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd"];

/// What a later agent of the same boot has to know.
const STATE: &str = "/run/banger/state.json";

/// Most that it can take.
const MAX_STATE: usize = 64 * 1024;

/// How long process 1 may take to become something else.
const EXEC: Duration = Duration::from_secs(10);

/// Most that is read of an answer.
const LINE: u64 = 1024;

/// The agent's end of the socket to process 1.
pub struct Handover {
    socket: UnixStream,
}

impl Handover {
    /// Takes the agent's end.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket }
    }

    /// Has process 1 become `init`, or stay what it is.
    pub(crate) async fn become_init(mut self, init: Option<&str>) -> io::Result<()> {
        let line = match init {
            Some(path) => format!("exec {path}\n"),
            None => "stay\n".to_owned(),
        };
        self.socket.write_all(line.as_bytes()).await?;
        let mut answer = String::new();
        let mut limited = self.socket.take(LINE);
        tokio::time::timeout(EXEC, limited.read_to_string(&mut answer))
            .await
            .map_err(|_| {
                io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("process 1 did not take over within {EXEC:?}"),
                )
            })??;
        match answer.trim_end().strip_prefix("error ") {
            Some(why) => Err(io::Error::other(why.to_owned())),
            None => Ok(()),
        }
    }
}

fn is_program(path: &str) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// The image's init, if it has one.
pub(crate) fn find_init() -> Option<String> {
    INITS.into_iter().find(|path| is_program(path)).map(str::to_owned)
}

/// Checks the init that was asked for.
pub(crate) fn check_init(path: &str) -> Result<String, ApiError> {
    let fits = path.starts_with('/') && !path.contains(['\n', '\0']) && path.len() < 512;
    if !fits || !is_program(path) {
        return Err(ApiError::new(
            ErrorCode::NotFound,
            format!("the guest has no program `{path}` to be its init"),
        ));
    }
    Ok(path.to_owned())
}

/// Whether `init` is systemd, as far as its name tells.
pub(crate) fn is_systemd(init: &str) -> bool {
    let real = std::fs::canonicalize(init).unwrap_or_else(|_| Path::new(init).to_path_buf());
    real.file_name().is_some_and(|name| name == "systemd")
}

/// What is known of the machine once it is itself. Kept in `/run` for the case that the agent dies and process 1 starts
/// another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// Machine id.
    pub machine_id: String,
    /// Whether the image's init was started.
    pub init: bool,
    /// Network that was configured.
    #[serde(default)]
    pub network: Option<GuestNetwork>,
}

/// Notes who the machine is.
pub(crate) fn remember(known: &Known) {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    let mut text = serde_json::to_vec(known).unwrap_or_default();
    let open = || {
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        options.open(STATE)
    };
    let opened = open().or_else(|_| std::fs::create_dir_all("/run/banger").and_then(|()| open()));
    // In place; spaces take the rest of what was longer.
    let written = opened.and_then(|file| {
        let old = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        text.resize(text.len().max(old.min(MAX_STATE)), b' ');
        file.write_all_at(&text, 0)
    });
    if let Err(e) = written {
        crate::console::say(&format!("can't write {STATE}: {e}"));
    }
}

/// Takes the note away.
pub(crate) fn forget() {
    match std::fs::remove_file(STATE) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => crate::console::say(&format!("can't remove {STATE}: {e}")),
        _ => {}
    }
}

/// Who the machine is, when an earlier agent of this boot has personalized it.
pub fn recall() -> Option<Known> {
    serde_json::from_slice(&std::fs::read(STATE).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_the_socket_is_success() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let asked = tokio::spawn(Handover::new(ours).become_init(Some("/sbin/init")));
        let mut line = [0; 16];
        theirs.read_exact(&mut line).await.unwrap();
        assert_eq!(&line, b"exec /sbin/init\n");
        drop(theirs);
        asked.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_failed_exec_is_told() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"error no such file\n").await.unwrap();
        theirs.shutdown().await.unwrap();
        let error = Handover::new(ours).become_init(Some("/x")).await.unwrap_err();
        assert_eq!(error.to_string(), "no such file");
    }

    #[test]
    fn an_init_must_be_a_program() {
        assert!(check_init("/bin/sh").is_ok());
        assert!(check_init("bin/sh").is_err());
        assert!(check_init("/etc/passwd").is_err());
        assert!(check_init("/nope").is_err());
    }
}
