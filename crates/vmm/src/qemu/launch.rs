//! Starting QEMU, detached, letting it load what was saved, and undoing a start that failed.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use banger_core::plan::{BootPlan, Saved};
use banger_proto::shim::ShimJob;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::args::{self, Setup};
use super::{ENGINE, Qemu, find, io_error};
use crate::engine::{EngineError, Handles};
use crate::host;
use crate::identity::Process;
use crate::qmp::{Client, QmpError};
use crate::records::CONSOLE_LIMIT;
use crate::start::{self, DIAL, Reports, Start, died, end, end_process, remove_sockets, timed_out};

/// How often a loading engine is asked whether it is done.
const LOADING: Duration = Duration::from_millis(1);
/// Name of the descriptor with the state.
const STATE: &str = "state";
/// The command that loads it.
const INCOMING: &str = "migrate-incoming";

/// Starts a machine.
pub(super) async fn launch(qemu: &Qemu, plan: &BootPlan) -> Result<Handles, EngineError> {
    let work = Work {
        qemu: qemu.clone(),
        plan: plan.clone(),
    };
    start::attended(ENGINE, work).await
}

struct Work {
    qemu: Qemu,
    plan: BootPlan,
}

/// An engine that runs and has not answered yet.
struct Engine {
    handles: Handles,
    process: Process,
    reports: Reports,
}

impl Start for Work {
    type Begun = Engine;

    async fn start(&self) -> Result<Engine, EngineError> {
        start(&self.qemu, &self.plan).await
    }

    async fn ready(&self, engine: &mut Engine) -> Result<(), EngineError> {
        ready(&self.qemu, &self.plan, engine).await
    }

    async fn undo(&self, engine: Engine) {
        end_process(self.plan.id.as_str(), engine.process).await;
        remove_sockets(&self.plan.paths);
    }

    fn handles(engine: &Engine) -> &Handles {
        &engine.handles
    }
}

/// Prepares the files, starts the shim and hears of the engine. An error leaves nothing behind.
async fn start(qemu: &Qemu, plan: &BootPlan) -> Result<Engine, EngineError> {
    let boot_id = host::boot_id(&qemu.options.roots.proc)
        .map_err(|why| io_error("tell this boot of the host", io::Error::other(why)))?;
    let control = args::socket(plan.paths.control_socket())?;
    let agent = args::socket(plan.paths.agent_socket())?;
    start::check_saved(plan)?;
    let line = args::args(plan, &Setup { qboot: qemu.qboot })?;
    start::prepare(ENGINE, &plan.paths, &control, &agent).await?;
    let job = ShimJob {
        engine: qemu.binary.clone(),
        args: line,
        console_log: plan.paths.console_log(),
        log_limit: CONSOLE_LIMIT,
        exit_record: plan.paths.exit_record(),
        cwd: None,
        metrics: None,
    };
    let mut reports = start::shim(ENGINE, &qemu.options.shim, &args::guest_name(&plan.id), &job).await?;
    let outcome = start::hear(ENGINE, &qemu.options.roots.proc, &plan.paths, &mut reports).await;
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

/// Ends an engine that was started for this machine and that nobody heard of.
async fn sweep(qemu: &Qemu, plan: &BootPlan) {
    let proc = &qemu.options.roots.proc;
    if let Ok(Some(handles)) = find::search(proc, &plan.id, &plan.paths)
        && let Ok(process) = find::open(proc, &handles)
    {
        end_process(plan.id.as_str(), process).await;
    }
    remove_sockets(&plan.paths);
}

/// Waits until the control socket answers as this machine, or the engine ends, or the time is over.
async fn ready(qemu: &Qemu, plan: &BootPlan, engine: &mut Engine) -> Result<(), EngineError> {
    let limit = qemu.options.launch_timeout;
    let deadline = Instant::now() + limit;
    let (control, pid) = (engine.handles.control.clone(), engine.handles.pid);
    let fault = tokio::select! {
        biased;
        ended = start::report(&mut engine.reports) => return Err(start::ended_early(ENGINE, &plan.paths, ended)),
        answered = answers(plan, &control, pid, deadline) => match answered {
            Ok(()) => return Ok(()),
            Err(fault) => fault,
        },
    };
    Err(match fault {
        find::ControlFault::Qmp(QmpError::Timeout(_) | QmpError::Unreachable(_)) => {
            timed_out(ENGINE, "answer on its control socket", limit)
        }
        find::ControlFault::Qmp(error) => {
            // An engine that gives up closes its socket first, or it says that it could not load and ends.
            let over = match &error {
                QmpError::Closed(_) | QmpError::Io(_) => true,
                QmpError::Refused { command, .. } => command == INCOMING,
                _ => false,
            };
            if over && let Some(record) = end(&mut engine.reports).await {
                return Err(died(ENGINE, &plan.paths, Some(&record)));
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
