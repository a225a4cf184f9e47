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
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use banger_core::state::{self, Decision, Refusal};
use banger_proto::api::{MachineState, StartMachine};
use banger_proto::error::{ApiError, ErrorCode};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::record::Machine;
use super::stages::Stages;
use super::{create, delete, fork, snapshot, start, stop, suspend};
use crate::ops::Op;

/// Requests that may wait for a machine.
pub const QUEUE: usize = 16;
/// How long a machine that is to be removed with its holder lives without one.
const UNHELD: Duration = Duration::from_secs(30);

/// What a client asks of the task.
#[derive(Debug, Clone)]
pub enum Request {
    /// Bring it up.
    Start(StartMachine),
    /// Shut it down and bring it up.
    Restart(StartMachine),
    /// Shut it down.
    Stop(Duration),
    /// End its engine by a signal.
    Kill(i32),
    /// Remove it.
    Delete,
    /// Grow its root disk to so many bytes.
    GrowDisk(u64),
    /// Stop its virtual CPUs.
    Pause,
    /// Let them run again.
    Resume,
    /// Write its memory to disk and end its engine.
    Suspend,
    /// The same if nobody uses it any more: decided again when its turn comes.
    SuspendIdle,
    /// Take a snapshot.
    Snapshot {
        /// Its name.
        name: String,
        /// Without memory.
        disk_only: bool,
    },
    /// Put it back to a snapshot.
    Restore(String),
    /// Save it for copies of it.
    Fork(ForkJob),
    /// Make an image of its root disk.
    Commit {
        /// Name of the image.
        image: String,
        /// Replace one of that name.
        force: bool,
    },
}

/// A machine to be saved for its copies.
#[derive(Debug, Clone)]
pub struct ForkJob {
    /// Where to.
    pub place: Arc<fork::Place>,
    /// Who waits for it.
    pub tell: Arc<fork::Tell>,
}

impl Request {
    fn kind(&self) -> state::Request {
        match self {
            Self::Start(_) => state::Request::Start,
            Self::Restart(_) => state::Request::Restart,
            Self::Stop(_) => state::Request::Stop,
            Self::Kill(_) => state::Request::Kill,
            Self::Delete => state::Request::Delete,
            Self::GrowDisk(_) => state::Request::GrowDisk,
            Self::Pause => state::Request::Pause,
            Self::Resume => state::Request::Resume,
            Self::Suspend | Self::SuspendIdle => state::Request::Suspend,
            Self::Snapshot { .. } => state::Request::Snapshot,
            Self::Restore(_) => state::Request::Restore,
            Self::Fork(_) => state::Request::Fork,
            Self::Commit { .. } => state::Request::Commit,
        }
    }

    fn operation(&self) -> &'static str {
        match self {
            Self::Start(_) => "machine.start",
            Self::Restart(_) => "machine.restart",
            Self::Stop(_) => "machine.stop",
            Self::Kill(_) => "machine.kill",
            Self::Delete => "machine.delete",
            Self::GrowDisk(_) => "machine.grow",
            Self::Pause => "machine.pause",
            Self::Resume => "machine.resume",
            Self::Suspend | Self::SuspendIdle => "machine.suspend",
            Self::Snapshot { .. } => "machine.snapshot",
            Self::Restore(_) => "machine.restore",
            Self::Fork(_) => "machine.save",
            Self::Commit { .. } => "machine.commit",
        }
    }
}

/// A request and where its answer goes.
#[derive(Debug)]
pub struct Ask {
    /// What is asked.
    pub request: Request,
    /// The answer: the operation that does it.
    pub reply: oneshot::Sender<Reply>,
}

/// The answer to a request.
pub type Reply = Result<Op, ApiError>;

/// How a piece of work left the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It is there.
    Still,
    /// It is no more.
    Gone,
}

/// A piece of work.
pub type Work = Pin<Box<dyn Future<Output = Ended> + Send>>;

/// How a piece of work takes to being interrupted.
#[derive(Debug)]
pub enum Manner {
    /// It ends soon when asked to.
    Yields {
        /// Its operation.
        op: Op,
        /// Cancelled when another request takes over, so that what is there is kept where that makes sense.
        superseded: CancellationToken,
    },
    /// It is bounded and runs to its end.
    Bounded(Option<Op>),
    /// It waits for an engine that can't be verified; nothing can be asked meanwhile.
    Blocked,
}

/// The work under way.
pub struct Current {
    /// How it takes to being interrupted.
    pub manner: Manner,
    /// The work.
    pub work: Work,
}

impl Current {
    fn op(&self) -> Option<&Op> {
        match &self.manner {
            Manner::Yields { op, .. } => Some(op),
            Manner::Bounded(op) => op.as_ref(),
            Manner::Blocked => None,
        }
    }
}

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
                if let Err(e) = stop::ended_by_itself(&m).await {
                    tracing::error!(machine = %m.id, error = %e.message, "cannot be marked stopped");
                    // Its record keeps what is true; a start or delete tries again.
                    m.clear_live();
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
    let state = m.state();
    if let Some(Current {
        manner: Manner::Blocked,
        ..
    }) = &current
    {
        let cause = m.row().cause.unwrap_or_default();
        let message = format!("machine `{}` cannot be used now: {cause}", m.name());
        let _ = ask.reply.send(Err(
            ApiError::new(ErrorCode::WrongState, message).hint("the daemon looks again every few seconds")
        ));
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
        tokio::spawn(async move {
            if let Err(e) = live.engine.signal(&live.handles, signal).await {
                tracing::warn!(error = %e, "the engine could not be signalled");
            }
        });
    }
}

fn refused(m: &Machine, state: MachineState, refusal: Refusal) -> ApiError {
    let error = ApiError::new(
        ErrorCode::WrongState,
        format!("machine `{}` is {}: {}", m.name(), state.as_str(), refusal.reason()),
    );
    match refusal {
        Refusal::NotRunning => error.hint(format!("start it: banger vm start {}", m.name())),
        Refusal::NotStopped => error.hint(format!("stop it first: banger vm stop {}", m.name())),
        Refusal::Busy => error.hint(format!("wait for it: banger vm wait {}", m.name())),
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
    let state = m.state();
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

/// Asks a machine's task.
pub async fn ask(m: &Machine, request: Request) -> Reply {
    let gone = || ApiError::new(ErrorCode::NotFound, format!("machine `{}` was removed", m.name()));
    let (reply, answer) = oneshot::channel();
    m.asks.send(Ask { request, reply }).await.map_err(|_| gone())?;
    answer.await.map_err(|_| gone())?
}

/// An operation with nothing to do.
fn finished(m: &Machine, request: &Request) -> Op {
    let op = m.services.ops.begin(request.operation(), &m.name());
    let (ops, running) = (m.services.clone(), op.clone());
    tokio::spawn(async move {
        let _ = ops.ops.run(&running, async { Ok(()) }).await;
    });
    op
}

/// Begins the work of a request.
fn begin(m: &Arc<Machine>, ask: Ask) -> Current {
    let op = m.services.ops.begin(ask.request.operation(), &m.name());
    let _ = ask.reply.send(Ok(op.clone()));
    let within = |s: &StartMachine| s.timeout_ms.map_or(start::TIMEOUT, Duration::from_millis);
    match ask.request {
        Request::Start(s) => yields(&op, |superseded| {
            let wanted = start::Wanted {
                wait: s.wait,
                cold: s.cold,
            };
            Box::pin(create::run_start(m.clone(), op.clone(), wanted, within(&s), superseded))
        }),
        Request::Restart(s) => yields(&op, |superseded| {
            let wanted = start::Wanted {
                wait: s.wait,
                cold: true,
            };
            Box::pin(create::run_restart(
                m.clone(),
                op.clone(),
                wanted,
                within(&s),
                superseded,
            ))
        }),
        Request::Pause => bounded(m, op, |m, op| Box::pin(async move { suspend::pause(&m, &op).await })),
        Request::Resume => bounded(m, op, |m, op| Box::pin(async move { suspend::resume(&m, &op).await })),
        Request::Suspend => bounded(m, op, |m, op| {
            Box::pin(async move { suspend::suspend(&m, &op, false).await })
        }),
        Request::SuspendIdle => bounded(m, op, |m, op| {
            Box::pin(async move { suspend::suspend(&m, &op, true).await })
        }),
        Request::Snapshot { name, disk_only } => bounded(m, op, move |m, op| {
            Box::pin(async move { snapshot::take(&m, &op, &name, disk_only).await })
        }),
        Request::Restore(name) => bounded(m, op, move |m, op| {
            Box::pin(async move {
                let mut stages = Stages::new(&op, start::TIMEOUT);
                snapshot::restore(&m, &mut stages, &name).await
            })
        }),
        Request::Fork(job) => bounded(m, op, move |m, op| {
            Box::pin(async move {
                op.stage("save");
                let saved = fork::save_source(&m, job.place.dir()).await.map(Arc::new);
                job.tell.send_replace(Some(saved.clone()));
                saved.map(drop)
            })
        }),
        Request::Commit { image, force } => bounded(m, op, move |m, op| {
            Box::pin(async move { crate::commit::machine(&m, &op, &image, force).await })
        }),
        Request::Stop(timeout) => bounded(m, op, move |m, op| {
            Box::pin(async move { stop::stop(&m, &op, timeout).await })
        }),
        Request::Kill(signal) => bounded(m, op, move |m, op| {
            Box::pin(async move { stop::kill(&m, &op, signal).await })
        }),
        Request::GrowDisk(bytes) => bounded(m, op, move |m, op| Box::pin(async move { grow(&m, &op, bytes).await })),
        Request::Delete => removal(m, op),
    }
}

/// A piece of work that ends soon when asked to.
pub fn yields(op: &Op, work: impl FnOnce(CancellationToken) -> Work) -> Current {
    let superseded = CancellationToken::new();
    Current {
        work: work(superseded.clone()),
        manner: Manner::Yields {
            op: op.clone(),
            superseded,
        },
    }
}

type Step = Pin<Box<dyn Future<Output = Result<(), ApiError>> + Send>>;

fn bounded(m: &Arc<Machine>, op: Op, work: impl FnOnce(Arc<Machine>, Op) -> Step) -> Current {
    let step = work(m.clone(), op.clone());
    let (m, running) = (m.clone(), op.clone());
    let work = Box::pin(async move {
        let _ = m.services.ops.run(&running, step).await;
        Ended::Still
    });
    Current {
        manner: Manner::Bounded(Some(op)),
        work,
    }
}

fn removal(m: &Arc<Machine>, op: Op) -> Current {
    let (m, running) = (m.clone(), op.clone());
    let work = Box::pin(async move {
        match m.services.ops.run(&running, delete::delete(&m, &running)).await {
            Ok(()) => Ended::Gone,
            Err(_) => Ended::Still,
        }
    });
    Current {
        manner: Manner::Bounded(Some(op)),
        work,
    }
}

async fn grow(m: &Arc<Machine>, op: &Op, bytes: u64) -> Result<(), ApiError> {
    let now = m.row().spec.disk_bytes;
    if bytes < now {
        return Err(ApiError::new(
            ErrorCode::InvalidSpec,
            format!("the disk of `{}` has {now} bytes and only grows", m.name()),
        ));
    }
    op.stage("disk");
    start::ensure_disks(m).await?;
    m.services.stock.grow_root(&m.paths, bytes).await?;
    m.change(|row| {
        row.spec.disk_bytes = bytes;
        Ok(())
    })
    .await
}
