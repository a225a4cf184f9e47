//! What the agent knows: the machine it is in, its sessions, whether it is frozen, and how far the image's init has come.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use banger_proto::agent::{GuestNetwork, Init, Personalize};
use banger_proto::error::{ApiError, ErrorCode};

use rustix::process::Pid;

use crate::freezer::Freezer;
use crate::handover::{Handover, Known};
use crate::session::table::Sessions;
use crate::system::System;
use crate::{personalize, rehearsal};

/// The agent.
pub struct Agent {
    /// Sessions of the guest.
    pub sessions: Arc<Sessions>,
    /// State of the image's init.
    pub(crate) system: Arc<System>,
    /// The guest's control groups.
    pub(crate) freezer: Freezer,
    /// Id of this boot, once it was asked for.
    pub(crate) boot_id: Mutex<Option<String>>,
    /// journald was put away for a template.
    pub(crate) no_journal: AtomicBool,
    /// Process groups of the SSH servers that run for a connection each.
    pub(crate) connections: Arc<Mutex<Vec<Pid>>>,
    /// Who the machine is, once that is known.
    known: Mutex<Option<Known>>,
    /// Process 1, when it is ours and waits to be told what to become. Held by whoever changes who the machine is or whether
    /// it runs.
    pub(crate) handover: tokio::sync::Mutex<Option<Handover>>,
    /// Personalizing changes the machine; only in a guest.
    in_guest: bool,
    /// There is a second processor, for what may be done beside.
    pub(crate) beside: bool,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a request waits for a frozen guest to go on. The host waits longer for the answer (20 s), so that it gets the reason.
pub(crate) const THAW: Duration = Duration::from_secs(15);

/// The answer of a machine that is frozen.
pub(crate) fn frozen(so: &str) -> ApiError {
    ApiError::new(
        ErrorCode::WrongState,
        format!("the machine is frozen to be saved: {so}"),
    )
}

impl Agent {
    /// The agent of a guest. `known` is there when an earlier agent has personalized the machine already.
    pub fn new(handover: Handover, known: Option<Known>) -> Arc<Self> {
        let waits = known.is_none();
        let agent = Self::make(
            waits.then_some(handover),
            known,
            true,
            System::new(PathBuf::from(crate::system::NOTIFY_SOCKET)),
        );
        if !waits && agent.freezer.looks_frozen() {
            agent.sessions.hold();
        }
        agent
    }

    /// An agent in an ordinary process: it serves sessions, files and connections, and changes nothing of the system.
    pub fn for_tests() -> Arc<Self> {
        let known = Known {
            machine_id: "0000000000000000".to_owned(),
            init: false,
            network: None,
        };
        Self::make(None, Some(known), false, System::none())
    }

    fn make(handover: Option<Handover>, known: Option<Known>, in_guest: bool, system: System) -> Arc<Self> {
        Arc::new(Self {
            sessions: Arc::new(Sessions::new(PathBuf::from("/etc"))),
            system: Arc::new(system),
            freezer: Freezer::new(),
            boot_id: Mutex::default(),
            no_journal: AtomicBool::new(false),
            connections: Arc::default(),
            known: Mutex::new(known),
            handover: tokio::sync::Mutex::new(handover),
            in_guest,
            beside: in_guest && rehearsal::possible(),
        })
    }

    /// Machine id, empty before the machine is personalized.
    pub fn machine_id(&self) -> String {
        lock(&self.known)
            .as_ref()
            .map(|k| k.machine_id.clone())
            .unwrap_or_default()
    }

    /// The network that was configured last.
    pub(crate) fn network(&self) -> Option<GuestNetwork> {
        lock(&self.known).as_ref()?.network.clone()
    }

    /// Notes who the machine is from now on.
    pub(crate) fn set_known(&self, known: Known) {
        // Only where process 1 is ours is there ever another agent.
        if !known.init {
            crate::handover::remember(&known);
        }
        *lock(&self.known) = Some(known);
    }

    /// Whether nothing runs but the agent.
    pub(crate) fn is_frozen(&self) -> bool {
        self.sessions.is_held()
    }

    /// Ends the SSH servers that run for a connection each.
    pub(crate) fn end_connections(&self) {
        for group in std::mem::take(&mut *lock(&self.connections)) {
            // One that has just ended takes no signal.
            let _ = crate::sys::kill_group(group, 9);
        }
    }

    /// Whether the system around is the agent's to change.
    pub(crate) fn in_guest(&self) -> bool {
        self.in_guest
    }

    /// Nothing of the image runs before the machine is itself.
    pub(crate) fn require_personalized(&self) -> Result<(), ApiError> {
        if lock(&self.known).is_some() {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorCode::WrongState,
            "the machine has not been personalized yet",
        ))
    }

    /// Waits until the guest is not frozen, for at most [`THAW`]. Fails in a copy whose source had the request: its client is the
    /// source's.
    pub(crate) async fn thawed(&self) -> Result<(), ApiError> {
        self.thawed_within(THAW).await
    }

    async fn thawed_within(&self, limit: Duration) -> Result<(), ApiError> {
        if !self.is_frozen() {
            return Ok(());
        }
        let whose = self.machine_id();
        if tokio::time::timeout(limit, self.sessions.released()).await.is_err() {
            let message = format!("the machine is frozen to be saved, and did not go on within {limit:?}");
            return Err(ApiError::new(ErrorCode::Timeout, message));
        }
        if self.machine_id() != whose {
            let message = "the machine became a copy of another one while the request waited";
            return Err(ApiError::new(ErrorCode::WrongState, message));
        }
        Ok(())
    }

    /// Nothing is changed in a machine that is being saved.
    pub(crate) fn require_thawed(&self) -> Result<(), ApiError> {
        if self.is_frozen() {
            return Err(frozen("it has to be renewed first"));
        }
        Ok(())
    }

    /// Waits until the machine is itself and programs run.
    pub(crate) async fn running(&self) -> Result<(), ApiError> {
        self.require_personalized()?;
        self.thawed().await
    }

    /// The system around is the agent's to change.
    pub(crate) fn require_guest(&self) -> Result<(), ApiError> {
        if self.in_guest {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorCode::Unsupported,
            "this agent does not run in a guest",
        ))
    }

    /// Nothing of a template belongs to anybody.
    pub(crate) fn require_idle(&self) -> Result<(), ApiError> {
        let why = if self.system.is_starting() {
            "the image's init has not finished its start-up"
        } else if !self.sessions.is_idle() {
            "a session is open"
        } else if !lock(&self.connections).is_empty() {
            "an SSH connection is open"
        } else {
            return Ok(());
        };
        Err(ApiError::new(
            ErrorCode::WrongState,
            format!("the machine can't become a template: {why}"),
        ))
    }

    /// Makes the machine itself. The first time, the image's init is started too.
    pub(crate) async fn personalize(&self, wanted: Personalize) -> Result<(), ApiError> {
        personalize::check(&wanted)?;
        self.require_guest()?;
        // One at a time, and the hand-over only once.
        let mut handover = self.handover.lock().await;
        self.require_thawed()?;
        let init = match &wanted.init {
            Init::Agent => None,
            Init::Auto => crate::handover::find_init(),
            Init::Path(path) => Some(crate::handover::check_init(path)?),
        };
        personalize::tell_kernel(&wanted);
        personalize::write_files(std::path::Path::new("/"), &wanted);
        let known = Known {
            machine_id: wanted.machine_id,
            init: init.is_some(),
            network: wanted.network,
        };
        crate::handover::remember(&known);
        if let Some(handover) = handover.take() {
            self.system.expect(init.as_deref());
            if let Err(e) = handover.become_init(init.as_deref()).await {
                self.system.expect(None);
                return Err(
                    ApiError::new(ErrorCode::Guest, format!("the image's init can't be started: {e}"))
                        .hint("the machine runs on without it"),
                );
            }
        }
        if known.init {
            // Process 1 is the image's now, so there is no agent after this one; and a copy would have to write it anew.
            crate::handover::forget();
        }
        *lock(&self.known) = Some(known);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(100);

    #[tokio::test]
    async fn a_request_waits_until_the_guest_goes_on() {
        let agent = Agent::for_tests();
        agent.running().await.unwrap();
        agent.sessions.hold();
        let waiting = tokio::spawn({
            let agent = agent.clone();
            async move { agent.running().await }
        });
        tokio::time::sleep(SHORT).await;
        assert!(!waiting.is_finished(), "it did not wait");
        agent.sessions.release();
        waiting.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_stays_frozen_is_told_of() {
        let agent = Agent::for_tests();
        agent.sessions.hold();
        let error = agent.thawed_within(SHORT).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Timeout);
        assert!(error.message.contains("100ms"), "{}", error.message);
    }

    #[tokio::test]
    async fn a_request_of_the_source_is_not_carried_out_in_a_copy() {
        let agent = Agent::for_tests();
        agent.sessions.hold();
        let waiting = tokio::spawn({
            let agent = agent.clone();
            async move { agent.thawed().await }
        });
        tokio::time::sleep(SHORT).await;
        agent.set_known(Known {
            machine_id: "1111111111111111".to_owned(),
            init: true,
            network: None,
        });
        agent.sessions.release();
        assert_eq!(waiting.await.unwrap().unwrap_err().code, ErrorCode::WrongState);
    }
}
