//! The work behind "create": image and kernel, disks, and the first start. The row is there before it begins.

use std::sync::Arc;
use std::time::Duration;

use banger_core::spec;
use banger_core::state::Event;
use banger_proto::api::MachineState;
use banger_proto::error::{ApiError, ErrorCode};
use tokio_util::sync::CancellationToken;

use super::journal::{self, Begun};
use super::record::Machine;
use super::stages::Stages;
use super::work::Ended;
use super::{delete, disks, fork, start, stop};
use crate::error::IntoApi;
use crate::ops::{Op, canceled};
use crate::{failpoint, forwards};

/// What a create does beyond its row.
#[derive(Debug, Clone)]
pub struct Creation {
    /// Start it.
    pub start: bool,
    /// How.
    pub wanted: start::Wanted,
    /// Bound of the start.
    pub timeout: Duration,
    /// It is a copy of a running machine.
    pub copy: Option<CopyOf>,
    /// The size of its disk was asked for; a default grows to that of the image.
    pub disk_asked: bool,
}

/// What a copy is made of.
#[derive(Debug, Clone)]
pub struct CopyOf {
    /// Name of the source.
    pub source: String,
    /// The source, once it is saved.
    pub saved: fork::Source,
}

/// Carries a creation out. What fails leaves nothing behind, but for two cases: a guest whose own system takes too long is
/// kept, so that one can look into it, and a creation that a stop has interrupted keeps what it has.
pub async fn run(m: Arc<Machine>, op: Op, creation: Creation, superseded: CancellationToken) -> Ended {
    let mut ended = Ended::Still;
    let work = async {
        let mut stages = Stages::new(&op, creation.timeout);
        let made = make(&m, &mut stages, &creation).await;
        let Err(e) = made else { return Ok(()) };
        if kept(&m, &e, superseded.is_cancelled()).await {
            return Err(e);
        }
        op.stage("undo");
        match delete::delete(&m, &op).await {
            Ok(()) => ended = Ended::Gone,
            Err(undo) => {
                tracing::error!(machine = %m.id, error = %undo.message, "a failed create is not wholly undone")
            }
        }
        // The machine is gone, and its console with it: what there was to see goes with the error.
        Err(if e.code == ErrorCode::Timeout {
            e.hint("give it more time with --timeout")
        } else {
            e
        })
    };
    let _ = m.services.ops.run(&op, work).await;
    if !forwards::serves(m.state()) {
        m.services.forwards.close(&m.id);
    }
    ended
}

async fn make(m: &Arc<Machine>, stages: &mut Stages, creation: &Creation) -> Result<(), ApiError> {
    failpoint::hit("create.row").await?;
    if let Some(copy) = &creation.copy {
        return fork::start_copy(m, stages, &copy.source, copy.saved.clone()).await;
    }
    stages.enter("image");
    let spec = m.row().spec;
    let services = &m.services;
    let op = stages.op().clone();
    let (image, kernel) = stages
        .cancellable(async {
            let image = services.stock.image(&spec.image, &op).await?;
            let kernel = services.stock.kernel(&spec.kernel, &op).await?;
            Ok((image, kernel))
        })
        .await?;
    let disk_bytes =
        spec::disk_for(spec.disk_bytes, creation.disk_asked, image.size_bytes).map_err(IntoApi::into_api)?;
    m.change(|row| {
        row.spec.disk_bytes = disk_bytes;
        row.spec.image_digest.clone_from(&image.digest);
        row.spec.kernel_digest.clone_from(&kernel.digest);
        Ok(())
    })
    .await?;
    failpoint::hit("create.stock").await?;
    stages.restart_clock();
    disks::make_dir(&m.paths.state)?;
    m.describe();
    if !creation.start {
        stages.enter("disks");
        services.stock.make_disks(services, &m.paths, &m.row().spec).await?;
    }
    failpoint::hit("create.disks").await?;
    stages.check()?;
    m.happen(Event::DisksReady, |_| {}).await?;
    if creation.start {
        // Its disks depend on what it starts from.
        start::bring_up(m, stages, creation.wanted).await
    } else {
        Ok(())
    }
}

/// Whether a creation that failed leaves its machine.
async fn kept(m: &Arc<Machine>, e: &ApiError, superseded: bool) -> bool {
    match m.state() {
        MachineState::Running if superseded => true,
        // The guest is up, only its system takes too long: kept for a look into it, also where it was to be removed.
        MachineState::Running if e.code == ErrorCode::Timeout => {
            let kept = m.change(|row| {
                row.auto_remove = false;
                Ok(())
            });
            if let Err(e) = kept.await {
                tracing::warn!(machine = %m.id, error = %e.message, "cannot be marked as kept");
            }
            true
        }
        MachineState::Starting if superseded => down(m, None).await,
        MachineState::Stopped => superseded,
        _ => false,
    }
}

/// Ends the engine of a start that came to nothing; whether the machine is stopped now.
pub async fn down(m: &Arc<Machine>, cause: Option<String>) -> bool {
    let ended = match m.live() {
        Some(live) if !live.exited.is_cancelled() => stop::end_engine(&live).await,
        _ => Ok(()),
    };
    let gone = stop::engine_gone(m, cause).await;
    if let Err(e) = ended.and(gone) {
        tracing::error!(machine = %m.id, error = %e.message, "the engine of a failed start is not wholly cleared");
    }
    m.state() == MachineState::Stopped
}

/// The work behind "start".
pub async fn run_start(
    m: Arc<Machine>,
    op: Op,
    wanted: start::Wanted,
    timeout: Duration,
    superseded: CancellationToken,
) -> Ended {
    let work = async {
        let mut stages = Stages::new(&op, timeout);
        let started = start::bring_up(&m, &mut stages, wanted).await;
        after_start(&m, started, superseded.is_cancelled()).await
    };
    let _ = m.services.ops.run(&op, work).await;
    Ended::Still
}

/// The work behind "restart".
pub async fn run_restart(
    m: Arc<Machine>,
    op: Op,
    wanted: start::Wanted,
    timeout: Duration,
    superseded: CancellationToken,
) -> Ended {
    let work = async {
        let restarted = restart(&m, &op, wanted, timeout, superseded).await;
        restarted.and(journal::clear(&m))
    };
    let _ = m.services.ops.run(&op, work).await;
    Ended::Still
}

async fn restart(
    m: &Arc<Machine>,
    op: &Op,
    wanted: start::Wanted,
    timeout: Duration,
    superseded: CancellationToken,
) -> Result<(), ApiError> {
    if matches!(m.state(), MachineState::Running | MachineState::Paused) {
        // A daemon that finds it stopped knows that it is to be started.
        journal::write(m, Begun::Restart)?;
        failpoint::hit("restart.begun").await?;
        stop::stop(m, op, stop::TIMEOUT).await?;
        failpoint::hit("restart.stopped").await?;
    }
    if op.canceled().is_cancelled() {
        return Err(canceled());
    }
    let mut stages = Stages::new(op, timeout);
    let started = start::bring_up(m, &mut stages, wanted).await;
    after_start(m, started, superseded.is_cancelled()).await
}

/// Settles a start: what failed ends stopped, but for a guest whose own system takes too long.
pub async fn after_start(m: &Arc<Machine>, started: Result<(), ApiError>, superseded: bool) -> Result<(), ApiError> {
    let Err(e) = started else { return Ok(()) };
    let keep = m.state() == MachineState::Running && (superseded || e.code == ErrorCode::Timeout);
    if !keep && matches!(m.state(), MachineState::Starting | MachineState::Running) {
        let cause = if e.code == ErrorCode::Canceled {
            "its start was cancelled".to_owned()
        } else {
            e.message.clone()
        };
        down(m, Some(cause)).await;
    }
    Err(e)
}
