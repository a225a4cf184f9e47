//! The guest channel over a virtio-serial port.
//!
//! Such a port is not a socket. It has no connections; a read gives zero bytes while nobody is at the other end, and poll
//! reports that as a hang-up for as long as it lasts. A reactor that takes a hang-up for final (as tokio's does) would spin on
//! it, so the port is watched by an epoll of its own, edge triggered, and the reactor watches that epoll, which never hangs
//! up.
//!
//! Reads come in the 4 KiB buffers of the driver; one write is at most 32 KiB. Writes are gathered to that size, because each
//! takes a buffer of the queue and an exit to the engine.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use rustix::event::epoll;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio_util::task::AbortOnDropHandle;

use super::{Channel, greet, is_call};

/// Size of the driver's buffers of received bytes.
const READ: usize = 4096;

/// Most that the driver takes in one write.
const WRITE: usize = 32 * 1024;

/// How often an idle port is looked at even though nothing was reported: a net under lost wake-ups, not the way events come.
const LOOK: Duration = Duration::from_secs(2);

/// Finds the device of the port called `name`. `sys` and `dev` are the roots of sysfs and of the devices.
pub fn find_port(sys: &Path, dev: &Path, name: &str) -> io::Result<Option<PathBuf>> {
    let entries = match std::fs::read_dir(sys.join("class/virtio-ports")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        let Ok(found) = std::fs::read_to_string(entry.path().join("name")) else {
            continue;
        };
        if found.trim_end() == name {
            return Ok(Some(dev.join(entry.file_name())));
        }
    }
    Ok(None)
}

/// A port, open for as long as the agent lives.
pub struct Port {
    shared: Arc<Shared>,
    /// Bytes that were read ahead of a new handshake.
    pending: Arc<Mutex<Vec<u8>>>,
    _watch: AbortOnDropHandle<()>,
}

struct Shared {
    fd: OwnedFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    readable: bool,
    writable: bool,
    /// The other end went away since this was last cleared.
    hung_up: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Port {
    /// Opens the port at `path`. Must be called within a runtime.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = rustix::fs::open(
            path,
            OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY,
            Mode::empty(),
        )?;
        Self::from_fd(fd)
    }

    /// Takes a descriptor that behaves like a port: non-blocking, zero bytes read while nobody is there.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let inner = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&inner, &fd, epoll::EventData::new_u64(0), flags)?;
        let inner = crate::sys::watched(inner, Interest::READABLE)?;
        let state = State {
            readable: true,
            writable: true,
            ..State::default()
        };
        let shared = Arc::new(Shared {
            fd,
            state: Mutex::new(state),
        });
        let watch = AbortOnDropHandle::new(tokio::spawn(watch(inner, shared.clone())));
        Ok(Self {
            shared,
            pending: Arc::default(),
            _watch: watch,
        })
    }
}

/// Hands the port's events to whoever waits for them.
async fn watch(inner: AsyncFd<OwnedFd>, shared: Arc<Shared>) {
    loop {
        let Ok(mut guard) = inner.readable().await else { return };
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 4];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut flags = epoll::EventFlags::empty();
        while let Ok(n @ 1..) = epoll::wait(guard.get_inner(), &mut events, Some(&now)) {
            for event in &events[..n] {
                flags |= event.flags;
            }
        }
        guard.clear_ready();
        let mut state = lock(&shared.state);
        state.hung_up |= flags.contains(epoll::EventFlags::HUP);
        state.readable = true;
        state.writable = true;
        let wakers = [state.reader.take(), state.writer.take()];
        drop(state);
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

impl Channel for Port {
    type Stream = PortStream;

    async fn accept(&mut self) -> io::Result<PortStream> {
        loop {
            let prefix = std::mem::take(&mut *lock(&self.pending));
            lock(&self.shared.state).hung_up = false;
            let mut stream = PortStream {
                shared: self.shared.clone(),
                pending: self.pending.clone(),
                prefix,
                prefix_at: 0,
                out: Vec::with_capacity(WRITE),
                out_at: 0,
                serving: false,
                over: false,
            };
            match tokio::time::timeout(LOOK, greet(&mut stream)).await {
                Ok(Ok(rest)) => {
                    let mut prefix = stream.prefix.split_off(stream.prefix_at);
                    prefix.splice(..0, rest);
                    stream.prefix = prefix;
                    stream.prefix_at = 0;
                    stream.serving = true;
                    return Ok(stream);
                }
                // Half a greeting that is lost here is sent again.
                Err(_) => {}
                Ok(Err(e)) if e.kind() == io::ErrorKind::UnexpectedEof || e.kind() == io::ErrorKind::BrokenPipe => {
                    self.shared.changed().await;
                }
                Ok(Err(e)) => return Err(e),
            }
        }
    }
}

impl Shared {
    /// Waits for an event of the port, or a while.
    async fn changed(&self) {
        let event = std::future::poll_fn(|cx| {
            let mut state = lock(&self.state);
            if std::mem::take(&mut state.readable) {
                return Poll::Ready(());
            }
            state.reader = Some(cx.waker().clone());
            Poll::Pending
        });
        let _ = tokio::time::timeout(LOOK, event).await;
    }
}

/// One connection over a port. It ends when the host's end is closed, or when a new host calls.
pub struct PortStream {
    shared: Arc<Shared>,
    pending: Arc<Mutex<Vec<u8>>>,
    prefix: Vec<u8>,
    prefix_at: usize,
    out: Vec<u8>,
    out_at: usize,
    serving: bool,
    over: bool,
}

impl PortStream {
    /// Writes what was gathered.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.out_at < self.out.len() {
            let end = self.out.len().min(self.out_at + WRITE);
            let n = ready!(self.poll_write_some(cx, self.out_at, end))?;
            self.out_at += n;
        }
        self.out.clear();
        self.out_at = 0;
        Poll::Ready(Ok(()))
    }

    fn poll_write_some(&mut self, cx: &mut Context<'_>, from: usize, to: usize) -> Poll<io::Result<usize>> {
        loop {
            if self.over || lock(&self.shared.state).hung_up {
                self.over = true;
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            match rustix::io::write(self.shared.fd.as_fd(), &self.out[from..to]) {
                Ok(n) => return Poll::Ready(Ok(n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let mut state = lock(&self.shared.state);
                    if !std::mem::take(&mut state.writable) {
                        state.writer = Some(cx.waker().clone());
                        return Poll::Pending;
                    }
                }
                Err(e) => return Poll::Ready(Err(e.into())),
            }
        }
    }
}

impl AsyncRead for PortStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(Ok(()));
        }
        let mut got = false;
        while buf.remaining() > 0 {
            if this.prefix_at < this.prefix.len() {
                let n = buf.remaining().min(this.prefix.len() - this.prefix_at);
                buf.put_slice(&this.prefix[this.prefix_at..this.prefix_at + n]);
                this.prefix_at += n;
                got = true;
                continue;
            }
            // Each read gives one buffer of the driver at most, and there must be room for all of it: a host's call is known
            // by standing at the beginning of one.
            let aside = buf.remaining() < READ;
            let n = if aside {
                this.prefix.resize(READ, 0);
                let n = rustix::io::read(this.shared.fd.as_fd(), this.prefix.as_mut_slice());
                this.prefix.truncate(n.unwrap_or(0));
                this.prefix_at = 0;
                n
            } else {
                rustix::io::read(this.shared.fd.as_fd(), buf.initialize_unfilled())
            };
            match n {
                // Nobody is there. What was read before is delivered first; the next read says it again.
                Ok(0) if got => break,
                Ok(0) => {
                    this.over = true;
                    break;
                }
                Ok(n) => {
                    let bytes = if aside {
                        &this.prefix[..n]
                    } else {
                        &buf.initialize_unfilled()[..n]
                    };
                    if this.serving && is_call(bytes) {
                        lock(&this.pending).extend_from_slice(bytes);
                        this.prefix.clear();
                        this.prefix_at = 0;
                        this.over = true;
                        break;
                    }
                    if !aside {
                        buf.advance(n);
                        got = true;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if got => break,
                Err(Errno::AGAIN) => {
                    let mut state = lock(&this.shared.state);
                    if !std::mem::take(&mut state.readable) {
                        state.reader = Some(cx.waker().clone());
                        return Poll::Pending;
                    }
                }
                Err(e) => return Poll::Ready(Err(e.into())),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for PortStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.out.len() >= WRITE {
            ready!(self.poll_drain(cx))?;
        }
        let n = bytes.len().min(WRITE - self.out.len());
        self.out.extend_from_slice(&bytes[..n]);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_drain(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

#[cfg(test)]
mod tests {
    use banger_proto::hello::{GREETING, Greeting, GreetingKind};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::*;

    fn greeting(kind: GreetingKind, nonce: u8) -> [u8; GREETING] {
        Greeting::new(kind, [nonce; 16]).encode()
    }

    fn port() -> (UnixStream, Port) {
        let (host, guest) = std::os::unix::net::UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        guest.set_nonblocking(true).unwrap();
        (
            UnixStream::from_std(host).unwrap(),
            Port::from_fd(guest.into()).unwrap(),
        )
    }

    async fn shake_hands(host: &mut UnixStream, nonce: u8) {
        host.write_all(&greeting(GreetingKind::Call, nonce)).await.unwrap();
        let mut answer = [0; GREETING];
        host.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, greeting(GreetingKind::Answer, nonce));
        host.write_all(&greeting(GreetingKind::Go, nonce)).await.unwrap();
    }

    #[tokio::test]
    async fn bytes_pass_both_ways() {
        let (mut host, mut port) = port();
        let (mut stream, ()) = tokio::join!(async { port.accept().await.unwrap() }, shake_hands(&mut host, 1));
        let data: Vec<u8> = (0..3_000_000u32).map(|i| (i >> 3) as u8).collect();
        let (mut from_host, mut to_host) = host.split();
        let (mut from_guest, mut to_guest) = tokio::io::split(&mut stream);
        let (mut there, mut back) = (vec![0; data.len()], vec![0; data.len()]);
        let write = async {
            to_guest.write_all(&data).await.unwrap();
            to_guest.flush().await.unwrap();
        };
        let (_, (), there_read, back_read) = tokio::join!(
            to_host.write_all(&data),
            write,
            from_guest.read_exact(&mut there),
            from_host.read_exact(&mut back)
        );
        assert!(there_read.is_ok() && back_read.is_ok() && there == data && back == data);
    }

    #[tokio::test]
    async fn a_call_amid_a_connection_ends_it_and_begins_the_next() {
        let (mut host, mut port) = port();
        let (mut stream, ()) = tokio::join!(async { port.accept().await.unwrap() }, shake_hands(&mut host, 1));
        host.write_all(b"some HTTP/2").await.unwrap();
        let mut got = [0; 11];
        stream.read_exact(&mut got).await.unwrap();
        // The host went away and came back, and the port never said so.
        let next = async {
            assert_eq!(stream.read(&mut got).await.unwrap(), 0);
            drop(stream);
            port.accept().await.unwrap()
        };
        let (mut stream, ()) = tokio::join!(next, shake_hands(&mut host, 2));
        host.write_all(b"PRI").await.unwrap();
        let mut got = [0; 3];
        stream.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"PRI");
    }

    #[tokio::test]
    async fn nobody_there_is_the_end_of_the_connection() {
        let (mut host, mut port) = port();
        let (mut stream, ()) = tokio::join!(async { port.accept().await.unwrap() }, shake_hands(&mut host, 1));
        drop(host);
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
        let mut result = Ok(());
        // Gathered first, so the failure may come with the second write.
        for _ in 0..4 {
            result = stream.write_all(&[0; WRITE]).await;
        }
        assert!(result.is_err());
    }

    #[test]
    fn the_port_is_found_by_its_name() {
        let sys = tempfile::tempdir().unwrap();
        for (port, name) in [("vport0p1", "org.other"), ("vport1p2", "banger.agent")] {
            let dir = sys.path().join("class/virtio-ports").join(port);
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join("name"), format!("{name}\n")).unwrap();
        }
        let found = |name| find_port(sys.path(), Path::new("/dev"), name).unwrap();
        assert_eq!(found("banger.agent"), Some(PathBuf::from("/dev/vport1p2")));
        assert_eq!(found("none"), None);
        assert_eq!(
            find_port(&sys.path().join("none"), Path::new("/dev"), "x").unwrap(),
            None
        );
    }
}
