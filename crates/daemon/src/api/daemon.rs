//! The daemon itself.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use banger_proto::api::{Check, DaemonStatus, MachineState, VersionInfo};
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use crate::{doctor, version};

/// What the daemon is.
#[utoipa::path(get, path = "/v1/version", tag = "daemon", responses((status = 200, body = VersionInfo)))]
pub(super) async fn version() -> Json<VersionInfo> {
    Json(version::info())
}

/// How the daemon does.
#[utoipa::path(get, path = "/v1/daemon", tag = "daemon", responses((status = 200, body = DaemonStatus)))]
pub(super) async fn status(State(app): State<App>) -> Json<DaemonStatus> {
    let machines = app.machines();
    Json(DaemonStatus {
        version: version::info(),
        pid: std::process::id(),
        started_at: app.started_at.clone(),
        resident_bytes: crate::stats::resident_bytes(std::process::id()).unwrap_or(0),
        machines: machines.len().try_into().unwrap_or(u32::MAX),
        running: machines
            .iter()
            .filter(|m| m.state() == MachineState::Running)
            .count()
            .try_into()
            .unwrap_or(u32::MAX),
        state_dir: app.paths.state.display().to_string(),
        socket: app.paths.socket().display().to_string(),
        mode: app.hosting.mode().to_owned(),
        log: app.paths.log().display().to_string(),
    })
}

/// Ends the daemon. Machines run on.
#[utoipa::path(post, path = "/v1/daemon/stop", tag = "daemon", responses((status = 202)))]
pub(super) async fn stop(State(app): State<App>) -> StatusCode {
    tracing::info!("stopped by request");
    app.stopping.cancel();
    StatusCode::ACCEPTED
}

/// What was looked at.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Checks {
    /// One line each.
    checks: Vec<Check>,
}

/// Looks at everything that banger needs, and changes nothing.
#[utoipa::path(get, path = "/v1/doctor", tag = "daemon", responses((status = 200, body = Checks)))]
pub(super) async fn doctor(State(app): State<App>) -> Json<Checks> {
    Json(Checks {
        checks: doctor::run(&app).await,
    })
}

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "daemon", responses((status = 200, content_type = "application/json")))]
pub(super) async fn openapi() -> impl IntoResponse {
    Json(super::document())
}
