//! What becomes of a machine when a daemon starts: the row says what was intended, the engine driver what is there.

use std::sync::Arc;
use std::time::Duration;

use banger_core::id::MachineId;
use banger_core::plan::MachinePaths;
use banger_core::state::Event;
use banger_proto::api::{MachineState as State, WaitFor};
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::{Handles, Liveness, VcpuState};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::doubt::{self, Doubt};
use super::journal::{self, Begun};
use super::live::Live;
use super::record::{Machine, Presence};
use super::stages::Stages;
use super::work::{Current, Ended, Manner, Work, yields};
use super::{cause, create, delete, disks, handles, reboot, restore, save, snapshot, start, stop, suspend};
use crate::engines;
use crate::error::IntoApi;
use crate::failpoint;
use crate::ops::Op;
use crate::services::Services;

/// How long a start that the last daemon began may still take.
const FINISH: Duration = Duration::from_secs(120);
/// How long the driver may take to look at one machine.
const LOOK: Duration = Duration::from_secs(15);
/// How long a record may take that an engine's end, long past most likely, has not left yet.
const RECORD: Duration = Duration::from_millis(300);
/// How long a guest that was left paused may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long others wait for a guest that may be frozen.
const SOON: Duration = Duration::from_secs(2);
/// What is to be done with a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// Nothing: it has no engine and should have none.
    Leave,
    /// Its engine lives: take charge of it.
    Adopt(Handles),
    /// Its engine lives and its start is not done: finish the start, or end it.
    FinishStart(Handles),
    /// Its engine lives and is to go.
    FinishStop(Handles),
    /// Its engine lives, and its suspension is not done: the machine runs on.
    TakeBackSuspension(Handles),
    /// Its engine is gone: clean up, mark it stopped, or suspended if all of its memory is there.
    MarkStopped,
    /// It was being made: remove what there is.
    Undo,
    /// It was being removed: go on. With its engine, if that lives.
    FinishDelete(Option<Handles>),
    /// Its engine can't be verified: neither use nor signal it, look again later.
    LookAgain(Doubt),
}

/// Decides on the row's state and what the driver found.
pub fn decide(state: State, found: Liveness) -> Fate {
    match (state, found) {
        (State::Creating, _) => Fate::Undo,
        (State::Stopped | State::Suspended | State::Error, _) => Fate::Leave,
        (State::Deleting, Liveness::Alive(handles)) => Fate::FinishDelete(Some(handles)),
        (State::Deleting, Liveness::Gone(_)) => Fate::FinishDelete(None),
        (State::Running | State::Stalled | State::Paused, Liveness::Alive(handles)) => Fate::Adopt(handles),
        (State::Suspending, Liveness::Alive(handles)) => Fate::TakeBackSuspension(handles),
        (State::Starting, Liveness::Alive(handles)) => Fate::FinishStart(handles),
        (State::Stopping, Liveness::Alive(handles)) => Fate::FinishStop(handles),
        (
            State::Running | State::Stalled | State::Paused | State::Suspending | State::Starting | State::Stopping,
            Liveness::Gone(_),
        ) => Fate::MarkStopped,
        // Never a row's.
        (State::Unverified, _) => Fate::Leave,
        (_, Liveness::Unclear(why)) => Fate::LookAgain(Doubt { why, process: None }),
        (_, Liveness::Silent { handles, why }) => Fate::LookAgain(Doubt {
            why,
            process: Some(handles),
        }),
    }
}

/// Looks for the machine's engine.
pub async fn look(m: &Machine) -> Liveness {
    let kept = handles::read(&m.paths.handles()).unwrap_or_else(|why| {
        tracing::warn!(machine = %m.id, why, "handles.json cannot be read; looking for the engine without it");
        None
    });
    let spec = m.row().spec;
    let find = find(&m.services, &m.id, &m.paths, kept.as_ref(), Some(&spec.engine));
    let found = tokio::time::timeout(LOOK, find).await;
    let found = found.unwrap_or_else(|_| Liveness::Unclear(format!("the engine driver took longer than {LOOK:?}")));
    if let Liveness::Alive(handles) = &found
        && kept.as_ref() != Some(handles)
        && let Err(e) = handles::write(&m.paths.handles(), handles)
    {
        tracing::warn!(machine = %m.id, error = %e.message, "handles not written");
    }
    found
}

/// Looks for a machine's engine with the driver that it has or may have: the one of its handles, else the one it was made for, else any.
pub async fn find(
    services: &Services,
    id: &MachineId,
    paths: &MachinePaths,
    kept: Option<&Handles>,
    made_for: Option<&str>,
) -> Liveness {
    let known: Vec<&str> = engines::ALL
        .into_iter()
        .filter(|name| kept.is_some_and(|h| h.engine == *name) || made_for == Some(name))
        .collect();
    let names = if known.is_empty() {
        engines::ALL.to_vec()
    } else {
        known.clone()
    };
    let mut gone = Liveness::Gone("no process of this machine was found".to_owned());
    for name in names {
        match services.engine(name).await {
            Ok(engine) => match engine.find(id, paths, kept.filter(|h| h.engine == name)).await {
                Liveness::Gone(why) => gone = Liveness::Gone(why),
                found => return found,
            },
            // An engine that is not installed has no machines, unless it is known to have this one.
            Err(e) if known.contains(&name) => return Liveness::Unclear(e.message),
            Err(_) => {}
        }
    }
    gone
}

/// Looks and decides, and does what is quick. The rest comes back as the first work of the machine's task.
pub async fn reconcile(m: &Arc<Machine>) -> Option<Current> {
    // One that an older banger made has none yet.
    m.describe();
    let state = m.state();
    let found = if matches!(
        state,
        State::Creating | State::Stopped | State::Suspended | State::Error
    ) {
        Liveness::Gone("it should have none".to_owned())
    } else {
        look(m).await
    };
    let fate = decide(state, found);
    if fate != Fate::Leave {
        tracing::info!(machine = %m.id, name = m.name(), state = state.as_str(), fate = ?fate, "reconcile");
    }
    if failpoint::hit("adopt.found").await.is_err() {
        return None;
    }
    if let Fate::LookAgain(doubt) = fate {
        let (asks, forced) = mpsc::channel(1);
        m.set_known(Presence::doubtful(&doubt));
        return Some(Current {
            work: Box::pin(doubt::look_again(m.clone(), doubt, forced)),
            manner: Manner::Blocked(asks),
        });
    }
    let first = carry_out(m, fate).await;
    m.set_known(Presence::Known);
    first
}

/// Does what a fate says that is quick, and comes back with the rest.
pub(super) async fn carry_out(m: &Arc<Machine>, fate: Fate) -> Option<Current> {
    let m = m.clone();
    match fate {
        Fate::Leave => at_rest(&m).await.map(|next| bounded(go_on(m, next))),
        Fate::TakeBackSuspension(handles) => Some(bounded(Box::pin(take_back_suspension(m, handles)))),
        Fate::Adopt(handles) => {
            take_charge(&m, handles).await;
            None
        }
        Fate::MarkStopped => mark_stopped(&m).await,
        Fate::FinishStart(handles) => {
            let op = m.services.ops.begin("machine.start", &m.name());
            Some(yields(&op, |superseded| {
                Box::pin(finish_start(m, handles, op.clone(), superseded))
            }))
        }
        Fate::FinishStop(handles) => Some(bounded(Box::pin(finish_stop(m, handles)))),
        Fate::Undo => Some(bounded(Box::pin(remove(m, None)))),
        Fate::FinishDelete(handles) => Some(bounded(Box::pin(remove(m, handles)))),
        Fate::LookAgain(_) => None,
    }
}

fn bounded(work: Work) -> Current {
    Current {
        work,
        manner: Manner::Bounded(None),
    }
}

/// What is to be gone on with in a machine that has no engine.
#[derive(Debug)]
enum Next {
    /// It was put back to this snapshot, and is to run with its memory.
    Wake(String),
    /// It was stopped to be started again.
    Start,
    /// It goes with its client, and never came up.
    Remove,
}

fn go_on(m: Arc<Machine>, next: Next) -> Work {
    Box::pin(async move {
        match next {
            Next::Wake(snapshot) => {
                let op = m.services.ops.begin("machine.restore", &m.name());
                let mut stages = Stages::new(&op, start::TIMEOUT);
                let work = snapshot::wake_restored(&m, &mut stages, &snapshot);
                let _ = m.services.ops.run(&op, work).await;
                Ended::Still
            }
            Next::Start => {
                let op = m.services.ops.begin("machine.start", &m.name());
                let wanted = start::Wanted {
                    wait: WaitFor::Agent,
                    cold: true,
                };
                create::run_start(m, op, wanted, start::TIMEOUT, CancellationToken::new()).await
            }
            Next::Remove => remove(m, None).await,
        }
    })
}

async fn attach(m: &Machine, handles: Handles) -> Option<Live> {
    match m.services.engine(&handles.engine).await {
        Ok(engine) => {
            let live = Live::new(&m.id, engine, handles.clone());
            m.set_live(live.clone());
            // Nothing happens to one that is in its scope already; what an older daemon left in its own unit is moved.
            let (services, id, spec) = (m.services.clone(), m.id.clone(), m.row().spec);
            tokio::spawn(start::scope(services, id, spec, handles));
            Some(live)
        }
        Err(e) => {
            tracing::error!(machine = %m.id, error = %e.message, "no engine driver");
            None
        }
    }
}

/// Takes charge of an engine that this daemon does not know of, if there is one.
pub async fn find_lost(m: &Arc<Machine>) -> Result<(), ApiError> {
    match look(m).await {
        Liveness::Gone(_) => Ok(()),
        Liveness::Alive(handles) => {
            attach(m, handles).await;
            Ok(())
        }
        Liveness::Unclear(why) | Liveness::Silent { why, .. } => Err(ApiError::new(
            ErrorCode::Engine,
            format!("the engine of machine {} cannot be verified: {why}", m.name()),
        )),
    }
}

/// What was cut off in the middle of a machine without an engine. Comes back with what is to be gone on with.
async fn at_rest(m: &Arc<Machine>) -> Option<Next> {
    let dir = m.paths.disks();
    let settled = if dir.is_dir() {
        disks::settle(&dir, None)
    } else {
        Ok(())
    };
    let restored = snapshot::settle(m).await;
    let swept = suspend::sweep(m);
    let restarts = journal::read(m) == Some(Begun::Restart);
    // Before it is started: a start that fails is not tried again.
    let cleared = if restarts { journal::clear(m) } else { Ok(()) };
    let next = match settled.and(swept).and(cleared).and(restored) {
        Ok(Some(snapshot)) => Some(Next::Wake(snapshot)),
        Ok(None) if restarts && m.state() == State::Stopped => Some(Next::Start),
        Ok(None) => None,
        Err(e) => {
            tracing::error!(machine = %m.id, error = %e.message, "what was cut off is not settled");
            None
        }
    };
    next.or_else(|| abandoned(m).then_some(Next::Remove))
}

/// Whether a machine that goes with its client never came up: there is nothing in it that the client could come back to.
fn abandoned(m: &Machine) -> bool {
    let row = m.row();
    row.auto_remove && row.state == State::Stopped && row.boot.is_none()
}

/// What was cut off in the middle of a machine whose engine lives: a save that left it standing still, its disks half frozen or its
/// guest frozen. A machine that is stalled is known as such afterwards, before a request opens the guest channel in vain.
async fn settle(m: &Arc<Machine>, live: &Live) -> Result<(), ApiError> {
    let paused = m.state() == State::Paused;
    let vcpus = live.engine.vcpu_state(&live.handles).await.map_err(IntoApi::into_api)?;
    if vcpus == VcpuState::Stalled && tokio::time::timeout(SOON, live.stalled()).await.is_err() {
        tracing::warn!(machine = %m.id, "why it is stalled is not known yet");
    }
    let dir = m.paths.disks();
    if dir.is_dir() {
        let written = live.engine.writes_to(&live.handles).await.map_err(IntoApi::into_api)?;
        disks::settle(&dir, Some(&written))?;
    }
    snapshot::undo(m)?;
    suspend::sweep(m)?;
    // What was to follow the end of this engine was not begun.
    journal::clear(m)?;
    match (paused, vcpus) {
        (true, VcpuState::Running) => live.engine.pause(&live.handles).await.map_err(IntoApi::into_api),
        (false, VcpuState::Paused) => {
            let going = suspend::run_again(m, live, ANSWER).await;
            if let Err(e) = &going {
                m.happen(Event::Pauses, |row| row.cause = Some(e.message.clone()))
                    .await?;
            }
            going
        }
        _ => Ok(()),
    }
}

async fn take_back_suspension(m: Arc<Machine>, handles: Handles) -> Ended {
    if attach(&m, handles).await.is_none() {
        return Ended::Still;
    }
    let op = m.services.ops.begin("machine.resume", &m.name());
    let _ = m.services.ops.run(&op, suspend::take_back(&m)).await;
    if let Some(live) = m.live() {
        tokio::spawn(start::follow_guest(m.clone(), live));
    }
    Ended::Still
}

async fn take_charge(m: &Arc<Machine>, handles: Handles) {
    if let Some(live) = attach(m, handles).await {
        if let Err(e) = settle(m, &live).await {
            tracing::error!(machine = %m.id, error = %e.message, "what was cut off is not settled");
        }
        if m.row().cause.is_some() && m.state() != State::Paused {
            let cleared = m.change(|row| {
                row.cause = None;
                Ok(())
            });
            let _ = cleared.await;
        }
        // Nobody is served before it goes on, unless it takes its time.
        let frozen = m.state() == State::Running && !let_go(m, &live, SOON).await;
        let m = m.clone();
        tokio::spawn(async move {
            if frozen {
                let_go(&m, &live, FINISH).await;
            }
            start::follow_guest(m, live).await;
        });
    }
}

/// Lets a guest go on that a daemon had frozen to save it. False when it did not answer in time.
async fn let_go(m: &Machine, live: &Live, time: Duration) -> bool {
    let health = tokio::select! {
        () = live.exited.cancelled() => return true,
        health = live.link.health(Instant::now() + time) => health,
    };
    match health {
        Ok(health) if health.frozen && health.machine_id == m.id.as_str() => {
            let _gate = live.link.hold();
            save::go_on(m, live).await
        }
        Ok(_) => true,
        Err(e) => {
            tracing::debug!(machine = %m.id, error = %e, "whether it is frozen is not known");
            false
        }
    }
}

/// Comes back with what is to be gone on with, or the start of a machine whose guest has rebooted meanwhile.
async fn mark_stopped(m: &Arc<Machine>) -> Option<Current> {
    let unspent = m.state() == State::Suspending && m.paths.suspended().is_dir() || suspend::unspent(m);
    if unspent {
        if let Err(e) = suspend::finish(m).await {
            tracing::error!(machine = %m.id, error = %e.message, "cannot be marked suspended");
        }
        return at_rest(m).await.map(|next| bounded(go_on(m.clone(), next)));
    }
    let gone = async |cause: Option<String>| stop::engine_gone(m, cause).await.map(|()| None);
    let again = match (m.state(), journal::read(m)) {
        (State::Stopping, Some(Begun::Restore(restore))) => {
            gone(Some(format!("it was put back to snapshot `{}`", restore.snapshot))).await
        }
        (State::Stopping, _) => gone(None).await,
        (State::Starting, _) => {
            let cause = "its start was cut off: the daemon ended in the middle of it";
            gone(Some(cause.to_owned())).await
        }
        _ => reboot::after(m, &cause::find(m, RECORD).await).await,
    };
    let next = at_rest(m).await;
    let again = again.unwrap_or_else(|e| {
        tracing::error!(machine = %m.id, error = %e.message, "cannot be marked stopped");
        None
    });
    again.or_else(|| next.map(|next| bounded(go_on(m.clone(), next))))
}

async fn finish_start(m: Arc<Machine>, handles: Handles, op: Op, superseded: CancellationToken) -> Ended {
    let live = attach(&m, handles).await;
    let work = async {
        let mut stages = Stages::new(&op, FINISH);
        if suspend::unspent(&m) {
            restore::take_back(&m).await?;
            return m.happen(Event::MemorySaved, |_| {}).await;
        }
        let started = match live {
            // A wake whose guest may run already.
            Some(_) if suspend::was_spent(&m) => suspend::finish_wake(&m, &mut stages).await,
            // Whose memory it is only the daemon knew that has ended: it is nobody's, and ended.
            Some(_) if m.paths.memory().exists() => Err(ApiError::new(
                ErrorCode::Canceled,
                "its start was cut off: the daemon ended in the middle of it",
            )),
            _ => start::become_itself(&m, &mut stages).await,
        };
        if started.is_ok()
            && let Some(live) = m.live()
        {
            tokio::spawn(start::follow_guest(m.clone(), live));
        }
        create::after_start(&m, started, superseded.is_cancelled()).await
    };
    let _ = m.services.ops.run(&op, work).await;
    if let Err(e) = journal::clear(&m) {
        tracing::error!(machine = %m.id, error = %e.message, "the journal of a start that is over is not removed");
    }
    if abandoned(&m) {
        return remove(m, None).await;
    }
    Ended::Still
}

async fn finish_stop(m: Arc<Machine>, handles: Handles) -> Ended {
    attach(&m, handles).await;
    if !matches!(journal::read(&m), Some(Begun::Restore(_))) {
        let op = m.services.ops.begin("machine.stop", &m.name());
        let _ = m.services.ops.run(&op, stop::finish_stop(&m, &op, stop::TIMEOUT)).await;
        if m.state() != State::Stopped {
            return Ended::Still;
        }
    }
    // A restore ends the engine itself.
    match at_rest(&m).await {
        Some(next) => go_on(m, next).await,
        None => Ended::Still,
    }
}

async fn remove(m: Arc<Machine>, handles: Option<Handles>) -> Ended {
    if let Some(handles) = handles {
        attach(&m, handles).await;
    }
    let op = m.services.ops.begin("machine.delete", &m.name());
    match m.services.ops.run(&op, delete::delete(&m, &op)).await {
        Ok(()) => Ended::Gone,
        Err(_) => Ended::Still,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn alive() -> Liveness {
        Liveness::Alive(Handles {
            engine: "qemu".to_owned(),
            pid: 1,
            start_time: 2,
            host_boot_id: String::new(),
            control: "/c".into(),
            agent: "/a".into(),
        })
    }

    fn silent() -> Liveness {
        let Liveness::Alive(handles) = alive() else {
            unreachable!()
        };
        Liveness::Silent {
            handles,
            why: "s".to_owned(),
        }
    }

    fn found() -> impl Strategy<Value = Liveness> {
        prop::sample::select(vec![
            alive(),
            Liveness::Gone("g".to_owned()),
            Liveness::Unclear("u".to_owned()),
            silent(),
        ])
    }

    fn states() -> impl Strategy<Value = State> {
        use State::*;
        prop::sample::select(vec![
            Creating, Starting, Running, Paused, Suspending, Suspended, Stopping, Stopped, Error, Deleting,
        ])
    }

    proptest! {
        #[test]
        fn a_running_machine_is_never_ended(found in found()) {
            let fate = decide(State::Running, found);
            prop_assert!(matches!(fate, Fate::Adopt(_) | Fate::MarkStopped | Fate::LookAgain(_)));
        }

        #[test]
        fn what_cannot_be_verified_is_not_touched(state in states(), identified: bool) {
            let found = if identified { silent() } else { Liveness::Unclear("x".to_owned()) };
            let fate = decide(state, found);
            if let Fate::LookAgain(doubt) = &fate {
                prop_assert_eq!(doubt.process.is_some(), identified);
            }
            prop_assert!(matches!(fate, Fate::LookAgain(_) | Fate::Leave | Fate::Undo));
            // An undo happens only before any engine was launched.
            prop_assert!(fate != Fate::Undo || !banger_core::state::may_have_engine(state));
        }

        #[test]
        fn a_living_engine_always_has_an_owner(state in states()) {
            if banger_core::state::may_have_engine(state) {
                let fate = decide(state, alive());
                let taken = matches!(
                    fate,
                    Fate::Adopt(_) | Fate::TakeBackSuspension(_) | Fate::FinishStart(_) | Fate::FinishStop(_) | Fate::FinishDelete(Some(_))
                );
                prop_assert!(taken, "{fate:?}");
            }
        }
    }
}
