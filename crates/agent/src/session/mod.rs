//! Exec sessions: programs that run whether or not a client is looking.
//!
//! ```text
//!            Open            Go              program ended and its output is read
//!   (none) ───────▶ New ───────────▶ Running ──────────────────────────────────────▶ Done
//!                    │ client gone                    spawn failed ─────────────────▶ Done
//!                    ▼
//!                 (none)
//!
//!   who is there:   Client ── connection lost ──▶ Lost ── 30 s ──▶ Free ◀── Detach ── Client
//! ```
//!
//! While a client is there, or may come back, the program is held back when the client is slow: its output stays in its pipe.
//! Once nobody is there it runs freely and the oldest output is dropped.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;
use std::time::Duration;

use banger_proto::api;
use banger_proto::error::{ApiError, ErrorCode};
use banger_proto::frame::{OUTPUT_BUFFER, Open, Opened, Resize, STDIN_WINDOW, Signal};
use bytes::Bytes;
use rustix::process::Pid;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

pub mod attach;
pub mod log;
mod run;
mod spawn;
pub mod table;
pub mod users;

use log::OutputLog;
pub(crate) use spawn::PATH;

/// Output that may lie here unsent before the program is held back.
const UNSENT: u64 = 256 * 1024;

/// Standard input that is taken from a client beyond what the program has read. Twice the window: a client that attaches
/// again may count its window from what was received instead of what was acknowledged.
const STDIN_QUEUE: usize = 2 * STDIN_WINDOW as usize;

/// How long a program is held back for a client whose connection was lost.
pub const GRACE: Duration = Duration::from_secs(30);

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// With this status.
    Exit(i32),
    /// It could not be started.
    Failed(ApiError),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Presence {
    Client,
    Lost,
    Free,
}

/// A session.
pub struct Session {
    id: String,
    open: Open,
    inner: Mutex<Inner>,
    /// Room for output, or a change of who is there.
    room: Notify,
    /// Standard input came, or its end.
    input: Notify,
    /// Output came, or its end.
    output: Notify,
}

struct Inner {
    log: OutputLog,
    /// Offset up to which the attached client was sent output.
    sent: u64,
    presence: Presence,
    /// Counts attachments; an older one is displaced.
    generation: u64,
    waker: Option<Waker>,
    started: bool,
    /// It is to run as soon as the guest is no longer frozen.
    waits: bool,
    /// The program's process group, while its leader has not been waited for.
    group: Option<Pid>,
    pty: Option<Arc<AsyncFd<OwnedFd>>>,
    size: Option<Resize>,
    outcome: Option<Outcome>,
    stdin: VecDeque<Bytes>,
    stdin_queued: usize,
    stdin_received: u64,
    stdin_written: u64,
    stdin_acked: u64,
    stdin_eof: bool,
    /// Why the attached client is sent away.
    broken_off: Option<ApiError>,
}

/// Most bytes of a command in the list of sessions.
const SHOWN: usize = 512;

/// A command as it is listed: one that is too long is cut and ends with `…`, and control characters, which JSON makes six times
/// as long, are replaced.
fn shown(command: &[String]) -> Vec<String> {
    let mut left = SHOWN;
    let mut words = Vec::new();
    for word in command {
        if word.len() + 1 > left {
            let cut: String = word.chars().take(left / 4).collect();
            words.push(format!("{cut}…"));
            break;
        }
        left -= word.len() + 1;
        words.push(word.clone());
    }
    let clean = |word: &String| word.replace(|c: char| c.is_control(), "\u{fffd}");
    words.iter().map(clean).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    fn new(id: &str, open: Open) -> Self {
        let inner = Inner {
            log: OutputLog::new(OUTPUT_BUFFER),
            sent: 0,
            presence: Presence::Free,
            generation: 0,
            waker: None,
            started: false,
            waits: false,
            group: None,
            pty: None,
            size: open.size,
            outcome: None,
            stdin: VecDeque::new(),
            stdin_queued: 0,
            stdin_received: 0,
            stdin_written: 0,
            stdin_acked: 0,
            stdin_eof: !open.stdin && !open.tty,
            broken_off: None,
        };
        Self {
            id: id.to_owned(),
            open,
            inner: Mutex::new(inner),
            room: Notify::new(),
            input: Notify::new(),
            output: Notify::new(),
        }
    }

    /// As it is listed.
    pub fn describe(&self) -> api::Session {
        let inner = lock(&self.inner);
        api::Session {
            id: self.id.clone(),
            command: shown(&self.open.command),
            tty: self.open.tty,
            running: inner.started && inner.outcome.is_none(),
            attached: inner.presence == Presence::Client,
            exit_code: match inner.outcome {
                Some(Outcome::Exit(code)) => Some(code),
                _ => None,
            },
        }
    }

    /// Lets a client in, who has output up to `offset`, and displaces the one before.
    fn attach(&self, offset: u64, existing: bool) -> Result<(u64, Opened), ApiError> {
        let mut inner = lock(&self.inner);
        let end = inner.log.end();
        if offset > end {
            let message = format!(
                "session {} has {end} bytes of output, not the {offset} the client speaks of",
                self.id
            );
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
        inner.generation += 1;
        inner.presence = Presence::Client;
        inner.broken_off = None;
        inner.sent = offset.max(inner.log.start());
        inner.stdin_acked = inner.stdin_written;
        let opened = Opened {
            existing,
            started: inner.started,
            stdin_received: inner.stdin_received,
            dropped: inner.log.start().saturating_sub(offset),
        };
        let generation = inner.generation;
        inner.wake();
        drop(inner);
        self.room.notify_waiters();
        Ok((generation, opened))
    }

    /// The client of `generation` has gone: on purpose, or its connection was lost.
    fn leave(self: &Arc<Self>, generation: u64, lost: bool) {
        let mut inner = lock(&self.inner);
        if inner.generation != generation || inner.presence != Presence::Client {
            return;
        }
        inner.wake();
        let running = inner.started && inner.outcome.is_none();
        inner.presence = if lost && running {
            Presence::Lost
        } else {
            Presence::Free
        };
        drop(inner);
        self.room.notify_waiters();
        if lost && running {
            let session = Arc::downgrade(self);
            tokio::spawn(async move {
                tokio::time::sleep(GRACE).await;
                Self::give_up(&session, generation);
            });
        }
    }

    fn give_up(session: &Weak<Self>, generation: u64) {
        let Some(session) = session.upgrade() else { return };
        let mut inner = lock(&session.inner);
        if inner.generation == generation && inner.presence == Presence::Lost {
            inner.presence = Presence::Free;
        }
        drop(inner);
        session.room.notify_waiters();
    }

    /// Whether this attachment is still the one.
    fn is_current(&self, generation: u64) -> bool {
        lock(&self.inner).generation == generation
    }

    /// Takes standard input from the client.
    fn take_stdin(&self, bytes: Bytes) -> Result<(), ApiError> {
        let mut inner = lock(&self.inner);
        inner.stdin_received += bytes.len() as u64;
        if inner.stdin_eof || inner.outcome.is_some() {
            // Nobody will read it: taken and gone, so that the client does not wait for its window.
            inner.stdin_written += bytes.len() as u64;
            inner.wake();
            return Ok(());
        }
        if inner.stdin_queued + bytes.len() > STDIN_QUEUE {
            let message = format!(
                "more standard input than the window of {STDIN_WINDOW} bytes for session {}",
                self.id
            );
            return Err(ApiError::new(ErrorCode::BadRequest, message));
        }
        inner.stdin_queued += bytes.len();
        inner.stdin.push_back(bytes);
        drop(inner);
        self.input.notify_one();
        Ok(())
    }

    fn end_stdin(&self) {
        lock(&self.inner).stdin_eof = true;
        self.input.notify_one();
    }

    fn resize(&self, size: Resize) {
        let mut inner = lock(&self.inner);
        inner.size = Some(size);
        if let Some(pty) = &inner.pty {
            // A terminal that has just closed has no size to set.
            let _ = spawn::resize(pty.get_ref(), size);
        }
    }

    fn signal(&self, signal: Signal) {
        let inner = lock(&self.inner);
        let Some(group) = inner.group else { return };
        let foreground = inner
            .pty
            .as_ref()
            .and_then(|pty| rustix::termios::tcgetpgrp(pty.get_ref()).ok());
        // A group that has just ended takes no signal, and a number that is none is the client's affair.
        let _ = crate::sys::kill_group(foreground.unwrap_or(group), signal.signal);
    }

    /// Bytes kept.
    fn weight(&self) -> usize {
        lock(&self.inner).log.len()
    }
}

impl Inner {
    /// Whether the program's output may be read now.
    fn has_room(&self) -> bool {
        match self.presence {
            Presence::Client | Presence::Lost => self.log.end() - self.sent < UNSENT,
            Presence::Free => true,
        }
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_command_is_listed_short() {
        let words = |words: &[&str]| words.iter().map(|&w| w.to_owned()).collect::<Vec<_>>();
        assert_eq!(shown(&words(&["make", "test"])), words(&["make", "test"]));
        for long in [vec!["é".repeat(100_000)], vec!["x".to_owned(); 100_000]] {
            let listed = shown(&long);
            assert!(listed.concat().len() <= SHOWN + 3, "{}", listed.concat().len());
            assert!(listed.last().unwrap().ends_with('…'));
        }
        assert_eq!(shown(&words(&["a\u{1}b"])), words(&["a\u{fffd}b"]));
    }
}
