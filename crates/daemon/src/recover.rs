//! Machines whose files are there and whose rows are not: found, shown, and taken back.
//!
//! A database can be lost or emptied while machines run. Each machine's directory holds what its row said
//! ([`crate::machine::description`]); its state is what files and processes say.

use std::collections::BTreeMap;
use std::sync::Arc;

use banger_core::id::MachineId;
use banger_core::name::MachineName;
use banger_proto::api::{Machine as Shown, MachineSpec, MachineState, Recoverable};
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::Liveness;
use tokio::sync::mpsc;

use crate::db::{MachineRow, Slots};
use crate::error::IntoApi;
use crate::forwards;
use crate::machine::description::{self, Description};
use crate::machine::{Machine, adopt, handles, task};
use crate::provision;
use crate::services::Services;

/// Ids of machines without a row that can be taken back.
pub fn ids(services: &Services) -> Vec<MachineId> {
    let mut lost = without_row(services);
    lost.retain(|id| is_recoverable(services, id));
    lost
}

/// What `audit` spares, each with what is to be said of it: machines that can be taken back, and those whose description is there
/// and of no use. Only a person can tell what the files of those are worth.
pub fn spared(services: &Services) -> BTreeMap<MachineId, String> {
    let say = |id: MachineId| {
        let paths = services.paths.machine(&id);
        let note = match Description::read(&id, &paths) {
            Ok(found) if is_recoverable(services, &id) => format!(
                "it is not in the database and can be taken back: banger vm recover {}",
                found.name()
            ),
            Ok(_) if !paths.snapshots().is_dir() => return None,
            Ok(_) => "it is not in the database, and has snapshots and no disks".to_owned(),
            Err(why) if description::path(&paths).exists() => {
                format!("it is not in the database, and what it was cannot be read ({why}): look at its files")
            }
            Err(_) => return None,
        };
        Some((id, note))
    };
    without_row(services).into_iter().filter_map(say).collect()
}

/// Ids of machines that have a directory and no row.
fn without_row(services: &Services) -> Vec<MachineId> {
    // Directories first: what is made meanwhile has its row before its directory.
    let entries = std::fs::read_dir(services.paths.machines())
        .into_iter()
        .flatten()
        .flatten();
    let all: Vec<MachineId> = entries
        .filter_map(|entry| MachineId::parse(entry.file_name().to_str()?).ok())
        .collect();
    let known: Vec<MachineId> = services.machines().iter().map(|m| m.id.clone()).collect();
    let mut lost: Vec<MachineId> = all.into_iter().filter(|id| !known.contains(id)).collect();
    lost.sort();
    lost
}

/// Whether there is something to take back: what the machine was, and its disks where it ever had some.
fn is_recoverable(services: &Services, id: &MachineId) -> bool {
    let paths = services.paths.machine(id);
    Description::read(id, &paths).is_ok_and(|found| !found.was_started() || paths.disks().is_dir())
}

/// All of them.
pub fn list(services: &Services) -> Vec<Recoverable> {
    let found = ids(services).into_iter().filter_map(|id| {
        let description = Description::read(&id, &services.paths.machine(&id)).ok()?;
        Some(Recoverable {
            id: id.to_string(),
            name: description.name().to_owned(),
            image: description.spec().image.clone(),
            created_at: description.created_at().to_owned(),
        })
    });
    found.collect()
}

/// What they are made of, each with its name.
pub fn specs(services: &Services) -> Vec<(MachineSpec, String)> {
    let read = |id: MachineId| Description::read(&id, &services.paths.machine(&id)).ok();
    let found = ids(services).into_iter().filter_map(read);
    found
        .map(|found| (found.spec().clone(), found.name().to_owned()))
        .collect()
}

/// The places in the network that a new machine can have, in system mode: not those of machines without a row, which may run.
pub fn free_slots(services: &Services) -> Option<Slots> {
    let last = services.hosting.last_slot()?;
    let mut lent = services.hosting.lent_slots();
    let read = |id: MachineId| Description::read(&id, &services.paths.machine(&id)).ok();
    lent.extend(
        ids(services)
            .into_iter()
            .filter_map(read)
            .filter_map(|found| found.slot()),
    );
    Some(Slots { last, lent })
}

/// Says so in the log, at the daemon's start.
pub fn tell(services: &Services) {
    for found in list(services) {
        tracing::warn!(
            machine = found.id,
            name = found.name,
            "its files are there and it is not in the database; `banger vm recover` takes it back"
        );
    }
}

/// Takes a machine back: its row is written anew, and what runs of it is adopted.
pub async fn recover(services: &Arc<Services>, reference: &str) -> Result<Shown, ApiError> {
    let (id, description) = find(services, reference)?;
    let paths = services.paths.machine(&id);
    let kept = handles::read(&paths.handles()).unwrap_or_default();
    let engine = description.spec().engine.clone();
    let found = adopt::find(services, &id, &paths, kept.as_ref(), Some(&engine)).await;
    let runs = !matches!(found, Liveness::Gone(_));
    let state = match found {
        // What cannot be verified is looked at again by the machine's task.
        _ if runs => MachineState::Running,
        _ if paths.suspended().is_dir() => MachineState::Suspended,
        _ => MachineState::Stopped,
    };
    let mut row = description.row(id.clone(), state);
    row.name = free_name(services, &row.name, &id)?;
    if !runs {
        row.cause = Some("it was taken back after the database had been lost".to_owned());
    }
    let ports = services.forwards.reserve(&row.forwards, None);
    let ports = ports.unwrap_or_else(|e| {
        tracing::warn!(machine = %id, error = %e.message, "its ports are another's by now: not forwarded");
        row.forwards.clear();
        Default::default()
    });
    let row = insert(services, row, runs).await?;
    tracing::info!(machine = %id, name = row.name, state = row.state.as_str(), "taken back");
    let (asks, queue) = mpsc::channel(task::QUEUE);
    let m = Machine::new(services.clone(), row, asks);
    services.remember(m.clone());
    provision::seat(services, std::slice::from_ref(&m));
    let first = adopt::reconcile(&m).await;
    if forwards::serves(m.state()) {
        services.forwards.open(&m, ports);
    }
    m.describe();
    tokio::spawn(task::run(m.clone(), queue, first));
    Ok(m.show())
}

/// The machine that a name, or an id or the beginning of one means.
fn find(services: &Services, reference: &str) -> Result<(MachineId, Description), ApiError> {
    let lost = ids(services);
    let read = |id: &MachineId| Description::read(id, &services.paths.machine(id)).ok();
    let means = |id: &MachineId| {
        let named = read(id).is_some_and(|found| found.name() == reference);
        named || (reference.len() >= 4 && id.as_str().starts_with(reference))
    };
    let mut meant = lost.into_iter().filter(means);
    let shown: String = reference.chars().take(80).flat_map(char::escape_default).collect();
    match (meant.next(), meant.next()) {
        (Some(id), None) => {
            let why = |why| ApiError::new(ErrorCode::Conflict, format!("machine {id} cannot be taken back: {why}"));
            let description = Description::read(&id, &services.paths.machine(&id)).map_err(why)?;
            Ok((id, description))
        }
        (Some(_), Some(_)) => {
            let message = format!("`{shown}` means several machines that are not in the database");
            Err(ApiError::new(ErrorCode::Ambiguous, message).hint("give the id: `banger vm recover` lists them"))
        }
        _ if services.find(reference).is_ok() => {
            let message = format!("machine `{shown}` is in the database: there is nothing to take back");
            Err(ApiError::new(ErrorCode::Conflict, message))
        }
        _ => {
            let message = format!("no files of a machine `{shown}` that is not in the database");
            Err(ApiError::new(ErrorCode::NotFound, message).hint("`banger vm recover` lists what can be taken back"))
        }
    }
}

/// Its old name, or one that begins with it where another machine has that by now.
fn free_name(services: &Services, name: &str, id: &MachineId) -> Result<String, ApiError> {
    let taken = |name: &str| services.machines().iter().any(|m| m.name() == name);
    if !taken(name) {
        return Ok(name.to_owned());
    }
    let head: String = name.chars().take(50).collect();
    let other = format!("{head}-{}", &id.as_str()[..8]);
    let other = MachineName::parse(&other).map_err(IntoApi::into_api)?;
    match taken(other.as_str()) {
        false => Ok(other.as_str().to_owned()),
        true => {
            let message = format!("the names `{name}` and `{}` are taken", other.as_str());
            Err(ApiError::new(ErrorCode::Conflict, message).hint(format!("rename one: banger vm rename {name} OTHER")))
        }
    }
}

/// Writes the row. The place in the network is the one it had; a machine that does not run takes another where that is taken.
async fn insert(services: &Services, mut row: MachineRow, runs: bool) -> Result<MachineRow, ApiError> {
    let Some(slots) = free_slots(services) else {
        row.slot = None;
        return services.db.insert_machine(row, None).await.map_err(IntoApi::into_api);
    };
    let holder = services
        .machines()
        .into_iter()
        .find(|m| row.slot.is_some() && m.row().slot == row.slot);
    let slots = match (holder, row.slot, runs) {
        (None, Some(_), _) => None,
        (_, _, false) | (_, None, _) => Some(slots),
        (Some(holder), _, true) => {
            let message = format!(
                "machine `{}` runs with the network address that machine `{}` has by now",
                row.name,
                holder.name()
            );
            return Err(ApiError::new(ErrorCode::Conflict, message)
                .hint(format!("stop and remove `{}`, then try again", holder.name())));
        }
    };
    services.db.insert_machine(row, slots).await.map_err(IntoApi::into_api)
}
