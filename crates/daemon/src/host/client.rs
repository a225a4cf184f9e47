//! Calls of the root helper: framing, descriptors, deadlines, and a helper that was restarted in between.
//!
//! A call is a task of its own, so that it runs to its end whatever becomes of the caller: what the helper has done is then known.
//! Connections are kept for the next call. One that turns out to be closed belonged to a helper that was restarted meanwhile; the call
//! is made again on a fresh one, once, where doing it twice is the same as doing it once.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use banger_proto::error::{ApiError, ErrorCode};
use banger_system::helper::{
    Answer, Call, HelperCode, HelperError, MAX_DESCRIPTORS, MAX_REPLY, MAX_REQUEST, Reply, Request, VERSION,
};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::error::chain;

/// Connections that are kept.
const KEPT: usize = 4;
/// How long a helper that is being restarted is waited for.
const RESTART: Duration = Duration::from_secs(3);
/// How often it is tried meanwhile.
const AGAIN: Duration = Duration::from_millis(20);
/// Whom the helper's socket belongs to is told by systemd's unit.
const UNIT: &str = "bangerd-root";

/// A call that came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// Nobody answers at its socket.
    #[error("the root helper does not answer at {}: {why}", socket.display())]
    Absent {
        /// Where it should be.
        socket: PathBuf,
        /// What the kernel says.
        why: String,
    },
    /// It took too long.
    #[error("the root helper did not do `{method}` within {after:?}")]
    Late {
        /// The method.
        method: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// The connection broke in the middle, or what came back is not an answer.
    #[error("the connection to the root helper broke in `{method}`: {why}")]
    Broken {
        /// The method.
        method: &'static str,
        /// What happened.
        why: String,
    },
    /// It answered, and said no.
    #[error("{method}: {error}")]
    Refused {
        /// The method.
        method: &'static str,
        /// What it said.
        error: HelperError,
    },
}

impl CallError {
    /// What kind of no it was, where it was one.
    pub fn code(&self) -> Option<HelperCode> {
        match self {
            Self::Refused { error, .. } => Some(error.code),
            _ => None,
        }
    }

    /// As clients are told.
    pub fn into_api(self) -> ApiError {
        let message = self.to_string();
        match self {
            Self::Absent { .. } => {
                ApiError::new(ErrorCode::Unavailable, message).hint(format!("look at it: systemctl status {UNIT}"))
            }
            Self::Late { .. } => {
                ApiError::new(ErrorCode::Timeout, message).hint(format!("look at it: journalctl -u {UNIT}"))
            }
            Self::Broken { .. } => ApiError::new(ErrorCode::Unavailable, message)
                .hint(format!("try again; then look at it: journalctl -u {UNIT}")),
            Self::Refused { error, .. } => {
                let (code, hint) = match error.code {
                    HelperCode::BadVersion => (
                        ErrorCode::Unsupported,
                        Some("daemon and root helper are of different versions: sudo banger system restart"),
                    ),
                    HelperCode::NotFound => (ErrorCode::NotFound, None),
                    HelperCode::Conflict => (ErrorCode::Conflict, Some("what is there of banger's: banger audit")),
                    HelperCode::NoSpace => (ErrorCode::NoSpace, Some("free some space")),
                    HelperCode::Unsupported => (ErrorCode::Unsupported, Some("what this host has: banger doctor")),
                    HelperCode::Denied | HelperCode::BadRequest | HelperCode::Failed => (ErrorCode::Internal, None),
                };
                let mut api = ApiError::new(code, message).details(error.details);
                api.hint = hint.map(str::to_owned);
                api
            }
        }
    }
}

/// The helper's client.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    kept: Mutex<Vec<UnixStream>>,
}

/// How far a call came on a connection that failed.
#[derive(Debug)]
enum Fault {
    /// Nothing came back.
    Silent(io::Error),
    /// What came back is no answer.
    Answer(String),
}

impl Client {
    /// A client of the helper at a socket. Nothing is connected yet.
    pub fn new(socket: PathBuf) -> Arc<Self> {
        Arc::new(Self {
            socket,
            kept: Mutex::default(),
        })
    }

    /// Where the helper is.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Makes a call.
    pub async fn call(self: &Arc<Self>, request: Request) -> Result<Answer, CallError> {
        self.call_with(request, Vec::new()).await
    }

    /// Makes a call with descriptors.
    pub async fn call_with(self: &Arc<Self>, request: Request, files: Vec<OwnedFd>) -> Result<Answer, CallError> {
        let (own, op) = (self.clone(), crate::ops::current());
        let method = request.name();
        let work = tokio::spawn(async move { own.make(request, files, op).await });
        work.await.unwrap_or_else(|e| {
            Err(CallError::Broken {
                method,
                why: e.to_string(),
            })
        })
    }

    /// Makes a call whose answer has descriptors, over a connection of its own.
    pub async fn call_for(&self, request: Request) -> Result<(Answer, Vec<OwnedFd>), CallError> {
        let (method, after) = (request.name(), deadline(&request));
        let by = Instant::now() + after;
        let broken = |why: String| CallError::Broken { method, why };
        let call = Call {
            version: VERSION,
            op: crate::ops::current(),
            request,
        };
        let frame = frame(&call).map_err(broken)?;
        let work = async {
            let mut stream = self.connect(by).await?;
            send(&mut stream, &frame, &[])
                .await
                .map_err(|e| broken(e.to_string()))?;
            receive(&mut stream).await.map_err(|fault| match fault {
                Fault::Silent(e) => broken(e.to_string()),
                Fault::Answer(why) => broken(why),
            })
        };
        match timeout_at(by, work)
            .await
            .map_err(|_| CallError::Late { method, after })??
        {
            (Reply::Ok(answer), fds) => Ok((answer, fds)),
            (Reply::Error(error), _) => Err(CallError::Refused { method, error }),
        }
    }

    async fn make(&self, request: Request, files: Vec<OwnedFd>, op: Option<String>) -> Result<Answer, CallError> {
        let method = request.name();
        let after = deadline(&request);
        let began = Instant::now();
        let twice = repeatable(&request);
        let call = Call {
            version: VERSION,
            op,
            request,
        };
        let broken = |why: String| CallError::Broken { method, why };
        let frame = frame(&call).map_err(broken)?;
        if files.len() > MAX_DESCRIPTORS {
            return Err(broken(format!("{} descriptors are too many", files.len())));
        }
        let by = began + after;
        let (stream, reused) = match self.take() {
            Some(stream) => (stream, true),
            None => (self.connect(by).await?, false),
        };
        let late = || CallError::Late { method, after };
        let told = |fault| match fault {
            Fault::Silent(e) => broken(e.to_string()),
            Fault::Answer(why) => broken(why),
        };
        let reply = match timeout_at(by, self.over(stream, &frame, &files))
            .await
            .map_err(|_| late())?
        {
            Ok(reply) => reply,
            // Nobody was there any more when it was sent, or the helper ended with it in hand.
            Err(Fault::Silent(e)) if twice => {
                tracing::info!(method, error = %e, reused, "the root helper was restarted; once more");
                self.forget();
                let stream = self.connect(by).await?;
                let again = timeout_at(by, self.over(stream, &frame, &files)).await;
                again.map_err(|_| late())?.map_err(told)?
            }
            Err(fault) => return Err(told(fault)),
        };
        let ms = began.elapsed().as_secs_f64() * 1000.0;
        match reply {
            Reply::Ok(answer) => {
                tracing::debug!(method, ms, "root helper");
                Ok(answer)
            }
            Reply::Error(error) => {
                tracing::warn!(method, ms, code = ?error.code, error = %error.message, details = ?error.details, "root helper");
                Err(CallError::Refused { method, error })
            }
        }
    }

    /// One call over one connection, which is kept when it went well.
    async fn over(&self, mut stream: UnixStream, frame: &[u8], files: &[OwnedFd]) -> Result<Reply, Fault> {
        let reply = exchange(&mut stream, frame, files).await?;
        self.keep(stream);
        Ok(reply)
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Vec<UnixStream>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A kept connection that nobody has closed meanwhile.
    fn take(&self) -> Option<UnixStream> {
        loop {
            let stream = self.kept().pop()?;
            // Nothing is to be read between calls but the other side's end.
            let closed = match stream.try_read(&mut [0; 1]) {
                Err(e) => e.kind() != io::ErrorKind::WouldBlock,
                Ok(_) => true,
            };
            if !closed {
                return Some(stream);
            }
        }
    }

    fn keep(&self, stream: UnixStream) {
        let mut kept = self.kept();
        if kept.len() < KEPT {
            kept.push(stream);
        }
    }

    fn forget(&self) {
        self.kept().clear();
    }

    /// Connects. A helper that is being restarted is waited for.
    async fn connect(&self, by: Instant) -> Result<UnixStream, CallError> {
        let by = by.min(Instant::now() + RESTART);
        loop {
            let absent = |why: String| CallError::Absent {
                socket: self.socket.clone(),
                why,
            };
            match timeout_at(by, UnixStream::connect(&self.socket)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(e)) => {
                    let restarting = matches!(
                        e.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock
                    );
                    if !restarting || Instant::now() + AGAIN >= by {
                        return Err(absent(e.to_string()));
                    }
                }
                Err(_) => return Err(absent("it takes no connections".to_owned())),
            }
            sleep(AGAIN).await;
        }
    }

    /// Whether the helper answers now, and which it is. Does not wait for one that is being restarted.
    pub async fn ping(&self, within: Duration) -> Result<(String, u32), CallError> {
        let absent = |why: String| CallError::Absent {
            socket: self.socket.clone(),
            why,
        };
        let call = Call {
            version: VERSION,
            op: None,
            request: Request::Ping,
        };
        let frame = frame(&call).map_err(absent)?;
        let work = async {
            let mut stream = UnixStream::connect(&self.socket)
                .await
                .map_err(|e| absent(e.to_string()))?;
            exchange(&mut stream, &frame, &[]).await.map_err(|fault| match fault {
                Fault::Silent(e) => absent(e.to_string()),
                Fault::Answer(why) => absent(why),
            })
        };
        match timeout(within, work).await {
            Err(_) => Err(CallError::Late {
                method: "ping",
                after: within,
            }),
            Ok(Ok(Reply::Ok(Answer::Pong { version, pid }))) => Ok((version, pid)),
            Ok(Ok(Reply::Ok(_))) => Err(absent("it answers something else".to_owned())),
            Ok(Ok(Reply::Error(error))) => Err(CallError::Refused { method: "ping", error }),
            Ok(Err(e)) => Err(e),
        }
    }
}

fn frame(call: &Call) -> Result<Vec<u8>, String> {
    let text = serde_json::to_vec(call).map_err(|e| e.to_string())?;
    let length = u32::try_from(text.len()).ok().filter(|n| *n <= MAX_REQUEST);
    let length = length.ok_or_else(|| format!("a call of {} bytes is too long", text.len()))?;
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend_from_slice(&text);
    Ok(frame)
}

async fn exchange(stream: &mut UnixStream, frame: &[u8], files: &[OwnedFd]) -> Result<Reply, Fault> {
    send(stream, frame, files).await.map_err(Fault::Silent)?;
    let mut length = [0; 4];
    stream.read_exact(&mut length).await.map_err(Fault::Silent)?;
    body(stream, length).await
}

/// An answer with its descriptors, which come with its first byte.
async fn receive(stream: &mut UnixStream) -> Result<(Reply, Vec<OwnedFd>), Fault> {
    let mut length = [0; 4];
    let mut fds = Vec::new();
    let first = stream.async_io(Interest::READABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut length)];
        let message = recvmsg(&*stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                fds.extend(rights);
            }
        }
        Ok(message.bytes)
    });
    let count = match first.await.map_err(Fault::Silent)? {
        0 => return Err(Fault::Silent(io::ErrorKind::UnexpectedEof.into())),
        count => count,
    };
    let rest = length.get_mut(count..).unwrap_or_default();
    stream.read_exact(rest).await.map_err(Fault::Silent)?;
    Ok((body(stream, length).await?, fds))
}

async fn body(stream: &mut UnixStream, length: [u8; 4]) -> Result<Reply, Fault> {
    let length = u32::from_be_bytes(length);
    if length > MAX_REPLY {
        return Err(Fault::Answer(format!("its answer has {length} bytes")));
    }
    let mut text = vec![0; usize::try_from(length).unwrap_or(0)];
    stream
        .read_exact(&mut text)
        .await
        .map_err(|e| Fault::Answer(chain(&e)))?;
    serde_json::from_slice(&text).map_err(|e| Fault::Answer(format!("its answer cannot be read: {e}")))
}

/// Sends a frame, the descriptors on its first byte.
async fn send(stream: &mut UnixStream, frame: &[u8], files: &[OwnedFd]) -> io::Result<()> {
    let sent = if files.is_empty() {
        0
    } else {
        stream
            .async_io(Interest::WRITABLE, || {
                let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                Ok(sendmsg(
                    &*stream,
                    &[IoSlice::new(frame)],
                    &mut ancillary,
                    SendFlags::NOSIGNAL,
                )?)
            })
            .await?
    };
    stream.write_all(frame.get(sent..).unwrap_or_default()).await
}

/// How long a call may take.
fn deadline(request: &Request) -> Duration {
    Duration::from_secs(match request {
        Request::Ping => 2,
        Request::EngineCollect { .. } => 120,
        Request::EngineLaunch { .. } | Request::MachineRemove { .. } => 30,
        Request::NetworkSetup { .. } | Request::TapsWarm { .. } | Request::Inventory => 30,
        Request::DiskAttach { .. } | Request::DisksDetach { .. } => 20,
        _ => 10,
    })
}

/// Whether doing it twice is the same as doing it once. An engine whose launch nobody heard of is found, not launched again.
fn repeatable(request: &Request) -> bool {
    !matches!(request, Request::EngineLaunch { .. })
}

/// A file as a descriptor for a call.
pub fn descriptor(file: File) -> OwnedFd {
    file.into()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use banger_system::id::MachineId;

    use super::*;

    fn read_call(stream: &mut impl Read) -> Option<Call> {
        let mut length = [0; 4];
        stream.read_exact(&mut length).ok()?;
        let mut text = vec![0; u32::from_be_bytes(length) as usize];
        stream.read_exact(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    fn answer(stream: &mut impl Write, reply: &Reply) {
        let text = serde_json::to_vec(reply).unwrap();
        stream.write_all(&(text.len() as u32).to_be_bytes()).unwrap();
        stream.write_all(&text).unwrap();
    }

    fn place() -> (tempfile::TempDir, PathBuf) {
        let tmp = tempfile::tempdir().unwrap();
        let socket = tmp.path().join("s");
        (tmp, socket)
    }

    #[tokio::test]
    async fn calls_follow_each_other_on_one_connection_and_a_restart_is_survived() {
        let (_tmp, socket) = place();
        let listener = UnixListener::bind(&socket).unwrap();
        let helper = std::thread::spawn(move || {
            let mut seen = Vec::new();
            // Two calls on the first connection, then its end; the rest on a fresh one.
            for calls in [2, 1] {
                let (mut stream, _) = listener.accept().unwrap();
                for _ in 0..calls {
                    let call = read_call(&mut stream).unwrap();
                    seen.push(call.request.name());
                    answer(&mut stream, &Reply::Ok(Answer::Done));
                }
            }
            seen
        });
        let client = Client::new(socket);
        let id = MachineId::from_random([1; 8]);
        for _ in 0..3 {
            let request = Request::DisksDetach { machine: id.clone() };
            assert_eq!(client.call(request).await, Ok(Answer::Done));
        }
        assert_eq!(helper.join().unwrap(), ["disks_detach"; 3]);
    }

    #[tokio::test]
    async fn descriptors_come_with_the_first_byte() {
        use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
        let (tmp, socket) = place();
        let listener = UnixListener::bind(&socket).unwrap();
        let helper = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut first = [0; 1];
            let mut into = [io::IoSliceMut::new(&mut first)];
            recvmsg(&stream, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
            let files: Vec<OwnedFd> = ancillary
                .drain()
                .flat_map(|m| match m {
                    RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
                    _ => Vec::new(),
                })
                .collect();
            let call = read_call(&mut Read::chain(first.as_slice(), &mut stream)).unwrap();
            answer(&mut stream, &Reply::Ok(Answer::Disk { node: None }));
            let mut text = String::new();
            for file in files {
                File::from(file).read_to_string(&mut text).unwrap();
            }
            (call.request.name(), text)
        });
        let files = ["a", "b"].map(|name| {
            std::fs::write(tmp.path().join(name), name).unwrap();
            descriptor(File::open(tmp.path().join(name)).unwrap())
        });
        let request = Request::DisksDetach {
            machine: MachineId::from_random([1; 8]),
        };
        let answered = Client::new(socket).call_with(request, files.into()).await;
        assert_eq!(answered, Ok(Answer::Disk { node: None }));
        assert_eq!(helper.join().unwrap(), ("disks_detach", "ab".to_owned()));
    }

    #[tokio::test]
    async fn errors_say_what_to_do() {
        let (_tmp, socket) = place();
        let client = Client::new(socket.clone());
        let absent = client.ping(Duration::from_secs(1)).await.unwrap_err().into_api();
        assert!(absent.hint.unwrap().contains("systemctl status bangerd-root"));
        let listener = UnixListener::bind(&socket).unwrap();
        let helper = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            read_call(&mut stream).unwrap();
            let error = HelperError {
                code: HelperCode::BadVersion,
                message: "version 1 is not version 2".to_owned(),
                details: Vec::new(),
            };
            answer(&mut stream, &Reply::Error(error));
        });
        let old = client.ping(Duration::from_secs(5)).await.unwrap_err().into_api();
        assert_eq!(old.code, ErrorCode::Unsupported);
        assert!(old.hint.unwrap().contains("system restart"));
        helper.join().unwrap();
    }

    #[test]
    fn a_launch_is_not_repeated() {
        let machine = MachineId::from_random([1; 8]);
        assert!(repeatable(&Request::EngineOpen {
            machine: machine.clone()
        }));
        let launch = Request::EngineLaunch {
            machine,
            slot: 0,
            vcpu: 1,
            memory_mib: 1,
            files: Vec::new(),
            disks: Vec::new(),
        };
        assert!(!repeatable(&launch));
    }
}
