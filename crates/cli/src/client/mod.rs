//! The daemon's client: HTTP/1.1 over its Unix socket, starting the daemon when none answers.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use banger_proto::api::VersionInfo;
use banger_proto::error::{ErrorBody, ErrorCode};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use crate::client::again::{Cut, again};
use crate::client::skew::of_another_build;
use crate::error::{Error, Kind, Result, reason};
use crate::paths::{Installation, Places};

mod again;
mod detach;
pub(crate) mod operation;
mod skew;
pub(crate) mod start;

pub(crate) use skew::{Renew, skew};

/// Body of a request.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A WebSocket to the daemon.
pub(crate) type WebSocket = WebSocketStream<UnixStream>;

/// Largest JSON answer that is read.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

/// How long the daemon may take for an answer that needs no waiting.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// When a daemon that should be coming up and is not there is started after all.
const RETRY_START: Duration = Duration::from_millis(300);

/// What a client does when no daemon answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Absent {
    /// It starts one, or waits for the one that systemd is bringing up.
    Start,
    /// It starts none, and waits for the one that systemd is bringing up.
    Wait,
    /// It fails.
    Fail,
}

/// A client. Requests go one after the other over one connection as far as it lasts. Those that only read are asked again when the
/// daemon goes away before its answer is whole; others may have been carried out, and are not.
#[derive(Debug)]
pub(crate) struct Client {
    socket: PathBuf,
    absent: Absent,
    /// Where the daemon is systemd's to start: the owner.
    system: Option<u32>,
    idle: Mutex<Option<SendRequest<Body>>>,
}

impl Client {
    /// A client that starts the daemon when there is none.
    pub(crate) fn new(places: &Places) -> Result<Self> {
        Self::of(places, Absent::Start)
    }

    /// A client that takes what is there.
    pub(crate) fn passive(places: &Places) -> Result<Self> {
        Self::of(places, Absent::Fail)
    }

    /// A client of the daemon of an installation, for root as well, which takes what is there.
    pub(crate) fn installed(installation: &Installation) -> Self {
        Self::at(installation.layout.socket(), false, Some(installation.record.owner.uid))
    }

    /// A client of some user's own daemon, for root.
    pub(crate) fn of_user(socket: PathBuf, uid: u32) -> Self {
        Self::at(socket, false, Some(uid))
    }

    fn of(places: &Places, absent: Absent) -> Result<Self> {
        let system = places.system()?.map(|i| i.record.owner.uid);
        Ok(Self::with(places.socket()?, absent, system))
    }

    /// A client of the daemon at this socket, which starts it or does not.
    pub(crate) fn at(socket: PathBuf, start: bool, system: Option<u32>) -> Self {
        Self::with(socket, if start { Absent::Start } else { Absent::Fail }, system)
    }

    fn with(socket: PathBuf, absent: Absent, system: Option<u32>) -> Self {
        Self {
            socket,
            absent,
            system,
            idle: Mutex::new(None),
        }
    }

    /// Another client of the same daemon, which does not start it.
    pub(crate) fn sibling(&self) -> Self {
        let absent = match self.absent {
            Absent::Start | Absent::Wait => Absent::Wait,
            Absent::Fail => Absent::Fail,
        };
        Self::with(self.socket.clone(), absent, self.system)
    }

    /// Another client that does as this one, for what is asked side by side.
    pub(crate) fn another(&self) -> Self {
        Self::with(self.socket.clone(), self.absent, self.system)
    }

    /// Connects, so that the first request need not. Starts the daemon when there is none.
    pub(crate) async fn connected(&self) -> Result<()> {
        let sender = self.open().await?;
        if let Ok(mut idle) = self.idle.lock() {
            *idle = Some(sender);
        }
        Ok(())
    }

    /// `GET`.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::GET, path, empty()).await
    }

    /// `POST` with a JSON body.
    pub(crate) async fn post<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T> {
        self.call(Method::POST, path, json(body)?).await
    }

    /// `POST` with a JSON body whose answer is not looked at.
    pub(crate) async fn post_only<B: Serialize>(&self, path: &str, body: &B) -> Result<()> {
        self.send(Method::POST, path, json(body)?).await?;
        Ok(())
    }

    /// `PATCH` with a JSON body.
    pub(crate) async fn patch<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T> {
        self.call(Method::PATCH, path, json(body)?).await
    }

    /// `DELETE`.
    pub(crate) async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(Method::DELETE, path, empty()).await
    }

    /// `DELETE` whose answer is not looked at.
    pub(crate) async fn delete_only(&self, path: &str) -> Result<()> {
        self.send(Method::DELETE, path, empty()).await?;
        Ok(())
    }

    /// `GET` that may wait as long as the daemon does.
    pub(crate) async fn long_poll<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        again(async || self.read(path, self.send(Method::GET, path, empty()).await?).await).await
    }

    /// `GET` of a stream. Asked again until it begins; what it breaks off in is its reader's.
    pub(crate) async fn stream(&self, path: &str) -> Result<Incoming> {
        let response = again(async || self.send(Method::GET, path, empty()).await).await?;
        Ok(response.into_body())
    }

    /// `PUT` of a stream.
    pub(crate) async fn put<T: DeserializeOwned>(&self, path: &str, body: Body) -> Result<T> {
        let response = self.send(Method::PUT, path, body).await?;
        Ok(self.read(path, response).await?)
    }

    /// Opens a WebSocket. `limit` bounds a message.
    pub(crate) async fn websocket(&self, path: &str, limit: usize) -> Result<WebSocket> {
        let request = Request::builder()
            .method(Method::GET)
            .uri(format!("/v1/{path}"))
            .header(HOST, "banger")
            .header(CONNECTION, "Upgrade")
            .header(UPGRADE, "websocket")
            .header(SEC_WEBSOCKET_VERSION, "13")
            // The key protects against caches between the two ends; there is none on a Unix socket.
            .header(SEC_WEBSOCKET_KEY, "YmFuZ2VyIHdlYnNvY2tldA==")
            .body(empty())
            .map_err(|e| Error::failed(format!("cannot ask for {path}: {e}")))?;
        let response = self.dispatch(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let status = response.status();
            return Err(match self.refused(response).await {
                Some(error) => error,
                None => {
                    self.not_understood(path, &format!("status {status} instead of a WebSocket"))
                        .await
                }
            });
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(|e| lost(&e))?;
        let parts = upgraded
            .downcast::<TokioIo<UnixStream>>()
            .map_err(|_| Error::failed("the connection is not the one that was made"))?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(limit))
            .max_frame_size(Some(limit))
            .write_buffer_size(0);
        let stream = parts.io.into_inner();
        Ok(WebSocketStream::from_partially_read(stream, parts.read_buf.to_vec(), Role::Client, Some(config)).await)
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Body) -> Result<T> {
        let answer = async {
            if method == Method::GET {
                return self.long_poll(path).await;
            }
            let response = self.send(method.clone(), path, body).await?;
            Ok(self.read(path, response).await?)
        };
        // The start of the daemon has a deadline of its own and is not counted.
        tokio::time::timeout(ANSWER_DEADLINE + start::START_DEADLINE, answer)
            .await
            .unwrap_or_else(|_| {
                let message = format!("the daemon did not answer {method} /v1/{path} in time");
                Err(Error::new(Kind::Timeout, message).hint("see `banger daemon logs`"))
            })
    }

    async fn send(&self, method: Method, path: &str, body: Body) -> again::Answer<Response<Incoming>> {
        let request = Request::builder()
            .method(method)
            .uri(format!("/v1/{path}"))
            .header(HOST, "banger")
            .header(CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|e| Error::failed(format!("cannot ask for {path}: {e}")))?;
        let response = self.dispatch(request).await?;
        if response.status().is_client_error() || response.status().is_server_error() {
            let status = response.status();
            return Err(Cut::Told(match self.refused(response).await {
                Some(error) => error,
                None => self.not_understood(path, &format!("status {status}")).await,
            }));
        }
        Ok(response)
    }

    async fn dispatch(&self, mut request: Request<Body>) -> again::Answer<Response<Incoming>> {
        let idle = self.take_idle();
        if let Some(sender) = &idle
            && !sender.is_ready()
        {
            // The answer has been read, but its connection may not have noticed yet.
            tokio::task::yield_now().await;
        }
        let mut sender = match idle {
            // Not ready means that an answer is still being streamed: that goes on without us.
            Some(sender) if sender.is_ready() => sender,
            _ => self.open().await?,
        };
        let mut unsent = false;
        let response = loop {
            match sender.try_send_request(request).await {
                Ok(response) => break response,
                Err(mut e) => match e.take_message() {
                    // The connection had ended before anything was sent: whatever is asked for, it was not done.
                    Some(back) if !unsent => {
                        (request, unsent) = (back, true);
                        sender = self.open().await?;
                    }
                    _ => return Err(Cut::Lost(lost(&e.into_error()))),
                },
            }
        };
        if let Ok(mut idle) = self.idle.lock() {
            *idle = Some(sender);
        }
        Ok(response)
    }

    fn take_idle(&self) -> Option<SendRequest<Body>> {
        self.idle.lock().ok()?.take()
    }

    async fn open(&self) -> Result<SendRequest<Body>> {
        let stream = self.connect().await?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| lost(&e))?;
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
    }

    async fn connect(&self) -> Result<UnixStream> {
        let first = match self.connect_once().await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        if !is_absent(&first) {
            return Err(unreachable(&self.socket, &first));
        }
        if self.system.is_some() {
            return self.wait_for_unit().await;
        }
        if self.absent != Absent::Start {
            return Err(Error::unavailable("the daemon is not running").hint("banger starts it when it is needed"));
        }
        let deadline = tokio::time::Instant::now() + start::START_DEADLINE;
        let mut started = start::start(&start::program()).await?;
        let mut tried = tokio::time::Instant::now();
        loop {
            let error = match self.connect_once().await {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            // Ready means listening; another one that is still coming up may need a moment.
            if started == start::Started::Ready || !is_absent(&error) || tokio::time::Instant::now() >= deadline {
                return Err(unreachable(&self.socket, &error));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            // Or it was on its way out, and has left its place by now.
            if tried.elapsed() >= RETRY_START {
                started = start::start(&start::program()).await?;
                tried = tokio::time::Instant::now();
            }
        }
    }

    /// The daemon is systemd's to start. One that is just being restarted is waited for.
    async fn wait_for_unit(&self) -> Result<UnixStream> {
        let deadline = tokio::time::Instant::now() + start::START_DEADLINE;
        while self.absent != Absent::Fail
            && tokio::time::Instant::now() < deadline
            && start::unit_is_coming(&self.socket).await
        {
            tokio::time::sleep(Duration::from_millis(100)).await;
            match self.connect_once().await {
                Ok(stream) => return Ok(stream),
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(unreachable(&self.socket, &error)),
            }
        }
        Err(Error::unavailable("the installed daemon is not running").hint(
            "`sudo banger system restart` starts it; `systemctl status bangerd` and `banger system status` say what is wrong",
        ))
    }

    async fn connect_once(&self) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(&self.socket).await?;
        let peer = rustix::net::sockopt::socket_peercred(&stream)?.uid;
        let expected = self.system.unwrap_or(rustix::process::getuid().as_raw());
        if peer.as_raw() != expected && !peer.is_root() {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("the socket is served by user {}", peer.as_raw()),
            ));
        }
        Ok(stream)
    }

    async fn read<T: DeserializeOwned>(&self, path: &str, response: Response<Incoming>) -> again::Answer<T> {
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let body = body
            .map_err(|e| Cut::Lost(Error::unavailable(format!("the daemon's answer broke off: {e}"))))?
            .to_bytes();
        match serde_json::from_slice(&body) {
            Ok(value) => Ok(value),
            Err(error) => Err(Cut::Told(self.not_understood(path, &error.to_string()).await)),
        }
    }

    async fn refused(&self, response: Response<Incoming>) -> Option<Error> {
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .ok()?
            .to_bytes();
        let body: ErrorBody = serde_json::from_slice(&body).ok()?;
        if body.error.code == ErrorCode::BadRequest {
            // What this build sends is well formed for a daemon of the same build.
            if let Some(daemon) = Box::pin(self.daemon_version()).await {
                return Some(
                    skew(&daemon, self.renew())
                        .unwrap_or_else(|| of_another_build(body.error.into(), &daemon, self.renew())),
                );
            }
        }
        Some(body.error.into())
    }

    /// An answer that makes no sense: most likely a daemon of another version.
    async fn not_understood(&self, path: &str, what: &str) -> Error {
        if let Some(error) = Box::pin(self.daemon_version())
            .await
            .and_then(|v| skew(&v, self.renew()))
        {
            return error;
        }
        Error::failed(format!("the daemon's answer to /v1/{path} was not understood: {what}"))
    }

    /// How a daemon of another build is replaced.
    fn renew(&self) -> Renew {
        if self.system.is_some() {
            Renew::Install
        } else {
            Renew::Stop
        }
    }

    async fn daemon_version(&self) -> Option<VersionInfo> {
        let client = self.sibling();
        let request = Request::builder()
            .uri("/v1/version")
            .header(HOST, "banger")
            .body(empty())
            .ok()?;
        let response = tokio::time::timeout(Duration::from_secs(2), client.dispatch(request))
            .await
            .ok()?
            .ok()?;
        let body = Limited::new(response.into_body(), 64 * 1024)
            .collect()
            .await
            .ok()?
            .to_bytes();
        serde_json::from_slice(&body).ok()
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn unreachable(socket: &Path, error: &io::Error) -> Error {
    Error::unavailable(format!(
        "cannot reach the daemon at {}: {}",
        socket.display(),
        reason(error)
    ))
}

fn lost(error: &hyper::Error) -> Error {
    Error::unavailable(format!("the connection to the daemon was lost: {error}"))
        .hint("try again; machines are not affected by the daemon's end")
}

/// An empty body.
pub(crate) fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

fn json<B: Serialize>(body: &B) -> Result<Body> {
    let body = serde_json::to_vec(body).map_err(|e| Error::failed(format!("cannot write the request: {e}")))?;
    Ok(Full::from(body).map_err(|never| match never {}).boxed_unsync())
}

/// A part of a path or a query value, percent-encoded.
pub(crate) fn encode(text: impl AsRef<[u8]>) -> String {
    let mut out = String::new();
    for &byte in text.as_ref() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// A name as one element of a path.
pub(crate) fn element(name: &str) -> String {
    // A slash would make it another path; dots alone would be folded away.
    encode(name).replace('/', "%2F").replace('.', "%2E")
}

/// The path of a machine, by name, id or prefix.
pub(crate) fn machine_path(reference: &str) -> String {
    format!("machines/{}", element(reference))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_stay_one_path_element() {
        assert_eq!(machine_path("swift-otter"), "machines/swift-otter");
        assert_eq!(machine_path("../images/x y"), "machines/%2E%2E%2Fimages%2Fx%20y");
        assert_eq!(encode("/root/a b&c=ü"), "/root/a%20b%26c%3D%C3%BC");
    }
}
