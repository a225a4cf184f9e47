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

/// Most that the driver takes in one write.
const WRITE: usize = 32 * 1024;

/// How often an idle port is looked at even though nothing was reported: a net under lost wake-ups, not the way events come.
const LOOK: Duration = Duration::from_secs(2);

/// Finds the device of the port called `name`. `sys` and `dev` are the roots of sysfs and of the devices.
pub fn find_port(sys: &Path, dev: &Path, name: &str) -> io::Result<Option<PathBuf>> {
    for entry in std::fs::read_dir(sys.join("class/virtio-ports"))? {
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
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.over {
            return Poll::Ready(Ok(()));
        }
        if self.prefix_at < self.prefix.len() {
            let n = buf.remaining().min(self.prefix.len() - self.prefix_at);
            buf.put_slice(&self.prefix[self.prefix_at..self.prefix_at + n]);
            self.prefix_at += n;
            return Poll::Ready(Ok(()));
        }
        let mut got = false;
        while buf.remaining() > 0 {
            // Each read gives one buffer of the driver at most.
            let spare = buf.initialize_unfilled();
            match rustix::io::read(self.shared.fd.as_fd(), &mut *spare) {
                // Nobody is there. What was read before is delivered first; the next read says it again.
                Ok(0) if got => break,
                Ok(0) => {
                    self.over = true;
                    return Poll::Ready(Ok(()));
                }
                Ok(n) if self.serving && is_call(&spare[..n]) => {
                    lock(&self.pending).extend_from_slice(&spare[..n]);
                    self.over = true;
                    return Poll::Ready(Ok(()));
                }
                Ok(n) => {
                    buf.advance(n);
                    got = true;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if got => break,
                Err(Errno::AGAIN) => {
                    let mut state = lock(&self.shared.state);
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
