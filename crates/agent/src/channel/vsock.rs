//! The guest channel over a vsock device.
//!
//! Here the host opens real connections, and there may be several: one of a daemon that has died unseen and one of its
//! successor. The one that called last is the host. A call ends the connection before it, and is answered only when that one
//! is over, so whoever has the answer knows that nothing of an earlier connection goes on.
//!
//! When the machine is saved and goes on as it was, or as a copy, the device resets its connections; the listener stays.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::AbortOnDropHandle;

use super::{Channel, Greeter, Step, greet};
use crate::sys;

/// The kind of a vsock device on the virtio bus.
const DEVICE: &str = "0x0013";

/// The address that the host has.
const HOST: u32 = 2;

/// Connections that have not called yet.
const SILENT: usize = 8;

/// How long a connection may take to call, and then to say that it goes on.
const CALL: Duration = Duration::from_secs(5);

/// How long to wait when the system has no room for another connection.
const ROOM: Duration = Duration::from_millis(100);

/// Whether there is a vsock device. `sys` is the root of sysfs.
pub fn is_there(sys: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(sys.join("bus/virtio/devices")) else {
        return false;
    };
    entries
        .flatten()
        .any(|entry| std::fs::read_to_string(entry.path().join("device")).is_ok_and(|kind| kind.trim_end() == DEVICE))
}

/// A port that the host connects to.
pub struct Vsock {
    called: mpsc::Receiver<VsockStream>,
    _listen: AbortOnDropHandle<()>,
}

impl Vsock {
    /// Listens at `port`. Must be called within a runtime.
    pub fn listen(port: u32) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &sys::VsockAddress::any(port))?;
        rustix::net::listen(&socket, 16)?;
        let socket = sys::watched(socket, Interest::READABLE)?;
        let (calls, called) = Calls::new();
        let listen = AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                match accept(&socket).await {
                    Ok(Some(stream)) => calls.offer(stream),
                    Ok(None) => {}
                    // The channel is told to be broken by its receiver's end.
                    Err(e) if is_lasting(&e) => return,
                    Err(_) => tokio::time::sleep(ROOM).await,
                }
            }
        }));
        Ok(Self {
            called,
            _listen: listen,
        })
    }
}

/// Whether a listener that failed so is of no use any more.
fn is_lasting(e: &io::Error) -> bool {
    let errno = e.raw_os_error().map(Errno::from_raw_os_error);
    matches!(
        errno,
        Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK | Errno::OPNOTSUPP | Errno::NODEV)
    )
}

/// The next connection; none when it was not the host's. Programs in the guest can reach the port too where their kernel
/// loops vsock back.
async fn accept(socket: &tokio::io::unix::AsyncFd<OwnedFd>) -> io::Result<Option<UnixStream>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (stream, peer) = socket
        .async_io(Interest::READABLE, |socket| {
            Ok(rustix::net::acceptfrom_with(socket, flags)?)
        })
        .await?;
    if peer.as_ref().and_then(sys::vsock_cid) != Some(HOST) {
        return Ok(None);
    }
    // A stream socket like any other, but for its addresses, which are not looked at any more.
    UnixStream::from_std(stream.into()).map(Some)
}

/// Connections on their way to call.
struct Calls {
    to: mpsc::Sender<VsockStream>,
    /// Ends the connection that called last.
    last: Arc<Mutex<CancellationToken>>,
    silent: Arc<Semaphore>,
}

impl Calls {
    fn new() -> (Self, mpsc::Receiver<VsockStream>) {
        let (to, called) = mpsc::channel(SILENT);
        let calls = Self {
            to,
            last: Arc::default(),
            silent: Arc::new(Semaphore::new(SILENT)),
        };
        (calls, called)
    }

    /// Takes a connection. It is heard of once it has called.
    fn offer(&self, mut stream: UnixStream) {
        let Ok(place) = self.silent.clone().try_acquire_owned() else {
            return;
        };
        let (to, last) = (self.to.clone(), self.last.clone());
        tokio::spawn(async move {
            let _place = place;
            let Ok(Ok(prefix)) = tokio::time::timeout(CALL, until_call(&mut stream)).await else {
                return;
            };
            let own = CancellationToken::new();
            let before = std::mem::replace(&mut *last.lock().unwrap_or_else(PoisonError::into_inner), own.clone());
            before.cancel();
            let _ = to.send(VsockStream::new(stream, prefix, own)).await;
        });
    }
}

/// Reads up to a call, and gives back what was read.
async fn until_call(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut greeter = Greeter::new();
    let mut buffer = vec![0; 4096];
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // A call that is torn between two reads is sent again.
        if buffer[..n]
            .iter()
            .any(|byte| matches!(greeter.push(*byte), Step::Answer(_)))
        {
            buffer.truncate(n);
            return Ok(buffer);
        }
    }
}

impl Channel for Vsock {
    type Stream = VsockStream;

    async fn accept(&mut self) -> io::Result<VsockStream> {
        next(&mut self.called).await
    }
}

/// The next connection whose host goes on after its call.
async fn next(called: &mut mpsc::Receiver<VsockStream>) -> io::Result<VsockStream> {
    loop {
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "the vsock listener has ended");
        let mut stream = called.recv().await.ok_or_else(gone)?;
        while let Ok(later) = called.try_recv() {
            stream = later;
        }
        if let Ok(Ok(mut rest)) = tokio::time::timeout(CALL, greet(&mut stream)).await {
            rest.extend_from_slice(&stream.prefix[stream.prefix_at..]);
            stream.prefix = rest;
            stream.prefix_at = 0;
            return Ok(stream);
        }
    }
}

/// One connection. It ends with the host's end, or when another one calls.
pub struct VsockStream {
    inner: UnixStream,
    prefix: Vec<u8>,
    prefix_at: usize,
    token: CancellationToken,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl VsockStream {
    fn new(inner: UnixStream, prefix: Vec<u8>, token: CancellationToken) -> Self {
        Self {
            inner,
            prefix,
            prefix_at: 0,
            over: Box::pin(token.clone().cancelled_owned()),
            token,
        }
    }

    fn check(&self) -> io::Result<()> {
        if self.token.is_cancelled() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    }
}

impl AsyncRead for VsockStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.over.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        if this.prefix_at < this.prefix.len() {
            let n = buf.remaining().min(this.prefix.len() - this.prefix_at);
            buf.put_slice(&this.prefix[this.prefix_at..this.prefix_at + n]);
            this.prefix_at += n;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut this.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for VsockStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.inner).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl Drop for VsockStream {
    fn drop(&mut self) {
        // At once, also where a descriptor of it has slipped into a child.
        let _ = rustix::net::shutdown(&self.inner, rustix::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use banger_proto::hello::{GREETING, Greeting, GreetingKind};
    use tokio::io::AsyncWriteExt;

    use super::*;

    fn greeting(kind: GreetingKind, nonce: u8) -> [u8; GREETING] {
        Greeting::new(kind, [nonce; 16]).encode()
    }

    async fn answer(host: &mut UnixStream, nonce: u8) {
        let mut answer = [0; GREETING];
        host.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, greeting(GreetingKind::Answer, nonce));
    }

    async fn call(calls: &Calls, nonce: u8) -> UnixStream {
        let (mut host, guest) = UnixStream::pair().unwrap();
        calls.offer(guest);
        host.write_all(&greeting(GreetingKind::Call, nonce)).await.unwrap();
        host
    }

    async fn connect(calls: &Calls, called: &mut mpsc::Receiver<VsockStream>, nonce: u8) -> (UnixStream, VsockStream) {
        let mut host = call(calls, nonce).await;
        let go = async {
            answer(&mut host, nonce).await;
            let rest = [&greeting(GreetingKind::Go, nonce)[..], b"PRI"].concat();
            host.write_all(&rest).await.unwrap();
        };
        let (stream, ()) = tokio::join!(async { next(called).await.unwrap() }, go);
        (host, stream)
    }

    #[tokio::test]
    async fn the_last_call_is_the_host() {
        let (calls, mut called) = Calls::new();
        let (mut first_host, mut first) = connect(&calls, &mut called, 1).await;
        let mut got = [0; 3];
        first.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"PRI");

        // Whoever only connects is not.
        let (mut stray, guest) = UnixStream::pair().unwrap();
        calls.offer(guest);
        stray.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        first_host.write_all(b"abc").await.unwrap();
        first.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"abc");

        let mut second_host = call(&calls, 2).await;
        assert_eq!(first.read(&mut got).await.unwrap(), 0, "a call ends what was before");
        assert!(first.write_all(b"x").await.is_err());
        // The answer comes when the first one is no longer served.
        let early = tokio::time::timeout(Duration::from_millis(50), second_host.read_u8()).await;
        assert!(early.is_err());
        drop(first);
        assert_eq!(first_host.read(&mut got).await.unwrap(), 0, "and its host sees that");
        let go = async {
            answer(&mut second_host, 2).await;
            second_host.write_all(&greeting(GreetingKind::Go, 2)).await.unwrap();
            second_host.write_all(b"more").await.unwrap();
        };
        let (mut second, ()) = tokio::join!(async { next(&mut called).await.unwrap() }, go);
        let mut got = [0; 4];
        second.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"more");
        second.write_all(b"back").await.unwrap();
        second_host.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"back");
    }

    #[tokio::test]
    async fn a_call_that_does_not_go_on_gives_way() {
        let (calls, mut called) = Calls::new();
        let lost = call(&calls, 1).await;
        let waiting = tokio::spawn(async move {
            let stream = next(&mut called).await;
            (called, stream)
        });
        // It calls anew, on another connection.
        let mut host = call(&calls, 2).await;
        answer(&mut host, 2).await;
        host.write_all(&greeting(GreetingKind::Go, 2)).await.unwrap();
        let (_called, stream) = waiting.await.unwrap();
        assert!(stream.is_ok());
        drop(lost);
    }

    #[tokio::test]
    async fn what_does_not_call_is_bounded() {
        let (calls, mut called) = Calls::new();
        let mut kept = Vec::new();
        for _ in 0..SILENT {
            let (host, guest) = UnixStream::pair().unwrap();
            calls.offer(guest);
            kept.push(host);
        }
        let (mut host, guest) = UnixStream::pair().unwrap();
        calls.offer(guest);
        assert_eq!(host.read(&mut [0; 1]).await.unwrap(), 0);
        kept.clear();
        let room = async {
            while calls.silent.available_permits() < SILENT {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(CALL, room).await.unwrap();
        let (_host, _stream) = connect(&calls, &mut called, 3).await;
    }

    #[test]
    fn the_device_is_known_by_its_kind() {
        let tmp = tempfile::tempdir().unwrap();
        assert!(!is_there(tmp.path()));
        let kind = |name: &str, kind: &str| {
            let dir = tmp.path().join("bus/virtio/devices").join(name);
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join("device"), kind).unwrap();
        };
        kind("virtio0", "0x0002\n");
        assert!(!is_there(tmp.path()));
        kind("virtio1", "0x0013\n");
        assert!(is_there(tmp.path()));
    }
}
