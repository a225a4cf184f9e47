//! Bringing a machine up: engine, guest channel, identity, and as far as wanted the start-up of the image's own system.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use banger_core::host::Accel;
use banger_core::plan::{self, BootPlan, Disk, DiskFormat, DiskRole, NetworkKind, NetworkPlan};
use banger_core::state::Event;
use banger_proto::agent::{GuestNetwork, Personalize};
use banger_proto::api::WaitFor;
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::console_tail;
use tokio::time::Instant;

use super::live::Live;
use super::record::Machine;
use super::stages::Stages;
use super::{cause, handles};
use crate::agent::{LinkError, sanitize};
use crate::error::{self, IntoApi};
use crate::{failpoint, time};

/// Bound of a start when the request has none.
pub const TIMEOUT: Duration = Duration::from_secs(180);
/// How long the guest may take to become itself.
const PERSONALIZE: Duration = Duration::from_secs(30);
/// Bounds below a stage's own end this much later, so that it is the stage that is told.
const GRACE: Duration = Duration::from_secs(5);
/// Lines of the console that go with a failure.
pub const TAIL: usize = 20;
/// Pause before the guest is asked again in the background.
const AGAIN: Duration = Duration::from_secs(2);
/// Longest wait for the end of a guest's start-up in the background.
const SYSTEM: Duration = Duration::from_secs(15 * 60);

/// Brings the machine up. After a failure the machine is in state `starting`, or `running` if the guest was up already; the
/// caller undoes what has to be undone.
pub async fn bring_up(m: &Arc<Machine>, stages: &mut Stages, wait: WaitFor) -> Result<(), ApiError> {
    launch(m, stages).await?;
    become_itself(m, stages).await?;
    settle_system(m, stages, wait).await?;
    let report = stages.report();
    m.change(|row| {
        row.boot = Some(report);
        Ok(())
    })
    .await
}

/// The engine, from nothing to a process whose handles are written down.
async fn launch(m: &Arc<Machine>, stages: &mut Stages) -> Result<(), ApiError> {
    stages.enter("prepare");
    let row = m.row();
    let engine = m.services.engine().await?;
    let boot = stages.cancellable(m.services.stock.boot_files(&row.spec)).await?;
    m.happen(Event::StartBegins, |row| {
        row.started_at = Some(time::now());
        row.cause = None;
        row.boot = None;
    })
    .await?;
    failpoint::hit("start.row").await?;
    fresh_run_dir(&m.paths.run)?;
    let _ = std::fs::remove_file(m.paths.exit_record());
    let accel = if row.spec.accel == Accel::Kvm.as_str() {
        Accel::Kvm
    } else {
        Accel::Tcg
    };
    let plan = BootPlan {
        id: m.id.clone(),
        accel,
        vcpu: row.spec.vcpu,
        memory_mib: row.spec.memory_mib,
        kernel: boot.kernel,
        initrd: boot.initrd,
        cmdline: plan::cmdline(accel, m.services.host().await.tsc_khz()),
        disks: vec![
            Disk {
                serial: DiskRole::Root,
                path: m.paths.root_disk(),
                format: DiskFormat::Qcow2,
            },
            Disk {
                serial: DiskRole::Work,
                path: m.paths.work_disk(),
                format: DiskFormat::Raw,
            },
        ],
        network: (row.spec.network == "user").then(|| NetworkPlan {
            kind: NetworkKind::User,
            mac: m.id.mac(),
        }),
        paths: m.paths.clone(),
    };
    stages.enter("launch");
    // Not cut off in between: an engine that was half launched would have no owner.
    let launched = engine.launch(&plan).await.map_err(IntoApi::into_api)?;
    let passed = failpoint::hit("start.launched").await;
    let live = Live::new(&m.id, engine, launched.clone());
    let written = handles::write(&m.paths.handles(), &launched);
    m.set_live(live);
    // Only now may anything fail: the engine has an owner who can end it.
    passed.and(written)?;
    failpoint::hit("start.handles").await?;
    stages.check()
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

fn live(m: &Machine) -> Result<Live, ApiError> {
    m.live()
        .ok_or_else(|| ApiError::new(ErrorCode::Engine, format!("machine {} has no engine", m.name())))
}

async fn link<T>(call: impl Future<Output = Result<T, LinkError>>) -> Result<T, ApiError> {
    call.await.map_err(IntoApi::into_api)
}

/// Ends with an error as soon as the engine ends.
async fn or_exit<T>(m: &Machine, live: &Live, work: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
    let result = tokio::select! {
        biased;
        () = live.exited.cancelled() => Err(engine_ended(m).await),
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
    let cause = cause::find(&m.paths, super::stop::RECORD).await;
    ApiError::new(
        ErrorCode::Engine,
        format!("machine {} ended while it was starting: {cause}", m.name()),
    )
}

/// Names the stage and adds the end of the console.
fn explain(m: &Machine, stages: &Stages, mut e: ApiError) -> ApiError {
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
async fn identity(m: &Machine) -> Result<Personalize, ApiError> {
    let row = m.row();
    let mut entropy = [0; 64];
    getrandom::fill(&mut entropy).map_err(|e| ApiError::new(ErrorCode::Internal, format!("no randomness: {e}")))?;
    let ssh = m.services.ssh.of_machine(&m.paths.state, &m.id, &row.name).await;
    let network = (row.spec.network == "user").then(|| GuestNetwork {
        address: "10.0.2.15".to_owned(),
        prefix: 24,
        gateway: "10.0.2.2".to_owned(),
        dns: vec!["10.0.2.3".to_owned()],
    });
    Ok(Personalize {
        machine_id: m.id.to_string(),
        hostname: row.name,
        time_ns: u64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or_default(),
        entropy: banger_core::id::hex(&entropy),
        network,
        authorized_keys: ssh.authorized_keys,
        ssh_host_key: ssh.host_key,
        init: Default::default(),
        mask_units: plan::MASKED_UNITS.iter().map(|u| (*u).to_owned()).collect(),
    })
}

/// An empty directory for the machine's sockets.
fn fresh_run_dir(path: &Path) -> Result<(), ApiError> {
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
