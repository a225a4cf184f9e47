//! The pieces of work that a machine's task runs: which request begins which, and how each takes to being interrupted.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use banger_proto::api::{MachineState, StartMachine};
use banger_proto::error::{ApiError, ErrorCode};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::record::Machine;
use super::request::{Ask, Request};
use super::stages::Stages;
use super::{create, delete, disks, fork, snapshot, stall, start, stop, suspend};
use crate::blocking::blocking;
use crate::failpoint;
use crate::ops::Op;

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
    /// It waits for an engine that can't be verified. Nothing can be asked meanwhile but its end, by force: that goes here.
    Blocked(mpsc::Sender<Ask>),
}

/// The work under way.
pub struct Current {
    /// How it takes to being interrupted.
    pub manner: Manner,
    /// The work.
    pub work: Work,
}

impl Current {
    /// Its operation, where it has one.
    pub fn op(&self) -> Option<&Op> {
        match &self.manner {
            Manner::Yields { op, .. } => Some(op),
            Manner::Bounded(op) => op.as_ref(),
            Manner::Blocked(_) => None,
        }
    }
}

/// Begins the work of a request.
pub fn begin(m: &Arc<Machine>, ask: Ask) -> Current {
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
        Request::Resume => bounded(m, op, |m, op| {
            Box::pin(async move {
                match m.live().filter(|live| live.stalled_now().is_some()) {
                    Some(live) if m.state() == MachineState::Running => stall::resume(&m, &live, &op).await,
                    _ => suspend::resume(&m, &op).await,
                }
            })
        }),
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

/// Removes the machine.
pub fn removal(m: &Arc<Machine>, op: Op) -> Current {
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
    let dir = m.paths.disks();
    blocking(move || disks::grow(&dir, bytes)).await?;
    failpoint::hit("grow.disk").await?;
    m.change(|row| {
        row.spec.disk_bytes = bytes;
        Ok(())
    })
    .await
}
