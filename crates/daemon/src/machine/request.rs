//! What may be asked of a machine's task, and the asking.

use std::sync::Arc;
use std::time::Duration;

use banger_core::state;
use banger_proto::api::StartMachine;
use banger_proto::error::{ApiError, ErrorCode};
use tokio::sync::oneshot;

use super::fork;
use super::record::Machine;
use crate::ops::Op;

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

impl Request {
    /// What is in memory or on disks is lost by it, so that it has to be clear which machine is meant.
    pub fn loses_something(&self) -> bool {
        match self {
            Self::Start(start) => start.cold,
            Self::Restart(_) | Self::Stop(_) | Self::Kill(_) | Self::Delete | Self::Restore(_) => true,
            Self::GrowDisk(_)
            | Self::Pause
            | Self::Resume
            | Self::Suspend
            | Self::SuspendIdle
            | Self::Snapshot { .. }
            | Self::Fork(_)
            | Self::Commit { .. } => false,
        }
    }
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
    /// What it is to the state machine.
    pub fn kind(&self) -> state::Request {
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

    /// The kind of its operation.
    pub fn operation(&self) -> &'static str {
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
    /// A stop, kill or delete ends an engine that does not answer, too, if everything else identifies it.
    pub force: bool,
    /// The answer: the operation that does it.
    pub reply: oneshot::Sender<Reply>,
}

/// The answer to a request.
pub type Reply = Result<Op, ApiError>;

/// Asks a machine's task.
pub async fn ask(m: &Machine, request: Request) -> Reply {
    ask_with(m, request, false).await
}

/// The same, by force if so wanted: see [`Ask::force`].
pub async fn ask_with(m: &Machine, request: Request, force: bool) -> Reply {
    let gone = || ApiError::new(ErrorCode::NotFound, format!("machine `{}` was removed", m.name()));
    let (reply, answer) = oneshot::channel();
    m.asks.send(Ask { request, force, reply }).await.map_err(|_| gone())?;
    answer.await.map_err(|_| gone())?
}
