//! A disk's content in one file: a QEMU without a machine reads the chain and writes what it reads.
//!
//! It is confined as any other, is spoken to over its standard input and output, and ends with the future that it works for.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use banger_child::End;
use banger_core::plan::Disk;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, Command};
use tokio::time::{Instant, sleep, timeout};

use super::args::{SANDBOX, text};
use super::block::{self, Access};
use super::{ENGINE, Qemu, io_error};
use crate::engine::{EngineError, EngineExit};
use crate::qmp::{Client, QmpError};
use crate::space;

/// How long a command may take. Opening a disk that is on a slow one does take a while.
const STEP: Duration = Duration::from_secs(30);
/// How long it may go without having copied anything.
const STUCK: Duration = Duration::from_secs(120);
/// How long it may take to be gone once it has been told to end.
const ENDING: Duration = Duration::from_secs(5);
/// How often it is asked how far it is: soon at first, for most disks are small.
const ASK: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(100)];
/// The command that copies, and its name for what it does.
const COPY: &str = "blockdev-mirror";
const JOB: &str = "flatten";
/// The most that is kept of what it says.
const WORDS: u64 = 16 << 10;

/// Copies a disk to a new raw and sparse file.
pub(super) async fn flatten(qemu: &Qemu, disk: &Disk, target: &Path) -> Result<(), EngineError> {
    let nodes = block::nodes(disk, Access::Read)?;
    let mut unfinished = Unfinished(None);
    let mut engine = Engine::start(qemu, &nodes)?;
    let outcome = copy(&mut engine, disk, target, &mut unfinished).await;
    match outcome {
        Ok(()) => {
            unfinished.0 = None;
            Ok(())
        }
        Err(fault) => {
            // Half a disk may be what fills it: asked before that goes.
            let full = target.parent().is_some_and(space::is_full);
            match engine.error(fault).await {
                EngineError::Io { what, source } if space::says_full(&source) => Err(io_error(what, source)),
                error if full => {
                    let why = io::Error::new(io::ErrorKind::StorageFull, error);
                    Err(io_error(format!("write {}", target.display()), why))
                }
                error => Err(error),
            }
        }
    }
}

/// A file that goes unless all of it was written.
struct Unfinished(Option<PathBuf>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(path) = self.0.take()
            && let Err(e) = fs::remove_file(&path)
        {
            tracing::warn!(path = %path.display(), error = %e, "cannot remove half a disk");
        }
    }
}

enum Fault {
    Qmp(QmpError),
    Other(EngineError),
}

impl From<QmpError> for Fault {
    fn from(error: QmpError) -> Self {
        Self::Qmp(error)
    }
}

async fn copy(engine: &mut Engine, disk: &Disk, target: &Path, unfinished: &mut Unfinished) -> Result<(), Fault> {
    #[derive(Deserialize)]
    struct Node {
        #[serde(rename = "node-name")]
        name: Option<String>,
        image: Image,
    }
    #[derive(Deserialize)]
    struct Image {
        #[serde(rename = "virtual-size")]
        size: u64,
    }
    let source = disk.serial.serial();
    let stream = engine.stream.take().ok_or(QmpError::Closed("greeting"))?;
    let mut client = Client::over(stream, STEP).await?;
    let nodes: Vec<Node> = client
        .execute("query-named-block-nodes", Some(json!({ "flat": true })))
        .await?;
    let size = nodes
        .iter()
        .find(|n| n.name.as_deref() == Some(source))
        .map(|n| n.image.size);
    let size = size.ok_or_else(|| QmpError::Protocol("the disk has no size".to_owned()))?;
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(target)
        .map_err(|e| Fault::Other(io_error(format!("make {}", target.display()), e)))?;
    unfinished.0 = Some(target.to_owned());
    made.set_len(size)
        .map_err(|e| Fault::Other(io_error(format!("write {}", target.display()), e)))?;
    drop(made);
    // Zeros stay holes, whether the source knows that they are zeros or they are only found to be.
    let node = json!({
        "node-name": "target", "driver": "raw", "discard": "unmap", "detect-zeroes": "unmap",
        "file": { "driver": "file", "filename": text(target).map_err(Fault::Other)?, "discard": "unmap" },
    });
    client.execute::<Value>("blockdev-add", Some(node)).await?;
    // A backup would allocate what is zero.
    let job = json!({
        "job-id": JOB, "device": source, "target": "target", "sync": "full", "auto-dismiss": false,
    });
    client.execute::<Value>(COPY, Some(job)).await?;
    wait(&mut client).await?;
    // It closes the file, and what that has to say comes with the exit status.
    client.extend(STEP);
    client.execute::<Value>("quit", None).await?;
    let status = timeout(STEP, engine.child.wait()).await;
    match status {
        Ok(Ok(status)) if status.success() => Ok(()),
        _ => Err(Fault::Qmp(QmpError::Closed("the end"))),
    }
}

/// Waits until everything has been copied.
async fn wait(client: &mut Client) -> Result<(), Fault> {
    #[derive(Deserialize)]
    struct Job {
        status: String,
        #[serde(rename = "current-progress")]
        progress: u64,
        error: Option<String>,
    }
    let (mut seen, mut since, mut pause) = (None, Instant::now(), ASK[0]);
    let mut told = false;
    loop {
        client.extend(STEP);
        let jobs: Vec<Job> = client.execute("query-jobs", None).await?;
        let Some(job) = jobs.into_iter().next() else {
            return Err(QmpError::Protocol("the copying has vanished".to_owned()).into());
        };
        match (job.status.as_str(), job.error) {
            (_, Some(message)) => {
                let command = COPY.to_owned();
                return Err(QmpError::Refused { command, message }.into());
            }
            ("concluded", None) => return Ok(()),
            // A mirror that has caught up goes on mirroring; ended now, it leaves a complete copy.
            ("ready", None) if !told => {
                told = true;
                client
                    .execute::<Value>("block-job-cancel", Some(json!({ "device": JOB })))
                    .await?;
            }
            _ => {}
        }
        if seen != Some(job.progress) {
            (seen, since) = (Some(job.progress), Instant::now());
        } else if since.elapsed() > STUCK {
            return Err(Fault::Other(EngineError::Timeout {
                engine: ENGINE,
                what: "copy any more of a disk",
                after: STUCK,
            }));
        }
        sleep(pause).await;
        pause = (pause * 2).min(ASK[1]);
    }
}

/// The process that copies. It ends when this is dropped.
struct Engine {
    child: Child,
    stream: Option<UnixStream>,
    words: Option<ChildStderr>,
}

impl Engine {
    fn start(qemu: &Qemu, nodes: &[Value]) -> Result<Self, EngineError> {
        let failed = |e: io::Error| io_error(format!("start {}", qemu.binary.display()), e);
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let output = OwnedFd::from(theirs.try_clone().map_err(failed)?);
        // By way of the shim, which gives up what root has more than others.
        let mut command = Command::new(&qemu.options.shim);
        command
            .arg("exec")
            .arg(&qemu.binary)
            .args([
                "-machine",
                "none",
                "-S",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
            ])
            .args(["-sandbox", SANDBOX])
            .args([
                "-chardev",
                "stdio,id=control,signal=off",
                "-mon",
                "chardev=control,mode=control",
            ]);
        for node in nodes {
            command.args(["-blockdev", &node.to_string()]);
        }
        command
            .env_clear()
            .current_dir("/")
            .stdin(OwnedFd::from(theirs))
            .stdout(output)
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        // It copies for this daemon alone.
        banger_child::bind(command.as_std_mut(), End::Killed);
        let mut child = command.spawn().map_err(failed)?;
        Ok(Self {
            words: child.stderr.take(),
            stream: Some(UnixStream::from_std(ours).map_err(failed)?),
            child,
        })
    }

    /// What went wrong, with what it says of it.
    async fn error(mut self, fault: Fault) -> EngineError {
        let error = match fault {
            Fault::Other(error) => return error,
            Fault::Qmp(error) => error,
        };
        match error {
            QmpError::Refused { command, message } => EngineError::Refused {
                engine: ENGINE,
                command,
                message,
            },
            QmpError::Timeout(_) => EngineError::Timeout {
                engine: ENGINE,
                what: "answer while it copied a disk",
                after: STEP,
            },
            // It has ended, or is made to.
            other => {
                let status = match timeout(ENDING, self.child.wait()).await {
                    Ok(Ok(status)) => status,
                    _ => return io_error("copy a disk", io::Error::other(other)),
                };
                let mut words = Vec::new();
                if let Some(stderr) = self.words.take() {
                    let _ = timeout(ENDING, stderr.take(WORDS).read_to_end(&mut words)).await;
                }
                EngineError::Died {
                    engine: ENGINE,
                    how: exit(status).to_string(),
                    last_words: String::from_utf8_lossy(&words).lines().map(str::to_owned).collect(),
                }
            }
        }
    }
}

fn exit(status: ExitStatus) -> EngineExit {
    use std::os::unix::process::ExitStatusExt;
    EngineExit {
        code: status.code(),
        signal: status.signal(),
    }
}
