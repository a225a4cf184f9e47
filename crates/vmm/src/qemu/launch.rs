//! Starting QEMU, detached, and undoing a start that failed.
//!
//! The work runs as a task of its own, so that a caller who goes away in the middle leaves nothing behind: the task notices,
//! ends the engine and removes its sockets.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use banger_core::plan::{BootPlan, Saved};
use banger_proto::shim::{ExitRecord, ShimJob, ShimReport};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStdout, Command};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::args::{self, Setup, unsupported};
use super::{ENGINE, Qemu, find, io_error};
use crate::engine::{EngineError, EngineExit, Handles};
use crate::host;
use crate::identity::{Expected, Mismatch, Process};
use crate::qmp::{Client, QmpError};
use crate::records::{CONSOLE_LIMIT, console_tail};

/// How long the shim may take for what takes it some milliseconds.
const SHIM: Duration = Duration::from_secs(10);
/// How long an engine that gives up may take to be gone.
const ENDING: Duration = Duration::from_secs(3);
/// How long a killed engine may take to be gone.
const KILLED: Duration = Duration::from_secs(10);
/// How many lines of the console an error shows.
const LAST_LINES: usize = 12;
/// How often the control socket is tried: often for as long as an engine needs that is not short of anything.
const DIAL: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(20)];
/// How often a loading engine is asked whether it is done.
const LOADING: Duration = Duration::from_millis(1);
/// Name of the descriptor with the state.
const STATE: &str = "state";
/// The command that loads it.
const INCOMING: &str = "migrate-incoming";
/// Longest report of the shim.
const REPORT: u64 = 64 << 10;

/// Starts a machine.
pub(super) async fn launch(qemu: &Qemu, plan: &BootPlan) -> Result<Handles, EngineError> {
    let (qemu, plan) = (qemu.clone(), plan.clone());
    let (mut tell, told) = oneshot::channel();
    tokio::spawn(async move {
        let mut engine = match start(&qemu, &plan).await {
            Ok(engine) => engine,
            Err(error) => {
                let _ = tell.send(Err(error));
                return;
            }
        };
        let outcome = tokio::select! {
            outcome = ready(&qemu, &plan, &mut engine) => Some(outcome),
            () = tell.closed() => None,
        };
        match outcome {
            Some(Ok(())) => {
                if tell.send(Ok(engine.handles.clone())).is_err() {
                    undo(&plan, engine).await;
                }
            }
            Some(Err(error)) => {
                undo(&plan, engine).await;
                let _ = tell.send(Err(error));
            }
            None => undo(&plan, engine).await,
        }
    });
    told.await.unwrap_or_else(|_| {
        Err(io_error(
            "start the engine",
            io::Error::other("the task that starts it has ended"),
        ))
    })
}

/// An engine that runs and has not answered yet.
struct Engine {
    handles: Handles,
    process: Process,
    reports: BufReader<ChildStdout>,
}

/// Prepares the files, starts the shim and hears of the engine. An error leaves nothing behind.
async fn start(qemu: &Qemu, plan: &BootPlan) -> Result<Engine, EngineError> {
    let boot_id = host::boot_id(&qemu.options.roots.proc)
        .map_err(|why| io_error("tell this boot of the host", io::Error::other(why)))?;
    let control = args::socket(plan.paths.control_socket())?;
    let agent = args::socket(plan.paths.agent_socket())?;
    check_saved(plan)?;
    let line = args::args(plan, &Setup { qboot: qemu.qboot })?;
    prepare(plan, &control, &agent).await?;
    let job = ShimJob {
        engine: qemu.binary.clone(),
        args: line,
        console_log: plan.paths.console_log(),
        log_limit: CONSOLE_LIMIT,
        exit_record: plan.paths.exit_record(),
    };
    let mut reports = match timeout(SHIM, shim(&qemu.options.shim, &args::guest_name(&plan.id), &job)).await {
        Ok(started) => started?,
        Err(_) => return Err(timed_out("start its shim", SHIM)),
    };
    let outcome = hear(qemu, plan, &mut reports).await;
    match outcome {
        Ok((process, start_time)) => Ok(Engine {
            handles: Handles {
                engine: ENGINE.to_owned(),
                pid: process.pid(),
                start_time,
                host_boot_id: boot_id,
                control,
                agent,
            },
            process,
            reports,
        }),
        Err(error) => {
            // Before a shim reports an engine nobody else knows of it. Should the shim have been killed in between, the engine
            // is found by what it was started with.
            drop(reports);
            sweep(qemu, plan).await;
            Err(error)
        }
    }
}

/// Hears of the engine and gets hold of it.
async fn hear(
    qemu: &Qemu,
    plan: &BootPlan,
    reports: &mut BufReader<ChildStdout>,
) -> Result<(Process, u64), EngineError> {
    let (pid, start_time) = match timeout(SHIM, report(reports)).await {
        Ok(Ok(ShimReport::Started { pid, start_time })) => (pid, start_time),
        Ok(Ok(ShimReport::Failed { message })) => {
            return Err(io_error("start the engine", io::Error::other(message)));
        }
        Ok(Ok(ShimReport::Ended(record))) => return Err(died(plan, Some(&record))),
        Ok(Err(e)) => return Err(io_error("hear of the engine", e)),
        // The pipe is closed with this error, and a shim that finds it closed ends its engine.
        Err(_) => return Err(timed_out("report its process", SHIM)),
    };
    let expected = Expected {
        pid,
        start_time,
        // It takes its own name a moment later.
        comm_prefix: String::new(),
    };
    match Process::open(&qemu.options.roots.proc, &expected) {
        Ok(process) => Ok((process, start_time)),
        Err(Mismatch::Gone(_)) => Err(died(plan, end(reports).await.as_ref())),
        Err(Mismatch::Unclear(why)) => Err(EngineError::NotOurs { pid, why }),
    }
}

/// Ends an engine that was started for this machine and that nobody heard of.
async fn sweep(qemu: &Qemu, plan: &BootPlan) {
    let proc = &qemu.options.roots.proc;
    if let Ok(Some(handles)) = find::search(proc, &plan.id, &plan.paths)
        && let Ok(process) = find::open(proc, &handles)
    {
        end_process(plan, process).await;
    }
    remove_sockets(plan);
}

/// Makes the run directory, and removes what an earlier engine left: sockets that nobody answers on, the record of its end.
async fn prepare(plan: &BootPlan, control: &Path, agent: &Path) -> Result<(), EngineError> {
    let run = &plan.paths.run;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(run)
        .map_err(|e| io_error(format!("create {}", run.display()), e))?;
    let meta = fs::symlink_metadata(run).map_err(|e| io_error(format!("look at {}", run.display()), e))?;
    if !meta.is_dir() || meta.uid() != rustix::process::getuid().as_raw() || meta.mode() & 0o077 != 0 {
        return Err(unsupported(&format!(
            "keep its sockets in {}: it must be a directory that is this user's alone (mode 0700)",
            run.display()
        )));
    }
    for socket in [control, agent] {
        // Whoever answers is the engine of a machine that runs.
        if tokio::net::UnixStream::connect(socket).await.is_ok() {
            return Err(unsupported(&format!(
                "start a machine that runs already: {} answers",
                socket.display()
            )));
        }
        remove(socket).map_err(|e| io_error(format!("remove {}", socket.display()), e))?;
    }
    let record = plan.paths.exit_record();
    remove(&record).map_err(|e| io_error(format!("remove {}", record.display()), e))
}

/// Starts the shim. Its first stage ends at once; what is left reports on the pipe.
async fn shim(binary: &Path, tag: &str, job: &ShimJob) -> Result<BufReader<ChildStdout>, EngineError> {
    let failed = |e: io::Error| io_error(format!("start {}", binary.display()), e);
    let text = serde_json::to_vec(job).map_err(|e| failed(e.into()))?;
    let mut child = Command::new(binary)
        .args(["start", tag])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let (Some(mut stdin), Some(stdout)) = (stdin, stdout) else {
        return Err(failed(io::Error::other("it has no pipes")));
    };
    // A shim that ended early says why below.
    let written = stdin.write_all(&text).await;
    drop(stdin);
    let mut complaint = String::new();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(4096).read_to_string(&mut complaint).await;
    }
    let status = child.wait().await.map_err(failed)?;
    if !status.success() {
        return Err(failed(io::Error::other(format!("{status}: {}", complaint.trim()))));
    }
    written.map_err(failed)?;
    Ok(BufReader::new(stdout))
}

/// The shim's next report.
async fn report(reports: &mut BufReader<ChildStdout>) -> io::Result<ShimReport> {
    let mut line = Vec::new();
    reports.take(REPORT).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "banger-shim has ended"));
    }
    Ok(serde_json::from_slice(&line)?)
}

/// The shim's last report, when the engine has ended.
async fn end(reports: &mut BufReader<ChildStdout>) -> Option<ExitRecord> {
    match timeout(ENDING, report(reports)).await {
        Ok(Ok(ShimReport::Ended(record))) => Some(record),
        _ => None,
    }
}

/// Waits until the control socket answers as this machine, or the engine ends, or the time is over.
async fn ready(qemu: &Qemu, plan: &BootPlan, engine: &mut Engine) -> Result<(), EngineError> {
    let limit = qemu.options.launch_timeout;
    let deadline = Instant::now() + limit;
    let (control, pid) = (engine.handles.control.clone(), engine.handles.pid);
    let fault = tokio::select! {
        biased;
        // The shim reports the end once it has written it down.
        ended = report(&mut engine.reports) => return Err(match ended {
            Ok(ShimReport::Ended(record)) => died(plan, Some(&record)),
            // Without a shim nobody keeps the console: that is not the machine that was asked for.
            _ => io_error("keep the engine's console", io::Error::other("banger-shim has ended")),
        }),
        answered = answers(plan, &control, pid, deadline) => match answered {
            Ok(()) => return Ok(()),
            Err(fault) => fault,
        },
    };
    Err(match fault {
        find::ControlFault::Qmp(QmpError::Timeout(_) | QmpError::Unreachable(_)) => {
            timed_out("answer on its control socket", limit)
        }
        find::ControlFault::Qmp(error) => {
            // An engine that gives up closes its socket first, or it says that it could not load and ends.
            let over = match &error {
                QmpError::Closed(_) | QmpError::Io(_) => true,
                QmpError::Refused { command, .. } => command == INCOMING,
                _ => false,
            };
            if over && let Some(record) = end(&mut engine.reports).await {
                return Err(died(plan, Some(&record)));
            }
            super::control_error(qemu, &engine.handles, error)
        }
        other => EngineError::NotOurs {
            pid,
            why: other.to_string(),
        },
    })
}

/// Connects as soon as the socket is there, and lets the engine load what was saved.
async fn answers(plan: &BootPlan, control: &Path, pid: u32, deadline: Instant) -> Result<(), find::ControlFault> {
    let mut pause = DIAL[0];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match Client::connect(control, left).await {
            Ok(mut client) => {
                find::check(&mut client, pid, Some(&plan.id)).await?;
                return match &plan.resume {
                    Some(saved) => Ok(load(&mut client, saved).await?),
                    None => Ok(client.status().await.map(drop)?),
                };
            }
            // Not there yet, or bound but not listening yet.
            Err(QmpError::Unreachable(_)) if !left.is_zero() => {}
            Err(error) => return Err(error.into()),
        }
        sleep(pause).await;
        pause = (pause * 9 / 8).min(DIAL[1]);
    }
}

/// Loads processors and devices. They stay stopped.
async fn load(client: &mut Client, saved: &Saved) -> Result<(), QmpError> {
    #[derive(Deserialize)]
    struct Progress {
        status: Option<String>,
        #[serde(rename = "error-desc")]
        error: Option<String>,
    }
    let state = File::open(&saved.state).map_err(QmpError::Io)?;
    client.give(STATE, state.as_fd()).await?;
    let uri = json!({ "uri": format!("fd:{STATE}") });
    client.execute::<Value>(INCOMING, Some(uri)).await?;
    loop {
        let progress: Progress = client.execute("query-migrate", None).await?;
        match progress.status.as_deref() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                return Err(QmpError::Refused {
                    command: INCOMING.to_owned(),
                    message: progress
                        .error
                        .unwrap_or_else(|| "the state could not be loaded".to_owned()),
                });
            }
            _ => sleep(LOADING).await,
        }
    }
}

/// Makes sure that what a machine is to go on with can be its memory and state.
fn check_saved(plan: &BootPlan) -> Result<(), EngineError> {
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

/// Ends the engine and removes what it left but its logs.
async fn undo(plan: &BootPlan, engine: Engine) {
    end_process(plan, engine.process).await;
    remove_sockets(plan);
}

async fn end_process(plan: &BootPlan, process: Process) {
    let (machine, pid) = (plan.id.as_str(), process.pid());
    if let Err(e) = process.signal(rustix::process::Signal::KILL.as_raw()) {
        tracing::warn!(machine, pid, error = %e, "cannot end an engine");
    }
    if timeout(KILLED, process.ended()).await.is_err() {
        tracing::warn!(machine, pid, "a killed engine is still there");
    }
}

fn remove_sockets(plan: &BootPlan) {
    for socket in [plan.paths.control_socket(), plan.paths.agent_socket()] {
        if let Err(e) = remove(&socket) {
            tracing::warn!(path = %socket.display(), error = %e, "cannot remove a socket");
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The error for an engine that ended, with its last words or else the guest's.
fn died(plan: &BootPlan, record: Option<&ExitRecord>) -> EngineError {
    let how = record.map_or_else(|| "nobody saw how".to_owned(), |r| EngineExit::from(r).to_string());
    let mut last_words = record.map(|r| r.last_words.clone()).unwrap_or_default();
    let console = console_tail(&plan.paths, LAST_LINES);
    last_words.extend(console.into_iter().filter(|line| !line.starts_with("[engine] ")));
    EngineError::Died {
        engine: ENGINE,
        how,
        last_words,
    }
}

fn timed_out(what: &'static str, after: Duration) -> EngineError {
    EngineError::Timeout {
        engine: ENGINE,
        what,
        after,
    }
}
