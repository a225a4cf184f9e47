//! Connecting to an engine's sockets.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout_at};

/// How often a full queue of connections is tried again.
const QUEUE: Duration = Duration::from_millis(20);

/// Connects. A stopped engine takes no connections, and when a few wait already the kernel takes none for it either: that is
/// waited for, as if it had taken them.
pub(crate) async fn dial(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    loop {
        match timeout_at(deadline, UnixStream::connect(path)).await {
            Ok(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => {}
            Ok(outcome) => return outcome,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
        if timeout_at(deadline, sleep(QUEUE)).await.is_err() {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

/// The process that opened the socket, as the kernel knows it. 0 is one of another namespace.
pub(crate) fn peer(stream: &UnixStream) -> Option<u32> {
    let pid = stream.peer_cred().ok()?.pid()?;
    u32::try_from(pid).ok().filter(|pid| *pid != 0)
}
