//! Machines: what they are and what can be done with them.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use banger_core::name::MachineName;
use banger_core::spec;
use banger_core::state;
use banger_proto::api::{
    Accepted, CreateMachine, KillMachine, Machine, MachineState, MachineStats, PatchMachine, Recoverable, StartMachine,
    StopMachine,
};
use banger_proto::error::{ApiError, ErrorBody, ErrorCode};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::App;
use super::extract::{Body, Params};
use crate::error::{Failure, IntoApi};
use crate::machine::{Request, request, stop as stopping, task};
use crate::{failpoint, forwards, provision, recover, stats};

type Answer<T> = Result<T, Failure>;

/// Longest time that a client may wait in one request.
const MAX_WAIT: Duration = Duration::from_secs(600);

/// Machines.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Machines {
    /// Oldest first.
    machines: Vec<Machine>,
    /// How many machines have files and are not in the database: see `/v1/recoverable`.
    #[serde(skip_serializing_if = "is_zero")]
    recoverable: usize,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// All machines.
#[utoipa::path(get, path = "/v1/machines", tag = "machines", responses((status = 200, body = Machines)))]
pub(super) async fn list(State(app): State<App>) -> Json<Machines> {
    app.settled().await;
    Json(Machines {
        machines: app.machines().iter().map(|m| m.show()).collect(),
        recoverable: recover::ids(&app).len(),
    })
}

/// Machines that can be taken back.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Recoverables {
    /// By id.
    machines: Vec<Recoverable>,
}

/// Machines whose files are there and which are not in the database.
#[utoipa::path(get, path = "/v1/recoverable", tag = "machines", responses((status = 200, body = Recoverables)))]
pub(super) async fn recoverable(State(app): State<App>) -> Answer<Json<Recoverables>> {
    app.reconciled().await?;
    Ok(Json(Recoverables {
        machines: recover::list(&app),
    }))
}

/// Takes a machine back whose files are there and which is not in the database, by its name or id.
#[utoipa::path(post, path = "/v1/recoverable/{ref}", tag = "machines", params(("ref" = String, Path)),
    responses((status = 200, body = Machine), (status = "4XX", body = ErrorBody)))]
pub(super) async fn recover_one(State(app): State<App>, Path(reference): Path<String>) -> Answer<Json<Machine>> {
    app.reconciled().await?;
    Ok(Json(recover::recover(&app, &reference).await?))
}

/// Creates a machine, and starts it unless told otherwise.
#[utoipa::path(post, path = "/v1/machines", tag = "machines", request_body = CreateMachine,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn create(
    State(app): State<App>,
    Body(request): Body<CreateMachine>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    app.reconciled().await?;
    let (op, machine) = provision::create(&app, request).await?;
    Ok((
        StatusCode::ACCEPTED,
        Json(Accepted {
            operation: op.snapshot(),
            machine: Some(machine.show()),
        }),
    ))
}

/// One machine, by name, id or unambiguous prefix.
#[utoipa::path(get, path = "/v1/machines/{ref}", tag = "machines", params(("ref" = String, Path)),
    responses((status = 200, body = Machine), (status = "4XX", body = ErrorBody)))]
pub(super) async fn show(State(app): State<App>, Path(reference): Path<String>) -> Answer<Json<Machine>> {
    app.settled().await;
    Ok(Json(app.find(&reference)?.show()))
}

/// Changes a machine: its name at any time, CPUs and memory for the next start, its disk while it is stopped.
#[utoipa::path(patch, path = "/v1/machines/{ref}", tag = "machines", params(("ref" = String, Path)), request_body = PatchMachine,
    responses((status = 200, body = Machine), (status = "4XX", body = ErrorBody)))]
pub(super) async fn patch(
    State(app): State<App>,
    Path(reference): Path<String>,
    Body(patch): Body<PatchMachine>,
) -> Answer<Json<Machine>> {
    app.reconciled().await?;
    let m = app.find(&reference)?;
    // Everything is checked before anything is changed.
    let row = m.row();
    let name = patch.name.as_deref().map(MachineName::parse).transpose()?;
    let (vcpu, memory) = (
        patch.vcpu.unwrap_or(row.spec.vcpu),
        patch.memory_mib.unwrap_or(row.spec.memory_mib),
    );
    if patch.vcpu.is_some() || patch.memory_mib.is_some() {
        spec::check_sizes(vcpu, memory, app.shape().await)?;
        task::check_change(&m, state::Request::Resize)?;
    }
    if let Some(bytes) = patch.disk_bytes {
        spec::check_disk(bytes)?;
        if bytes < row.spec.disk_bytes {
            let message = format!(
                "the disk of `{}` has {} bytes and only grows",
                row.name, row.spec.disk_bytes
            );
            return Err(Failure(ApiError::new(ErrorCode::InvalidSpec, message)));
        }
        task::check_change(&m, state::Request::GrowDisk)?;
    }
    if name.is_some() {
        task::check_change(&m, state::Request::Rename)?;
    }
    spec::check_reach(&row.spec.network, patch.nat, None)?;
    let ports = match &patch.forwards {
        Some(wanted) => Some(app.forwards.reserve(wanted, Some(&m.id))?),
        None => None,
    };
    m.change(|row| {
        if let Some(ports) = &ports {
            row.forwards = ports.forwards();
        }
        if let Some(name) = &name {
            name.as_str().clone_into(&mut row.name);
        }
        row.spec.vcpu = vcpu;
        row.spec.memory_mib = memory;
        if let Some(nat) = patch.nat {
            row.spec.nat = nat;
        }
        if patch.workspace.is_some() {
            row.workspace = patch.workspace;
        }
        if let Some(after) = patch.idle_suspend_after_ms {
            row.idle_suspend_after_ms = after;
        }
        if let Some(policy) = patch.on_panic {
            row.on_panic = policy;
        }
        Ok(())
    })
    .await?;
    if let Some(ports) = ports
        && forwards::serves(m.state())
    {
        app.forwards.open(&m, ports);
    }
    if let (Some(nat), Some(system)) = (patch.nat, app.hosting.get()) {
        system.set_nat(&m.id, nat).await?;
    }
    if let Some(name) = name {
        tracing::info!(machine = %m.id, from = row.name, to = %name, "renamed");
        failpoint::hit("rename.row").await?;
        app.ssh.rename(&m.paths.state, &m.id, name.as_str()).await?;
    }
    if let Some(bytes) = patch.disk_bytes
        && bytes > row.spec.disk_bytes
    {
        let op = request::ask(&m, Request::GrowDisk(bytes)).await?;
        let mut state = op.subscribe();
        let _ = state.wait_for(|o| o.ended_at.is_some()).await;
        if let Some(error) = op.snapshot().error {
            return Err(Failure(error));
        }
    }
    Ok(Json(m.show()))
}

/// Removes a machine with everything it has.
#[utoipa::path(delete, path = "/v1/machines/{ref}", tag = "machines", params(("ref" = String, Path), DeleteParams),
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn delete(
    State(app): State<App>,
    Path(reference): Path<String>,
    Params(params): Params<DeleteParams>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    accept_with(&app, &reference, Request::Delete, params.force).await
}

/// How a machine is removed.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct DeleteParams {
    /// End an engine that does not answer, too: everything else must identify it.
    #[serde(default)]
    force: bool,
}

/// Starts a machine.
#[utoipa::path(post, path = "/v1/machines/{ref}/start", tag = "machines", params(("ref" = String, Path)), request_body = StartMachine,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn start(
    State(app): State<App>,
    Path(reference): Path<String>,
    Body(start): Body<StartMachine>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    accept(&app, &reference, Request::Start(start)).await
}

/// Stops a machine and starts it again.
#[utoipa::path(post, path = "/v1/machines/{ref}/restart", tag = "machines", params(("ref" = String, Path)), request_body = StartMachine,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn restart(
    State(app): State<App>,
    Path(reference): Path<String>,
    Body(start): Body<StartMachine>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    accept(&app, &reference, Request::Restart(start)).await
}

/// Shuts a machine down; its engine is ended when the guest takes too long.
#[utoipa::path(post, path = "/v1/machines/{ref}/stop", tag = "machines", params(("ref" = String, Path)), request_body = StopMachine,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn stop(
    State(app): State<App>,
    Path(reference): Path<String>,
    Body(stop): Body<StopMachine>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    let timeout = stop.timeout_ms.map_or(stopping::TIMEOUT, Duration::from_millis);
    accept_with(&app, &reference, Request::Stop(timeout), stop.force).await
}

/// Ends a machine's engine at once.
#[utoipa::path(post, path = "/v1/machines/{ref}/kill", tag = "machines", params(("ref" = String, Path)), request_body = KillMachine,
    responses((status = 202, body = Accepted), (status = "4XX", body = ErrorBody)))]
pub(super) async fn kill(
    State(app): State<App>,
    Path(reference): Path<String>,
    Body(kill): Body<KillMachine>,
) -> Answer<(StatusCode, Json<Accepted>)> {
    let signal = stopping::signal_number(kill.signal.as_deref().unwrap_or("KILL"))?;
    accept_with(&app, &reference, Request::Kill(signal), kill.force).await
}

pub(super) async fn accept(app: &App, reference: &str, request: Request) -> Answer<(StatusCode, Json<Accepted>)> {
    accept_with(app, reference, request, false).await
}

async fn accept_with(
    app: &App,
    reference: &str,
    request: Request,
    force: bool,
) -> Answer<(StatusCode, Json<Accepted>)> {
    app.reconciled().await?;
    let m = if request.loses_something() {
        app.find_exact(reference)?
    } else {
        app.find(reference)?
    };
    let op = request::ask_with(&m, request, force).await?;
    Ok((
        StatusCode::ACCEPTED,
        Json(Accepted {
            operation: op.snapshot(),
            machine: Some(m.show()),
        }),
    ))
}

/// What to wait for.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct WaitParams {
    /// States, separated by commas; `running` when absent.
    state: Option<String>,
    /// How long, in milliseconds; a minute when absent, ten minutes at most.
    timeout_ms: Option<u64>,
}

/// Waits until a machine is in one of several states.
#[utoipa::path(get, path = "/v1/machines/{ref}/wait", tag = "machines", params(("ref" = String, Path), WaitParams),
    responses((status = 200, body = Machine), (status = 504, body = ErrorBody), (status = "4XX", body = ErrorBody)))]
pub(super) async fn wait(
    State(app): State<App>,
    Path(reference): Path<String>,
    Params(params): Params<WaitParams>,
) -> Answer<Json<Machine>> {
    let m = app.find(&reference)?;
    let words = params.state.unwrap_or_else(|| "running".to_owned());
    let mut states = Vec::new();
    for word in words.split(',') {
        let state: MachineState = serde_json::from_value(serde_json::Value::String(word.to_owned())).map_err(|_| {
            let word: String = word.chars().take(20).flat_map(char::escape_default).collect();
            ApiError::new(ErrorCode::BadRequest, format!("unknown state `{word}`"))
                .hint("states: creating starting running paused suspending suspended stopping stopped error deleting unverified")
        })?;
        states.push(state);
    }
    let timeout = params
        .timeout_ms
        .map_or(Duration::from_secs(60), Duration::from_millis)
        .min(MAX_WAIT);
    let waited = tokio::select! {
        waited = tokio::time::timeout(timeout, m.wait(|s| states.contains(&s))) => waited,
        () = app.stopping.cancelled() => {
            return Err(Failure(ApiError::new(ErrorCode::Unavailable, "the daemon is stopping")));
        }
    };
    match waited {
        Ok(Some(machine)) => Ok(Json(machine)),
        Ok(None) => Err(Failure(ApiError::new(
            ErrorCode::NotFound,
            format!("machine `{}` was removed", m.name()),
        ))),
        Err(_) => {
            let message = format!(
                "machine `{}` is {} after {timeout:?}, not {words}",
                m.name(),
                m.state().as_str()
            );
            Err(Failure(ApiError::new(ErrorCode::Timeout, message)))
        }
    }
}

/// Figures of a machine.
#[utoipa::path(get, path = "/v1/machines/{ref}/stats", tag = "machines", params(("ref" = String, Path)),
    responses((status = 200, body = MachineStats), (status = "4XX", body = ErrorBody)))]
pub(super) async fn stats(State(app): State<App>, Path(reference): Path<String>) -> Answer<Json<MachineStats>> {
    let m = app.find(&reference)?;
    task::check_agent(&m)?;
    stats::read(&m).await.map(Json).map_err(|e| Failure(e.into_api()))
}
