//! Snapshots of a machine: taken, listed, restored, removed.
//!
//! One is a checkpoint in `snapshots/<name>/`, written in `snapshots/.new-<name>/` and moved to its place when it is whole. It
//! shares its layers of disks with the machine and with every copy by hard link, so that any of them can go first.
//!
//! **A restore** replaces the disks by fresh ones over the snapshot's layers, and with memory makes the machine a suspended one
//! that is then woken:
//!
//! ```text
//!   disks.new/, restored.new/ prepared ─▶ journal written ─▶ engine ended ─▶ disks exchanged ─▶ restored.new/ becomes suspended/
//!     ─▶ journal removed ─▶ woken
//! ```
//!
//! Cut off while its engine still lives it is undone; once that is to end, the next daemon carries it out ([`settle`]). A mark among
//! the disks tells whether they were exchanged.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use banger_core::name::MachineName;
use banger_core::state::Event;
use banger_proto::api::{MachineState, Snapshot};
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::AfterSave;

use super::checkpoint::Checkpoint;
use super::journal::{self, Begun, Restore};
use super::record::Machine;
use super::save::{self, Take};
use super::stages::Stages;
use super::start::{self, remove_dir};
use super::{checkpoint, create, disks, stop, suspend};
use crate::blocking::blocking;
use crate::error::{self, IntoApi};
use crate::failpoint;
use crate::ops::Op;
use crate::{stats, time};

/// Begins the name of one that is being taken.
const STAGING: &str = ".new-";
/// Among disks that were prepared for a restore. Removed once everything is in its place.
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

/// All snapshots, oldest first. A damaged one is among them, with what is wrong.
pub fn list(m: &Machine) -> Vec<Snapshot> {
    let entries = std::fs::read_dir(m.paths.snapshots()).into_iter().flatten().flatten();
    let names = entries.filter_map(|e| e.file_name().into_string().ok());
    let mut list: Vec<Snapshot> = names
        .filter(|name| !name.starts_with('.') && check_name(name).is_ok())
        .filter_map(|name| look(m, &name).ok())
        .collect();
    list.sort_by(|a, b| (&a.created_at, &a.name).cmp(&(&b.created_at, &b.name)));
    list
}

fn read(m: &Machine, name: &str) -> Result<Checkpoint, ApiError> {
    let place = place(m, name);
    Checkpoint::read(&place)?.ok_or_else(|| {
        let message = format!("{} has no manifest.json", place.display());
        ApiError::new(ErrorCode::Conflict, message)
    })
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
        damaged: None,
    }
}

/// A snapshot whose manifest cannot be read: what its files say.
fn damaged(m: &Machine, name: String, why: String) -> Snapshot {
    let place = place(m, &name);
    let saved = checkpoint::files(&place);
    let modified = std::fs::metadata(&place).and_then(|meta| meta.modified());
    let created = modified.ok().and_then(|at| jiff::Timestamp::try_from(at).ok());
    Snapshot {
        machine: m.name(),
        created_at: created.map(time::text).unwrap_or_default(),
        memory: saved.memory.exists(),
        memory_bytes: stats::allocated(&saved.memory) + stats::allocated(&saved.state),
        disk_bytes: disks::allocated(&place.join("disks")).1,
        paused_ms: 0,
        damaged: Some(why),
        name,
    }
}

/// One of them, damaged or not.
pub fn look(m: &Machine, name: &str) -> Result<Snapshot, ApiError> {
    let name = known(m, name)?;
    Ok(match read(m, &name) {
        Ok(checkpoint) => show(m, name, &checkpoint),
        Err(e) => damaged(m, name, e.message),
    })
}

/// One that can be used.
pub fn find(m: &Machine, name: &str) -> Result<(Snapshot, Checkpoint), ApiError> {
    let name = known(m, name)?;
    match read(m, &name) {
        Ok(checkpoint) => Ok((show(m, name, &checkpoint), checkpoint)),
        Err(e) => {
            let message = format!("snapshot `{name}` of machine `{}` is damaged: {}", m.name(), e.message);
            Err(ApiError::new(ErrorCode::Conflict, message).hint(format!(
                "only its removal is left: banger vm snapshot delete {} {name}",
                m.name()
            )))
        }
    }
}

/// The name of a snapshot that is there, damaged or not.
fn known(m: &Machine, name: &str) -> Result<String, ApiError> {
    if let Ok(name) = check_name(name)
        && place(m, &name).is_dir()
    {
        return Ok(name);
    }
    let names: Vec<String> = list(m).into_iter().map(|s| s.name).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let error = crate::stock::unknown("snapshot", name, &names);
    Err(match names.is_empty() {
        true => error.hint(format!(
            "machine `{0}` has none: banger vm snapshot create {0} NAME",
            m.name()
        )),
        false => error,
    })
}

/// Removes one, damaged or not.
pub async fn delete(m: &Arc<Machine>, name: &str) -> Result<(), ApiError> {
    let name = known(m, name)?;
    // Away at once, so that nobody restores what is half removed.
    let gone = m.paths.snapshots().join(format!("{STAGING}{name}"));
    remove_dir(&gone)?;
    let place = place(m, &name);
    std::fs::rename(&place, &gone).map_err(|e| error::io(format_args!("remove {}", place.display()), e))?;
    failpoint::hit("snapshot.unlinked").await?;
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
    let spec = &checkpoint.manifest.spec;
    let restore = Restore {
        snapshot: name.to_owned(),
        memory,
        vcpu: spec.vcpu,
        memory_mib: spec.memory_mib,
        disk_bytes: spec.disk_bytes,
    };
    journal::write(m, Begun::Restore(restore.clone()))?;
    failpoint::hit("rollback.journaled").await?;
    if !matches!(
        m.state(),
        MachineState::Suspended | MachineState::Stopped | MachineState::Stopping
    ) {
        m.happen(Event::StopBegins, |_| {}).await?;
    }
    failpoint::hit("rollback.stopping").await?;
    carry_out(m, &restore).await?;
    if !memory {
        return Ok(());
    }
    wake_restored(m, stages, name).await
}

/// Ends the engine and puts in place what is prepared. Begun once, it is carried to its end by the next daemon too.
pub async fn carry_out(m: &Arc<Machine>, restore: &Restore) -> Result<(), ApiError> {
    let cause = format!("it was put back to snapshot `{}`", restore.snapshot);
    let (fresh, _) = restoring(m);
    let exchanged = !fresh.join(RESTORING).exists();
    match m.state() {
        // After the exchange it is the snapshot's memory that it has.
        MachineState::Suspended if exchanged => {}
        MachineState::Suspended => suspend::drop_memory(m).await?,
        MachineState::Stopped => {}
        _ => {
            if let Some(live) = m.live() {
                stop::kill_now(&live).await?;
            }
            failpoint::hit("rollback.killed").await?;
            stop::engine_gone(m, Some(cause)).await?;
        }
    }
    failpoint::hit("rollback.stopped").await?;
    if !exchanged {
        exchange(&fresh, &m.paths.disks())?;
    }
    failpoint::hit("rollback.exchanged").await?;
    put_in_place(m, restore).await?;
    failpoint::hit("rollback.placed").await
}

/// Wakes a machine whose memory is that of a snapshot.
pub async fn wake_restored(m: &Arc<Machine>, stages: &mut Stages, name: &str) -> Result<(), ApiError> {
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

async fn put_in_place(m: &Arc<Machine>, restore: &Restore) -> Result<(), ApiError> {
    let (old, restored) = restoring(m);
    let (vcpu, memory_mib, disk_bytes) = (restore.vcpu, restore.memory_mib, restore.disk_bytes);
    let same = move |row: &mut crate::db::MachineRow| {
        // The machine is what it was then, but for what its images are called now.
        row.spec.vcpu = vcpu;
        row.spec.memory_mib = memory_mib;
        row.spec.disk_bytes = disk_bytes;
    };
    if restored.is_dir() {
        remove_dir(&m.paths.suspended())?;
        std::fs::rename(&restored, m.paths.suspended())
            .map_err(|e| error::io(format_args!("move {}", restored.display()), e))?;
    }
    failpoint::hit("rollback.memory").await?;
    if restore.memory && m.state() != MachineState::Suspended {
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
    failpoint::hit("rollback.row").await?;
    remove_dir(&old)?;
    stop::remove_file(&m.paths.disks().join(RESTORING))?;
    journal::clear(m)
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

/// Settles a restore that was cut off, and clears what is left of a snapshot that was being taken. The machine has no engine.
/// Comes back with the name of the snapshot whose memory it is to go on with.
pub async fn settle(m: &Arc<Machine>) -> Result<Option<String>, ApiError> {
    sweep(m)?;
    let Some(Begun::Restore(restore)) = journal::read(m) else {
        clear(m)?;
        return Ok(None);
    };
    tracing::info!(machine = %m.id, snapshot = restore.snapshot, "a restore that was cut off is carried out");
    if is_prepared(m) {
        carry_out(m, &restore).await?;
    } else {
        // All of it was in its place.
        clear(m)?;
        journal::clear(m)?;
    }
    Ok(restore.memory.then_some(restore.snapshot))
}

/// Undoes a restore that was cut off before the engine was to end, and clears what is left of a snapshot that was being taken.
pub fn undo(m: &Machine) -> Result<(), ApiError> {
    sweep(m)?;
    clear(m)?;
    match journal::read(m) {
        Some(Begun::Restore(_)) => journal::clear(m),
        _ => Ok(()),
    }
}

/// Whether something of a restore is still to be put in place.
fn is_prepared(m: &Machine) -> bool {
    let (fresh, _) = restoring(m);
    fresh.join(RESTORING).exists() || m.paths.disks().join(RESTORING).exists()
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
