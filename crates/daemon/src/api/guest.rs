//! What goes through to a machine's agent: sessions, files, connections. Also the hold that ties a machine to its client.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::extract::{Path, Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use banger_proto::agent::{Stat, Target};
use banger_proto::api::{FilesWritten, Session};
use banger_proto::error::{ApiError, ErrorBody, ErrorCode};
use banger_proto::frame::MAX_PAYLOAD;
use futures_util::StreamExt;
use http_body_util::BodyExt;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::App;
use super::extract::Params;
use crate::agent::{Link, LinkError, relay};
use crate::error::{Failure, IntoApi};
use crate::idle::Use;
use crate::machine::{Machine, reboot, task};
use crate::reach::reach;

type Answer<T> = Result<T, Failure>;

/// Bytes that a WebSocket reads ahead.
const READ_AHEAD: usize = 64 * 1024;
/// Bytes that wait for a client that does not read.
const WRITE_BEHIND: usize = 1024 * 1024;

/// The link of a machine that runs, and the machine's use for as long as it is held. A machine that is suspended is woken.
async fn link(app: &App, reference: &str) -> Result<(Use, Arc<Link>), ApiError> {
    app.reconciled().await?;
    reach(&app.find(reference)?).await
}

/// Sessions.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Sessions {
    /// As the agent lists them.
    sessions: Vec<Session>,
}

/// Exec sessions of a machine.
#[utoipa::path(get, path = "/v1/machines/{ref}/sessions", tag = "guest", params(("ref" = String, Path)),
    responses((status = 200, body = Sessions), (status = "4XX", body = ErrorBody)))]
pub(super) async fn sessions(State(app): State<App>, Path(reference): Path<String>) -> Answer<Json<Sessions>> {
    let m = app.find(&reference)?;
    task::check_agent(&m)?;
    let (_used, link) = link(&app, &reference).await?;
    Ok(Json(Sessions {
        sessions: link.sessions().await?,
    }))
}

/// Opens or attaches to an exec session: a WebSocket whose binary messages are the frames of `banger_proto::frame`.
#[utoipa::path(get, path = "/v1/machines/{ref}/sessions/{id}/attach", tag = "guest",
    params(("ref" = String, Path), ("id" = String, Path, description = "1 to 64 of a-z A-Z 0-9 _ -, chosen by the client")),
    responses((status = 101), (status = "4XX", body = ErrorBody)))]
pub(super) async fn attach(
    State(app): State<App>,
    Path((reference, id)): Path<(String, String)>,
    upgrade: WebSocketUpgrade,
) -> Answer<Response> {
    let fits = (1..=64).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    if !fits {
        let message = "a session id has 1 to 64 characters of a-z, A-Z, 0-9, `_` and `-`";
        return Err(Failure(ApiError::new(ErrorCode::BadRequest, message)));
    }
    let (used, link) = link(&app, &reference).await?;
    let m = app.find(&reference)?;
    Ok(bounded(upgrade, MAX_PAYLOAD + 1).on_upgrade(move |socket| async move {
        let _used = used;
        let explain = |e| reboot::explain(m, link.clone(), e);
        tokio::select! {
            () = relay::session(socket, &link, &id, explain) => {}
            () = app.stopping.cancelled() => {}
        }
    }))
}

fn bounded(upgrade: WebSocketUpgrade, message: usize) -> WebSocketUpgrade {
    upgrade
        .max_message_size(message)
        .max_frame_size(message)
        .read_buffer_size(READ_AHEAD)
        .write_buffer_size(0)
        .max_write_buffer_size(WRITE_BEHIND)
}

/// A path in the guest.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct PathParams {
    /// Absolute path in the guest.
    path: String,
}

impl PathParams {
    fn check(&self) -> Result<(), ApiError> {
        if self.path.len() > 4095 || self.path.contains('\0') || !self.path.starts_with('/') {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                "a path in the guest is absolute and has at most 4095 bytes",
            ));
        }
        Ok(())
    }
}

/// Reads a file or a directory as a tar stream.
#[utoipa::path(get, path = "/v1/machines/{ref}/files", tag = "guest", params(("ref" = String, Path), PathParams),
    responses((status = 200, content_type = "application/x-tar"), (status = "4XX", body = ErrorBody)))]
pub(super) async fn read_files(
    State(app): State<App>,
    Path(reference): Path<String>,
    Params(params): Params<PathParams>,
) -> Answer<Response> {
    params.check()?;
    let (used, link) = link(&app, &reference).await?;
    let permit = link.relay_permit()?;
    let body = link.read_files(&params.path).await?;
    // The place among the relays is given back with the body.
    let body = body.map_frame(move |frame| {
        let _held = (&permit, &used);
        frame
    });
    Ok(([(header::CONTENT_TYPE, "application/x-tar")], Body::new(body)).into_response())
}

/// Unpacks a tar stream below a directory, which is made.
#[utoipa::path(put, path = "/v1/machines/{ref}/files", tag = "guest", params(("ref" = String, Path), PathParams),
    request_body(content_type = "application/x-tar", content = Vec<u8>),
    responses((status = 200, body = FilesWritten), (status = "4XX", body = ErrorBody)))]
pub(super) async fn write_files(
    State(app): State<App>,
    Path(reference): Path<String>,
    Params(params): Params<PathParams>,
    body: Request,
) -> Answer<Json<FilesWritten>> {
    params.check()?;
    let (_used, link) = link(&app, &reference).await?;
    let _permit = link.relay_permit()?;
    let body = body.into_body().map_err(Into::into);
    let body = crate::agent::link::Body::new(body);
    Ok(Json(link.write_files(&params.path, body).await?))
}

/// What stands at a path in the guest.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PathStat {
    /// `file`, `dir`, `symlink`, `other`, or `missing`.
    kind: String,
    /// Size in bytes for a file.
    size: u64,
    /// For a link: what it leads to. Null where it leads nowhere.
    target: Option<PathTarget>,
}

/// What a link in the guest leads to, all links followed.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PathTarget {
    /// `file`, `dir` or `other`.
    kind: String,
    /// Where it is: an absolute path without links.
    path: String,
}

/// Looks at a path in the guest.
#[utoipa::path(get, path = "/v1/machines/{ref}/stat", tag = "guest", params(("ref" = String, Path), PathParams),
    responses((status = 200, body = PathStat), (status = "4XX", body = ErrorBody)))]
pub(super) async fn stat(
    State(app): State<App>,
    Path(reference): Path<String>,
    Params(params): Params<PathParams>,
) -> Answer<Json<PathStat>> {
    params.check()?;
    let (_used, link) = link(&app, &reference).await?;
    let Stat { kind, size, target } = link.stat(&params.path).await?;
    let target = target.map(|Target { kind, path }| PathTarget { kind, path });
    Ok(Json(PathStat { kind, size, target }))
}

/// Where to connect to.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ConnectParams {
    /// `tcp:PORT` on the guest's loopback, or `sshd`.
    target: String,
}

/// Connects to something in the guest: a WebSocket of raw bytes. An empty message ends the client's direction; the guest's end
/// is a close.
#[utoipa::path(get, path = "/v1/machines/{ref}/connect", tag = "guest", params(("ref" = String, Path), ConnectParams),
    responses((status = 101), (status = "4XX", body = ErrorBody)))]
pub(super) async fn connect(
    State(app): State<App>,
    Path(reference): Path<String>,
    Params(params): Params<ConnectParams>,
    upgrade: WebSocketUpgrade,
) -> Answer<Response> {
    let fits = match params.target.strip_prefix("tcp:") {
        Some(port) => port.parse::<u16>().is_ok_and(|p| p > 0),
        None => params.target == "sshd",
    };
    if !fits {
        return Err(Failure(ApiError::new(
            ErrorCode::BadRequest,
            "a target is `tcp:PORT` or `sshd`",
        )));
    }
    let (used, link) = link(&app, &reference).await?;
    Ok(bounded(upgrade, 1024 * 1024).on_upgrade(move |socket| async move {
        let _used = used;
        tokio::select! {
            () = relay::raw(socket, &link, &params.target, LinkError::into_api) => {}
            () = app.stopping.cancelled() => {}
        }
    }))
}

/// Holds a machine for as long as this WebSocket is open. A machine with `auto_remove` is removed 30 s after its last holder
/// is gone.
#[utoipa::path(get, path = "/v1/machines/{ref}/hold", tag = "machines", params(("ref" = String, Path)),
    responses((status = 101), (status = "4XX", body = ErrorBody)))]
pub(super) async fn hold(
    State(app): State<App>,
    Path(reference): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Answer<Response> {
    let m = app.find(&reference)?;
    let held = Hold::new(m.clone());
    Ok(bounded(upgrade, 1024).on_upgrade(move |mut socket| async move {
        let _held = held;
        loop {
            tokio::select! {
                message = socket.next() => match message {
                    None | Some(Err(_) | Ok(Message::Close(_))) => return,
                    Some(Ok(_)) => {}
                },
                _ = m.wait(|_| false) => return,
                () = app.stopping.cancelled() => return,
            }
        }
    }))
}

struct Hold(Arc<Machine>);

impl Hold {
    fn new(m: Arc<Machine>) -> Self {
        m.holders.send_modify(|n| *n += 1);
        Self(m)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.holders.send_modify(|n| *n = n.saturating_sub(1));
    }
}
