//! Images made of machines' root disks.

use std::path::PathBuf;
use std::sync::Arc;

use banger_proto::api::{CommitMachine, MachineSpec};
use banger_proto::error::ApiError;

use crate::blocking::blocking;
use crate::engines;
use crate::error::IntoApi;
use crate::machine::disks::RootDisk;
use crate::machine::{Machine, Request, disks, request, snapshot, start};
use crate::ops::Op;
use crate::services::Services;

/// Begins to make an image of a stopped machine, or of one of its snapshots.
pub async fn begin(services: &Arc<Services>, m: &Arc<Machine>, request: CommitMachine) -> Result<Op, ApiError> {
    services.stock.check_new_image(&request.image, request.force).await?;
    let Some(name) = request.snapshot else {
        let (image, force) = (request.image, request.force);
        return request::ask(m, Request::Commit { image, force }).await;
    };
    let (_, checkpoint) = snapshot::find(m, &name)?;
    let op = services.ops.begin("machine.commit", &m.name());
    let (services, m, running) = (services.clone(), m.clone(), op.clone());
    tokio::spawn(async move {
        let work = async {
            let spec = &checkpoint.manifest.spec;
            let image = services.stock.image_file(spec).await?;
            let disk = disks::frozen_root(&checkpoint.disks(), image, spec.disk_bytes)?;
            let source = format!("machine {} snapshot {name}", m.name());
            keep(&services, &running, disk, spec, source, &request.image, request.force).await
        };
        let _ = services.ops.run(&running, work).await;
    });
    Ok(op)
}

/// Makes an image of a machine that no engine uses.
pub async fn machine(m: &Arc<Machine>, op: &Op, name: &str, force: bool) -> Result<(), ApiError> {
    let spec = m.row().spec;
    start::ensure_disks(m).await?;
    let image = m.services.stock.image_file(&spec).await?;
    let root = disks::root(&m.paths.disks(), image, spec.disk_bytes)?;
    let source = format!("machine {}", m.name());
    keep(&m.services, op, root, &spec, source, name, force).await
}

async fn keep(
    services: &Services,
    op: &Op,
    disk: RootDisk,
    spec: &MachineSpec,
    source: String,
    name: &str,
    force: bool,
) -> Result<(), ApiError> {
    op.stage("copy");
    let draft = services.stock.draft()?;
    let target = draft.rootfs();
    let copied = tokio::select! {
        biased;
        () = op.canceled().cancelled() => Err(crate::ops::canceled()),
        copied = flatten(services, disk, target) => copied,
    };
    copied?;
    op.stage("store");
    services.stock.check_new_image(name, force).await?;
    services.stock.keep_disk(draft, spec, source, name, op).await
}

/// All of a root disk in one file. Only an engine reads layers.
async fn flatten(services: &Services, disk: RootDisk, target: PathBuf) -> Result<(), ApiError> {
    match disk {
        RootDisk::Chain(disk) => {
            let engine = services.engine(engines::QEMU).await?;
            engine.flatten(&disk, &target).await.map_err(IntoApi::into_api)
        }
        disk => blocking(move || disks::flatten(&disk, &target)).await,
    }
}
