//! Making a template: a machine that is nobody's boots, is saved and ended.
//!
//! It has no row: its directory, whose name holds its id, is what is known of it from before the first effect to its end, and what an
//! earlier daemon left of one is found by it ([`sweep`]). It is told no key and no name of any machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use banger_core::id::MachineId;
use banger_core::plan::MachinePaths;
use banger_proto::agent::Freeze;
use banger_proto::api::MachineSpec;
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::{AfterSave, Liveness, SavePlan, Steps, console_tail};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::agent::warm;
use crate::blocking::blocking;
use crate::error::IntoApi;
use crate::failpoint;
use crate::machine::checkpoint::{self, Checkpoint};
use crate::machine::live::Live;
use crate::machine::start::{self, remove_dir};
use crate::machine::{adopt, console, disks, handles, save, stop};
use crate::ops::{Op, canceled};
use crate::services::Services;

/// How long the machine may take from its start to the end of its system's start-up.
const BOOT: Duration = Duration::from_secs(180);
/// How long it may take to take on its identity.
const PERSONALIZE: Duration = Duration::from_secs(30);
/// How long it may take to be frozen, its services put away first.
const FREEZE: Duration = Duration::from_secs(60);
/// Its host name: short, so that a copy's own takes its place in the same blocks.
const NAME: &str = "b";

/// The machine that boots for a template.
struct Builder {
    services: Arc<Services>,
    id: MachineId,
    /// Its place in the network of system mode, lent for as long as it is needed.
    slot: Option<u32>,
    spec: MachineSpec,
    staging: PathBuf,
    paths: MachinePaths,
}

/// Makes the template `id`. Cancelled, or failed, it leaves nothing.
pub async fn build(services: &Arc<Services>, id: &str, spec: &MachineSpec, op: &Op) -> Result<Checkpoint, ApiError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|e| ApiError::new(ErrorCode::Internal, format!("no randomness: {e}")))?;
    let machine = MachineId::from_random(bytes);
    let staging = services
        .paths
        .templates()
        .join(format!("{}{id}-{machine}", super::STAGING));
    let rows = services.machines().into_iter().filter_map(|m| m.row().slot);
    let slot = match services.hosting.get() {
        Some(system) => Some(system.lend(&machine, rows)?),
        None => None,
    };
    super::lock(&services.templates.building).insert(machine.clone());
    let builder = Builder {
        slot,
        paths: paths(services, &staging, &machine),
        services: services.clone(),
        id: machine,
        // It reaches nobody, and nobody reaches it.
        spec: MachineSpec {
            nat: spec.network != "bridge",
            net_group: None,
            ..spec.clone()
        },
        staging,
    };
    let (place, op) = (services.paths.templates().join(id), op.clone());
    // A task of its own: whoever stops waiting leaves the clearing up to it.
    let cancel = CancellationToken::new();
    let _guard = cancel.clone().drop_guard();
    let work = tokio::spawn(crate::ops::part(async move {
        let mut live = None;
        let made = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(canceled()),
            () = builder.services.stopping.cancelled() => Err(canceled()),
            made = builder.make(&mut live, &op) => made,
        };
        let made = made.map_err(|e| builder.explain(e));
        let cleared = builder.clear(live.as_ref()).await;
        let done = match made {
            // What is left there of one that is not whole is in the way.
            Ok(made) => remove_dir(&place).and_then(|()| made.commit(&place)),
            Err(e) => Err(e),
        };
        let removed = remove_dir(&builder.staging);
        if let Err(e) = cleared.and(removed) {
            tracing::error!(machine = %builder.id, error = %e.message, "what made a template is not wholly cleared");
        }
        super::lock(&builder.services.templates.building).remove(&builder.id);
        done
    }));
    work.await
        .unwrap_or_else(|e| Err(ApiError::new(ErrorCode::Internal, format!("the making broke off: {e}"))))
}

fn paths(services: &Services, staging: &Path, id: &MachineId) -> MachinePaths {
    MachinePaths {
        state: staging.join("machine"),
        run: services.paths.machine(id).run,
    }
}

impl Builder {
    async fn make(&self, live: &mut Option<Live>, op: &Op) -> Result<Checkpoint, ApiError> {
        op.stage("template");
        disks::make_dir(&self.staging)?;
        disks::make_dir(&self.paths.state)?;
        failpoint::hit("template.row").await?;
        self.services
            .stock
            .make_disks(&self.services, &self.paths, &self.spec)
            .await?;
        start::fresh_run_dir(&self.paths.run)?;
        let engine = self.services.engine(&self.spec.engine).await?;
        let plan = start::boot_plan(&self.services, &self.id, self.slot, &self.spec, &self.paths, None).await?;
        op.stage("template boot");
        start::attach(&self.services, &plan, &self.spec).await?;
        let launched = engine.launch(&plan).await.map_err(IntoApi::into_api)?;
        let live = live.insert(Live::new(&self.id, engine, launched.clone()));
        handles::write(&self.paths.handles(), &launched)?;
        let spec = self.spec.clone();
        let scoped = start::scope(self.services.clone(), self.id.clone(), spec, launched);
        tokio::spawn(crate::ops::part(scoped));
        failpoint::hit("template.launched").await?;
        let booted = tokio::select! {
            biased;
            () = live.exited.cancelled() => Err(ApiError::new(ErrorCode::Engine, "its engine has ended")),
            booted = tokio::time::timeout(BOOT, self.boot(live)) => booted.unwrap_or_else(|_| {
                Err(ApiError::new(ErrorCode::Timeout, format!("its system was not up within {BOOT:?}")))
            }),
        };
        booted?;
        failpoint::hit("template.booted").await?;
        op.stage("template save");
        let target = self.staging.join("checkpoint");
        disks::make_dir(&target)?;
        live.link
            .freeze(
                &Freeze {
                    template: true,
                    sync: false,
                },
                FREEZE,
            )
            .await
            .map_err(IntoApi::into_api)?;
        // No copy has a connection to give up.
        live.link
            .hang_up(Instant::now() + FREEZE)
            .await
            .map_err(IntoApi::into_api)?;
        let save = SavePlan {
            memory: Some(checkpoint::files(&target)),
            base: None,
            layers: Vec::new(),
            then: AfterSave::Stopped,
        };
        let saved = live
            .engine
            .save(&live.handles, &save, Steps::none())
            .await
            .map_err(IntoApi::into_api)?;
        failpoint::hit("template.saved").await?;
        console::keep(&self.paths.console_log(), &target);
        // It has written out its disks when it stopped.
        stop::kill_now(live).await?;
        self.services.hosting.release(&self.id).await?;
        let (dir, frozen, layer) = (self.paths.disks(), target.join("disks"), save::layer_name()?);
        let layers = blocking(move || {
            disks::freeze_at_rest(&dir, &layer)?;
            disks::export(&dir, &frozen)?;
            disks::read_list(&frozen)
        })
        .await?;
        let spec = self.spec.clone();
        let id = self.id.as_str();
        Checkpoint::seal(&self.services, &target, id, spec, layers.layers, true, saved.paused).await
    }

    /// From the first sign of life to a system that has settled.
    async fn boot(&self, live: &Live) -> Result<(), ApiError> {
        let link = &live.link;
        link.connect(Instant::now() + BOOT).await.map_err(IntoApi::into_api)?;
        let network = start::guest_network(&self.services, &self.id, self.slot, &self.spec)?;
        let nobody = start::personalize(&self.id, NAME, network, Vec::new(), None)?;
        let health = link
            .personalize(&nobody, PERSONALIZE)
            .await
            .map_err(IntoApi::into_api)?;
        if health.system != "none" {
            link.system(BOOT).await.map_err(IntoApi::into_api)?;
        }
        // What every machine does first is in the guest's page cache then.
        warm::run(link).await;
        Ok(())
    }

    /// The error, with what the guest's console said last.
    fn explain(&self, mut e: ApiError) -> ApiError {
        if e.code != ErrorCode::Canceled && e.details.is_empty() {
            e.details = console_tail(&self.paths, start::TAIL);
        }
        e
    }

    async fn clear(&self, live: Option<&Live>) -> Result<(), ApiError> {
        let ended = match live {
            Some(live) => {
                live.link.disconnect().await;
                stop::kill_now(live).await
            }
            None => Ok(()),
        };
        let released = self.services.hosting.release(&self.id).await;
        if let Some(system) = self.services.hosting.get() {
            system.take_back(&self.id);
        }
        ended.and(remove_dir(&self.paths.run)).and(released)
    }
}

/// Clears what an earlier daemon left of a template it was making. `rest` is the directory's name behind the prefix.
pub async fn sweep(services: &Arc<Services>, staging: &Path, rest: &str) {
    let machine = rest.rsplit_once('-').and_then(|(_, id)| MachineId::parse(id).ok());
    if let Some(id) = machine {
        let paths = paths(services, staging, &id);
        match lost(services, &id, &paths).await {
            Ok(()) => {}
            Err(e) => {
                tracing::error!(machine = %id, error = %e.message, "the machine of a half-made template is still there");
                return;
            }
        }
    }
    match remove_dir(staging) {
        Ok(()) => tracing::info!(dir = %staging.display(), "half-made template removed"),
        Err(e) => tracing::warn!(dir = %staging.display(), error = %e.message, "half-made template not removed"),
    }
}

/// Ends the engine of a builder that was lost sight of.
async fn lost(services: &Arc<Services>, id: &MachineId, paths: &MachinePaths) -> Result<(), ApiError> {
    let kept = handles::read(&paths.handles()).unwrap_or_default();
    match adopt::find(services, id, paths, kept.as_ref(), None).await {
        Liveness::Gone(_) => {}
        Liveness::Alive(found) => {
            let engine = services.engine(&found.engine).await?;
            stop::kill_now(&Live::new(id, engine, found)).await?;
        }
        Liveness::Unclear(why) | Liveness::Silent { why, .. } => return Err(ApiError::new(ErrorCode::Engine, why)),
    }
    let released = services.hosting.release(id).await;
    remove_dir(&paths.run).and(released)
}
