//! Running copies of a running machine.
//!
//! ```text
//!   rows of all copies, `creating` ─▶ source saved in forks/<id>/ ─▶ each copy: disks over its layers, its memory mapped
//!     ─▶ all run ─▶ forks/<id>/ removed: the copies hold what they need by hard link
//! ```
//!
//! All copies or none: where one fails, the others are removed. The source runs on in any case.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::AfterSave;
use tokio::sync::watch;

use super::checkpoint::Checkpoint;
use super::record::Machine;
use super::restore::{self, Becomes};
use super::save::{self, Take};
use super::stages::Stages;
use super::start::{self, remove_dir};
use super::{console, disks, snapshot};
use crate::failpoint;
use crate::services::Services;

/// Most copies in one request.
pub const MOST: u32 = 64;

/// What the copies of one fork wait for: the saved source.
pub type Source = watch::Receiver<Option<Saved>>;
/// Who tells them.
pub type Tell = watch::Sender<Option<Saved>>;
/// What became of the save.
pub type Saved = Result<Arc<Checkpoint>, ApiError>;

/// Where the source of a fork is saved. Removed with the last of those who start from it.
#[derive(Debug)]
pub struct Place(PathBuf);

impl Place {
    /// A place of its own, not made yet.
    pub fn new(services: &Services) -> Result<Self, ApiError> {
        Ok(Self(services.paths.forks().join(save::layer_name()?)))
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(e) = remove_dir(&self.0) {
            tracing::error!(error = %e.message, "what copies were started from is not removed");
        }
    }
}

/// Saves the source, which runs on.
pub async fn save_source(m: &Arc<Machine>, dir: &Path) -> Result<Checkpoint, ApiError> {
    if let Some(parent) = dir.parent()
        && !parent.is_dir()
    {
        disks::make_dir(parent)?;
    }
    disks::make_dir(dir)?;
    failpoint::hit("fork.begun").await?;
    let layer = save::layer_name()?;
    let take = Take {
        memory: Some(dir),
        layer: Some(&layer),
        then: AfterSave::AsBefore,
    };
    let paused = save::take(m, take).await?;
    console::keep(&m.paths.console_log(), dir);
    failpoint::hit("fork.saved").await?;
    snapshot::finish(m, dir, true, paused).await
}

/// Starts a copy, whose row says `creating`.
pub async fn start_copy(
    m: &Arc<Machine>,
    stages: &mut Stages,
    source: &str,
    mut saved: Source,
) -> Result<(), ApiError> {
    stages.enter("source");
    let checkpoint = stages
        .cancellable(async {
            let saved = saved.wait_for(Option::is_some).await;
            match saved.ok().and_then(|saved| saved.clone()) {
                Some(result) => result,
                None => Err(ApiError::new(ErrorCode::Internal, "the fork broke off")),
            }
        })
        .await?;
    stages.restart_clock();
    stages.enter("disks");
    disks::make_dir(&m.paths.state)?;
    m.describe();
    disks::create_over(&m.paths.disks(), &checkpoint.disks())?;
    failpoint::hit("fork.disks").await?;
    stages.check()?;
    m.happen(banger_core::state::Event::DisksReady, |_| {}).await?;
    start::begin(m).await?;
    let of = format!("the console of {source}, up to the copy");
    console::inherit(&checkpoint.dir, &m.paths.console_log(), &of);
    restore::launch(m, stages, &checkpoint).await?;
    restore::go_on(m, stages, &checkpoint, Becomes::ThisMachine).await?;
    let mut report = stages.report("fork", Some(source.to_owned()));
    report.source_paused_ms = Some(checkpoint.manifest.paused_ms);
    m.change(|row| {
        row.boot = Some(report);
        Ok(())
    })
    .await
}

/// Removes what an earlier daemon left: its forks are over.
pub fn sweep(services: &Services) {
    if let Err(e) = remove_dir(&services.paths.forks()) {
        tracing::warn!(error = %e.message, "what is left of forks is not removed");
    }
}
