//! HTTP/2 on one connection: settings, routes, and what becomes of a request when its connection ends.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;

use banger_proto::agent::{AdjustClock, MAX_JSON, Shutdown};
use banger_proto::error::{ApiError, ErrorCode};
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::reply::{self, Body};
use crate::session::attach;
use crate::session::table::Sessions;
use crate::{clock, connect, files, ports, system};

/// What the host may send on one stream before it is read.
const STREAM_WINDOW: u32 = 1024 * 1024;

/// And on all of them.
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// Largest frame that is taken.
const MAX_FRAME: u32 = 256 * 1024;

/// What one answer may have waiting to be written.
const SEND_BUFFER: usize = 512 * 1024;

/// Requests at a time.
const MAX_STREAMS: u32 = 512;

/// Runs the tasks of one connection, until that ends.
#[derive(Clone)]
struct Tasks {
    end: CancellationToken,
}

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, future: F) {
        let end = self.end.clone();
        tokio::spawn(async move { end.run_until_cancelled(future).await.map(drop) });
    }
}

/// Serves one connection until it ends. Its sessions live on.
pub async fn serve<S>(agent: Arc<Agent>, stream: S) -> Result<(), hyper::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let end = CancellationToken::new();
    // However this future ends, nothing of the connection outlives it.
    let _guard = end.clone().drop_guard();
    let service = service_fn(move |request| {
        let agent = agent.clone();
        async move { Ok::<_, Infallible>(route(agent, request).await) }
    });
    hyper::server::conn::http2::Builder::new(Tasks { end })
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(MAX_STREAMS)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

async fn route(agent: Arc<Agent>, request: Request<Incoming>) -> Response<Body> {
    dispatch(agent, request).await.unwrap_or_else(reply::error)
}

async fn dispatch(agent: Arc<Agent>, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let path = request.uri().path().to_owned();
    let words: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let query = Query::of(request.uri().query().unwrap_or_default());
    match (request.method().clone(), words.as_slice()) {
        (Method::GET, ["v1", "health"]) => Ok(reply::json(&system::health(&agent))),
        (Method::POST, ["v1", "personalize"]) => {
            let wanted = body(request).await?;
            agent.personalize(wanted).await?;
            Ok(reply::json(&system::health(&agent)))
        }
        (Method::POST, ["v1", "freeze"]) => {
            let wanted = body(request).await?;
            agent.freeze(wanted).await?;
            Ok(reply::json(&system::health(&agent)))
        }
        (Method::POST, ["v1", "renew"]) => {
            let wanted = body(request).await?;
            agent.renew(wanted).await?;
            Ok(reply::json(&system::health(&agent)))
        }
        (Method::GET, ["v1", "system"]) => {
            agent.require_personalized()?;
            system::settled(&agent).await;
            Ok(reply::json(&system::health(&agent)))
        }
        (Method::GET, ["v1", "sessions"]) => Ok(reply::json(&agent.sessions.list())),
        (Method::POST, ["v1", "sessions", id]) => {
            agent.running().await?;
            if !Sessions::valid_id(id) {
                let message = format!("`{id}` can't name a session: 1 to 64 letters, digits, `-`, `_`, `.`");
                return Err(ApiError::new(ErrorCode::BadRequest, message));
            }
            let frames = attach::serve(agent.sessions.clone(), (*id).to_owned(), request.into_body());
            Ok(reply::with(
                StatusCode::OK,
                frames.map_err(|never| match never {}).boxed_unsync(),
            ))
        }
        (Method::GET, ["v1", "files"]) => files::get(&query.need("path")?),
        (Method::PUT, ["v1", "files"]) => {
            agent.thawed().await?;
            files::put(&query.need("path")?, request.into_body()).await
        }
        (Method::GET, ["v1", "stat"]) => Ok(reply::json(&files::stat(&query.need("path")?)?)),
        (Method::POST, ["v1", "connect"]) => {
            agent.running().await?;
            connect::serve(&agent, &query.need("target")?, request.into_body()).await
        }
        (Method::GET, ["v1", "stats"]) => Ok(reply::json(&system::stats()?)),
        (Method::GET, ["v1", "clock"]) => Ok(reply::json(&clock::read())),
        (Method::POST, ["v1", "clock"]) => {
            let wanted: AdjustClock = body(request).await?;
            agent.require_thawed()?;
            agent.require_guest()?;
            Ok(reply::json(&clock::adjust(wanted.by_ns)?))
        }
        (Method::GET, ["v1", "ports"]) => {
            agent.running().await?;
            Ok(reply::json(&ports::list().await?))
        }
        (Method::POST, ["v1", "shutdown"]) => {
            let wanted: Shutdown = body(request).await?;
            if wanted.graceful {
                // Nothing in a frozen guest ends by itself.
                agent.thawed().await?;
            }
            system::shut_down(&agent, &wanted)?;
            Ok(reply::with(StatusCode::ACCEPTED, reply::full(Bytes::new())))
        }
        (method, _) => Err(ApiError::new(
            ErrorCode::NotFound,
            format!("the agent has no `{method} {path}`"),
        )),
    }
}

async fn body<T: DeserializeOwned>(request: Request<Incoming>) -> Result<T, ApiError> {
    let path = request.uri().path().to_owned();
    let bad = |e: &dyn std::fmt::Display| {
        ApiError::new(
            ErrorCode::BadRequest,
            format!("the body of `{path}` can't be read: {e}"),
        )
    };
    let bytes = Limited::new(request.into_body(), MAX_JSON)
        .collect()
        .await
        .map_err(|e| bad(&e))?
        .to_bytes();
    serde_json::from_slice(&bytes).map_err(|e| bad(&e))
}

/// The parameters of a request.
struct Query(Vec<(String, String)>);

impl Query {
    fn of(text: &str) -> Self {
        let pair = |part: &str| {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            (unescape(key), unescape(value))
        };
        Self(text.split('&').filter(|p| !p.is_empty()).map(pair).collect())
    }

    fn need(&self, name: &str) -> Result<String, ApiError> {
        let found = self.0.iter().find(|(key, value)| key == name && !value.is_empty());
        found
            .map(|(_, v)| v.clone())
            .ok_or_else(|| ApiError::new(ErrorCode::BadRequest, format!("parameter `{name}` is missing")))
    }
}

/// Undoes percent-encoding. A plus sign is a plus sign.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let code = bytes.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        let code = code
            .filter(|h| h.iter().all(u8::is_ascii_hexdigit))
            .and_then(|h| std::str::from_utf8(h).ok())
            .and_then(|h| u8::from_str_radix(h, 16).ok());
        out.push(code.unwrap_or(bytes[at]));
        at += if code.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters() {
        let query = Query::of("path=%2Froot%2Fa%20b+c&x&target=tcp:80&bad=%zz%4");
        assert_eq!(query.need("path").unwrap(), "/root/a b+c");
        assert_eq!(query.need("target").unwrap(), "tcp:80");
        assert_eq!(query.need("bad").unwrap(), "%zz%4");
        assert!(query.need("x").is_err());
        assert!(query.need("nope").is_err());
    }
}
