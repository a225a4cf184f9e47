//! Operations: long pieces of work.

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use banger_proto::api::{Operation, OperationState};
use banger_proto::error::{ApiError, ErrorBody, ErrorCode};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::App;
use super::extract::Params;
use crate::error::Failure;
use crate::ops::Op;

/// Operations.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Operations {
    /// Newest first.
    operations: Vec<Operation>,
}

/// Recent operations.
#[utoipa::path(get, path = "/v1/operations", tag = "operations", responses((status = 200, body = Operations)))]
pub(super) async fn list(State(app): State<App>) -> Json<Operations> {
    Json(Operations {
        operations: app.ops.list(),
    })
}

/// One operation.
#[utoipa::path(get, path = "/v1/operations/{id}", tag = "operations", params(("id" = String, Path)),
    responses((status = 200, body = Operation), (status = "4XX", body = ErrorBody)))]
pub(super) async fn show(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Operation>, Failure> {
    Ok(Json(find(&app, &id)?.snapshot()))
}

/// Asks an operation to end and to undo what it did. Those that only run for a bounded time run to their end.
#[utoipa::path(delete, path = "/v1/operations/{id}", tag = "operations", params(("id" = String, Path)),
    responses((status = 202, body = Operation), (status = "4XX", body = ErrorBody)))]
pub(super) async fn cancel(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<Operation>), Failure> {
    let op = find(&app, &id)?;
    op.cancel();
    Ok((StatusCode::ACCEPTED, Json(op.snapshot())))
}

/// How to follow.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsParams {
    /// Cancel the operation when this client goes away before its end.
    #[serde(default)]
    cancel_on_disconnect: bool,
}

/// Follows an operation: one JSON object a line, at once and at each change, the last one being its end.
#[utoipa::path(get, path = "/v1/operations/{id}/events", tag = "operations", params(("id" = String, Path), EventsParams),
    responses((status = 200, content_type = "application/x-ndjson", body = Operation), (status = "4XX", body = ErrorBody)))]
pub(super) async fn events(
    State(app): State<App>,
    Path(id): Path<String>,
    Params(params): Params<EventsParams>,
) -> Result<Response, Failure> {
    let op = find(&app, &id)?;
    let guard = params.cancel_on_disconnect.then(|| CancelGuard(op.clone()));
    let mut seen = op.subscribe();
    seen.mark_changed();
    let stopping = app.stopping.clone();
    let state = (seen, guard, false, stopping);
    let stream = futures_util::stream::unfold(state, |(mut seen, guard, ended, stopping)| async move {
        if ended {
            drop(guard);
            return None;
        }
        tokio::select! {
            changed = seen.changed() => changed.ok()?,
            () = stopping.cancelled() => return None,
        }
        let operation = seen.borrow_and_update().clone();
        let mut line = serde_json::to_vec(&operation).unwrap_or_default();
        line.push(b'\n');
        let ended = operation.state != OperationState::Running;
        Some((
            Ok::<_, std::convert::Infallible>(Bytes::from(line)),
            (seen, guard, ended, stopping),
        ))
    });
    Ok((
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(stream),
    )
        .into_response())
}

/// Cancels the operation when its follower goes before its end. The end of the daemon is no reason to cancel.
struct CancelGuard(Op);

impl Drop for CancelGuard {
    fn drop(&mut self) {
        if !self.0.ended() {
            tracing::info!(op = self.0.id(), "its client is gone: cancelled");
            self.0.cancel();
        }
    }
}

fn find(app: &App, id: &str) -> Result<Op, ApiError> {
    app.ops.get(id).ok_or_else(|| {
        let id: String = id.chars().take(40).flat_map(char::escape_default).collect();
        ApiError::new(ErrorCode::NotFound, format!("no operation `{id}`"))
    })
}
