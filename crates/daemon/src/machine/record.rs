//! What is known of a machine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use banger_core::id::MachineId;
use banger_core::plan::MachinePaths;
use banger_core::state::{self, Event};
use banger_proto::api::{self, GuestInfo, MachineState};
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::Stall;
use tokio::sync::{mpsc, watch};

use super::description::Description;
use super::doubt::Doubt;
use super::live::Live;
use super::reboot::Restarts;
use super::request::Ask;
use super::stall;
use crate::db::MachineRow;
use crate::error::IntoApi;
use crate::idle::Usage;
use crate::services::Services;

/// A machine: what lasts, what is true now, and the way to its task.
#[derive(Debug)]
pub struct Machine {
    /// Identifier.
    pub id: MachineId,
    /// Files.
    pub paths: MachinePaths,
    /// The daemon's services.
    pub services: Arc<Services>,
    /// Requests to the machine's task.
    pub asks: mpsc::Sender<Ask>,
    /// Clients that hold the machine.
    pub holders: watch::Sender<usize>,
    /// Who uses it, and when it was last used.
    pub used: Usage,
    view: watch::Sender<View>,
    live: Mutex<Option<Live>>,
    writing: tokio::sync::Mutex<()>,
    /// The row is newer than the one in the database, which could not be written.
    unwritten: AtomicBool,
    /// When it was started by itself.
    pub restarts: Mutex<Restarts>,
    /// Reading of the last statistics: (when, CPU time in ms).
    pub last_cpu: Mutex<Option<(std::time::Instant, u64)>>,
}

/// What is known of a machine's engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// The daemon has just started and looks for it: the row says what an earlier one knew.
    Sought,
    /// The row says what is true.
    Known,
    /// Something is there that can't be verified.
    Doubtful {
        /// What is wrong.
        why: String,
        /// Its process is identified by everything but its answer.
        identified: bool,
    },
}

impl Presence {
    /// Of a machine whose engine can't be verified.
    pub fn doubtful(doubt: &Doubt) -> Self {
        Self::Doubtful {
            why: doubt.why.clone(),
            identified: doubt.process.is_some(),
        }
    }
}

/// State and cause that are shown of a machine: those of its row, unless these are not known to be true.
fn shown(presence: &Presence, state: MachineState, cause: Option<String>) -> (MachineState, Option<String>) {
    let last = state.as_str();
    match presence {
        // Without an engine there is nothing to look for.
        Presence::Sought if !state::may_have_engine(state) => (state, cause),
        Presence::Known => (state, cause),
        Presence::Sought => {
            let cause = format!("the daemon has just started and still looks for its engine; it was {last}");
            (MachineState::Unverified, Some(cause))
        }
        Presence::Doubtful { why, .. } => {
            let cause = format!("its engine cannot be verified: {why}; it was {last}");
            (MachineState::Unverified, Some(cause))
        }
    }
}

/// What clients see.
#[derive(Debug, Clone)]
struct View {
    row: MachineRow,
    presence: Presence,
    guest: Option<GuestInfo>,
    pid: Option<u32>,
    gone: bool,
}

/// How a change of a row is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Write {
    /// It outlives the daemon.
    Ordinary,
    /// It outlives the host's power.
    Lasting,
    /// It is written on a full disk too.
    Ending,
}

impl Machine {
    /// A machine whose row is written.
    pub fn new(services: Arc<Services>, row: MachineRow, asks: mpsc::Sender<Ask>) -> Arc<Self> {
        Arc::new(Self {
            id: row.id.clone(),
            paths: services.paths.machine(&row.id),
            services,
            asks,
            holders: watch::Sender::new(0),
            used: Usage::new(),
            view: watch::Sender::new(View {
                row,
                presence: Presence::Known,
                guest: None,
                pid: None,
                gone: false,
            }),
            live: Mutex::new(None),
            writing: tokio::sync::Mutex::new(()),
            unwritten: AtomicBool::new(false),
            restarts: Mutex::default(),
            last_cpu: Mutex::new(None),
        })
    }

    /// The row as it was last written.
    pub fn row(&self) -> MachineRow {
        self.view.borrow().row.clone()
    }

    /// State as it was last written.
    pub fn state(&self) -> MachineState {
        self.view.borrow().row.state
    }

    /// State as it is shown: a running machine may be stalled.
    pub fn state_now(&self) -> MachineState {
        match (self.state(), self.stall()) {
            (MachineState::Running, Some(_)) => MachineState::Stalled,
            (state, _) => state,
        }
    }

    /// Why it is stalled, if it is.
    pub fn stall(&self) -> Option<Stall> {
        self.live().and_then(|live| live.stalled_now())
    }

    /// Name.
    pub fn name(&self) -> String {
        self.view.borrow().row.name.clone()
    }

    /// The machine as the API shows it.
    pub fn show(&self) -> api::Machine {
        let stall = self.stall();
        let view = self.view.borrow();
        let row = view.row.clone();
        let on_bridge = row.spec.network == "bridge";
        let address = on_bridge.then(|| self.services.hosting.address(row.slot)).flatten();
        let address = address.map(|address| address.to_string());
        let (state, cause) = shown(&view.presence, row.state, row.cause);
        let stall = stall.filter(|_| state == MachineState::Running);
        let (state, cause) = match &stall {
            Some(stall) => (MachineState::Stalled, Some(stall::words(stall))),
            None => (state, cause),
        };
        api::Machine {
            id: row.id.to_string(),
            name: row.name,
            state,
            cause,
            stalled: stall.as_ref().map(stall::shown),
            spec: row.spec,
            created_at: row.created_at,
            started_at: row.started_at,
            pid: view.pid,
            guest: view.guest.clone(),
            workspace: row.workspace,
            boot: row.boot,
            auto_remove: row.auto_remove,
            idle_suspend_after_ms: row.idle_suspend_after_ms,
            on_panic: row.on_panic,
            address,
            forwards: row.forwards,
        }
    }

    /// What is known of its engine.
    pub fn presence(&self) -> Presence {
        self.view.borrow().presence.clone()
    }

    /// Whether its row says what is true.
    pub fn is_known(&self) -> bool {
        self.view.borrow().presence == Presence::Known
    }

    /// What is known of its engine from now on.
    pub fn set_known(&self, presence: Presence) {
        self.view.send_if_modified(|v| {
            let changed = v.presence != presence;
            v.presence = presence;
            changed
        });
    }

    /// Waits until the machine is in a state that `wanted` accepts, or is gone (`None`).
    pub async fn wait(&self, wanted: impl Fn(MachineState) -> bool) -> Option<api::Machine> {
        let mut view = self.view.subscribe();
        let accepted = |v: &View| wanted(shown(&v.presence, v.row.state, None).0);
        let gone = match view.wait_for(|v| v.gone || accepted(v)).await {
            Ok(view) => view.gone,
            Err(_) => true,
        };
        (!gone).then(|| self.show())
    }

    /// Changes the row: in the database first, then for everyone to see. Changes come one after the other.
    pub async fn change(&self, edit: impl FnOnce(&mut MachineRow) -> Result<(), ApiError>) -> Result<(), ApiError> {
        self.write(edit, Write::Ordinary).await
    }

    async fn write(
        &self,
        edit: impl FnOnce(&mut MachineRow) -> Result<(), ApiError>,
        how: Write,
    ) -> Result<(), ApiError> {
        let _turn = self.writing.lock().await;
        let mut row = self.row();
        edit(&mut row)?;
        let db = &self.services.db;
        let written = match how {
            Write::Ordinary => db.update_machine(row.clone()).await,
            Write::Lasting => db.update_machine_lasting(row.clone()).await,
            Write::Ending => db.update_ending_machine(row.clone()).await,
        };
        match written {
            // Of what ends a machine the next daemon finds out by looking; that it happens must not depend on space.
            Err(e) if how == Write::Ending && e.is_full() => {
                tracing::warn!(machine = %self.id, state = row.state.as_str(), "the disk is full: its row is written later");
                self.unwritten.store(true, Ordering::Relaxed);
            }
            written => {
                written.map_err(IntoApi::into_api)?;
                self.unwritten.store(false, Ordering::Relaxed);
            }
        }
        self.view.send_modify(|v| v.row = row);
        self.describe();
        Ok(())
    }

    /// Keeps `machine.json` as the row is. A full disk is no reason to fail: the next change writes it, or the next daemon.
    pub fn describe(&self) {
        if let Err(error) = Description::of(&self.row()).keep(&self.paths) {
            tracing::warn!(machine = %self.id, %error, "machine.json is not written");
        }
    }

    /// Writes the row that could not be written when it changed, if there is such a one.
    pub async fn catch_up(&self) {
        if !self.unwritten.load(Ordering::Relaxed) || self.is_gone() {
            return;
        }
        if let Err(e) = self.write(|_| Ok(()), Write::Ending).await {
            tracing::warn!(machine = %self.id, error = %e.message, "its row is not written");
        }
    }

    /// Moves to the state that follows an event, with further changes of the row.
    pub async fn happen(&self, event: Event, edit: impl FnOnce(&mut MachineRow)) -> Result<(), ApiError> {
        let id = self.id.clone();
        let how = match event {
            Event::StopBegins | Event::EngineGone | Event::DeleteBegins => Write::Ending,
            // Memory on disk is of use only to who knows of it.
            Event::SuspendBegins | Event::MemorySaved => Write::Lasting,
            _ => Write::Ordinary,
        };
        let edit = |row: &mut MachineRow| {
            let next = state::next(row.state, event).ok_or_else(|| {
                let what = format!("machine {id}: {event:?} cannot happen in state {}", row.state.as_str());
                ApiError::new(ErrorCode::Internal, what)
            })?;
            tracing::info!(machine = %id, from = row.state.as_str(), to = next.as_str(), "state");
            row.state = next;
            edit(row);
            Ok(())
        };
        self.write(edit, how).await?;
        // The disks of a machine that is being made are there before its engine.
        let down = matches!(
            self.state(),
            MachineState::Stopped | MachineState::Error | MachineState::Deleting
        );
        if down && event != Event::DisksReady {
            self.services.forwards.close(&self.id);
        }
        Ok(())
    }

    /// The engine, while there is one.
    pub fn live(&self) -> Option<Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// There is an engine now.
    pub fn set_live(&self, live: Live) {
        let pid = live.handles.pid;
        *self.live.lock().unwrap_or_else(PoisonError::into_inner) = Some(live);
        self.view.send_modify(|v| v.pid = Some(pid));
    }

    /// There is no engine any more.
    pub fn clear_live(&self) -> Option<Live> {
        let old = self.live.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.view.send_modify(|v| {
            v.pid = None;
            v.guest = None;
        });
        old
    }

    /// What the guest says of itself.
    pub fn set_guest(&self, guest: GuestInfo) {
        self.view.send_if_modified(|v| {
            let changed = v.pid.is_some() && v.guest.as_ref() != Some(&guest);
            if changed {
                v.guest = Some(guest);
            }
            changed
        });
    }

    /// The machine is no more.
    pub fn set_gone(&self) {
        self.view.send_modify(|v| v.gone = true);
    }

    /// Whether it is no more.
    pub fn is_gone(&self) -> bool {
        self.view.borrow().gone
    }
}
