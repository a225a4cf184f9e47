//! From a request to a machine with a row and a task: at a client's wish, and at the daemon's start from the database.

use std::sync::Arc;
use std::time::Duration;

use banger_core::id::MachineId;
use banger_core::name::{self, MachineName};
use banger_core::spec;
use banger_proto::api::{CreateMachine, MachineSpec, MachineState};
use banger_proto::error::{ApiError, ErrorCode};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::db::{DbError, MachineRow};
use crate::error::IntoApi;
use crate::machine::task::{Current, Manner};
use crate::machine::{Machine, adopt, create, start, task};
use crate::ops::Op;
use crate::services::Services;
use crate::time;

/// Tries to find a free name or id before giving up.
const TRIES: usize = 8;

/// Creates a machine: everything is checked, the row is written, and the work is begun.
pub async fn create(services: &Arc<Services>, request: CreateMachine) -> Result<(Op, Arc<Machine>), ApiError> {
    let name = request
        .name
        .as_deref()
        .map(MachineName::parse)
        .transpose()
        .map_err(IntoApi::into_api)?;
    let resolved = spec::resolve(&request, &services.config, services.shape().await).map_err(IntoApi::into_api)?;
    let image_size = services.stock.check_image(&resolved.image).await?;
    services.stock.check_kernel(&resolved.kernel).await?;
    if let Some(size) = image_size
        && resolved.disk_bytes < size
    {
        return Err(spec::SpecError::DiskBelowImage {
            wanted: resolved.disk_bytes,
            image: size,
        }
        .into_api());
    }
    let engine = services.engine().await?;
    let spec = MachineSpec {
        image: resolved.image,
        image_digest: String::new(),
        kernel: resolved.kernel,
        kernel_digest: String::new(),
        engine: engine.capabilities().engine.to_owned(),
        accel: services.host().await.accel.accel.as_str().to_owned(),
        vcpu: resolved.vcpu,
        memory_mib: resolved.memory_mib,
        disk_bytes: resolved.disk_bytes,
        network: resolved.network,
    };
    let row = insert(services, name, spec, request.auto_remove).await?;
    let op = services.ops.begin("machine.create", &row.name);
    let creation = create::Creation {
        start: request.start.unwrap_or(true),
        wait: request.wait,
        timeout: request.timeout_ms.map_or(start::TIMEOUT, Duration::from_millis),
    };
    let (asks, queue) = mpsc::channel(task::QUEUE);
    let m = Machine::new(services.clone(), row, asks);
    services.remember(m.clone());
    let first = task::yields(&op, |superseded| {
        Box::pin(create::run(m.clone(), op.clone(), creation, superseded))
    });
    tokio::spawn(task::run(m.clone(), queue, Some(first)));
    Ok((op, m))
}

/// Writes the row. A made-up name that was taken in the meantime is made up again.
async fn insert(
    services: &Services,
    name: Option<MachineName>,
    spec: MachineSpec,
    auto_remove: bool,
) -> Result<MachineRow, ApiError> {
    for _ in 0..TRIES {
        let invented = match &name {
            Some(name) => name.as_str().to_owned(),
            None => {
                let taken: Vec<String> = services.machines().iter().map(|m| m.name()).collect();
                name::invent(random, |n| taken.iter().any(|t| t == n))
                    .as_str()
                    .to_owned()
            }
        };
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes).map_err(|e| ApiError::new(ErrorCode::Internal, format!("no randomness: {e}")))?;
        let row = MachineRow {
            id: MachineId::from_random(bytes),
            name: invented,
            state: MachineState::Creating,
            cause: None,
            spec: spec.clone(),
            created_at: time::now(),
            started_at: None,
            workspace: None,
            boot: None,
            auto_remove,
        };
        match services.db.insert_machine(row.clone()).await {
            Ok(()) => return Ok(row),
            Err(DbError::NameTaken(_)) if name.is_none() => {}
            Err(e) => return Err(e.into_api()),
        }
    }
    Err(ApiError::new(ErrorCode::Internal, "no free name was found").hint("give one with --name"))
}

fn random() -> u32 {
    let mut bytes = [0; 4];
    // A bad name is no harm: the row's unique index decides.
    let _ = getrandom::fill(&mut bytes);
    u32::from_ne_bytes(bytes)
}

/// A machine that is known and not yet looked at, with what it is asked meanwhile.
pub type Known = (Arc<Machine>, mpsc::Receiver<task::Ask>);

/// Makes every machine of the database known. Done before anybody is served, so that no client is told that there is none.
pub async fn load(services: &Arc<Services>) -> Result<Vec<Known>, DbError> {
    let rows = services.db.machines().await?;
    let known = rows.into_iter().map(|row| {
        let (asks, queue) = mpsc::channel(task::QUEUE);
        let m = Machine::new(services.clone(), row, asks);
        services.remember(m.clone());
        (m, queue)
    });
    Ok(known.collect())
}

/// Brings rows and world together at the daemon's start. Machines are looked at side by side, so that one that does not answer
/// keeps no other waiting.
pub async fn reconcile(services: &Arc<Services>, known: Vec<Known>) {
    let mut looking = JoinSet::new();
    for (m, queue) in known {
        looking.spawn(async move {
            let work = adopt::reconcile(&m).await;
            let first = work.map(|(work, blocked)| Current {
                work,
                manner: if blocked {
                    Manner::Blocked
                } else {
                    Manner::Bounded(None)
                },
            });
            tokio::spawn(task::run(m, queue, first));
        });
    }
    while let Some(looked) = looking.join_next().await {
        if let Err(e) = looked {
            tracing::error!(error = %e, "a machine could not be reconciled");
        }
    }
    sweep(services).await;
}

/// Removes sockets that no row knows. An engine that still has its sockets there is somebody's and stays.
async fn sweep(services: &Arc<Services>) {
    let Ok(entries) = std::fs::read_dir(services.paths.machines_run()) else {
        return;
    };
    let known: Vec<MachineId> = services.machines().iter().map(|m| m.id.clone()).collect();
    for entry in entries.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|n| MachineId::parse(n).ok()) else {
            continue;
        };
        if known.contains(&id) {
            continue;
        }
        let paths = services.paths.machine(&id);
        let Ok(engine) = services.engine().await else { return };
        match engine.find(&id, &paths, None).await {
            banger_vmm::Liveness::Gone(_) => {
                tracing::info!(machine = %id, "sockets of a machine that is no more: removed");
                if let Err(e) = start::remove_dir(&paths.run) {
                    tracing::warn!(machine = %id, error = %e.message, "not removed");
                }
            }
            found => tracing::warn!(machine = %id, ?found, "an engine runs that no row knows; it is left alone"),
        }
    }
}
