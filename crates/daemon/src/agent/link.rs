//! The connection to one machine's agent: at most one at a time, made on demand, made again when it breaks.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use banger_core::id::MachineId;
use banger_vmm::{Engine, EngineError, Handles, Stall};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::Response;
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::call::{Call, Patience};
use super::gate::{self, Closed, Gate};
use super::handshake::{self, HandshakeError, rounded, shake};

/// Bytes of one stream that the guest may send ahead of its reader.
const STREAM_WINDOW: u32 = 512 * 1024;
/// Bytes of all streams together: this and no more can a guest make the daemon hold.
const CONNECTION_WINDOW: u32 = 32 * 1024 * 1024;
/// Streams that may be relayed at once. Together their windows stay below the connection's, so that readers who have stalled
/// never keep a call from its answer.
const MAX_RELAYS: usize = 60;
/// Bytes of one stream on their way to the guest.
const SEND_BUFFER: usize = 256 * 1024;
/// Largest frame of HTTP/2.
const MAX_FRAME: u32 = 256 * 1024;
/// Largest set of headers.
const MAX_HEADERS: u32 = 16 * 1024;
/// How long the engine may take to accept a connection to the guest channel.
const CONNECT: Duration = Duration::from_secs(5);

/// How often a channel is opened again that is closed while the two greet each other: a restored guest resets what was open when it
/// was saved, and may take a new connection for one of those.
const RESETS: u32 = 5;
/// How soon a guest that did not take the call is called again.
const REDIAL: Duration = Duration::from_millis(25);
/// How long the agent may take to answer on a channel before the channel is opened again, and twice as long each time: where a channel
/// was closed while the processors of QEMU stood still, the guest does not answer on the next one.
const UNANSWERED: Duration = Duration::from_secs(2);

/// Any error of a body.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;
/// The body of a request to the agent.
pub type Body = UnsyncBoxBody<Bytes, BodyError>;

/// Why a request did not reach the agent, or no answer came back.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The engine gave no channel.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The agent did not answer the handshake.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The connection broke, or the agent broke the protocol.
    #[error("the connection to the guest agent broke while {doing}")]
    Broken {
        /// What was being done.
        doing: String,
        /// Why it broke.
        #[source]
        source: hyper::Error,
    },
    /// No answer in time.
    #[error("the guest agent took longer than {after:?} to {what}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long.
        after: Duration,
    },
    /// The guest was frozen to be saved, and did not go on in time.
    #[error("the guest is frozen to be saved, and did not go on within {after:?}")]
    Frozen {
        /// For how long it was waited for.
        after: Duration,
    },
    /// An answer that breaks the protocol.
    #[error("the guest agent answered {what} with {why}")]
    Answer {
        /// The request.
        what: String,
        /// What is wrong with the answer.
        why: String,
    },
    /// The agent refused.
    #[error("{}", .0.message)]
    Refused(banger_proto::error::ApiError),
    /// Another machine answers on this channel.
    #[error("the agent on the channel of machine {wanted} says that it is `{found}`")]
    WrongMachine {
        /// Whose channel it is.
        wanted: String,
        /// What the agent says.
        found: String,
    },
    /// The machine is stalled, for an unknown time.
    #[error("{}", crate::machine::stall::words(.0))]
    Stalled(Stall),
    /// Too many sessions and transfers at once.
    #[error("{MAX_RELAYS} sessions and transfers are under way in this machine already")]
    Busy,
}

impl LinkError {
    /// Whether the request may have reached the agent all the same.
    pub fn is_broken(&self) -> bool {
        matches!(self, Self::Broken { .. })
    }
}

/// Where connections come from: an engine, or a test.
pub trait Dial: Send + Sync {
    /// Opens the guest channel.
    fn dial(&self) -> Pin<Box<dyn Future<Output = Result<UnixStream, EngineError>> + Send + '_>>;
}

/// The guest channel of a launched engine.
pub struct EngineDial {
    /// The driver.
    pub engine: Arc<dyn Engine>,
    /// The machine's handles.
    pub handles: Handles,
}

impl Dial for EngineDial {
    fn dial(&self) -> Pin<Box<dyn Future<Output = Result<UnixStream, EngineError>> + Send + '_>> {
        self.engine.connect_agent(&self.handles)
    }
}

struct Connection {
    send: http2::SendRequest<Body>,
    driver: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// The connection to one machine's agent.
pub struct Link {
    id: MachineId,
    dial: Box<dyn Dial>,
    connection: Mutex<Option<Connection>>,
    relays: Arc<Semaphore>,
    patience: Patience,
    gate: Gate,
    stall: watch::Receiver<Option<Stall>>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Link {
    /// A link that is not connected yet.
    pub fn new(id: MachineId, dial: Box<dyn Dial>) -> Self {
        Self {
            id,
            dial,
            connection: Mutex::new(None),
            relays: Arc::new(Semaphore::new(MAX_RELAYS)),
            patience: Patience::default(),
            gate: Gate::new(gate::PATIENCE),
            stall: watch::channel(None).1,
        }
    }

    /// The same for a machine that may stall: requests fail at once then.
    pub fn may_stall(mut self, stall: watch::Receiver<Option<Stall>>) -> Self {
        self.stall = stall;
        self
    }

    async fn stalled(&self) -> Stall {
        let mut stall = self.stall.clone();
        match stall.wait_for(Option::is_some).await.map(|stall| *stall) {
            Ok(Some(stall)) => stall,
            // No engine is watched.
            _ => std::future::pending().await,
        }
    }

    /// The same with other deadlines.
    #[cfg(test)]
    pub(crate) fn with_patience(mut self, patience: Patience) -> Self {
        self.patience = patience;
        self
    }

    /// How long requests may take where nothing else is said.
    pub fn patience(&self) -> Patience {
        self.patience
    }

    /// Until when a connection has to be open that is asked for now.
    pub(super) fn connect_by(&self) -> Instant {
        Instant::now() + self.patience.connect
    }

    /// The machine.
    pub fn id(&self) -> &MachineId {
        &self.id
    }

    /// A place among the streams that may be relayed at once.
    pub fn relay_permit(&self) -> Result<OwnedSemaphorePermit, LinkError> {
        self.relays.clone().try_acquire_owned().map_err(|_| LinkError::Busy)
    }

    /// The guest is frozen to be saved: requests wait until the answer is dropped.
    pub fn hold(&self) -> Closed {
        self.gate.close()
    }

    /// Opens the connection if there is none.
    pub async fn connect(&self, deadline: Instant) -> Result<(), LinkError> {
        self.connected(deadline).await.map(|_| ())
    }

    /// The connection, made if there is none. A second caller waits for the first one's handshake.
    async fn connected(&self, deadline: Instant) -> Result<http2::SendRequest<Body>, LinkError> {
        let began = Instant::now();
        let late = |_| LinkError::Timeout {
            what: "be connected".to_owned(),
            after: rounded(deadline.duration_since(began)),
        };
        let mut held = timeout_at(deadline, self.connection.lock()).await.map_err(late)?;
        if let Some(connection) = &*held
            && !connection.send.is_closed()
        {
            return Ok(connection.send.clone());
        }
        // The old one must be gone before the engine accepts the next.
        if let Some(old) = held.take() {
            old.driver.abort();
            drop(old);
        }
        let (mut resets, mut answers) = (0, UNANSWERED);
        let channel = loop {
            let stream = self.dialled(deadline).await?;
            let by = deadline.min(Instant::now() + answers);
            match shake(stream, nonce()?, by).await {
                Err(HandshakeError::Closed) if resets < RESETS => resets += 1,
                Err(HandshakeError::Silent(_)) if by < deadline => answers *= 2,
                Err(HandshakeError::Silent(_)) => {
                    return Err(HandshakeError::Silent(rounded(deadline.duration_since(began))).into());
                }
                shaken => break shaken?,
            }
            sleep(REDIAL).await;
        };
        let connection = timeout_at(deadline, start(channel))
            .await
            .map_err(late)?
            .map_err(|source| LinkError::Broken {
                doing: "connecting".to_owned(),
                source,
            })?;
        tracing::debug!(machine = %self.id, ms = began.elapsed().as_millis() as u64, "agent connected");
        let send = connection.send.clone();
        *held = Some(connection);
        Ok(send)
    }

    /// Opens the channel. Where the engine tells that nobody in the guest takes the call, it is tried again: the guest may be
    /// on its way.
    async fn dialled(&self, deadline: Instant) -> Result<UnixStream, LinkError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let dialled = timeout(CONNECT.min(left), self.dial.dial())
                .await
                .map_err(|_| LinkError::Timeout {
                    what: "be connected: the engine accepted no connection".to_owned(),
                    after: CONNECT,
                })?;
            match dialled {
                Err(EngineError::Silent { .. }) if Instant::now() + REDIAL < deadline => sleep(REDIAL).await,
                other => return Ok(other?),
            }
        }
    }

    /// Drops the connection; the next request makes a new one.
    pub async fn disconnect(&self) {
        *self.connection.lock().await = None;
    }

    /// Ends the connection and makes sure that the agent knows: it has answered a new call, and waits for what may come.
    pub async fn hang_up(&self, deadline: Instant) -> Result<(), LinkError> {
        let began = Instant::now();
        let mut held = timeout_at(deadline, self.connection.lock())
            .await
            .map_err(|_| LinkError::Timeout {
                what: "hang up".to_owned(),
                after: rounded(deadline.duration_since(began)),
            })?;
        *held = None;
        let mut stream = self.dialled(deadline).await?;
        handshake::call(&mut stream, nonce()?, deadline).await?;
        Ok(())
    }

    /// Sends a request and waits for the head of its answer.
    pub(super) async fn send(
        &self,
        call: Call,
        argument: &str,
        body: Body,
        connect_by: Instant,
        answer_within: Duration,
    ) -> Result<Response<Incoming>, LinkError> {
        // The sleep begins when it is first polled, with the request on its way.
        let late = async { sleep(answer_within).await };
        self.send_until(call, argument, body, connect_by, answer_within, late)
            .await
    }

    /// Sends a request and waits for the head of its answer until `late` has come, which is `within` after the agent's last
    /// progress. While the guest is frozen to be saved the request waits, unless it is for a frozen guest; that time counts against no
    /// deadline.
    pub(super) async fn send_until(
        &self,
        call: Call,
        argument: &str,
        body: Body,
        connect_by: Instant,
        within: Duration,
        late: impl Future<Output = ()>,
    ) -> Result<Response<Incoming>, LinkError> {
        tokio::select! {
            biased;
            stall = self.stalled() => Err(LinkError::Stalled(stall)),
            answer = self.sent(call, argument, body, connect_by, within, late) => answer,
        }
    }

    async fn sent(
        &self,
        call: Call,
        argument: &str,
        body: Body,
        connect_by: Instant,
        within: Duration,
        late: impl Future<Output = ()>,
    ) -> Result<Response<Incoming>, LinkError> {
        let request = call.request(argument, body)?;
        let what = format!("{} {}", request.method(), call.name());
        let broken = |source| LinkError::Broken {
            doing: what.clone(),
            source,
        };
        let asked = Instant::now();
        if call.waits() {
            self.gate.pass().await?;
        }
        let began = Instant::now();
        let connect_by = connect_by + began.duration_since(asked);
        let mut send = self.connected(connect_by).await?;
        timeout_at(connect_by, send.ready())
            .await
            .map_err(|_| LinkError::Timeout {
                what: format!("take {what}"),
                after: rounded(connect_by.duration_since(began)),
            })?
            .map_err(broken)?;
        let answer = send.send_request(request);
        tokio::pin!(answer);
        tokio::select! {
            biased;
            answer = &mut answer => return answer.map_err(broken),
            () = late => {}
        }
        if call.waits()
            && self.gate.is_closed()
            && let Some(answer) = self.gate.bounded(within, answer).await?
        {
            return answer.map_err(broken);
        }
        Err(LinkError::Timeout {
            what: format!("answer {what}"),
            after: within,
        })
    }
}

/// A fresh nonce for a handshake.
fn nonce() -> Result<[u8; 16], HandshakeError> {
    let mut nonce = [0; 16];
    getrandom::fill(&mut nonce).map_err(|e| HandshakeError::Io(std::io::Error::other(e)))?;
    Ok(nonce)
}

async fn start(channel: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Connection, hyper::Error> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADERS)
        .max_send_buf_size(SEND_BUFFER);
    let (send, connection) = builder.handshake(TokioIo::new(channel)).await?;
    let driver = tokio::spawn(async move {
        if let Err(e) = connection.await {
            tracing::debug!(error = %e, "agent connection ended");
        }
    });
    Ok(Connection { send, driver })
}
