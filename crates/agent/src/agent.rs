//! What the agent knows: the machine it is in, its sessions, and how far the image's init has come.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use banger_proto::agent::{Init, Personalize};
use banger_proto::error::{ApiError, ErrorCode};

use crate::handover::Handover;
use crate::personalize;
use crate::session::table::Sessions;
use crate::system::System;

/// The agent.
pub struct Agent {
    /// Sessions of the guest.
    pub sessions: Arc<Sessions>,
    /// State of the image's init.
    pub(crate) system: Arc<System>,
    /// Machine id, once there is one.
    machine_id: Mutex<Option<String>>,
    /// Process 1, when it is ours and waits to be told what to become.
    handover: tokio::sync::Mutex<Option<Handover>>,
    /// Personalizing changes the machine; only in a guest.
    in_guest: bool,
}

impl Agent {
    /// The agent of a guest. `known` is the machine id when an earlier agent has personalized the machine already.
    pub fn new(handover: Handover, known: Option<String>) -> Arc<Self> {
        let waits = known.is_none();
        Self::make(
            waits.then_some(handover),
            known,
            true,
            System::new(PathBuf::from(crate::system::NOTIFY_SOCKET)),
        )
    }

    /// An agent in an ordinary process: it serves sessions, files and connections, and changes nothing of the system.
    pub fn for_tests() -> Arc<Self> {
        Self::make(None, Some("0000000000000000".to_owned()), false, System::none())
    }

    fn make(handover: Option<Handover>, machine_id: Option<String>, in_guest: bool, system: System) -> Arc<Self> {
        Arc::new(Self {
            sessions: Arc::new(Sessions::new(PathBuf::from("/etc"))),
            system: Arc::new(system),
            machine_id: Mutex::new(machine_id),
            handover: tokio::sync::Mutex::new(handover),
            in_guest,
        })
    }

    /// Machine id, empty before the machine is personalized.
    pub fn machine_id(&self) -> String {
        self.known_id().unwrap_or_default()
    }

    /// Whether the system around is the agent's to change.
    pub(crate) fn in_guest(&self) -> bool {
        self.in_guest
    }

    fn known_id(&self) -> Option<String> {
        self.machine_id
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    /// Nothing of the image runs before the machine is itself.
    pub(crate) fn require_personalized(&self) -> Result<(), ApiError> {
        match self.known_id() {
            Some(_) => Ok(()),
            None => Err(ApiError::new(
                ErrorCode::WrongState,
                "the machine has not been personalized yet",
            )),
        }
    }

    /// Makes the machine itself. The first time, the image's init is started too.
    pub(crate) async fn personalize(&self, wanted: Personalize) -> Result<(), ApiError> {
        personalize::check(&wanted)?;
        if !self.in_guest {
            return Err(ApiError::new(
                ErrorCode::Unsupported,
                "this agent does not run in a guest",
            ));
        }
        // One at a time, and the hand-over only once.
        let mut handover = self.handover.lock().await;
        let init = match &wanted.init {
            Init::Agent => None,
            Init::Auto => crate::handover::find_init(),
            Init::Path(path) => Some(crate::handover::check_init(path)?),
        };
        personalize::tell_kernel(&wanted);
        personalize::write_files(std::path::Path::new("/"), &wanted);
        crate::handover::remember(&wanted.machine_id, init.is_some());
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
        *self
            .machine_id
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(wanted.machine_id);
        Ok(())
    }
}
