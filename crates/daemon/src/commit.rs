//! Images made of machines' root disks.

use std::sync::Arc;

use banger_core::plan::Disk;
use banger_proto::api::{CommitMachine, MachineSpec};
use banger_proto::error::{ApiError, ErrorCode};

use crate::error::IntoApi;
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
            let disk = disks::frozen_root(&checkpoint.disks(), image)?;
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
    let root = disks::plan(&m.paths, image)?
        .into_iter()
        .next()
        .ok_or_else(|| ApiError::new(ErrorCode::Internal, "the machine has no root disk"))?;
    let source = format!("machine {}", m.name());
    keep(&m.services, op, root, &spec, source, name, force).await
}

async fn keep(
    services: &Services,
    op: &Op,
    disk: Disk,
    spec: &MachineSpec,
    source: String,
    name: &str,
    force: bool,
) -> Result<(), ApiError> {
    op.stage("copy");
    let engine = services.engine().await?;
    let draft = services.stock.draft()?;
    let target = draft.rootfs();
    let copied = tokio::select! {
        biased;
        () = op.canceled().cancelled() => Err(crate::ops::canceled()),
        copied = engine.flatten(&disk, &target) => copied.map_err(IntoApi::into_api),
    };
    copied?;
    op.stage("store");
    services.stock.check_new_image(name, force).await?;
    services.stock.keep_disk(draft, spec, source, name, op).await
}
