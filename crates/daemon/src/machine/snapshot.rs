//! Snapshots of a machine: taken, listed, restored, removed.
//!
//! One is a checkpoint in `snapshots/<name>/`, written in `snapshots/.new-<name>/` and moved to its place when it is whole. It
//! shares its layers of disks with the machine and with every copy by hard link, so that any of them can go first.
//!
//! **A restore** replaces the disks by fresh ones over the snapshot's layers, and with memory makes the machine a suspended one
//! that is then woken:
//!
//! ```text
//!   engine ended ─▶ disks.new/, restored.new/ prepared ─▶ disks exchanged ─▶ restored.new/ becomes suspended/ ─▶ woken
//! ```
//!
//! Cut off before the exchange it is undone, after it it is gone on with ([`settle`]): a mark among the disks tells.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use banger_core::name::MachineName;
use banger_core::state::Event;
use banger_proto::api::{MachineState, Snapshot};
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::AfterSave;

use super::checkpoint::Checkpoint;
use super::record::Machine;
use super::save::{self, Take};
use super::stages::Stages;
use super::start::{self, remove_dir};
use super::{create, disks, stop, suspend};
use crate::blocking::blocking;
use crate::error::{self, IntoApi};
use crate::failpoint;
use crate::ops::Op;

/// Begins the name of one that is being taken.
const STAGING: &str = ".new-";
/// Among disks that were prepared for a restore: once they are the machine's, it is gone on with.
const RESTORING: &str = "restoring";

fn place(m: &Machine, name: &str) -> PathBuf {
    m.paths.snapshots().join(name)
}

fn restoring(m: &Machine) -> (PathBuf, PathBuf) {
    (m.paths.state.join("disks.new"), m.paths.state.join("restored.new"))
}

/// Checks a name: it names a directory and stands in commands, so it is what a machine may be called.
pub fn check_name(name: &str) -> Result<String, ApiError> {
    MachineName::parse(name)
        .map(|name| name.as_str().to_owned())
        .map_err(|e| {
            let mut error = e.into_api();
            error.message = error.message.replace("machine name", "snapshot name");
            error
        })
}

/// Takes a snapshot.
pub async fn take(m: &Arc<Machine>, op: &Op, name: &str, disk_only: bool) -> Result<(), ApiError> {
    let place = place(m, name);
    if place.exists() {
        let message = format!("machine `{}` has a snapshot `{name}` already", m.name());
        return Err(ApiError::new(ErrorCode::Conflict, message)
            .hint(format!("remove it: banger vm snapshot delete {} {name}", m.name())));
    }
    op.stage("snapshot");
    let staging = m.paths.snapshots().join(format!("{STAGING}{name}"));
    let taken = write(m, &staging, disk_only).await;
    let taken = match taken {
        Ok(checkpoint) => checkpoint.commit(&place).map(drop),
        Err(e) => Err(e),
    };
    if taken.is_err() {
        remove_dir(&staging)?;
    }
    failpoint::hit("snapshot.committed").await?;
    taken
}

async fn write(m: &Arc<Machine>, staging: &Path, disk_only: bool) -> Result<Checkpoint, ApiError> {
    if !m.paths.snapshots().is_dir() {
        disks::make_dir(&m.paths.snapshots())?;
    }
    remove_dir(staging)?;
    disks::make_dir(staging)?;
    failpoint::hit("snapshot.begun").await?;
    let layer = save::layer_name()?;
    let (paused, memory) = if m.state() == MachineState::Running {
        let take = Take {
            memory: (!disk_only).then_some(staging),
            layer: Some(&layer),
            then: AfterSave::AsBefore,
        };
        (save::take(m, take).await?, !disk_only)
    } else {
        start::ensure_disks(m).await?;
        disks::freeze_at_rest(&m.paths.disks(), &layer)?;
        (Duration::ZERO, false)
    };
    failpoint::hit("snapshot.saved").await?;
    finish(m, staging, memory, paused).await
}

/// Adds the frozen disks to saved memory and seals both.
pub async fn finish(m: &Machine, dir: &Path, memory: bool, paused: Duration) -> Result<Checkpoint, ApiError> {
    let frozen = dir.join("disks");
    disks::export(&m.paths.disks(), &frozen)?;
    let layers = disks::read_list(&frozen)?.layers;
    Checkpoint::seal(&m.services, dir, m.id.as_str(), m.row().spec, layers, memory, paused).await
}

/// All snapshots, oldest first.
pub fn list(m: &Machine) -> Vec<Snapshot> {
    let entries = std::fs::read_dir(m.paths.snapshots()).into_iter().flatten().flatten();
    let names = entries.filter_map(|e| e.file_name().into_string().ok());
    let mut list: Vec<Snapshot> = names
        .filter(|name| !name.starts_with('.'))
        .filter_map(|name| match Checkpoint::read(&place(m, &name)) {
            Ok(Some(checkpoint)) => Some(show(m, name, &checkpoint)),
            Ok(None) => None,
            Err(e) => {
                tracing::warn!(machine = %m.id, snapshot = name, error = %e.message, "not listed");
                None
            }
        })
        .collect();
    list.sort_by(|a, b| (&a.created_at, &a.name).cmp(&(&b.created_at, &b.name)));
    list
}

fn show(m: &Machine, name: String, checkpoint: &Checkpoint) -> Snapshot {
    Snapshot {
        name,
        machine: m.name(),
        created_at: checkpoint.manifest.created_at.clone(),
        memory: checkpoint.manifest.memory.is_some(),
        memory_bytes: checkpoint.memory_bytes(),
        disk_bytes: checkpoint.disk_bytes(),
        paused_ms: checkpoint.manifest.paused_ms,
    }
}

/// One of them.
pub fn find(m: &Machine, name: &str) -> Result<(Snapshot, Checkpoint), ApiError> {
    let found = match check_name(name) {
        Ok(name) => Checkpoint::read(&place(m, &name))?.map(|checkpoint| (show(m, name, &checkpoint), checkpoint)),
        Err(_) => None,
    };
    found.ok_or_else(|| {
        let names: Vec<String> = list(m).into_iter().map(|s| s.name).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let error = crate::stock::unknown("snapshot", name, &names);
        match names.is_empty() {
            true => error.hint(format!(
                "machine `{0}` has none: banger vm snapshot create {0} NAME",
                m.name()
            )),
            false => error,
        }
    })
}

/// Removes one.
pub async fn delete(m: &Arc<Machine>, name: &str) -> Result<(), ApiError> {
    let (snapshot, _) = find(m, name)?;
    // Away at once, so that nobody restores what is half removed.
    let gone = m.paths.snapshots().join(format!("{STAGING}{}", snapshot.name));
    remove_dir(&gone)?;
    let place = place(m, &snapshot.name);
    std::fs::rename(&place, &gone).map_err(|e| error::io(format_args!("remove {}", place.display()), e))?;
    blocking(move || remove_dir(&gone)).await
}

/// Puts the machine back to a snapshot. With memory it runs then.
pub async fn restore(m: &Arc<Machine>, stages: &mut Stages, name: &str) -> Result<(), ApiError> {
    let (_, checkpoint) = find(m, name)?;
    let memory = checkpoint.manifest.memory.is_some();
    if memory {
        stages.enter("check");
        checkpoint.check(&m.services).await?;
    }
    stages.enter("disks");
    start::ensure_disks(m).await?;
    let prepared = prepare(m, &checkpoint);
    if prepared.is_err() {
        clear(m)?;
    }
    prepared?;
    failpoint::hit("rollback.prepared").await?;
    match m.state() {
        MachineState::Suspended => suspend::drop_memory(m).await?,
        MachineState::Stopped => {}
        _ => {
            if m.state() != MachineState::Stopping {
                m.happen(Event::StopBegins, |_| {}).await?;
            }
            if let Some(live) = m.live() {
                stop::kill_now(&live).await?;
            }
            stop::engine_gone(m, Some(format!("it was put back to snapshot `{name}`"))).await?;
        }
    }
    failpoint::hit("rollback.stopped").await?;
    let (fresh, _) = restoring(m);
    exchange(&fresh, &m.paths.disks())?;
    failpoint::hit("rollback.exchanged").await?;
    put_in_place(m, &checkpoint).await?;
    failpoint::hit("rollback.placed").await?;
    if !memory {
        return Ok(());
    }
    let woken = async {
        let mut report = suspend::wake(m, stages).await?;
        "snapshot".clone_into(&mut report.how);
        report.from = Some(name.to_owned());
        m.change(|row| {
            row.boot = Some(report);
            Ok(())
        })
        .await
    };
    // What failed before has ended nothing, or the machine is stopped.
    create::after_start(m, woken.await, false).await
}

/// Everything that is to be put in place, beside it.
fn prepare(m: &Machine, checkpoint: &Checkpoint) -> Result<(), ApiError> {
    let (fresh, restored) = restoring(m);
    clear(m)?;
    stop::remove_file(&m.paths.disks().join(RESTORING))?;
    disks::create_over(&fresh, &checkpoint.disks())?;
    let mark = fresh.join(RESTORING);
    std::fs::write(&mark, []).map_err(|e| error::io(format_args!("write {}", mark.display()), e))?;
    if checkpoint.manifest.memory.is_none() {
        return Ok(());
    }
    disks::make_dir(&restored)?;
    for name in ["memory", "state", "manifest.json"] {
        let from = checkpoint.dir.join(name);
        std::fs::hard_link(&from, restored.join(name))
            .map_err(|e| error::io(format_args!("link {}", from.display()), e))?;
    }
    suspend::mark_restored(&restored)
}

async fn put_in_place(m: &Arc<Machine>, checkpoint: &Checkpoint) -> Result<(), ApiError> {
    let (old, restored) = restoring(m);
    let spec = checkpoint.manifest.spec.clone();
    let same = move |row: &mut crate::db::MachineRow| {
        // The machine is what it was then, but for what its images are called now.
        row.spec.vcpu = spec.vcpu;
        row.spec.memory_mib = spec.memory_mib;
        row.spec.disk_bytes = spec.disk_bytes;
    };
    if restored.is_dir() {
        remove_dir(&m.paths.suspended())?;
        std::fs::rename(&restored, m.paths.suspended())
            .map_err(|e| error::io(format_args!("move {}", restored.display()), e))?;
        m.happen(Event::MemorySaved, |row| {
            row.cause = None;
            same(row);
        })
        .await?;
    } else {
        m.change(|row| {
            same(row);
            Ok(())
        })
        .await?;
    }
    remove_dir(&old)?;
    stop::remove_file(&m.paths.disks().join(RESTORING))
}

fn clear(m: &Machine) -> Result<(), ApiError> {
    let (fresh, restored) = restoring(m);
    remove_dir(&fresh).and(remove_dir(&restored))
}

fn exchange(a: &Path, b: &Path) -> Result<(), ApiError> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)
        .map_err(|e| error::io(format_args!("exchange {} and {}", a.display(), b.display()), e.into()))
}

/// Settles a restore that was cut off, and clears what is left of a snapshot that was being taken.
pub async fn settle(m: &Arc<Machine>) -> Result<(), ApiError> {
    sweep(m)?;
    let (_, restored) = restoring(m);
    let belongs = match (Checkpoint::read(&restored), disks::read_list(&m.paths.disks())) {
        (Ok(Some(checkpoint)), Ok(list)) if checkpoint.manifest.layers == list.layers => Some(checkpoint),
        _ => None,
    };
    // The layers alone do not tell: those of the latest snapshot are the machine's before the exchange, too.
    let belongs = belongs.filter(|_| m.paths.disks().join(RESTORING).exists());
    match belongs {
        Some(checkpoint) if m.state() == MachineState::Stopped => {
            tracing::info!(machine = %m.id, "a restore that was cut off is gone on with");
            put_in_place(m, &checkpoint).await
        }
        _ => clear(m),
    }
}

/// Clears what is left of snapshots that were being taken or removed.
pub fn sweep(m: &Machine) -> Result<(), ApiError> {
    let mut swept = Ok(());
    for entry in std::fs::read_dir(m.paths.snapshots()).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(STAGING) {
            swept = swept.and(remove_dir(&entry.path()));
        }
    }
    swept
}
