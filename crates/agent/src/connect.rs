//! Raw byte streams into the guest: to a port on its loopback, or to an SSH server of its own for one connection.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::task::{Context, Poll, ready};

use banger_proto::error::{ApiError, ErrorCode};
use bytes::Bytes;
use futures_util::Stream;
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame};
use hyper::{Response, StatusCode};
use rustix::process::Pid;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::io::ReaderStream;
use tokio_util::task::AbortOnDropHandle;

use crate::agent::{Agent, lock};
use crate::personalize::HOST_KEY;
use crate::reply::{self, Body};
use crate::session;

/// Bytes read from the guest's end at once.
const READ: usize = 64 * 1024;

/// The SSH server of the image.
const SSHD: &str = "/usr/sbin/sshd";

/// What can be connected to.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Tcp(u16),
    Sshd,
}

impl Target {
    fn parse(text: &str) -> Result<Self, ApiError> {
        let port = text
            .strip_prefix("tcp:")
            .and_then(|port| port.parse().ok())
            .filter(|port| *port != 0);
        match (text, port) {
            ("sshd", _) => Ok(Self::Sshd),
            (_, Some(port)) => Ok(Self::Tcp(port)),
            _ => Err(ApiError::new(
                ErrorCode::BadRequest,
                format!("`{text}` is no target: `tcp:PORT` or `sshd`"),
            )),
        }
    }
}

/// Connects a request's body to `target`.
pub(crate) async fn serve<B>(agent: &Agent, target: &str, body: B) -> Result<Response<Body>, ApiError>
where
    B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Send,
{
    match Target::parse(target)? {
        Target::Tcp(port) => {
            let stream = loopback(port).await.map_err(|e| {
                let code = if e.kind() == io::ErrorKind::ConnectionRefused {
                    ErrorCode::NotFound
                } else {
                    ErrorCode::Guest
                };
                ApiError::new(code, format!("nothing can be reached at port {port} in the guest: {e}"))
            })?;
            // Interactive protocols lie behind such ports.
            let _ = stream.set_nodelay(true);
            let (read, write) = stream.into_split();
            Ok(bridge(read, write, body))
        }
        Target::Sshd if !agent.in_guest() => Err(ApiError::new(
            ErrorCode::Unsupported,
            "this agent does not run in a guest",
        )),
        Target::Sshd => {
            let (read, write) = sshd(agent)?.into_split();
            Ok(bridge(read, write, body))
        }
    }
}

async fn loopback(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect(("127.0.0.1", port)).await {
        Ok(stream) => Ok(stream),
        Err(first) => TcpStream::connect(("::1", port)).await.map_err(|_| first),
    }
}

/// Starts an SSH server for one connection. The image's own server need not run, nor be set up.
fn sshd(agent: &Agent) -> Result<UnixStream, ApiError> {
    if !Path::new(SSHD).exists() {
        return Err(ApiError::new(
            ErrorCode::NotFound,
            format!("no sshd in this image: there is no {SSHD}"),
        )
        .hint("`banger vm shell` and `banger vm exec` need none"));
    }
    start_sshd(agent).map_err(|e| ApiError::new(ErrorCode::Guest, format!("{SSHD} can't be started: {e}")))
}

fn start_sshd(agent: &Agent) -> io::Result<UnixStream> {
    // Where it separates its privileges; its unit would make this.
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create("/run/sshd")?;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut command = Command::new(SSHD);
    command.arg("-i");
    let key = format!("/run/banger/{HOST_KEY}");
    if Path::new(&key).exists() {
        command.args(["-h", &key]);
    }
    for option in [
        "PermitRootLogin=prohibit-password",
        "PasswordAuthentication=no",
        "KbdInteractiveAuthentication=no",
        "UseDNS=no",
        // The client sends the default; the image's own locale, which PAM sets, comes after it.
        "AcceptEnv=LANG LC_*",
    ] {
        command.args(["-o", option]);
    }
    command
        .env_clear()
        .env("PATH", session::PATH)
        .env("LANG", "C.UTF-8")
        .current_dir("/")
        .process_group(0);
    command
        .stdin(OwnedFd::from(theirs.try_clone()?))
        .stdout(OwnedFd::from(theirs))
        .stderr(Stdio::null());
    let mut child = tokio::process::Command::from(command).spawn()?;
    let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    let connections = agent.connections.clone();
    lock(&connections).extend(group);
    tokio::spawn(async move {
        let _ = child.wait().await;
        lock(&connections).retain(|other| Some(*other) != group);
    });
    UnixStream::from_std(ours)
}

fn bridge<R, W, B>(read: R, mut write: W, mut body: B) -> Response<Body>
where
    R: AsyncRead + Send + 'static,
    W: AsyncWrite + Send + Unpin + 'static,
    B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Send,
{
    let upload = tokio::spawn(async move {
        while let Some(Ok(frame)) = body.frame().await {
            let Ok(bytes) = frame.into_data() else { continue };
            if write.write_all(&bytes).await.is_err() || write.flush().await.is_err() {
                return;
            }
        }
        let _ = write.shutdown().await;
    });
    let down = Download {
        stream: Box::pin(ReaderStream::with_capacity(read, READ)),
        upload: Some(AbortOnDropHandle::new(upload)),
    };
    reply::with(StatusCode::OK, down.boxed_unsync())
}

/// The guest's bytes as a body. When it is dropped early, the connection is over in both directions.
struct Download<R> {
    stream: Pin<Box<ReaderStream<R>>>,
    upload: Option<AbortOnDropHandle<()>>,
}

impl<R: AsyncRead> HttpBody for Download<R> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let next = ready!(self.stream.as_mut().poll_next(cx));
        if next.is_none()
            && let Some(upload) = self.upload.take()
        {
            // The guest has said all; it may still listen.
            upload.detach();
        }
        Poll::Ready(next.map(|bytes| bytes.map(Frame::data)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        assert_eq!(Target::parse("tcp:80").unwrap(), Target::Tcp(80));
        assert_eq!(Target::parse("sshd").unwrap(), Target::Sshd);
        for bad in ["tcp:0", "tcp:65536", "tcp:", "udp:1", "", "tcp:80 "] {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
    }
}
