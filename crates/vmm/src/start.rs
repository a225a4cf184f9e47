//! What starting an engine has in common, whichever engine it is: its shim, its files, its end.
//!
//! The work runs as a task of its own, so that a caller who goes away in the middle leaves nothing behind: the task notices,
//! ends the engine and removes its sockets.

use std::fs::{self, DirBuilder};
use std::future::Future;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use banger_core::plan::{BootPlan, MachinePaths};
use banger_proto::shim::{ExitRecord, ShimJob, ShimReport};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStdout, Command};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::engine::{EngineError, EngineExit, Handles};
use crate::identity::{Expected, Mismatch, Process};
use crate::records::console_tail;
use crate::space;

/// How long the shim may take for what takes it some milliseconds.
const SHIM: Duration = Duration::from_secs(10);
/// How long an engine that gives up may take to be gone.
const ENDING: Duration = Duration::from_secs(3);
/// How long a killed engine may take to be gone.
pub(crate) const KILLED: Duration = Duration::from_secs(10);
/// How many lines of the console an error shows.
const LAST_LINES: usize = 12;
/// How often a socket is tried: often for as long as an engine needs that is not short of anything.
pub(crate) const DIAL: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(20)];
/// Longest report of the shim.
const REPORT: u64 = 64 << 10;
/// Longest path of a socket: 108 bytes with the one that ends it.
pub(crate) const SOCKET_PATH: usize = 107;

/// Reports of a shim.
pub(crate) type Reports = BufReader<ChildStdout>;

/// The steps of a start.
pub(crate) trait Start: Send + Sync + 'static {
    /// An engine that runs and has not answered yet.
    type Begun: Send;

    /// Prepares the files and starts the engine. An error leaves nothing behind.
    fn start(&self) -> impl Future<Output = Result<Self::Begun, EngineError>> + Send;

    /// Waits until it is the machine that was asked for.
    fn ready(&self, begun: &mut Self::Begun) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Ends it and removes what it left but its logs.
    fn undo(&self, begun: Self::Begun) -> impl Future<Output = ()> + Send;

    /// Its handles.
    fn handles(begun: &Self::Begun) -> &Handles;
}

/// Starts an engine; undoes the start if it fails or if the caller goes away.
pub(crate) async fn attended<S: Start>(engine: &'static str, work: S) -> Result<Handles, EngineError> {
    let (mut tell, told) = oneshot::channel();
    tokio::spawn(async move {
        let mut begun = match work.start().await {
            Ok(begun) => begun,
            Err(error) => {
                let _ = tell.send(Err(error));
                return;
            }
        };
        let outcome = tokio::select! {
            outcome = work.ready(&mut begun) => Some(outcome),
            () = tell.closed() => None,
        };
        match outcome {
            Some(Ok(())) => {
                if tell.send(Ok(S::handles(&begun).clone())).is_err() {
                    work.undo(begun).await;
                }
            }
            Some(Err(error)) => {
                work.undo(begun).await;
                let _ = tell.send(Err(error));
            }
            None => work.undo(begun).await,
        }
    });
    told.await.unwrap_or_else(|_| {
        Err(io_error(
            format!("start {engine}"),
            io::Error::other("the task that starts it has ended"),
        ))
    })
}

/// Makes the run directory, and removes what an earlier engine left: sockets that nobody answers on, the record of its end.
pub(crate) async fn prepare(
    engine: &'static str,
    paths: &MachinePaths,
    control: &Path,
    agent: &Path,
) -> Result<(), EngineError> {
    let run = &paths.run;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(run)
        .map_err(|e| io_error(format!("create {}", run.display()), e))?;
    let meta = fs::symlink_metadata(run).map_err(|e| io_error(format!("look at {}", run.display()), e))?;
    if !meta.is_dir() || meta.uid() != rustix::process::getuid().as_raw() || meta.mode() & 0o077 != 0 {
        return Err(unsupported(
            engine,
            format!(
                "keep its sockets in {}: it must be a directory that is this user's alone (mode 0700)",
                run.display()
            ),
        ));
    }
    for socket in [control, agent] {
        // Whoever answers is the engine of a machine that runs.
        if tokio::net::UnixStream::connect(socket).await.is_ok() {
            return Err(unsupported(
                engine,
                format!("start a machine that runs already: {} answers", socket.display()),
            ));
        }
        remove(socket).map_err(|e| io_error(format!("remove {}", socket.display()), e))?;
    }
    let record = paths.exit_record();
    remove(&record).map_err(|e| io_error(format!("remove {}", record.display()), e))
}

/// Starts a shim that starts the engine. Its first stage ends at once; what is left reports on the pipe.
pub(crate) async fn shim(
    engine: &'static str,
    binary: &Path,
    tag: &str,
    job: &ShimJob,
) -> Result<Reports, EngineError> {
    let failed = |e: io::Error| io_error(format!("start {}", binary.display()), e);
    let text = serde_json::to_vec(job).map_err(|e| failed(e.into()))?;
    let start = async {
        let mut command = Command::new(binary);
        command.args(["start", tag]).stdin(Stdio::piped());
        first_stage(command, Some(&text)).await.map_err(failed)
    };
    match timeout(SHIM, start).await {
        Ok(reports) => reports,
        Err(_) => Err(timed_out(engine, "start its shim", SHIM)),
    }
}

/// Starts a shim that keeps the output of an engine that somebody else starts. It reads the job from the pipe's first line.
pub(crate) async fn log_shim(
    engine: &'static str,
    binary: &Path,
    tag: &str,
    output: std::os::fd::OwnedFd,
) -> Result<Reports, EngineError> {
    let failed = |e: io::Error| io_error(format!("start {}", binary.display()), e);
    let start = async {
        let mut command = Command::new(binary);
        command.args(["log", tag]).stdin(Stdio::from(output));
        let mut reports = first_stage(command, None).await.map_err(failed)?;
        match report(&mut reports).await.map_err(failed)? {
            ShimReport::Reading => Ok(reports),
            ShimReport::Failed { message } => Err(io_error("keep the engine's console", io::Error::other(message))),
            _ => Err(failed(io::ErrorKind::InvalidData.into())),
        }
    };
    match timeout(SHIM, start).await {
        Ok(reports) => reports,
        Err(_) => Err(timed_out(engine, "start its shim", SHIM)),
    }
}

/// Runs the stage that ends at once.
async fn first_stage(mut command: Command, job: Option<&[u8]>) -> io::Result<Reports> {
    let mut child = command
        .env_clear()
        .current_dir("/")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // What was given to the child is the child's alone.
    drop(command);
    let Some(stdout) = child.stdout.take() else {
        return Err(io::Error::other("it has no pipes"));
    };
    // A shim that ended early says why below.
    let written = match (child.stdin.take(), job) {
        (Some(mut stdin), Some(job)) => stdin.write_all(job).await,
        _ => Ok(()),
    };
    let mut complaint = String::new();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(4096).read_to_string(&mut complaint).await;
    }
    let status = child.wait().await?;
    if !status.success() {
        return Err(io::Error::other(format!("{status}: {}", complaint.trim())));
    }
    written?;
    Ok(BufReader::new(stdout))
}

/// The shim's next report.
pub(crate) async fn report(reports: &mut Reports) -> io::Result<ShimReport> {
    let mut line = Vec::new();
    reports.take(REPORT).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "banger-shim has ended"));
    }
    Ok(serde_json::from_slice(&line)?)
}

/// The shim's last report, when the engine has ended.
pub(crate) async fn end(reports: &mut Reports) -> Option<ExitRecord> {
    match timeout(ENDING, report(reports)).await {
        Ok(Ok(ShimReport::Ended(record))) => Some(record),
        _ => None,
    }
}

/// What a report means that comes before the engine has answered.
pub(crate) fn ended_early(engine: &'static str, paths: &MachinePaths, report: io::Result<ShimReport>) -> EngineError {
    match report {
        // The shim reports the end once it has written it down.
        Ok(ShimReport::Ended(record)) => died(engine, paths, Some(&record)),
        // Without a shim nobody keeps the console: that is not the machine that was asked for.
        _ => io_error("keep the engine's console", io::Error::other("banger-shim has ended")),
    }
}

/// Hears of the engine and gets hold of it.
pub(crate) async fn hear(
    engine: &'static str,
    proc: &Path,
    paths: &MachinePaths,
    reports: &mut Reports,
) -> Result<(Process, u64), EngineError> {
    let (pid, start_time) = match timeout(SHIM, report(reports)).await {
        Ok(Ok(ShimReport::Started { pid, start_time })) => (pid, start_time),
        Ok(Ok(ShimReport::Failed { message })) => {
            let why = space::judged(&paths.state, io::Error::other(message));
            return Err(io_error("start the engine", why));
        }
        Ok(Ok(ShimReport::Ended(record))) => return Err(died(engine, paths, Some(&record))),
        Ok(Ok(ShimReport::Reading)) => {
            return Err(io_error("hear of the engine", io::ErrorKind::InvalidData.into()));
        }
        Ok(Err(e)) => return Err(io_error("hear of the engine", e)),
        // The pipe is closed with this error, and a shim that finds it closed ends its engine.
        Err(_) => return Err(timed_out(engine, "report its process", SHIM)),
    };
    let expected = Expected {
        pid,
        start_time,
        // It takes its own name a moment later.
        comm_prefix: String::new(),
    };
    match Process::open(proc, &expected) {
        Ok(process) => Ok((process, start_time)),
        Err(Mismatch::Gone(_)) => Err(died(engine, paths, end(reports).await.as_ref())),
        Err(Mismatch::Unclear(why)) => Err(EngineError::NotOurs { pid, why }),
    }
}

/// Makes sure that what a machine is to go on with can be its memory and state.
pub(crate) fn check_saved(plan: &BootPlan) -> Result<(), EngineError> {
    let Some(saved) = &plan.resume else { return Ok(()) };
    let length = |path: &Path| -> Result<u64, EngineError> {
        let meta = fs::metadata(path).map_err(|e| io_error(format!("read {}", path.display()), e))?;
        Ok(if meta.is_file() { meta.len() } else { 0 })
    };
    let bad = |path: &Path, why: String| {
        let why = io::Error::new(io::ErrorKind::InvalidData, why);
        Err(io_error(format!("go on with {}", path.display()), why))
    };
    let (memory, expected) = (length(&saved.memory)?, plan.memory_mib << 20);
    if memory != expected {
        return bad(
            &saved.memory,
            format!("it has {memory} bytes, the machine's memory {expected}"),
        );
    }
    if length(&saved.state)? == 0 {
        return bad(&saved.state, "it is empty".to_owned());
    }
    Ok(())
}

/// Kills a process and waits until it is gone.
pub(crate) async fn end_process(machine: &str, process: Process) {
    let pid = process.pid();
    if let Err(e) = process.signal(rustix::process::Signal::KILL.as_raw()) {
        tracing::warn!(machine, pid, error = %e, "cannot end an engine");
    }
    if timeout(KILLED, process.ended()).await.is_err() {
        tracing::warn!(machine, pid, "a killed engine is still there");
    }
}

/// Removes a machine's sockets.
pub(crate) fn remove_sockets(paths: &MachinePaths) {
    let events = paths.control_socket().with_file_name("events.sock");
    for socket in [paths.control_socket(), paths.agent_socket(), events] {
        if let Err(e) = remove(&socket) {
            tracing::warn!(path = %socket.display(), error = %e, "cannot remove a socket");
        }
    }
}

/// Removes a file. One that is not there is fine.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The error for an engine that ended, with its last words or else the guest's.
pub(crate) fn died(engine: &'static str, paths: &MachinePaths, record: Option<&ExitRecord>) -> EngineError {
    let how = record.map_or_else(|| "nobody saw how".to_owned(), |r| EngineExit::from(r).to_string());
    let mut last_words = record.map(|r| r.last_words.clone()).unwrap_or_default();
    let console = console_tail(paths, LAST_LINES);
    last_words.extend(console.into_iter().filter(|line| !line.starts_with("[engine] ")));
    EngineError::Died {
        engine,
        how,
        last_words,
    }
}

/// A path that fits a socket address.
pub(crate) fn socket(engine: &'static str, path: PathBuf) -> Result<PathBuf, EngineError> {
    let length = path.as_os_str().len();
    if length <= SOCKET_PATH {
        return Ok(path);
    }
    Err(unsupported(
        engine,
        format!(
            "open a socket at {}: the path has {length} bytes, {SOCKET_PATH} is the most",
            path.display()
        ),
    ))
}

pub(crate) fn timed_out(engine: &'static str, what: &'static str, after: Duration) -> EngineError {
    EngineError::Timeout { engine, what, after }
}

pub(crate) fn unsupported(engine: &'static str, what: impl Into<String>) -> EngineError {
    EngineError::Unsupported {
        engine,
        what: what.into(),
    }
}

pub(crate) fn io_error(what: impl Into<String>, source: io::Error) -> EngineError {
    EngineError::Io {
        what: what.into(),
        source,
    }
}
