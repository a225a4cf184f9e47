//! From a request to a machine with a row and a task: at a client's wish, and at the daemon's start from the database.

use std::sync::Arc;
use std::time::Duration;

use banger_core::id::MachineId;
use banger_core::name::{self, MachineName};
use banger_core::spec;
use banger_core::state;
use banger_proto::api::{CreateMachine, ForkMachine, Forward, MachineSpec, MachineState, OnPanic, WaitFor, Workspace};
use banger_proto::error::{ApiError, ErrorCode};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::db::{DbError, MachineRow};
use crate::engines;
use crate::error::IntoApi;
use crate::forwards::Reserved;
use crate::host::rules::Member;
use crate::machine::record::Presence;
use crate::machine::request::{self, Ask, ForkJob};
use crate::machine::{Machine, adopt, create, fork, start, task, work};
use crate::ops::Op;
use crate::recover;
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
    let spec = resolve(services, &request).await?;
    let idle = services.config.idle_suspend_after.0.as_millis().try_into().unwrap_or(0);
    let ports = services.forwards.reserve(&request.forwards, None)?;
    let draft = Draft {
        spec,
        workspace: None,
        auto_remove: request.auto_remove,
        idle_suspend_after_ms: request.idle_suspend_after_ms.unwrap_or(idle),
        on_panic: request.on_panic.unwrap_or_default(),
        forwards: ports.forwards(),
    };
    let row = insert(services, name, draft).await?;
    let creation = create::Creation {
        start: request.start.unwrap_or(true),
        wanted: start::Wanted {
            wait: request.wait,
            cold: request.cold,
        },
        timeout: request.timeout_ms.map_or(start::TIMEOUT, Duration::from_millis),
        copy: None,
        disk_asked: request.disk_bytes.is_some(),
    };
    let serves = creation.start.then_some(ports);
    Ok(begin(services, row, creation, serves.unwrap_or_default()))
}

/// The spec of a request, every default resolved and everything checked. What is to be built or fetched has no digest yet.
pub async fn resolve(services: &Services, request: &CreateMachine) -> Result<MachineSpec, ApiError> {
    let resolved = spec::resolve(request, &services.config, services.place().await).map_err(IntoApi::into_api)?;
    let image_size = services.stock.check_image(&resolved.image).await?;
    services.stock.check_kernel(&resolved.kernel).await?;
    let disk_bytes =
        spec::disk_for(resolved.disk_bytes, resolved.disk_asked, image_size.unwrap_or(0)).map_err(IntoApi::into_api)?;
    let engine = engines::resolve(services, &resolved.engine, &resolved.network).await?;
    Ok(MachineSpec {
        image: resolved.image,
        image_digest: String::new(),
        kernel: resolved.kernel,
        kernel_digest: String::new(),
        engine: engine.to_owned(),
        accel: services.host().await.accel.accel.as_str().to_owned(),
        vcpu: resolved.vcpu,
        memory_mib: resolved.memory_mib,
        disk_bytes,
        network: resolved.network,
        nat: resolved.nat,
        net_group: resolved.net_group,
    })
}

/// Begins the creation of a machine whose row is written.
fn begin(services: &Arc<Services>, row: MachineRow, creation: create::Creation, ports: Reserved) -> (Op, Arc<Machine>) {
    let op = services.ops.begin("machine.create", &row.name);
    let (asks, queue) = mpsc::channel(task::QUEUE);
    let m = Machine::new(services.clone(), row, asks);
    services.remember(m.clone());
    services.forwards.open(&m, ports);
    let first = work::yields(&op, |superseded| {
        Box::pin(create::run(m.clone(), op.clone(), creation, superseded))
    });
    tokio::spawn(task::run(m.clone(), queue, Some(first)));
    (op, m)
}

/// Makes running copies of a running machine: everything is checked, the rows are written, and the work is begun.
pub async fn fork(
    services: &Arc<Services>,
    source: &Arc<Machine>,
    request: ForkMachine,
) -> Result<(Op, Vec<Arc<Machine>>), ApiError> {
    if !(1..=fork::MOST).contains(&request.count) {
        let message = format!("{} copies are not possible; 1 to {} are", request.count, fork::MOST);
        return Err(ApiError::new(ErrorCode::InvalidSpec, message));
    }
    task::check_change(source, state::Request::Fork)?;
    let names = copies(request.name.as_deref(), request.count).map_err(IntoApi::into_api)?;
    let (tell, saved) = watch::channel(None);
    let row = source.row();
    let creation = create::Creation {
        start: true,
        wanted: start::Wanted {
            wait: WaitFor::Agent,
            cold: false,
        },
        timeout: request.timeout_ms.map_or(start::TIMEOUT, Duration::from_millis),
        copy: Some(create::CopyOf {
            source: row.name.clone(),
            saved,
        }),
        disk_asked: true,
    };
    let place = Arc::new(fork::Place::new(services)?);
    let mut rows = Vec::new();
    for name in names {
        let draft = Draft {
            spec: row.spec.clone(),
            workspace: row.workspace.clone(),
            auto_remove: false,
            idle_suspend_after_ms: row.idle_suspend_after_ms,
            on_panic: row.on_panic,
            // Its source has them.
            forwards: Vec::new(),
        };
        match insert(services, name, draft).await {
            Ok(row) => rows.push(row),
            Err(e) => {
                for row in rows {
                    let _ = services.db.delete_machine(row.id).await;
                }
                return Err(e);
            }
        }
    }
    let op = services.ops.begin("machine.fork", &row.name);
    let begun: Vec<_> = rows
        .into_iter()
        .map(|row| begin(services, row, creation.clone(), Reserved::default()))
        .collect();
    let copies: Vec<Arc<Machine>> = begun.iter().map(|(_, m)| m.clone()).collect();
    let job = ForkJob {
        place: place.clone(),
        tell: Arc::new(tell),
    };
    let (own, running, source) = (services.clone(), op.clone(), source.clone());
    tokio::spawn(async move {
        let work = async {
            running.stage("save");
            let begun: Vec<Op> = begun.into_iter().map(|(op, _)| op).collect();
            let done = follow(&source, &running, job, &begun).await;
            // Before anybody is told that it is over.
            drop(place);
            done
        };
        let _ = own.ops.run(&running, work).await;
    });
    Ok((op, copies))
}

/// Waits for the source and for every copy. All of them, or none is left.
async fn follow(source: &Arc<Machine>, op: &Op, job: ForkJob, copies: &[Op]) -> Result<(), ApiError> {
    let tell = job.tell.clone();
    let saved = request::ask(source, request::Request::Fork(job)).await;
    if let Err(e) = saved {
        tell.send_replace(Some(Err(e)));
    }
    op.stage("start");
    let mut failed = None;
    for copy in copies {
        let mut state = copy.subscribe();
        let ended = async { state.wait_for(|o| o.ended_at.is_some()).await.map(|o| o.error.clone()) };
        tokio::select! {
            biased;
            () = op.canceled().cancelled() => {
                failed = Some(crate::ops::canceled());
                break;
            }
            ended = ended => if let Ok(Some(e)) = ended {
                failed = Some(e);
                break;
            },
        }
    }
    let Some(e) = failed else { return Ok(()) };
    op.stage("undo");
    for copy in copies {
        copy.cancel();
    }
    let machines = source.services.machines();
    for copy in copies {
        let name = copy.snapshot().target;
        if let Some(m) = machines.iter().find(|m| m.name() == name)
            && let Ok(removal) = request::ask(m, request::Request::Delete).await
        {
            let mut state = removal.subscribe();
            let _ = state.wait_for(|o| o.ended_at.is_some()).await;
        }
    }
    Err(e)
}

/// Names of copies: made up, or `NAME`, or `NAME-1` to `NAME-N`.
fn copies(name: Option<&str>, count: u32) -> Result<Vec<Option<MachineName>>, name::NameError> {
    (1..=count)
        .map(|n| match name {
            None => Ok(None),
            Some(name) if count == 1 => MachineName::parse(name).map(Some),
            Some(name) => MachineName::parse(&format!("{name}-{n}")).map(Some),
        })
        .collect()
}

/// What a new row says beyond its name.
struct Draft {
    spec: MachineSpec,
    workspace: Option<Workspace>,
    auto_remove: bool,
    idle_suspend_after_ms: u64,
    on_panic: OnPanic,
    forwards: Vec<Forward>,
}

/// Writes the row. A made-up name that was taken in the meantime is made up again.
async fn insert(services: &Services, name: Option<MachineName>, draft: Draft) -> Result<MachineRow, ApiError> {
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
            spec: draft.spec.clone(),
            created_at: time::now(),
            started_at: None,
            workspace: draft.workspace.clone(),
            boot: None,
            auto_remove: draft.auto_remove,
            idle_suspend_after_ms: draft.idle_suspend_after_ms,
            on_panic: draft.on_panic,
            slot: None,
            forwards: draft.forwards.clone(),
        };
        let slots = recover::free_slots(services);
        match services.db.insert_machine(row, slots).await {
            Ok(row) => return Ok(row),
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
pub type Known = (Arc<Machine>, mpsc::Receiver<Ask>);

/// Makes every machine of the database known. Done before anybody is served, so that no client is told that there is none.
pub async fn load(services: &Arc<Services>) -> Result<Vec<Known>, DbError> {
    let rows = services.db.machines().await?;
    let known = rows.into_iter().map(|row| {
        let (asks, queue) = mpsc::channel(task::QUEUE);
        let m = Machine::new(services.clone(), row, asks);
        m.set_known(Presence::Sought);
        services.remember(m.clone());
        (m, queue)
    });
    Ok(known.collect())
}

/// Tells of every machine that may have a tap, before anything is made.
pub fn seat(services: &Services, machines: &[Arc<Machine>]) {
    let Some(system) = services.hosting.get() else { return };
    for m in machines {
        let row = m.row();
        if row.spec.network == "bridge"
            && state::may_have_engine(row.state)
            && let Some(slot) = row.slot
        {
            let member = Member {
                slot,
                nat: row.spec.nat,
                group: row.spec.net_group,
            };
            system.has_tap(&row.id, member);
        }
    }
}

/// Brings rows and world together at the daemon's start. Machines are looked at side by side, so that one that does not answer
/// keeps no other waiting.
pub async fn reconcile(services: &Arc<Services>, known: Vec<Known>) {
    let mut looking = JoinSet::new();
    for (m, queue) in known {
        looking.spawn(async move {
            let first = adopt::reconcile(&m).await;
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
        match adopt::find(services, &id, &paths, None, None).await {
            banger_vmm::Liveness::Gone(_) => {
                tracing::info!(machine = %id, "sockets of a machine that is no more: removed");
                let released = services.hosting.release(&id).await;
                if let Err(e) = start::remove_dir(&paths.run).and(released) {
                    tracing::warn!(machine = %id, error = %e.message, "not removed");
                }
            }
            found => tracing::warn!(machine = %id, ?found, "an engine runs that no row knows; it is left alone"),
        }
    }
}
