//! Saving a machine that runs: its guest frozen, its engine's memory and devices written out, its disks frozen, and the guest let
//! go again.
//!
//! ```text
//!   fresh layers ─▶ engine: copies what there is ─▶ agent: freezes ─▶ engine: saves the rest ─▶ disks settled ─▶ agent: renews
//! ```
//!
//! Nothing of the guest but its kernel and the agent runs between freeze and renew, so that nothing of it runs in a copy before the
//! copy is itself.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use banger_core::plan::DiskRole;
use banger_proto::agent::{Freeze, Renew};
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::{AfterSave, EngineError, SavePlan, Step, Steps};

use super::checkpoint;
use super::disks;
use super::live::Live;
use super::record::Machine;
use crate::agent::LinkError;
use crate::agent::gate::Closed;
use crate::blocking::blocking;
use crate::error::IntoApi;
use crate::failpoint;

/// How long the guest may take to freeze.
const FREEZE: Duration = Duration::from_secs(10);
/// How long it may take to go on.
const RENEW: Duration = Duration::from_secs(20);
/// How often a guest is asked to go on that could not be reached.
const TRIES: u32 = 3;

/// What is to be saved.
#[derive(Debug, Clone, Copy)]
pub struct Take<'a> {
    /// Where memory and devices go; without, only the disks are frozen.
    pub memory: Option<&'a Path>,
    /// Freeze the disks under this name of a layer.
    pub layer: Option<&'a str>,
    /// What becomes of the machine.
    pub then: AfterSave,
}

/// Saves a running machine. What fails leaves it running as before. Comes back with how long its programs stood still.
pub async fn take(m: &Arc<Machine>, take: Take<'_>) -> Result<Duration, ApiError> {
    let live = m.live().ok_or_else(|| no_engine(m))?;
    if !m.paths.disks().is_dir() {
        let message = format!(
            "machine `{}` was started by an older banger, which could not do this",
            m.name()
        );
        return Err(ApiError::new(ErrorCode::Unsupported, message)
            .hint(format!("start it anew: banger vm restart {}", m.name())));
    }
    let still = Arc::new(Still::default());
    let saved = save(m, &live, take, &still).await;
    let Some(since) = still.since() else {
        return saved.map(|()| Duration::ZERO);
    };
    if take.then == AfterSave::Stopped && saved.is_ok() {
        return Ok(since.elapsed());
    }
    // It may be frozen though it did not say so.
    let renewed = go_on(m, &live).await;
    still.state().gate = None;
    let stood_still = since.elapsed();
    saved?;
    if renewed { Ok(stood_still) } else { Err(stuck(m)) }
}

/// A guest that is asked to hold still.
#[derive(Debug, Default)]
struct Still(Mutex<HoldingStill>);

#[derive(Debug, Default)]
struct HoldingStill {
    /// Since when.
    since: Option<Instant>,
    /// Why it could not.
    failed: Option<ApiError>,
    /// Keeps requests from it.
    gate: Option<Closed>,
}

impl Still {
    fn state(&self) -> std::sync::MutexGuard<'_, HoldingStill> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn since(&self) -> Option<Instant> {
        self.state().since
    }
}

async fn save(m: &Machine, live: &Live, take: Take<'_>, still: &Arc<Still>) -> Result<(), ApiError> {
    failpoint::hit("save.begun").await?;
    let dir = m.paths.disks();
    let layers = match take.layer {
        Some(layer) => disks::begin_freeze(&dir, layer).inspect_err(|_| undo(&dir, layer))?,
        None => Vec::new(),
    };
    let base = Some(m.paths.memory()).filter(|path| take.memory.is_some() && path.exists());
    let plan = SavePlan {
        memory: take.memory.map(checkpoint::files),
        base,
        layers,
        then: take.then,
    };
    let steps = Steps {
        hold_still: hold_still(live.clone(), take.memory.is_none(), take.then, still.clone()),
        while_still: match take.layer {
            Some(layer) => copy_still(m, layer),
            None => Box::pin(std::future::ready(Ok(()))),
        },
    };
    let saved = live.engine.save(&live.handles, &plan, steps).await;
    // What the guest said is the better reason.
    let saved = saved.map_err(|e| still.state().failed.take().unwrap_or_else(|| e.into_api()));
    if let Some(layer) = take.layer {
        match &saved {
            Ok(_) => {
                failpoint::hit("save.saved").await?;
                disks::end_freeze(&dir, layer)?;
            }
            // Whether the engine has followed is known to the engine alone.
            Err(_) => match live.engine.writes_to(&live.handles).await {
                Ok(files) => disks::settle(&dir, Some(&files))?,
                Err(_) if live.exited.is_cancelled() => disks::settle(&dir, None)?,
                Err(e) => return Err(e.into_api()),
            },
        }
    }
    saved.map(drop)
}

/// Freezes the guest. One that is not to run again gives up its connection too, so that it has none when it goes on.
fn hold_still(live: Live, sync: bool, then: AfterSave, still: Arc<Still>) -> Step {
    let told = still.clone();
    let work = async move {
        {
            let mut still = still.state();
            still.gate = Some(live.link.hold());
            still.since = Some(Instant::now());
        }
        let freeze = Freeze { template: false, sync };
        live.link.freeze(&freeze, FREEZE).await.map_err(IntoApi::into_api)?;
        if then == AfterSave::Stopped
            && let Err(e) = live.link.hang_up(tokio::time::Instant::now() + FREEZE).await
        {
            tracing::debug!(error = %e, "saved with an open connection");
        }
        failpoint::hit("save.frozen").await
    };
    Box::pin(async move {
        work.await.map_err(|e| {
            let what = "let the guest hold still".to_owned();
            let source = std::io::Error::other(e.message.clone());
            told.state().failed = Some(e);
            EngineError::Io { what, source }
        })
    })
}

/// Copies the disks where a layer is a copy.
fn copy_still(m: &Machine, layer: &str) -> Step {
    let (dir, layer) = (m.paths.disks(), layer.to_owned());
    let nodes: Vec<PathBuf> = match m.services.hosting.get() {
        Some(system) => [DiskRole::Root, DiskRole::Work]
            .map(|role| system.layout.node(&m.id, role))
            .into(),
        None => Vec::new(),
    };
    Box::pin(async move {
        let copied = blocking(move || disks::copy_still(&dir, &layer, &nodes)).await;
        copied.map_err(|e| EngineError::Io {
            what: "copy the disks".to_owned(),
            source: match e.code {
                ErrorCode::NoSpace => std::io::ErrorKind::StorageFull.into(),
                _ => std::io::Error::other(e.message),
            },
        })
    })
}

fn undo(dir: &Path, layer: &str) {
    if let Err(e) = disks::undo_freeze(dir, layer) {
        tracing::error!(dir = %dir.display(), error = %e.message, "a freeze of disks is not undone");
    }
}

/// Lets a frozen guest go on as who it was. False when it could not be reached.
pub async fn go_on(m: &Machine, live: &Live) -> bool {
    for attempt in 1..=TRIES {
        let renew = match renew(m.id.as_str(), None) {
            Ok(renew) => renew,
            Err(_) => return false,
        };
        match live.link.renew(&renew, RENEW).await {
            Ok(_) => return true,
            Err(_) if live.exited.is_cancelled() => return false,
            // It is asked again when it goes on.
            Err(LinkError::Stalled(_)) => return false,
            Err(e) => tracing::error!(machine = %m.id, attempt, error = %e, "the frozen guest does not go on"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    false
}

/// The request to go on, with fresh entropy and the time of now.
pub fn renew(machine_id: &str, identity: Option<banger_proto::agent::Personalize>) -> Result<Renew, ApiError> {
    Ok(Renew {
        machine_id: machine_id.to_owned(),
        time_ns: now_ns(),
        entropy: entropy()?,
        identity,
    })
}

/// Wall clock in nanoseconds since the epoch.
pub fn now_ns() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or_default()
}

/// 64 fresh random bytes in hexadecimal.
pub fn entropy() -> Result<String, ApiError> {
    let mut entropy = [0; 64];
    getrandom::fill(&mut entropy).map_err(|e| ApiError::new(ErrorCode::Internal, format!("no randomness: {e}")))?;
    Ok(banger_core::id::hex(&entropy))
}

/// A fresh name for a layer.
pub fn layer_name() -> Result<String, ApiError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|e| ApiError::new(ErrorCode::Internal, format!("no randomness: {e}")))?;
    Ok(banger_core::id::hex(&bytes))
}

fn no_engine(m: &Machine) -> ApiError {
    ApiError::new(ErrorCode::WrongState, format!("machine `{}` has no engine", m.name()))
}

fn stuck(m: &Machine) -> ApiError {
    ApiError::new(
        ErrorCode::Guest,
        format!("the guest of machine `{}` was saved and does not go on", m.name()),
    )
    .hint(format!(
        "start it anew: banger vm kill {0}, banger vm start {0}",
        m.name()
    ))
}
