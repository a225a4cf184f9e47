//! Bringing a machine up: from a template, from its own saved memory, or by booting it: engine, guest channel, identity, and as far
//! as wanted the start-up of the image's own system.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use banger_core::host::Accel;
use banger_core::id::MachineId;
use banger_core::plan::{self, BootPlan, MachinePaths, NetworkKind, NetworkPlan, Saved};
use banger_core::state::Event;
use banger_proto::agent::{GuestNetwork, Personalize};
use banger_proto::api::{MachineSpec, MachineState, WaitFor};
use banger_proto::error::{ApiError, ErrorCode};
use banger_system::helper::EngineUser;
use banger_system::net;
use banger_vmm::{Handles, console_tail};
use tokio::time::Instant;

use super::live::Live;
use super::record::Machine;
use super::restore::{self, Becomes};
use super::stages::Stages;
use super::{cause, console, disks, handles, save, stall, stop, suspend};
use crate::agent::{LinkError, sanitize};
use crate::blocking::blocking;
use crate::engines;
use crate::error::{self, IntoApi};
use crate::host::rules::Member;
use crate::host::{System, Wants};
use crate::services::Services;
use crate::{failpoint, time};

/// Bound of a start when the request has none.
pub const TIMEOUT: Duration = Duration::from_secs(180);
/// How long the guest may take to become itself.
const PERSONALIZE: Duration = Duration::from_secs(30);
/// How long a start from a template may take before the machine boots instead. It takes a fifth of a second; many at once share the
/// host.
const RESTORE: Duration = Duration::from_secs(60);
/// Bounds below a stage's own end this much later, so that it is the stage that is told.
pub const GRACE: Duration = Duration::from_secs(5);
/// Lines of the console that go with a failure.
pub const TAIL: usize = 20;
/// Pause before the guest is asked again in the background.
const AGAIN: Duration = Duration::from_secs(2);
/// Longest wait for the end of a guest's start-up in the background.
const SYSTEM: Duration = Duration::from_secs(15 * 60);

/// How a machine is to be brought up.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// How far the start goes.
    pub wait: WaitFor,
    /// Boot, whatever there is to start from.
    pub cold: bool,
}

/// Brings the machine up. After a failure the machine is in state `starting`, or `running` if the guest was up already; the
/// caller undoes what has to be undone. One that was suspended and has not run again is `suspended` as before.
pub async fn bring_up(m: &Arc<Machine>, stages: &mut Stages, wanted: Wanted) -> Result<(), ApiError> {
    match m.services.forwards.ensure(m) {
        // Whoever wants something else of it is not to be kept from it.
        Err(e) if m.state() == MachineState::Suspended => {
            tracing::warn!(machine = %m.id, error = %e.message, "its ports are not forwarded");
        }
        ensured => ensured?,
    }
    let report = if m.state() == MachineState::Suspended && !wanted.cold {
        Box::pin(suspend::wake(m, stages)).await?
    } else {
        if m.state() == MachineState::Suspended {
            suspend::drop_memory(m).await?;
        }
        // One that has run before has disks of its own.
        let fresh = m.row().started_at.is_none();
        let from = if fresh && !wanted.cold {
            Box::pin(from_template(m, stages)).await?
        } else {
            None
        };
        if from.is_none() {
            Box::pin(launch(m, stages)).await?;
            Box::pin(become_itself(m, stages)).await?;
        }
        settle_system(m, stages, wanted.wait).await?;
        let how = if from.is_some() { "template" } else { "boot" };
        stages.report(how, from)
    };
    m.change(|row| {
        row.boot = Some(report);
        Ok(())
    })
    .await
}

/// Starts a fresh machine from its template. `None` where it has to boot: there is no template and none can be made, or it failed,
/// and then the machine is as fresh as before.
async fn from_template(m: &Arc<Machine>, stages: &mut Stages) -> Result<Option<String>, ApiError> {
    let services = &m.services;
    let able = services.engine(&m.row().spec.engine).await?.capabilities().snapshot;
    if !able || !services.config.templates.enabled {
        return Ok(None);
    }
    stages.enter("template");
    let op = stages.op().clone();
    let spec = m.row().spec;
    // The future of making a template is large: on the heap, or the worker's stack is too small for it.
    let obtain = Box::pin(services.templates.obtain(services, &spec, &op));
    let obtained = stages.cancellable(obtain).await;
    let (id, template) = match obtained {
        Ok(obtained) => obtained,
        Err(e) if e.code == ErrorCode::Canceled => return Err(e),
        Err(e) => {
            tracing::warn!(machine = %m.id, error = %e.message, details = ?e.details, "no template; it boots");
            return Ok(None);
        }
    };
    match restore::settle(&template).await {
        Ok(()) => {}
        // The template is whole; only now there is no room to start from it.
        Err(e) if e.code == ErrorCode::NoSpace => {
            tracing::warn!(machine = %m.id, error = %e.message, "it boots instead of starting from its template");
            return Ok(None);
        }
        Err(e) => {
            services.templates.drop_failed(services, &id, &e).await;
            return Ok(None);
        }
    }
    // Making a template is not the start's time.
    stages.restart_clock();
    let work = async {
        begin(m).await?;
        let (disks, from) = (m.paths.disks(), template.disks());
        blocking(move || {
            remove_dir(&disks)?;
            disks::create_over(&disks, &from)
        })
        .await?;
        failpoint::hit("restore.disks").await?;
        console::inherit(
            &template.dir,
            &m.paths.console_log(),
            "the boot of the template that this machine starts from",
        );
        restore::launch(m, stages, &template).await?;
        restore::go_on(m, stages, &template, Becomes::ThisMachine).await
    };
    let restored = tokio::time::timeout(RESTORE, Box::pin(work)).await.unwrap_or_else(|_| {
        let message = format!("it was not there within {RESTORE:?}");
        Err(ApiError::new(ErrorCode::Timeout, message))
    });
    match restored {
        Ok(()) => {
            services.templates.used(services, &id).await;
            Ok(Some(id))
        }
        Err(e) if e.code == ErrorCode::Canceled || e.code == ErrorCode::NoSpace => Err(e),
        // The request's own time is over, which says nothing of the template.
        Err(e) if stages.left().is_zero() => Err(e),
        Err(e) => {
            services.templates.drop_failed(services, &id, &e).await;
            restore::take_back(m).await?;
            let dir = m.paths.disks();
            blocking(move || remove_dir(&dir)).await?;
            stages.restart_clock();
            Ok(None)
        }
    }
}

/// The row says that it is starting, unless it does already.
pub async fn begin(m: &Arc<Machine>) -> Result<(), ApiError> {
    if m.state() != MachineState::Starting {
        m.happen(Event::StartBegins, |row| {
            row.started_at = Some(time::now());
            row.cause = None;
            row.boot = None;
        })
        .await?;
    }
    failpoint::hit("start.row").await
}

/// Boots the engine, from nothing to a process whose handles are written down.
async fn launch(m: &Arc<Machine>, stages: &mut Stages) -> Result<(), ApiError> {
    stages.enter("prepare");
    begin(m).await?;
    ensure_disks(m).await?;
    stages.enter("launch");
    launch_engine(m, stages, None).await
}

/// Makes the disks of a machine that has none yet, and brings those of an older banger into their place. No engine uses them.
pub async fn ensure_disks(m: &Machine) -> Result<(), ApiError> {
    let paths = m.paths.clone();
    blocking(move || disks::upgrade(&paths)).await?;
    if m.paths.disks().exists() {
        return Ok(());
    }
    let spec = m.row().spec;
    m.services.stock.make_disks(&m.services, &m.paths, &spec).await
}

/// Starts the engine of a machine that is `starting`, with saved memory or without.
pub async fn launch_engine(m: &Arc<Machine>, stages: &Stages, resume: Option<Saved>) -> Result<(), ApiError> {
    fresh_run_dir(&m.paths.run)?;
    stop::remove_file(&m.paths.exit_record())?;
    let row = m.row();
    let engine = m.services.engine(&row.spec.engine).await?;
    let plan = stages
        .cancellable(boot_plan(&m.services, &m.id, row.slot, &row.spec, &m.paths, resume))
        .await?;
    attach(&m.services, &plan, &row.spec)
        .await
        .map_err(|e| explain(m, stages, e))?;
    failpoint::hit("start.attached").await?;
    // Not cut off in between: an engine that was half launched would have no owner.
    let launched = engine.launch(&plan).await;
    let launched = launched.map_err(|e| explain(m, stages, e.into_api()))?;
    let passed = failpoint::hit("start.launched").await;
    let live = Live::new(&m.id, engine, launched.clone());
    let written = handles::write(&m.paths.handles(), &launched);
    m.set_live(live);
    let scoped = scope(m.services.clone(), m.id.clone(), row.spec, launched);
    tokio::spawn(crate::ops::part(scoped));
    // Only now may anything fail: the engine has an owner who can end it.
    passed.and(written)?;
    failpoint::hit("start.handles").await?;
    stages.check()
}

/// Whether the engine runs in a jail: as a user of its own, started by the root helper.
pub fn jailed(services: &Services, spec: &MachineSpec) -> bool {
    services.hosting.get().is_some() && spec.engine == engines::FIRECRACKER
}

/// Makes what the machine of a plan needs of the host: its tap, its block devices. [`stop::clean_up`] removes it.
pub async fn attach(services: &Services, plan: &BootPlan, spec: &MachineSpec) -> Result<(), ApiError> {
    if services.hosting.get().is_none() {
        return Ok(());
    }
    let jailed = jailed(services, spec);
    let image = services.stock.image_file(spec).await?;
    let on_tap = matches!(&plan.network, Some(network) if network.kind != NetworkKind::User);
    let tap = plan.slot.filter(|_| on_tap).map(|slot| Member {
        slot,
        nat: spec.nat,
        group: spec.net_group.clone(),
    });
    let user = match plan.slot {
        Some(slot) if jailed => EngineUser::Jail(slot),
        _ => EngineUser::Owner,
    };
    let (dir, bytes) = (plan.paths.disks(), spec.disk_bytes);
    let mut linked = vec![plan.kernel.clone(), plan.initrd.clone()];
    linked.extend(
        plan.resume
            .iter()
            .flat_map(|saved| [saved.memory.clone(), saved.state.clone()]),
    );
    let devices = blocking(move || {
        if jailed {
            linked.iter().try_for_each(|path| readable(path))?;
        }
        disks::devices(&dir, image, bytes)
    })
    .await?;
    let wants = Wants {
        id: plan.id.clone(),
        tap,
        devices,
        user,
    };
    services.hosting.attach(wants).await
}

/// Lets a file be read by an engine in its jail. The directories above keep it from everybody else.
fn readable(path: &Path) -> Result<(), ApiError> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o444))
        .map_err(|e| error::io(format_args!("let {} be read", path.display()), e))
}

/// Moves an engine that the daemon has started, and the shim of any engine, out of the daemon's own unit.
pub async fn scope(services: Arc<Services>, id: MachineId, spec: MachineSpec, handles: Handles) {
    if !jailed(&services, &spec) {
        services.hosting.scope(&id, &handles, spec.memory_mib).await;
    }
    services.hosting.scope_shim(&id).await;
}

/// The first interface of a machine.
fn network_plan(
    services: &Services,
    id: &MachineId,
    slot: Option<u32>,
    spec: &MachineSpec,
) -> Result<Option<NetworkPlan>, ApiError> {
    let plan = match spec.network.as_str() {
        "user" => NetworkPlan {
            kind: NetworkKind::User,
            mac: id.mac(),
        },
        "bridge" => {
            let (system, slot) = bridge(services, slot)?;
            NetworkPlan {
                kind: NetworkKind::Tap(net::tap(slot)),
                mac: system.mac(slot)?,
            }
        }
        _ => return Ok(None),
    };
    Ok(Some(plan))
}

/// The bridge, and a machine's place at it.
fn bridge(services: &Services, slot: Option<u32>) -> Result<(&Arc<System>, u32), ApiError> {
    services.hosting.get().zip(slot).ok_or_else(|| {
        ApiError::new(ErrorCode::Unsupported, "the network `bridge` needs system mode")
            .hint("install it: sudo banger system install")
    })
}

/// Everything that an engine needs for a machine.
pub async fn boot_plan(
    services: &Services,
    id: &MachineId,
    slot: Option<u32>,
    spec: &MachineSpec,
    paths: &MachinePaths,
    resume: Option<Saved>,
) -> Result<BootPlan, ApiError> {
    let boot = services.stock.boot_files(spec).await?;
    let image = services.stock.image_file(spec).await?;
    let accel = if spec.accel == Accel::Kvm.as_str() {
        Accel::Kvm
    } else {
        Accel::Tcg
    };
    Ok(BootPlan {
        id: id.clone(),
        accel,
        vcpu: spec.vcpu,
        memory_mib: spec.memory_mib,
        kernel: boot.kernel,
        initrd: boot.initrd,
        cmdline: plan::cmdline(plan::Board::of(&spec.engine), accel, services.host().await.tsc_khz()),
        disks: disks::plan(paths, image, |role| {
            services.hosting.get().map(|system| system.layout.node(id, role))
        })?,
        network: network_plan(services, id, slot, spec)?,
        slot,
        resume,
        paths: paths.clone(),
    })
}

/// The guest, from its first sign of life to being this machine.
pub async fn become_itself(m: &Arc<Machine>, stages: &mut Stages) -> Result<(), ApiError> {
    let live = live(m)?;
    stages.enter("agent");
    stages
        .bounded(or_exit(m, &live, link(live.link.connect(stages.deadline() + GRACE))))
        .await
        .map_err(|e| explain(m, stages, e))?;
    failpoint::hit("start.channel").await?;
    stages.enter("personalize");
    let health = stages
        .bounded(or_exit(m, &live, async {
            let health = link(live.link.health(stages.deadline() + GRACE)).await?;
            if health.machine_id.is_empty() {
                link(live.link.personalize(&identity(m).await?, PERSONALIZE)).await
            } else {
                Ok(health)
            }
        }))
        .await
        .map_err(|e| explain(m, stages, e))?;
    if health.machine_id != m.id.as_str() {
        let found = sanitize::text(&health.machine_id, 32);
        return Err(ApiError::new(
            ErrorCode::Guest,
            format!("the agent of machine {} says that it is `{found}`", m.id),
        ));
    }
    failpoint::hit("start.personalized").await?;
    stages.check()?;
    m.happen(Event::AgentReady, |_| {}).await?;
    m.set_guest(sanitize::guest_info(&health));
    Ok(())
}

/// The image's own system, as far as the request wants to wait for it.
async fn settle_system(m: &Arc<Machine>, stages: &mut Stages, wait: WaitFor) -> Result<(), ApiError> {
    let live = live(m)?;
    let has_init = m.show().guest.is_none_or(|g| g.system != "none");
    if !has_init {
        return Ok(());
    }
    if wait == WaitFor::Agent {
        tokio::spawn(follow_guest(m.clone(), live));
        return Ok(());
    }
    stages.enter("system");
    let health = stages
        .bounded(or_exit(m, &live, async {
            loop {
                match live.link.system(stages.left() + GRACE).await {
                    // A connection that breaks is not the end of the guest: it is made anew, within the same time.
                    Err(e) if e.is_broken() => tokio::time::sleep(AGAIN).await,
                    other => return link(async { other }).await,
                }
            }
        }))
        .await;
    match health {
        Ok(health) => m.set_guest(sanitize::guest_info(&health)),
        Err(e) => {
            if e.code == ErrorCode::Timeout {
                tokio::spawn(follow_guest(m.clone(), live));
            }
            return Err(explain(m, stages, e));
        }
    }
    failpoint::hit("start.system").await
}

/// The engine of a machine that has one.
pub fn live(m: &Machine) -> Result<Live, ApiError> {
    m.live()
        .ok_or_else(|| ApiError::new(ErrorCode::Engine, format!("machine {} has no engine", m.name())))
}

async fn link<T>(call: impl Future<Output = Result<T, LinkError>>) -> Result<T, ApiError> {
    call.await.map_err(IntoApi::into_api)
}

/// Ends with an error as soon as the engine ends, or stands still.
pub async fn or_exit<T>(
    m: &Machine,
    live: &Live,
    work: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    let result = tokio::select! {
        biased;
        () = live.exited.cancelled() => Err(engine_ended(m).await),
        stall = live.stalled() => Err(stall::error(&stall)),
        result = work => result,
    };
    // A connection that breaks is often the first news of the engine's end; its process follows at once.
    match result {
        Err(e) if matches!(e.code, ErrorCode::Unavailable | ErrorCode::Guest) => {
            match tokio::time::timeout(Duration::from_millis(500), live.exited.cancelled()).await {
                Ok(()) => Err(engine_ended(m).await),
                Err(_) => Err(e),
            }
        }
        other => other,
    }
}

async fn engine_ended(m: &Machine) -> ApiError {
    // On the heap: this is part of everything that waits for a guest.
    let cause = Box::pin(cause::find(m, super::stop::RECORD)).await.cause();
    ApiError::new(
        ErrorCode::Engine,
        format!("machine {} ended while it was starting: {cause}", m.name()),
    )
}

/// Names the stage and adds the end of the console.
pub fn explain(m: &Machine, stages: &Stages, mut e: ApiError) -> ApiError {
    if e.code != ErrorCode::Canceled {
        if !e.message.contains("stage `") {
            e.message = format!("stage `{}`: {}", stages.stage(), e.message);
        }
        if e.details.is_empty() {
            e.details = console_tail(&m.paths, TAIL);
        }
    }
    e
}

/// Everything that makes the machine itself.
pub async fn identity(m: &Machine) -> Result<Personalize, ApiError> {
    let row = m.row();
    let ssh = m.services.ssh.of_machine(&m.paths.state, &m.id, &row.name).await;
    let network = guest_network(&m.services, &m.id, row.slot, &row.spec)?;
    personalize(&m.id, &row.name, network, ssh.authorized_keys, ssh.host_key)
}

/// What the guest of a machine with this spec is told of the network.
pub fn guest_network(
    services: &Services,
    id: &MachineId,
    slot: Option<u32>,
    spec: &MachineSpec,
) -> Result<Option<GuestNetwork>, ApiError> {
    Ok(match spec.network.as_str() {
        "user" => Some(GuestNetwork {
            address: "10.0.2.15".to_owned(),
            prefix: 24,
            gateway: "10.0.2.2".to_owned(),
            dns: vec!["10.0.2.3".to_owned()],
            mac: Some(id.mac()),
        }),
        "bridge" => {
            let (system, slot) = bridge(services, slot)?;
            Some(system.guest_network(slot)?)
        }
        _ => None,
    })
}

/// The identity of a machine of this id, name and network.
pub fn personalize(
    id: &MachineId,
    name: &str,
    network: Option<GuestNetwork>,
    authorized_keys: Vec<String>,
    ssh_host_key: Option<String>,
) -> Result<Personalize, ApiError> {
    Ok(Personalize {
        machine_id: id.to_string(),
        hostname: name.to_owned(),
        time_ns: save::now_ns(),
        entropy: save::entropy()?,
        network,
        authorized_keys,
        ssh_host_key,
        init: Default::default(),
        mask_units: plan::MASKED_UNITS.iter().map(|u| (*u).to_owned()).collect(),
    })
}

/// An empty directory for the machine's sockets.
pub fn fresh_run_dir(path: &Path) -> Result<(), ApiError> {
    use std::os::unix::fs::DirBuilderExt;
    remove_dir(path)?;
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(|e| error::io(format_args!("make {}", path.display()), e))
}

/// Removes a directory and what is in it; one that is not there is fine.
pub fn remove_dir(path: &Path) -> Result<(), ApiError> {
    // A shim outlives its engine by a moment and writes down how that ended: a file may appear while the others go. Each file
    // that it writes costs one more turn, and it writes only a few.
    let mut turns = 8;
    loop {
        match std::fs::remove_dir_all(path) {
            Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty && turns > 0 => turns -= 1,
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(error::io(format_args!("remove {}", path.display()), e));
            }
            _ => return Ok(()),
        }
    }
}

/// Keeps what is known of the guest up to date until its system has settled: after an adoption, and after a start that did not
/// wait for it. Ends with the engine.
pub async fn follow_guest(m: Arc<Machine>, live: Live) {
    let follow = async {
        loop {
            match live.link.health(Instant::now() + Duration::from_secs(30)).await {
                Ok(health) => {
                    let starting = health.system == "starting";
                    m.set_guest(sanitize::guest_info(&health));
                    if !starting {
                        return;
                    }
                    if let Ok(health) = live.link.system(SYSTEM).await {
                        m.set_guest(sanitize::guest_info(&health));
                        return;
                    }
                }
                Err(e @ LinkError::WrongMachine { .. }) => {
                    tracing::error!(machine = %m.id, error = %e, "the guest channel is not used");
                    return;
                }
                Err(e) => tracing::debug!(machine = %m.id, error = %e, "the agent does not answer yet"),
            }
            tokio::time::sleep(AGAIN).await;
        }
    };
    tokio::select! {
        () = live.exited.cancelled() => {}
        () = follow => {}
    }
}
