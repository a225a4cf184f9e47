//! The socket: bound without ever being open to others, each peer checked, clients counted.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::fs::Mode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;

use crate::services::Services;

/// Pause after a failed accept (too many open files).
const RETRY: Duration = Duration::from_millis(200);
/// How long requests under way may take once the daemon is to stop.
const GRACE: Duration = Duration::from_secs(2);
/// Most clients at once.
const MAX_CLIENTS: usize = 512;

/// Binds the socket in place of a stale one. Must be called while the lock of the runtime directory is held, and before there
/// are other threads: it changes the umask for a moment, so that the socket never is open to others.
pub fn bind(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = std::os::unix::net::UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = bound?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// How many clients are connected, and since when there is none.
#[derive(Debug, Default)]
pub struct Clients(AtomicUsize);

impl Clients {
    fn enter(self: &Arc<Self>) -> Option<Client> {
        let before = self.0.fetch_add(1, Ordering::Relaxed);
        let client = Client(self.clone());
        (before < MAX_CLIENTS).then_some(client)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// One connected client.
#[derive(Debug)]
struct Client(Arc<Clients>);

impl Drop for Client {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection of a peer that was checked.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    _client: Client,
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// Accepts peers of our own user and of root; others are closed with a line in the log.
#[derive(Debug)]
struct Listener {
    socket: UnixListener,
    uid: u32,
    clients: Arc<Clients>,
}

impl axum::serve::Listener for Listener {
    type Io = Connection;
    type Addr = ();

    async fn accept(&mut self) -> (Connection, ()) {
        loop {
            let stream = match self.socket.accept().await {
                Ok((stream, _)) => stream,
                Err(e) => {
                    tracing::warn!(error = %e, "accept failed");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            match stream.peer_cred() {
                Ok(peer) if may_connect(peer.uid(), self.uid) => match self.clients.enter() {
                    Some(client) => {
                        return (
                            Connection {
                                stream,
                                _client: client,
                            },
                            (),
                        );
                    }
                    None => tracing::warn!(limit = MAX_CLIENTS, "too many clients: closed"),
                },
                Ok(peer) => tracing::warn!(uid = peer.uid(), pid = peer.pid(), "a peer of another user: closed"),
                Err(e) => tracing::warn!(error = %e, "a peer without credentials: closed"),
            }
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Root can read our memory and files anyway; refusing it would only keep its tools from working.
fn may_connect(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}

/// Serves until the daemon is to stop, then gives what is under way a moment to end.
pub async fn serve(socket: std::os::unix::net::UnixListener, services: Arc<Services>) -> io::Result<()> {
    let clients = Arc::new(Clients::default());
    let uid = rustix::process::geteuid().as_raw();
    let listener = Listener {
        socket: UnixListener::from_std(socket)?,
        uid,
        clients: clients.clone(),
    };
    let idle_exit = services.config.daemon.idle_exit.0;
    if !idle_exit.is_zero() {
        tokio::spawn(exit_when_idle(services.clone(), clients, idle_exit));
    }
    let stopping = services.stopping.clone();
    let serving = axum::serve(listener, crate::api::router(services.clone()))
        .with_graceful_shutdown(services.stopping.clone().cancelled_owned());
    let overdue = async {
        stopping.cancelled().await;
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        served = async { serving.await } => served,
        () = overdue => Ok(()),
    }
}

/// Ends the daemon when for a while there was no client and no operation. Machines run on; the next client starts the next
/// daemon. What it has to do itself keeps it: removing a machine with its holder, listening at forwarded ports.
async fn exit_when_idle(services: Arc<Services>, clients: Arc<Clients>, idle_exit: Duration) {
    let look = (idle_exit / 4).clamp(Duration::from_millis(50), Duration::from_secs(10));
    let mut busy = Instant::now();
    loop {
        tokio::time::sleep(look).await;
        let waits_for_holder = services.machines().iter().any(|m| m.row().auto_remove);
        let needed = waits_for_holder || services.forwards.serve_any();
        if clients.count() > 0 || services.ops.running() > 0 || needed || !*services.ready.borrow() {
            busy = Instant::now();
        } else if busy.elapsed() >= idle_exit {
            tracing::info!(?idle_exit, "idle: the daemon ends, machines run on");
            services.stopping.cancel();
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn the_socket_is_ours_alone_and_replaces_a_stale_one() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("s");
        drop(bind(&path).unwrap());
        let _again = bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn others_may_not_connect() {
        assert!(may_connect(1000, 1000) && may_connect(0, 1000));
        assert!(!may_connect(1001, 1000) && !may_connect(1000, 0));
    }
}
