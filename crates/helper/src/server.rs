//! The socket: who is let in, frames with descriptors, one thread for each connection.
//!
//! Nothing that comes in can take more than its share: calls and descriptors are bounded, a call that has begun has to be there within
//! [`CALL_LIMIT`], and of the connections that only wait, the longest waiting makes room for a new one.

use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use banger_system::helper::{Answer, Call, HelperCode, HelperError, MAX_DESCRIPTORS, MAX_REPLY, Reply};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, Uid};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, sendmsg,
};

use crate::auth;
use crate::call;
use crate::ctx::{Ctx, error};
use crate::dispatch::{Locks, dispatch};

/// How long a call that has begun may take to arrive, and its answer to be taken.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Most connections.
const MAX_CONNECTIONS: usize = 64;
/// How long an end waits for the calls that are being carried out; less than systemd does.
const END_LIMIT: Duration = Duration::from_secs(15);
/// Bytes for the descriptors of one message: as many as the kernel lets through at once, so that too many are seen as such.
const CONTROL: usize = 16 + 253 * 4 + 64;

/// Why the socket is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// The directory.
    #[error("`{0}` is not a directory that only root can write")]
    Directory(String),
    /// Another helper.
    #[error("another helper serves `{0}`")]
    Taken(String),
    /// The kernel.
    #[error("cannot {0}: {1}")]
    Failed(String, std::io::Error),
}

fn cannot(what: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> ServeError {
    move |e| ServeError::Failed(what.into(), e.into())
}

/// The listening socket, and what keeps a second helper away.
#[derive(Debug)]
pub(crate) struct Served {
    listener: UnixListener,
    _lock: OwnedFd,
}

/// Makes the socket. Until it is the owner's alone it lies under another name, where only root can open it (the umask is 077), so
/// there is no moment at which anybody else could connect.
pub(crate) fn listen(path: &Path, record: &banger_system::install::Record) -> Result<Served, ServeError> {
    let shown = path.display().to_string();
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(ServeError::Directory(shown));
    };
    let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW;
    make_directory(parent)?;
    let directory = rustix::fs::open(parent, flags | OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
        .map_err(cannot(format!("open `{}`", parent.display())))?;
    if !auth::roots_own(&directory, FileType::Directory) {
        return Err(ServeError::Directory(parent.display().to_string()));
    }
    let lock = rustix::fs::openat(
        &directory,
        "lock",
        flags | OFlags::CREATE | OFlags::RDWR,
        Mode::RUSR | Mode::WUSR,
    )
    .map_err(cannot("open the lock"))?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|e| match e {
        rustix::io::Errno::WOULDBLOCK => ServeError::Taken(shown.clone()),
        e => cannot("take the lock")(e),
    })?;
    let temporary = ".new";
    match rustix::fs::unlinkat(&directory, temporary, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(e) => return Err(cannot("remove an old socket")(e)),
    }
    let at = parent.join(temporary);
    let listener = UnixListener::bind(&at).map_err(|e| ServeError::Failed(format!("make `{}`", at.display()), e))?;
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::chmodat(&directory, temporary, mode, AtFlags::empty()).map_err(cannot("change the socket's mode"))?;
    let (uid, gid) = (Uid::from_raw(record.owner.uid), Gid::from_raw(record.owner.gid));
    rustix::fs::chownat(&directory, temporary, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(cannot("give the socket to the owner"))?;
    rustix::fs::renameat(&directory, temporary, &directory, name).map_err(cannot(format!("make `{shown}`")))?;
    Ok(Served { listener, _lock: lock })
}

/// Makes the socket's directory where systemd has not: passable for all, and what is missing above it readable.
fn make_directory(path: &Path) -> Result<(), ServeError> {
    let missing: Vec<&Path> = path.ancestors().take_while(|dir| !dir.exists()).collect();
    for (above, dir) in missing.iter().enumerate().rev() {
        let mode = if above == 0 { 0o711 } else { 0o755 };
        std::fs::create_dir(dir)
            .and_then(|()| std::fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(mode)))
            .map_err(|e| ServeError::Failed(format!("make `{}`", dir.display()), e))?;
    }
    Ok(())
}

/// One connection, as others see it.
#[derive(Debug)]
struct Seat {
    number: u64,
    stream: Arc<UnixStream>,
    since: Instant,
    busy: bool,
}

/// All connections.
#[derive(Debug, Default)]
struct Seats(Mutex<Vec<Seat>>);

impl Seats {
    fn all(&self) -> std::sync::MutexGuard<'_, Vec<Seat>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A seat for a connection; where all are taken, the one that has waited longest is asked to leave. False: all are busy.
    fn take(&self, number: u64, stream: &Arc<UnixStream>) -> bool {
        let mut seats = self.all();
        if seats.len() >= MAX_CONNECTIONS {
            let Some(idle) = seats.iter().filter(|seat| !seat.busy).min_by_key(|seat| seat.since) else {
                return false;
            };
            let _ = idle.stream.shutdown(std::net::Shutdown::Both);
            let number = idle.number;
            seats.retain(|seat| seat.number != number);
        }
        seats.push(Seat {
            number,
            stream: Arc::clone(stream),
            since: Instant::now(),
            busy: false,
        });
        true
    }

    fn set_busy(&self, number: u64, busy: bool) {
        if let Some(seat) = self.all().iter_mut().find(|seat| seat.number == number) {
            (seat.busy, seat.since) = (busy, Instant::now());
        }
    }

    fn leave(&self, number: u64) {
        self.all().retain(|seat| seat.number != number);
    }

    fn busy(&self) -> bool {
        self.all().iter().any(|seat| seat.busy)
    }
}

/// Serves until `stop` is readable, then lets the calls that are being carried out come to their end.
pub(crate) fn serve(served: &Served, ctx: Ctx, stop: impl AsFd) -> Result<(), ServeError> {
    let shared = Arc::new((ctx, Locks::default(), Seats::default()));
    for number in 0.. {
        let mut fds = [
            PollFd::new(&served.listener, PollFlags::IN),
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => return Err(cannot("wait for connections")(e)),
        }
        if !fds[1].revents().is_empty() {
            break;
        }
        let stream = match served.listener.accept() {
            Ok((stream, _)) => Arc::new(stream),
            Err(e) => {
                log(&[
                    ("level", "warn".into()),
                    ("msg", "accept".into()),
                    ("error", e.to_string().into()),
                ]);
                // Out of descriptors, say: trying at once again would only spin.
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if !admitted(&stream, &shared.0) || !shared.2.take(number, &stream) {
            continue;
        }
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().stack_size(512 << 10).spawn(move || {
            let (ctx, locks, seats) = &*theirs;
            talk(&stream, number, ctx, locks, seats);
            seats.leave(number);
        });
        if thread.is_err() {
            shared.2.leave(number);
        }
    }
    let deadline = Instant::now() + END_LIMIT;
    while shared.2.busy() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Whether the peer is one that may call.
fn admitted(stream: &UnixStream, ctx: &Ctx) -> bool {
    let peer = match rustix::net::sockopt::socket_peercred(stream) {
        Ok(peer) => peer,
        Err(_) => return false,
    };
    let uid = peer.uid.as_raw();
    if auth::admitted(uid, &ctx.record) {
        return true;
    }
    log(&[
        ("level", "warn".into()),
        ("msg", "helper refused a caller".into()),
        ("uid", uid.into()),
        ("pid", peer.pid.as_raw_pid().into()),
    ]);
    false
}

/// The calls of one connection, one by one.
fn talk(stream: &UnixStream, number: u64, ctx: &Ctx, locks: &Locks, seats: &Seats) {
    let _ = stream.set_write_timeout(Some(CALL_LIMIT));
    loop {
        let (bytes, fds) = match receive(stream) {
            Ok(Some(frame)) => frame,
            Ok(None) => return,
            // Where the next call begins is not known any more.
            Err(e) => {
                log_call(None, "unreadable", Duration::ZERO, Err(&e));
                let _ = send(stream, &Reply::Error(e), &[]);
                return;
            }
        };
        seats.set_busy(number, true);
        let (reply, fds) = answer(ctx, locks, &bytes, fds);
        let sent = send(stream, &reply, &fds);
        // The caller's now, and nobody else's.
        drop(fds);
        seats.set_busy(number, false);
        if sent.is_err() {
            return;
        }
    }
}

/// Carries out what a frame asks for. A fault of the helper's own is an answer too.
fn answer(ctx: &Ctx, locks: &Locks, bytes: &[u8], fds: Vec<OwnedFd>) -> (Reply, Vec<OwnedFd>) {
    let begun = Instant::now();
    let call = match call::parse(bytes) {
        Ok(call) => call,
        Err(e) => {
            log_call(None, "unreadable", begun.elapsed(), Err(&e));
            return (Reply::Error(e), Vec::new());
        }
    };
    let (op, method) = (call.op.clone(), call.request.name());
    let result = carry_out(ctx, locks, call, fds);
    log_call(op.as_deref(), method, begun.elapsed(), result.as_ref().map(|_| ()));
    match result {
        Ok((answer, fds)) => (Reply::Ok(answer), fds),
        Err(e) => (Reply::Error(e), Vec::new()),
    }
}

/// An answer with its descriptors, or why there is none.
type Outcome = Result<(Answer, Vec<OwnedFd>), HelperError>;

fn carry_out(ctx: &Ctx, locks: &Locks, call: Call, fds: Vec<OwnedFd>) -> Outcome {
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| dispatch(ctx, locks, call, fds)));
    caught.unwrap_or_else(|_| Err(error(HelperCode::Failed, "the helper has a fault; its log has it")))
}

/// The bytes of a call, and its descriptors.
type Frame = (Vec<u8>, Vec<OwnedFd>);

/// One frame; none at the end of the connection.
fn receive(stream: &UnixStream) -> Result<Option<Frame>, HelperError> {
    let lost = |e: std::io::Error| error(HelperCode::BadRequest, format!("the call did not arrive: {e}"));
    let mut head = [0u8; 4];
    stream.set_read_timeout(None).map_err(lost)?;
    let (count, fds) = first(stream, &mut head)?;
    if count == 0 {
        return Ok(None);
    }
    let deadline = Instant::now() + CALL_LIMIT;
    rest(stream, &mut head[count..], deadline).map_err(lost)?;
    let mut bytes = vec![0u8; call::length(head)?];
    rest(stream, &mut bytes, deadline).map_err(lost)?;
    Ok(Some((bytes, fds)))
}

/// The first bytes, with the descriptors.
fn first(stream: &UnixStream, head: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), HelperError> {
    let mut space = [MaybeUninit::<u8>::uninit(); CONTROL];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        let flags = RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(stream, &mut [IoSliceMut::new(head)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Ok((0, Vec::new())),
            Err(e) => return Err(error(HelperCode::BadRequest, format!("the call did not arrive: {e}"))),
            Ok(message) => break message,
        }
    };
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if fds.len() > MAX_DESCRIPTORS || message.flags.contains(ReturnFlags::CTRUNC) {
        let text = format!("{} descriptors came; {MAX_DESCRIPTORS} are the most", fds.len());
        return Err(error(HelperCode::BadRequest, text));
    }
    Ok((message.bytes, fds))
}

/// What follows. Descriptors with it are not taken: the kernel closes them.
fn rest(stream: &UnixStream, mut buffer: &mut [u8], deadline: Instant) -> std::io::Result<()> {
    while !buffer.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match rustix::net::recv(stream, &mut *buffer, RecvFlags::empty()) {
            Ok((_, 0)) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok((_, count)) => buffer = &mut buffer[count..],
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(std::io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Sends an answer, its descriptors on the first byte.
fn send(mut stream: &UnixStream, reply: &Reply, fds: &[OwnedFd]) -> std::io::Result<()> {
    let encode = |reply: &Reply| serde_json::to_vec(reply).map_err(std::io::Error::other);
    let mut bytes = encode(reply)?;
    if bytes.len() > MAX_REPLY as usize {
        bytes = encode(&Reply::Error(error(
            HelperCode::Failed,
            "the answer is too long to be sent",
        )))?;
    }
    let length = u32::try_from(bytes.len()).map_err(std::io::Error::other)?.to_be_bytes();
    let mut frame = Vec::with_capacity(bytes.len() + 4);
    frame.write_all(&length)?;
    frame.write_all(&bytes)?;
    let mut sent = 0;
    if !fds.is_empty() {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        sent = sendmsg(stream, &[IoSlice::new(&frame)], &mut control, SendFlags::NOSIGNAL)?;
    }
    stream.write_all(frame.get(sent..).unwrap_or_default())
}

/// The line of a call.
fn log_call(op: Option<&str>, method: &str, took: Duration, result: Result<(), &HelperError>) {
    let mut fields: Vec<(&str, serde_json::Value)> = vec![
        ("level", if result.is_ok() { "info" } else { "warn" }.into()),
        ("msg", "helper call".into()),
        ("op", op.into()),
        ("method", method.into()),
        ("us", u64::try_from(took.as_micros()).unwrap_or(u64::MAX).into()),
    ];
    match result {
        Ok(()) => fields.push(("outcome", "ok".into())),
        Err(e) => {
            fields.push(("outcome", serde_json::to_value(e.code).unwrap_or_default()));
            fields.push(("error", e.message.clone().into()));
            if !e.details.is_empty() {
                fields.push(("details", e.details.clone().into()));
            }
        }
    }
    log(&fields);
}

/// One line of JSON on the standard error, where the journal takes it. One `write`, so that lines of threads do not mix.
pub(crate) fn log(fields: &[(&str, serde_json::Value)]) {
    let object: serde_json::Map<String, serde_json::Value> = fields
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.clone()))
        .collect();
    let mut line = serde_json::Value::Object(object).to_string();
    line.push('\n');
    let _ = rustix::io::writev(rustix::stdio::stderr(), &[IoSlice::new(line.as_bytes())]);
}
