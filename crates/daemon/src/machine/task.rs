//! The task that owns a machine: takes requests one at a time, asks [`banger_core::state`] what is to be done with them, and
//! runs one piece of work at a time.
//!
//! ```text
//!              ask                    decide          ┌─ Refuse ──▶ error
//!   client ──────────▶ queue (16) ──▶ (state, work) ──┼─ Already ─▶ the operation under way, or one that is done
//!                                        ▲            ├─ Do ──────▶ work ──▶ operation
//!                                        │            └─ Interrupt ▶ cancel the work, then ask again
//!   engine ends by itself ───────────────┤
//!   no holder for 30 s (auto_remove) ────┘
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use banger_core::state::{self, Decision, Refusal};
use banger_proto::api::MachineState;
use banger_proto::error::{ApiError, ErrorCode};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::reboot;
use super::record::{Machine, Presence};
use super::request::{Ask, Reply, Request};
use super::stall;
use super::work::{Current, Ended, Manner, begin, removal};
use crate::ops::Op;

/// Requests that may wait for a machine.
pub const QUEUE: usize = 16;
/// How long a machine that is to be removed with its holder lives without one.
const UNHELD: Duration = Duration::from_secs(30);

/// Runs until the machine is no more, or the daemon stops (which drops it, and with it nothing of the machine).
pub async fn run(m: Arc<Machine>, mut asks: mpsc::Receiver<Ask>, first: Option<Current>) {
    let mut current = first;
    let mut waiting: VecDeque<Ask> = VecDeque::new();
    let mut holders = m.holders.subscribe();
    loop {
        if current.is_none()
            && let Some(ask) = waiting.pop_front()
        {
            current = take(&m, None, ask, &mut waiting);
            continue;
        }
        let idle = current.is_none();
        let exited = exited(&m);
        let unheld = unheld(&m, *holders.borrow_and_update());
        let work = async {
            match &mut current {
                Some(current) => (&mut current.work).await,
                None => std::future::pending().await,
            }
        };
        // What has ended is settled before the next request is decided.
        tokio::select! {
            biased;
            ended = work => {
                current = None;
                if ended == Ended::Gone {
                    break;
                }
            }
            () = exited, if idle => {
                match Box::pin(reboot::ended_by_itself(&m)).await {
                    Ok(again) => current = again,
                    Err(e) => {
                        tracing::error!(machine = %m.id, error = %e.message, "cannot be marked stopped");
                        // Its record keeps what is true; a start or delete tries again.
                        m.clear_live();
                    }
                }
            }
            ask = asks.recv(), if waiting.len() < QUEUE => {
                let Some(ask) = ask else { break };
                current = take(&m, current, ask, &mut waiting);
            }
            () = unheld, if idle => {
                tracing::info!(machine = %m.id, "nobody holds it any more");
                let op = m.services.ops.begin("machine.delete", &m.name());
                current = Some(removal(&m, op));
            }
            _ = holders.changed() => {}
        }
    }
    m.services.forget(&m.id);
    m.set_gone();
    asks.close();
    while let Ok(ask) = asks.try_recv() {
        waiting.push_back(ask);
    }
    for ask in waiting {
        let _ = ask.reply.send(gone(&m, &ask.request));
    }
}

/// The answer of a machine that is no more.
fn gone(m: &Machine, request: &Request) -> Reply {
    if matches!(request, Request::Delete) {
        return Ok(finished(m, request));
    }
    Err(ApiError::new(
        ErrorCode::NotFound,
        format!("machine `{}` was removed", m.name()),
    ))
}

async fn exited(m: &Machine) {
    match m.live() {
        Some(live) => live.exited.cancelled().await,
        None => std::future::pending().await,
    }
}

async fn unheld(m: &Machine, holders: usize) {
    if holders == 0 && m.row().auto_remove {
        tokio::time::sleep(UNHELD).await;
    } else {
        std::future::pending().await
    }
}

/// Takes a request: answers it, begins its work, or puts it behind the work that it interrupts.
fn take(m: &Arc<Machine>, current: Option<Current>, ask: Ask, waiting: &mut VecDeque<Ask>) -> Option<Current> {
    let state = m.state_now();
    if let Some(Current {
        manner: Manner::Blocked(forced),
        ..
    }) = &current
    {
        if ask.force {
            // One at a time: the one before ends it, or says why not.
            if let Err(TrySendError::Full(ask) | TrySendError::Closed(ask)) = forced.try_send(ask) {
                let message = format!("the engine of machine `{}` is being ended already", m.name());
                let _ = ask.reply.send(Err(ApiError::new(ErrorCode::Conflict, message)));
            }
        } else {
            let _ = ask.reply.send(Err(unverified(m)));
        }
        return current;
    }
    match state::decide(state, ask.request.kind()) {
        Decision::Refuse(refusal) => {
            let _ = ask.reply.send(Err(refused(m, state, refusal)));
            current
        }
        Decision::Already => match &current {
            Some(work) if let Some(op) = work.op() => {
                let _ = ask.reply.send(Ok(op.clone()));
                current
            }
            // What failed in the middle is gone on with.
            None if matches!(state, MachineState::Deleting | MachineState::Stopping) => Some(begin(m, ask)),
            _ => {
                let _ = ask.reply.send(Ok(finished(m, &ask.request)));
                current
            }
        },
        Decision::Do | Decision::Interrupt => match current {
            None => Some(begin(m, ask)),
            Some(current) => {
                match (&current.manner, &ask.request) {
                    // It is being brought up already, only its row does not say so yet.
                    (Manner::Yields { op, .. }, Request::Start(start)) if !start.cold && brings_up(op) => {
                        let _ = ask.reply.send(Ok(op.clone()));
                        return Some(current);
                    }
                    (Manner::Yields { op, superseded }, request) => {
                        if !matches!(request, Request::Delete) {
                            superseded.cancel();
                        }
                        op.cancel();
                    }
                    // The guest takes its time to go down; a kill does not wait for it.
                    (Manner::Bounded(_), Request::Kill(signal)) => hurry(m, *signal),
                    (Manner::Bounded(_), Request::Delete) => hurry(m, 9),
                    _ => {}
                }
                waiting.push_back(ask);
                Some(current)
            }
        },
    }
}

/// The answer of a machine whose engine can't be verified.
fn unverified(m: &Machine) -> ApiError {
    let cause = m.show().cause.unwrap_or_default();
    let message = format!("machine `{}` cannot be used now: {cause}", m.name());
    let error = ApiError::new(ErrorCode::WrongState, message);
    match m.presence() {
        Presence::Doubtful { identified: true, .. } => error.hint(format!(
            "the daemon looks again every few seconds; to end its process all the same: banger vm kill --force {}",
            m.name()
        )),
        _ => error.hint("the daemon looks again every few seconds; `banger audit` shows what there is"),
    }
}

/// Whether an operation is a start that nobody has cancelled.
fn brings_up(op: &Op) -> bool {
    let start = matches!(op.snapshot().kind.as_str(), "machine.start" | "machine.restart");
    start && !op.canceled().is_cancelled()
}

/// Signals the engine beside the work that waits for its end.
fn hurry(m: &Arc<Machine>, signal: i32) {
    if m.state() != MachineState::Stopping {
        return;
    }
    if let Some(live) = m.live() {
        tokio::spawn(crate::ops::part(async move {
            if let Err(e) = live.engine.signal(&live.handles, signal).await {
                tracing::warn!(error = %e, "the engine could not be signalled");
            }
        }));
    }
}

fn refused(m: &Machine, state: MachineState, refusal: Refusal) -> ApiError {
    if let (Refusal::Stalled, Some(stall)) = (refusal, m.stall()) {
        return stall::error(&stall);
    }
    let error = ApiError::new(
        ErrorCode::WrongState,
        format!("machine `{}` is {}: {}", m.name(), state.as_str(), refusal.reason()),
    );
    match refusal {
        Refusal::NotRunning => error.hint(format!("start it: banger vm start {}", m.name())),
        Refusal::NotStopped => error.hint(format!("stop it first: banger vm stop {}", m.name())),
        Refusal::Busy => error.hint(format!("wait for it: banger vm wait {}", m.name())),
        // It goes on just now.
        Refusal::Stalled => error.hint("try again"),
        Refusal::Paused => error.hint(format!("let it go on first: banger vm resume {}", m.name())),
        Refusal::Suspended => error.hint(format!(
            "wake it first: banger vm start {0}; or drop its memory: banger vm kill {0}",
            m.name()
        )),
        Refusal::Broken => error.hint(format!("remove it: banger vm delete {}", m.name())),
        Refusal::Gone => error,
    }
}

/// Why a request to the agent is refused in this state, if it is.
pub fn check_agent(m: &Machine) -> Result<(), ApiError> {
    let state = m.state_now();
    match state::decide(state, state::Request::Agent) {
        Decision::Refuse(refusal) => Err(refused(m, state, refusal)),
        _ => Ok(()),
    }
}

/// Why a change of the record is refused in this state, if it is.
pub fn check_change(m: &Machine, request: state::Request) -> Result<(), ApiError> {
    let state = m.state();
    match state::decide(state, request) {
        Decision::Refuse(refusal) => Err(refused(m, state, refusal)),
        _ => Ok(()),
    }
}

/// An operation with nothing to do.
fn finished(m: &Machine, request: &Request) -> Op {
    let op = m.services.ops.begin(request.operation(), &m.name());
    op.unchanged();
    let (ops, running) = (m.services.clone(), op.clone());
    tokio::spawn(async move {
        let _ = ops.ops.run(&running, async { Ok(()) }).await;
    });
    op
}
