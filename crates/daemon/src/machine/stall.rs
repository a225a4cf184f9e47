//! Stalled machines, whose disk can't be written on the host: what is told of them, and how they resume.

use std::sync::Arc;
use std::time::{Duration, Instant};

use banger_proto::api::{self, MachineState};
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::{Stall, StallKind, space};

use super::live::Live;
use super::record::Machine;
use super::save;
use crate::db::FREE;
use crate::error::{self, IntoApi};
use crate::ops::Op;

/// Space that has to be there before a stalled machine is resumed, in bytes: with less it would only stall again.
const ENOUGH: u64 = 8 << 20;
/// How often a machine is resumed whose disk has failed.
const SELDOM: Duration = Duration::from_secs(10);
/// How long a machine may take to run after it was resumed.
const GOES_ON: Duration = Duration::from_secs(3);

/// Why a machine is stalled, in words.
pub fn words(stall: &Stall) -> String {
    let disk = match stall.disk {
        Some(role) => format!("the {} disk", role.serial()),
        None => "a disk".to_owned(),
    };
    let matter = match stall.kind {
        StallKind::NoSpace => "the host's disk is full",
        StallKind::Failed => "the host's disk has failed",
    };
    format!("{matter}: {disk} cannot be written, and the machine is stalled")
}

/// The error of a request that needs the guest.
pub fn error(stall: &Stall) -> ApiError {
    match stall.kind {
        StallKind::NoSpace => {
            ApiError::new(ErrorCode::NoSpace, words(stall)).hint(format!("{FREE}; the machine then resumes by itself"))
        }
        StallKind::Failed => ApiError::new(ErrorCode::Engine, words(stall)).hint(
            "look at the kernel's log (dmesg); the machine resumes by itself when the disk works, or with `banger vm resume`",
        ),
    }
}

/// As the API shows it.
pub fn shown(stall: &Stall) -> api::Stalled {
    api::Stalled {
        kind: match stall.kind {
            StallKind::NoSpace => api::StallKind::NoSpace,
            StallKind::Failed => api::StallKind::DiskFailed,
        },
        disk: stall.disk.map(|role| role.serial().to_owned()),
    }
}

/// Resumes a stalled machine on request.
pub async fn resume(m: &Arc<Machine>, live: &Live, op: &Op) -> Result<(), ApiError> {
    op.stage("resume");
    live.engine.try_again(&live.handles).await.map_err(IntoApi::into_api)?;
    let mut stall = live.stall.clone();
    let goes_on = tokio::time::timeout(GOES_ON, stall.wait_for(Option::is_none))
        .await
        .is_ok();
    if !goes_on && let Some(stall) = live.stalled_now() {
        return Err(error(&stall));
    }
    went_on(m, live).await;
    Ok(())
}

/// Its clock stood still, and it may have been frozen when the disk became full.
async fn went_on(m: &Arc<Machine>, live: &Live) {
    tracing::info!(machine = %m.id, "it runs again: its disk can be written");
    if !save::go_on(m, live).await {
        tracing::warn!(machine = %m.id, "its clock is not set");
    }
}

/// When a stalled machine was last resumed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tried(Option<Instant>);

/// Resumes a stalled machine if its disk may work now. A paused machine stays paused.
pub async fn look(m: &Arc<Machine>, live: &Live, stall: &Stall, tried: &mut Tried) {
    if m.state() != MachineState::Running {
        return;
    }
    if let Err(e) = space::probe(&m.paths.state, ENOUGH)
        && space::says_full(&e)
    {
        return;
    }
    let due = tried.0.is_none_or(|at| at.elapsed() >= SELDOM);
    if stall.kind == StallKind::Failed && !due {
        return;
    }
    tried.0 = Some(Instant::now());
    if let Err(e) = live.engine.try_again(&live.handles).await {
        tracing::warn!(machine = %m.id, error = %error::chain(&e), "it cannot be resumed");
        return;
    }
    let mut going = live.stall.clone();
    if tokio::time::timeout(GOES_ON, going.wait_for(Option::is_none))
        .await
        .is_ok()
    {
        went_on(m, live).await;
    }
}

#[cfg(test)]
mod tests {
    use banger_core::plan::DiskRole;

    use super::*;

    #[test]
    fn the_error_is_of_its_kind() {
        let full = Stall {
            kind: StallKind::NoSpace,
            disk: Some(DiskRole::Work),
        };
        let told = error(&full);
        assert_eq!(told.code, ErrorCode::NoSpace);
        assert!(
            told.message.contains("full") && told.message.contains("the work disk"),
            "{}",
            told.message
        );
        let failed = Stall {
            kind: StallKind::Failed,
            disk: None,
        };
        assert_eq!(error(&failed).code, ErrorCode::Engine);
        assert!(words(&failed).contains(": a disk cannot"), "{}", words(&failed));
    }
}
