//! What is saved of machines: pausing and suspending, snapshots, copies, images of disks, templates.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use banger_proto::api::{
    Accepted, BuildTemplate, CommitMachine, CreateMachine, CreateSnapshot, ForkAccepted, ForkMachine, PruneTemplates,
    Pruned, Snapshot, Template,
};
use banger_proto::error::{ApiError, ErrorBody};
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::extract::Body;
use super::machines::accept;
use crate::error::{Failure, IntoApi};
use crate::machine::{Request, snapshot};
use crate::{commit, provision};

type Answer<T> = Result<T, Failure>;

/// Stops a machine's virtual CPUs.
#[utoipa::path(post, path = "/v1/machines/{ref}/pause", tag = "machines", params(("ref" = String, Path)),
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn pause(
    State(app): State<App>,
    Path(reference): Path<String>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    accept(&app, &reference, Request::Pause).await
}

/// Lets a paused machine go on.
#[utoipa::path(post, path = "/v1/machines/{ref}/resume", tag = "machines", params(("ref" = String, Path)),
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn resume(
    State(app): State<App>,
    Path(reference): Path<String>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    accept(&app, &reference, Request::Resume).await
}

/// Writes a machine's memory to disk and ends its engine. A start, or any use of its guest, wakes it.
#[utoipa::path(post, path = "/v1/machines/{ref}/suspend", tag = "machines", params(("ref" = String, Path)),
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn suspend(
    State(app): State<App>,
    Path(reference): Path<String>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    accept(&app, &reference, Request::Suspend).await
}

/// Snapshots.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Snapshots {
    /// Oldest first.
    snapshots: Vec<Snapshot>,
}

/// Snapshots of a machine.
#[utoipa::path(get, path = "/v1/machines/{ref}/snapshots", tag = "snapshots", params(("ref" = String, Path)),
    responses((status = 200, body = Snapshots), (status = "4XX", body = ErrorBody)))]
pub(super) async fn snapshots(State(app): State<App>, Path(reference): Path<String>) -> Answer<Json<Snapshots>> {
    app.reconciled().await?;
    let snapshots = snapshot::list(&*app.find(&reference)?);
    Ok(Json(Snapshots { snapshots }))
}

/// Takes a snapshot: disks, and memory if the machine runs.
#[utoipa::path(post, path = "/v1/machines/{ref}/snapshots", tag = "snapshots", params(("ref" = String, Path)),
    request_body = CreateSnapshot, responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn take_snapshot(
    State(app): State<App>,
    Path(reference): Path<String>,
    Body(request): Body<CreateSnapshot>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    let name = snapshot::check_name(&request.name)?;
    let disk_only = request.disk_only;
    accept(&app, &reference, Request::Snapshot { name, disk_only }).await
}

/// One snapshot.
#[utoipa::path(get, path = "/v1/machines/{ref}/snapshots/{name}", tag = "snapshots",
    params(("ref" = String, Path), ("name" = String, Path)),
    responses((status = 200, body = Snapshot), (status = "4XX", body = ErrorBody)))]
pub(super) async fn snapshot(
    State(app): State<App>,
    Path((reference, name)): Path<(String, String)>,
) -> Answer<Json<Snapshot>> {
    app.reconciled().await?;
    let m = app.find(&reference)?;
    Ok(Json(snapshot::look(&m, &name)?))
}

/// Removes a snapshot. What was made of it keeps what it shares with it.
#[utoipa::path(delete, path = "/v1/machines/{ref}/snapshots/{name}", tag = "snapshots",
    params(("ref" = String, Path), ("name" = String, Path)),
    responses((status = 204), (status = "4XX", body = ErrorBody)))]
pub(super) async fn delete_snapshot(
    State(app): State<App>,
    Path((reference, name)): Path<(String, String)>,
) -> Answer<StatusCode> {
    app.reconciled().await?;
    let m = app.find_exact(&reference)?;
    snapshot::delete(&m, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Puts a machine back to a snapshot. What it is now is lost. With memory it runs afterwards.
#[utoipa::path(post, path = "/v1/machines/{ref}/snapshots/{name}/restore", tag = "snapshots",
    params(("ref" = String, Path), ("name" = String, Path)),
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn restore(
    State(app): State<App>,
    Path((reference, name)): Path<(String, String)>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    app.reconciled().await?;
    // A name that is not there is told before anything is ended.
    let (snapshot, _) = snapshot::find(&*app.find_exact(&reference)?, &name)?;
    accept(&app, &reference, Request::Restore(snapshot.name)).await
}

/// Makes running copies of a running machine.
#[utoipa::path(post, path = "/v1/machines/{ref}/fork", tag = "snapshots", params(("ref" = String, Path)),
    request_body = ForkMachine, responses((status = 202, body = ForkAccepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn fork(
    State(app): State<App>,
    Path(reference): Path<String>,
    Body(request): Body<ForkMachine>,
) -> Answer<(StatusCode, Json<ForkAccepted>)> {
    app.reconciled().await?;
    let source = app.find(&reference)?;
    let (op, machines) = provision::fork(&app, &source, request).await?;
    let accepted = ForkAccepted {
        operation: op.snapshot(),
        machines: machines.iter().map(|m| m.show()).collect(),
    };
    Ok((StatusCode::ACCEPTED, Json(accepted)))
}

/// Makes an image of the root disk of a stopped machine, or of a snapshot.
#[utoipa::path(post, path = "/v1/machines/{ref}/commit", tag = "snapshots", params(("ref" = String, Path)),
    request_body = CommitMachine, responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn commit(
    State(app): State<App>,
    Path(reference): Path<String>,
    Body(request): Body<CommitMachine>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    app.reconciled().await?;
    let m = app.find(&reference)?;
    let op = commit::begin(&app, &m, request).await?;
    Ok((
        StatusCode::ACCEPTED,
        Json(Accepted {
            operation: op.snapshot(),
            machine: Some(m.show()),
        }),
    ))
}

/// Templates.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Templates {
    /// The most recently used first.
    templates: Vec<Template>,
}

/// All templates.
#[utoipa::path(get, path = "/v1/templates", tag = "templates", responses((status = 200, body = Templates)))]
pub(super) async fn templates(State(app): State<App>) -> Answer<Json<Templates>> {
    app.reconciled().await?;
    let templates = app.templates.list(&app).await?;
    Ok(Json(Templates { templates }))
}

/// One template, by its id or an unambiguous prefix.
#[utoipa::path(get, path = "/v1/templates/{id}", tag = "templates", params(("id" = String, Path)),
    responses((status = 200, body = Template), (status = "4XX", body = ErrorBody)))]
pub(super) async fn template(State(app): State<App>, Path(id): Path<String>) -> Answer<Json<Template>> {
    app.reconciled().await?;
    Ok(Json(app.templates.show(&app, &id).await?))
}

/// Makes the template from which machines like this start. What is absent is resolved as for a machine.
#[utoipa::path(post, path = "/v1/templates", tag = "templates", request_body = BuildTemplate,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn build_template(
    State(app): State<App>,
    Body(request): Body<BuildTemplate>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    app.reconciled().await?;
    let force = request.force;
    let asked = request.disk_bytes.is_some();
    let like = CreateMachine {
        image: request.image,
        kernel: request.kernel,
        vcpu: request.vcpu,
        memory_mib: request.memory_mib,
        disk_bytes: request.disk_bytes,
        network: request.network,
        ..CreateMachine::default()
    };
    let mut spec = provision::resolve(&app, &like).await?;
    let op = app.ops.begin("template.build", &spec.image);
    let operation = op.snapshot();
    tokio::spawn(async move {
        let work = async {
            let image = app.stock.image(&spec.image, &op).await?;
            let kernel = app.stock.kernel(&spec.kernel, &op).await?;
            spec.disk_bytes =
                banger_core::spec::disk_for(spec.disk_bytes, asked, image.size_bytes).map_err(IntoApi::into_api)?;
            (spec.image_digest, spec.kernel_digest) = (image.digest, kernel.digest);
            app.templates.build(&app, &spec, force, &op).await.map(drop)
        };
        let cancelled = op.canceled().clone();
        let work = async {
            tokio::select! {
                biased;
                () = cancelled.cancelled() => Err::<(), ApiError>(crate::ops::canceled()),
                done = work => done,
            }
        };
        let _ = app.ops.run(&op, work).await;
    });
    let accepted = Accepted {
        operation,
        machine: None,
    };
    Ok((StatusCode::ACCEPTED, Json(accepted)))
}

/// Removes a template. Machines that were started from it run on.
#[utoipa::path(delete, path = "/v1/templates/{id}", tag = "templates", params(("id" = String, Path)),
    responses((status = 204), (status = "4XX", body = ErrorBody)))]
pub(super) async fn delete_template(State(app): State<App>, Path(id): Path<String>) -> Answer<StatusCode> {
    app.reconciled().await?;
    app.templates.delete(&app, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Removes all templates, or those that fit nothing any more and those beyond the budget.
#[utoipa::path(post, path = "/v1/templates/prune", tag = "templates", request_body = PruneTemplates,
    responses((status = 200, body = Pruned), (status = "4XX", body = ErrorBody)))]
pub(super) async fn prune_templates(
    State(app): State<App>,
    Body(request): Body<PruneTemplates>,
) -> Answer<Json<Pruned>> {
    app.reconciled().await?;
    Ok(Json(app.templates.prune(&app, request.all).await?))
}
