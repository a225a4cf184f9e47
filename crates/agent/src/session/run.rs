//! A session's program while it runs: output into the log, input out of the queue, and its end.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::Pid;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinSet;

use super::log::Stream;
use super::spawn::{self, SpawnFailure, Spawned};
use super::table::Sessions;
use super::{Outcome, Session, lock};

/// Bytes read from a program at once.
const READ: usize = 64 * 1024;

/// Once the program itself has ended: how long others that hold its output may be silent before they are left behind.
const SILENCE: Duration = Duration::from_millis(200);

/// And for how long they are listened to at most, not counting the time in which the client was slow.
const LINGER: Duration = Duration::from_secs(5);

thread_local! {
    /// Where output lies between pipe and log; one for all, since nothing waits while it is in use.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ]);
}

impl Session {
    /// Runs the program, once: every later call does nothing.
    pub(super) fn go(self: &Arc<Self>, sessions: &Arc<Sessions>) {
        {
            let mut inner = lock(&self.inner);
            if inner.started {
                return;
            }
            inner.waits = sessions.is_held();
            if inner.waits {
                return;
            }
            inner.started = true;
        }
        let mut open = self.open.clone();
        open.size = lock(&self.inner).size;
        match spawn::spawn(sessions.etc(), &open) {
            Ok(spawned) => {
                if let Some(note) = &spawned.note {
                    self.say(note);
                }
                {
                    let mut inner = lock(&self.inner);
                    inner.pty = spawned.pty.clone();
                    inner.group = spawned.child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
                }
                tokio::spawn(run(self.clone(), sessions.clone(), spawned));
            }
            Err(SpawnFailure::Refused(error)) => self.finish(sessions, Outcome::Failed(error)),
            Err(SpawnFailure::Exit(line, code)) => {
                self.say(&line);
                self.finish(sessions, Outcome::Exit(code));
            }
        }
    }

    /// A line of our own among the program's output.
    fn say(&self, line: &str) {
        let (stream, line) = if self.open.tty {
            (Stream::Out, line.replace('\n', "\r\n"))
        } else {
            (Stream::Err, line.to_owned())
        };
        lock(&self.inner).log.append(stream, line.as_bytes());
    }

    fn finish(&self, sessions: &Sessions, outcome: Outcome) {
        {
            let mut inner = lock(&self.inner);
            inner.outcome = Some(outcome);
            inner.group = None;
            inner.pty = None;
            inner.stdin_written = inner.stdin_received;
            inner.stdin.clear();
            inner.stdin_queued = 0;
            inner.log.shrink();
            inner.wake();
        }
        self.input.notify_one();
        self.room.notify_waiters();
        sessions.finished(self);
    }

    /// Waits until output may be read. After the end it always may.
    async fn room(&self) {
        loop {
            let mut changed = std::pin::pin!(self.room.notified());
            changed.as_mut().enable();
            {
                let inner = lock(&self.inner);
                if inner.outcome.is_some() || inner.has_room() {
                    return;
                }
            }
            changed.await;
        }
    }

    fn held_back(&self) -> bool {
        !lock(&self.inner).has_room()
    }

    fn append(&self, stream: Stream, bytes: &[u8]) {
        let mut inner = lock(&self.inner);
        if inner.outcome.is_some() {
            return;
        }
        inner.log.append(stream, bytes);
        inner.wake();
        drop(inner);
        self.output.notify_one();
    }

    /// The next stretch of standard input, `None` at its end.
    async fn next_input(&self) -> Option<Bytes> {
        loop {
            {
                let mut inner = lock(&self.inner);
                if inner.outcome.is_some() {
                    return None;
                }
                if let Some(bytes) = inner.stdin.pop_front() {
                    inner.stdin_queued -= bytes.len();
                    return Some(bytes);
                }
                if inner.stdin_eof {
                    return None;
                }
            }
            self.input.notified().await;
        }
    }

    fn input_written(&self, n: usize) {
        let mut inner = lock(&self.inner);
        inner.stdin_written += n as u64;
        inner.wake();
    }
}

/// The whole run of a program.
async fn run(session: Arc<Session>, sessions: Arc<Sessions>, spawned: Spawned) {
    let Spawned {
        mut child,
        pty,
        stdin,
        stdout,
        stderr,
        note: _,
    } = spawned;
    let mut outputs = Vec::new();
    let mut pumps = JoinSet::new();
    for (fd, stream) in [
        (stdout.map(Arc::new), Stream::Out),
        (stderr.map(Arc::new), Stream::Err),
        (pty.clone(), Stream::Out),
    ] {
        let Some(fd) = fd else { continue };
        outputs.push(fd.clone());
        pumps.spawn(pump(session.clone(), fd, stream));
    }
    let writer = match (stdin, pty.clone()) {
        (Some(fd), _) => Some(tokio::spawn(feed(session.clone(), Arc::new(fd), false))),
        (None, Some(fd)) => Some(tokio::spawn(feed(session.clone(), fd, true))),
        (None, None) => None,
    };
    drop(pty);
    let status = child.wait().await;
    // From here on the number of the process may be somebody else's.
    lock(&session.inner).group = None;
    drain(&session, &mut pumps, &outputs).await;
    let code = status.map_or(255, exit_code);
    session.finish(&sessions, Outcome::Exit(code));
    if let Some(writer) = writer {
        writer.abort();
    }
    // Somebody else may still write into the pipes: closing them would kill it, so they are read to nowhere. A terminal is
    // closed: who still has it is told so.
    drop(pumps);
    if !session.open.tty {
        outputs.into_iter().for_each(|fd| drop(tokio::spawn(sink(fd))));
    }
}

/// Reads to the end and forgets it.
async fn sink(fd: Arc<AsyncFd<OwnedFd>>) {
    loop {
        let Ok(mut guard) = fd.readable().await else { return };
        let read = SCRATCH
            .with_borrow_mut(|scratch| guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), scratch.as_mut_slice())?)));
        if matches!(read, Ok(Ok(0) | Err(_))) {
            return;
        }
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Waits for the rest of the output after the program has ended.
async fn drain(session: &Session, pumps: &mut JoinSet<()>, outputs: &[Arc<AsyncFd<OwnedFd>>]) {
    let mut until = Instant::now() + LINGER;
    loop {
        tokio::select! {
            biased;
            ended = pumps.join_next() => if ended.is_none() { return },
            () = session.output.notified() => if Instant::now() > until && !session.held_back() { return },
            () = tokio::time::sleep(SILENCE) => {
                if session.held_back() {
                    until = Instant::now() + LINGER;
                } else if !outputs.iter().any(|fd| readable(fd)) || Instant::now() > until {
                    return;
                }
            }
        }
    }
}

/// Whether there are bytes to be read right now. (A hang-up alone is not what is asked for.)
fn readable(fd: &AsyncFd<OwnedFd>) -> bool {
    let mut fds = [PollFd::new(fd.get_ref(), PollFlags::IN)];
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::IN)
}

/// Reads one output stream into the log until its end.
async fn pump(session: Arc<Session>, fd: Arc<AsyncFd<OwnedFd>>, stream: Stream) {
    loop {
        session.room().await;
        let Ok(mut guard) = fd.readable().await else { return };
        let read = SCRATCH.with_borrow_mut(|scratch| {
            let read = guard.try_io(|fd| match rustix::io::read(fd.get_ref(), scratch.as_mut_slice()) {
                Err(Errno::INTR) => Ok(None),
                other => other.map(Some).map_err(io::Error::from),
            });
            if let Ok(Ok(Some(n))) = read {
                session.append(stream, &scratch[..n]);
            }
            read
        });
        // EIO: the last one who had the terminal open has gone.
        if matches!(read, Ok(Ok(Some(0)) | Err(_))) {
            return;
        }
    }
}

/// Writes standard input to the program.
async fn feed(session: Arc<Session>, fd: Arc<AsyncFd<OwnedFd>>, terminal: bool) {
    let mut broken = false;
    while let Some(bytes) = session.next_input().await {
        let mut rest = bytes;
        while !rest.is_empty() {
            // What a program no longer reads is taken all the same: the client must not wait for it.
            let n = if broken {
                rest.len()
            } else {
                write(&fd, &rest).await.unwrap_or(0)
            };
            if n == 0 {
                broken = true;
                continue;
            }
            session.input_written(n);
            rest = rest.split_off(n);
        }
    }
    if terminal && !broken && lock(&session.inner).outcome.is_none() {
        // A terminal has no end of file, but a key for it.
        let _ = write(&fd, &[4]).await;
    }
}

async fn write(fd: &AsyncFd<OwnedFd>, bytes: &[u8]) -> io::Result<usize> {
    loop {
        let mut guard = fd.writable().await?;
        match guard.try_io(|fd| rustix::io::write(fd.get_ref(), bytes).map_err(io::Error::from)) {
            Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(result) => return result,
            Err(_) => {}
        }
    }
}
