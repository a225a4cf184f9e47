//! Pausing and suspending, and what undoes them.
//!
//! A paused machine's engine stands still. A suspended machine has no engine: its memory is in `suspended/`, and a wake goes on with
//! it. Its disks are as the memory knows them, for nothing has written to them since.
//!
//! ```text
//!   suspend:  row `suspending` ─▶ memory saved in suspended.new/ ─▶ suspended/ ─▶ engine ended ─▶ row `suspended`
//!   wake:     row `starting` ─▶ engine launched, paused ─▶ suspended/ becomes suspended.spent/ ─▶ it runs ─▶ row `running`
//! ```
//!
//! Until `suspended/` is there a suspension can only be taken back, and from then on only be gone on with, unless the engine still
//! lives: then it is taken back. Until it is spent a wake that fails leaves the machine suspended.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use banger_core::state::Event;
use banger_proto::api::{BootReport, MachineState};
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::{AfterSave, Still};

use super::checkpoint::Checkpoint;
use super::live::Live;
use super::record::Machine;
use super::restore::{self, Becomes};
use super::save::{self, Take};
use super::stages::Stages;
use super::start::{self, remove_dir};
use super::{disks, stop};
use crate::blocking::blocking;
use crate::error::{self, IntoApi};
use crate::failpoint;
use crate::ops::Op;

/// How long a wake may take at least, once its memory is the running machine's.
const FINISH: Duration = Duration::from_secs(60);

/// How long a guest may take to answer that was paused.
pub const ANSWER: Duration = Duration::from_secs(30);

/// Beside memory that a snapshot was restored to.
const RESTORED: &str = "restored";

/// Where a suspension is written before it is whole.
pub fn staging(m: &Machine) -> PathBuf {
    m.paths.state.join("suspended.new")
}

/// Where the memory of a machine is that has begun to run again.
fn spent(m: &Machine) -> PathBuf {
    m.paths.state.join("suspended.spent")
}

/// Marks memory as that of an earlier time: what goes on with it is the machine, but another course of its life.
pub fn mark_restored(dir: &Path) -> Result<(), ApiError> {
    let path = dir.join(RESTORED);
    std::fs::write(&path, []).map_err(|e| error::io(format_args!("write {}", path.display()), e))
}

/// As whom a machine goes on with the memory in `dir`. Sessions of an earlier time are nobody's, and the name may be another since.
fn becomes(dir: &Path) -> Becomes {
    if dir.join(RESTORED).exists() {
        Becomes::ThisMachine
    } else {
        Becomes::Itself
    }
}

/// Stops the virtual CPUs.
pub async fn pause(m: &Arc<Machine>, op: &Op) -> Result<(), ApiError> {
    op.stage("pause");
    m.happen(Event::Pauses, |_| {}).await?;
    let live = start::live(m)?;
    if let Err(e) = live.engine.pause(&live.handles).await {
        m.happen(Event::Resumes, |_| {}).await?;
        return Err(e.into_api());
    }
    Ok(())
}

/// Lets them run again. A machine whose guest does not answer stays paused.
pub async fn resume(m: &Arc<Machine>, op: &Op) -> Result<(), ApiError> {
    op.stage("resume");
    let live = start::live(m)?;
    if let Err(e) = run_again(m, &live, ANSWER).await {
        let told = m.change(|row| {
            row.cause = Some(e.message.clone());
            Ok(())
        });
        return told.await.and(Err(e));
    }
    m.happen(Event::Resumes, |row| row.cause = None).await
}

/// Lets stopped virtual CPUs run, and makes sure that the guest answers. One that does not within this time is stopped again: a machine
/// that is called running can be used.
pub async fn run_again(m: &Arc<Machine>, live: &Live, within: Duration) -> Result<(), ApiError> {
    let resumed = live.engine.resume(&live.handles, Still::Paused).await;
    resumed.map_err(IntoApi::into_api)?;
    // Its clock stood still too.
    let answered = tokio::time::timeout(within, save::go_on(m, live)).await;
    if answered.unwrap_or(false) {
        return Ok(());
    }
    if !live.exited.is_cancelled()
        && let Err(e) = live.engine.pause(&live.handles).await
    {
        tracing::error!(machine = %m.id, error = %e, "a guest that does not answer is not paused again");
    }
    let message = format!(
        "the guest of machine `{}` did not answer within {within:?} after it was resumed, and was paused again",
        m.name()
    );
    Err(ApiError::new(ErrorCode::Guest, message).hint(format!(
        "try again: banger vm resume {0}; or start it anew, without its memory: banger vm restart {0}",
        m.name()
    )))
}

/// Writes the memory to disk and ends the engine. What fails leaves the machine running.
///
/// With `idle` only if nobody uses it: whoever comes now either finds it `suspending`, or is seen here.
pub async fn suspend(m: &Arc<Machine>, op: &Op, idle: bool) -> Result<(), ApiError> {
    op.stage("save");
    m.happen(Event::SuspendBegins, |_| {}).await?;
    if idle && m.used.in_use() {
        return m.happen(Event::Resumes, |_| {}).await;
    }
    let saved = write(m).await;
    let live = start::live(m)?;
    if let Err(e) = saved {
        if live.exited.is_cancelled() {
            return Err(e);
        }
        take_back(m).await?;
        return Err(e);
    }
    failpoint::hit("suspend.committed").await?;
    op.stage("end");
    // It has written out its disks when it stopped.
    stop::kill_now(&live).await?;
    failpoint::hit("suspend.ended").await?;
    finish(m).await
}

/// The engine of a suspended machine is gone.
pub async fn finish(m: &Arc<Machine>) -> Result<(), ApiError> {
    let cleaned = stop::clean_up(m).await;
    m.happen(Event::MemorySaved, |_| {}).await?;
    cleaned
}

async fn write(m: &Arc<Machine>) -> Result<(), ApiError> {
    failpoint::hit("suspend.row").await?;
    let dir = staging(m);
    remove_dir(&dir)?;
    disks::make_dir(&dir)?;
    let take = Take {
        memory: Some(&dir),
        layer: None,
        then: AfterSave::Stopped,
    };
    let paused = save::take(m, take).await?;
    failpoint::hit("suspend.saved").await?;
    let layers = disks::read_list(&m.paths.disks())?.layers;
    let row = m.row();
    // The disk writes while the digests are computed.
    let sealed = Checkpoint::seal(&m.services, &dir, m.id.as_str(), row.spec, layers, true, paused);
    let (checkpoint, synced) = tokio::join!(sealed, sync(dir.clone()));
    let checkpoint = checkpoint?;
    synced?;
    failpoint::hit("suspend.sealed").await?;
    checkpoint.commit(&m.paths.suspended()).map(drop)
}

/// Memory that is nowhere else outlives the host's power.
async fn sync(dir: PathBuf) -> Result<(), ApiError> {
    let work = move || {
        for name in ["memory", "state"] {
            let path = dir.join(name);
            std::fs::File::open(&path)
                .and_then(|file| file.sync_data())
                .map_err(|e| error::io(format_args!("write {}", path.display()), e))?;
        }
        Ok::<_, ApiError>(())
    };
    blocking(work).await
}

/// A suspension that came to nothing, while its engine lives: the machine runs on.
pub async fn take_back(m: &Arc<Machine>) -> Result<(), ApiError> {
    let live = start::live(m)?;
    let removed = remove_dir(&staging(m)).and(remove_dir(&m.paths.suspended()));
    match run_again(m, &live, ANSWER).await {
        Ok(()) => m.happen(Event::Resumes, |_| {}).await?,
        Err(e) => {
            let paused = m.happen(Event::Pauses, |row| row.cause = Some(e.message.clone()));
            return paused.await.and(removed).and(Err(e));
        }
    }
    removed
}

/// The memory of a machine that is suspended; an error says why it cannot be used.
fn saved(m: &Machine) -> Result<Checkpoint, ApiError> {
    let found = Checkpoint::read(&m.paths.suspended())?;
    let checkpoint = found.ok_or_else(|| {
        let message = format!("the memory of machine `{}` is not there any more", m.name());
        ApiError::new(ErrorCode::Conflict, message)
    })?;
    if checkpoint.manifest.layers != disks::read_list(&m.paths.disks())?.layers {
        let message = format!("the memory of machine `{}` does not belong to its disks", m.name());
        return Err(ApiError::new(ErrorCode::Conflict, message));
    }
    Ok(checkpoint)
}

/// Brings a suspended machine back to where it was.
pub async fn wake(m: &Arc<Machine>, stages: &mut Stages) -> Result<BootReport, ApiError> {
    let lost = |e: ApiError| {
        if e.hint.is_some() {
            return e;
        }
        e.hint(format!(
            "boot it without its memory: banger vm start --cold {}",
            m.name()
        ))
    };
    stages.enter("prepare");
    let checkpoint = saved(m).map_err(lost)?;
    checkpoint.check(&m.services).await.map_err(lost)?;
    start::begin(m).await?;
    let launched = async {
        restore::launch(m, stages, &checkpoint).await?;
        failpoint::hit("wake.launched").await?;
        // From here on it runs, and its disks with it.
        let spent = spent(m);
        remove_dir(&spent)?;
        std::fs::rename(m.paths.suspended(), &spent)
            .map_err(|e| error::io(format_args!("move {}", m.paths.suspended().display()), e))
    };
    if let Err(e) = launched.await {
        restore::take_back(m).await?;
        m.happen(Event::MemorySaved, |_| {}).await?;
        return Err(e);
    }
    // What is in its memory is nowhere else now: whoever changes his mind stops it when it runs.
    stages.settle(FINISH);
    failpoint::hit("wake.spent").await?;
    restore::go_on(m, stages, &checkpoint, becomes(&spent(m))).await?;
    remove_dir(&spent(m))?;
    Ok(stages.report("wake", None))
}

/// Forgets the memory of a suspended machine: it is stopped, its disks as after a power cut.
pub async fn drop_memory(m: &Arc<Machine>) -> Result<(), ApiError> {
    m.happen(Event::MemoryDropped, |row| {
        row.cause = Some("its memory was dropped by request".to_owned());
    })
    .await?;
    remove_dir(&m.paths.suspended())
}

/// Whether an engine of a machine that is `starting` was launched for a wake that has not come to run it.
pub fn unspent(m: &Machine) -> bool {
    m.state() == MachineState::Starting && m.paths.suspended().is_dir()
}

/// Whether a wake has let the memory go that it started from.
pub fn was_spent(m: &Machine) -> bool {
    m.state() == MachineState::Starting && spent(m).is_dir()
}

/// Goes on with a wake that was cut off after its memory was spent.
pub async fn finish_wake(m: &Arc<Machine>, stages: &mut Stages) -> Result<(), ApiError> {
    let found = Checkpoint::read(&spent(m))?;
    let checkpoint = found.ok_or_else(|| {
        let message = format!("the memory of machine `{}` is not there any more", m.name());
        ApiError::new(ErrorCode::Conflict, message)
    })?;
    restore::go_on(m, stages, &checkpoint, becomes(&spent(m))).await?;
    remove_dir(&spent(m))
}

/// Clears what a wake or a suspension left that is over.
pub fn sweep(m: &Machine) -> Result<(), ApiError> {
    let mut swept = remove_dir(&staging(m)).and(remove_dir(&spent(m)));
    if !matches!(
        m.state(),
        MachineState::Suspended | MachineState::Suspending | MachineState::Starting
    ) {
        swept = swept.and(remove_dir(&m.paths.suspended()));
    }
    swept
}
