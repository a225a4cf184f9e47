//! All sessions of the guest, by id.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use banger_proto::api;
use banger_proto::error::{ApiError, ErrorCode};
use banger_proto::frame::{Open, Opened};
use tokio::sync::watch;

use super::{Session, lock};

/// Finished sessions kept for a client that comes late.
const MAX_FINISHED: usize = 64;

/// Output kept of finished sessions, all together.
const MAX_FINISHED_BYTES: usize = 16 * 1024 * 1024;

/// Sessions that run at the same time.
const MAX_RUNNING: usize = 4096;

const KILL: i32 = 9;

/// The sessions.
pub struct Sessions {
    etc: PathBuf,
    known: Mutex<Known>,
    /// The guest is frozen: nothing is started.
    held: watch::Sender<bool>,
}

#[derive(Default)]
struct Known {
    by_id: HashMap<String, Arc<Session>>,
    finished: VecDeque<String>,
}

impl Sessions {
    /// No sessions. Users are looked up below `etc`.
    pub fn new(etc: PathBuf) -> Self {
        Self {
            etc,
            known: Mutex::default(),
            held: watch::Sender::new(false),
        }
    }

    /// Starts nothing from now on.
    pub(crate) fn hold(&self) {
        self.held.send_replace(true);
    }

    /// Starts what has been waiting, and whatever else is wanted.
    pub(crate) fn release(self: &Arc<Self>) {
        self.held.send_replace(false);
        let waiting: Vec<_> = lock(&self.known)
            .by_id
            .values()
            .filter(|s| std::mem::take(&mut lock(&s.inner).waits))
            .cloned()
            .collect();
        for session in waiting {
            session.go(self);
        }
    }

    /// Whether nothing is started.
    pub(crate) fn is_held(&self) -> bool {
        *self.held.borrow()
    }

    /// Waits until programs are started again.
    pub(crate) async fn released(&self) {
        // The sender lives as long as `self`, so that this cannot fail.
        let _ = self.held.subscribe().wait_for(|held| !held).await;
    }

    /// Whether no session runs or is about to.
    pub(crate) fn is_idle(&self) -> bool {
        lock(&self.known)
            .by_id
            .values()
            .all(|s| lock(&s.inner).outcome.is_some())
    }

    /// Ends the programs of all sessions, each with its process group, and forgets all of it. What has left its session's
    /// group, a daemon for example, belongs to the machine and goes on.
    pub(crate) fn forget_all(&self) {
        let known = std::mem::take(&mut *lock(&self.known));
        for session in known.by_id.values() {
            if let Some(group) = lock(&session.inner).group {
                // One that ends by itself meanwhile takes no signal.
                let _ = crate::sys::kill_group(group, KILL);
            }
        }
    }

    pub(super) fn etc(&self) -> &Path {
        &self.etc
    }

    /// Whether `id` can name a session.
    pub fn valid_id(id: &str) -> bool {
        (1..=64).contains(&id.len())
            && id
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    }

    /// Lists them.
    pub fn list(&self) -> Vec<api::Session> {
        let mut list: Vec<_> = lock(&self.known).by_id.values().map(|s| s.describe()).collect();
        list.sort_by(|a, b| a.id.cmp(&b.id));
        list
    }

    /// Attaches to session `id`, which is made if it is not there. Nothing runs yet.
    pub(super) fn open(&self, id: &str, open: Open) -> Result<(Arc<Session>, u64, Opened), ApiError> {
        let mut known = lock(&self.known);
        let offset = open.output_offset;
        let (session, existing) = match known.by_id.get(id) {
            Some(session) => (session.clone(), true),
            None if open.attach_only => {
                return Err(ApiError::new(ErrorCode::NotFound, format!("no session `{id}`")));
            }
            None if known.by_id.len() >= MAX_RUNNING + MAX_FINISHED => {
                return Err(ApiError::new(
                    ErrorCode::Unavailable,
                    format!("{MAX_RUNNING} sessions run already"),
                ));
            }
            None => (Arc::new(Session::new(id, open)), false),
        };
        let (generation, opened) = session.attach(offset, existing)?;
        if !existing {
            known.by_id.insert(id.to_owned(), session.clone());
        }
        Ok((session, generation, opened))
    }

    /// Forgets a session that its client left before it was started.
    pub(super) fn forget_unstarted(&self, session: &Arc<Session>, generation: u64) {
        let mut known = lock(&self.known);
        let inner = lock(&session.inner);
        if !inner.started && inner.generation == generation {
            known.by_id.remove(&session.id);
        }
    }

    /// Keeps a finished session, and lets go of the oldest ones beyond the bounds.
    pub(super) fn finished(&self, session: &Session) {
        let mut known = lock(&self.known);
        let is_known = known
            .by_id
            .get(&session.id)
            .is_some_and(|s| std::ptr::eq(&raw const **s, session));
        if !is_known {
            return;
        }
        known.finished.push_back(session.id.clone());
        let mut bytes: usize = known
            .finished
            .iter()
            .filter_map(|id| known.by_id.get(id))
            .map(|s| s.weight())
            .sum();
        while known.finished.len() > 1 && (known.finished.len() > MAX_FINISHED || bytes > MAX_FINISHED_BYTES) {
            let Some(oldest) = known.finished.pop_front() else {
                break;
            };
            if let Some(gone) = known.by_id.remove(&oldest) {
                bytes -= gone.weight().min(bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::session::Outcome;

    fn shell(text: &str) -> Open {
        Open {
            command: ["/bin/sh", "-c", text].map(str::to_owned).to_vec(),
            ..Open::default()
        }
    }

    async fn ended(session: &Session) -> Outcome {
        for _ in 0..500 {
            if let Some(outcome) = lock(&session.inner).outcome.clone() {
                return outcome;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the session has not ended within 10 s");
    }

    #[tokio::test]
    async fn what_is_held_runs_when_it_is_released() {
        let sessions = Arc::new(Sessions::new("/etc".into()));
        let (session, _, _) = sessions.open("a", shell("exit 7")).unwrap();
        sessions.hold();
        session.go(&sessions);
        assert!(!session.describe().running && !sessions.is_idle());
        sessions.release();
        assert_eq!(ended(&session).await, Outcome::Exit(7));
        assert!(sessions.is_idle());
    }

    #[tokio::test]
    async fn forgotten_sessions_are_over_and_leave_nothing() {
        let sessions = Arc::new(Sessions::new("/etc".into()));
        let (session, _, _) = sessions.open("a", shell("sleep 1000")).unwrap();
        session.go(&sessions);
        let (waiting, _, _) = sessions.open("b", shell("exit 1")).unwrap();
        sessions.hold();
        waiting.go(&sessions);
        sessions.forget_all();
        sessions.release();
        assert_eq!(ended(&session).await, Outcome::Exit(128 + 9));
        assert!(sessions.list().is_empty() && lock(&sessions.known).finished.is_empty());
        assert!(!waiting.describe().running, "what was only waiting never runs");
    }
}
