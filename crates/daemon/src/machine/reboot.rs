//! What follows when an engine has ended by itself: its machine is stopped, or started again, because its guest rebooted, or because its
//! kernel panicked and the machine is set so.
//!
//! A machine that is started again boots from its own disks, whatever it was started from the first time. It keeps its name, place and ports;
//! its sessions have ended. A guest that goes down again and again is stopped after some starts.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use banger_core::state::Event;
use banger_proto::api::{MachineState, OnPanic, WaitFor};
use banger_proto::error::{ApiError, ErrorCode};

use super::cause::{self, End};
use super::record::Machine;
use super::work::{Current, yields};
use super::{create, start, stop};
use crate::agent::{Link, LinkError};
use crate::error::IntoApi;
use crate::time;

/// Most starts by itself of one machine in [`WINDOW`].
const MOST: usize = 5;
/// Time in which starts are counted. A guest that boots and goes down at once takes some seconds for it.
const WINDOW: Duration = Duration::from_secs(600);

/// How long the end of an engine may take to follow that of its guest channel.
const NEWS: Duration = Duration::from_millis(500);

/// When a machine was last started by itself, since the daemon began.
#[derive(Debug, Default)]
pub struct Restarts(VecDeque<Instant>);

impl Restarts {
    /// Counts one more. False where there have been too many.
    fn take(&mut self, now: Instant) -> bool {
        self.0.retain(|at| now.duration_since(*at) < WINDOW);
        if self.0.len() >= MOST {
            return false;
        }
        self.0.push_back(now);
        true
    }
}

/// What follows, with the cause that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Next {
    Stop(String),
    Start(String),
}

/// Decides on how the engine ended and what is set for the machine.
fn next(state: MachineState, end: &End, policy: OnPanic, restarts: &mut Restarts, now: Instant) -> Next {
    let cause = end.cause();
    let again = match end {
        End::Rebooted => true,
        End::Panicked { .. } => policy == OnPanic::Restart,
        End::PoweredOff | End::Engine(_) => false,
    };
    // A paused guest does nothing, and one that starts or stops is in other hands.
    if !again || state != MachineState::Running {
        return Next::Stop(cause);
    }
    if !restarts.take(now) {
        let minutes = WINDOW.as_secs() / 60;
        return Next::Stop(format!(
            "{cause}; it was started again {MOST} times within {minutes} minutes already, and was not once more"
        ));
    }
    Next::Start(cause)
}

/// The engine of a machine without work has ended. Comes back with the start that follows, if one does.
pub async fn ended_by_itself(m: &Arc<Machine>) -> Result<Option<Current>, ApiError> {
    let end = Box::pin(cause::find(m, stop::RECORD)).await;
    tracing::warn!(machine = %m.id, cause = end.cause(), "the engine has ended");
    after(m, &end).await
}

/// The same where it is known how.
pub async fn after(m: &Arc<Machine>, end: &End) -> Result<Option<Current>, ApiError> {
    let next = {
        let mut restarts = m.restarts.lock().unwrap_or_else(PoisonError::into_inner);
        next(m.state(), end, m.row().on_panic, &mut restarts, Instant::now())
    };
    let cause = match next {
        Next::Stop(cause) => return stop::engine_gone(m, Some(cause)).await.map(|()| None),
        Next::Start(cause) => cause,
    };
    if let Err(e) = stop::clean_up(m).await {
        // What is left on the host would be in the way of its start.
        let cause = format!("{cause}; it was not started again: {}", e.message);
        return stop::engine_gone(m, Some(cause)).await.and(Err(e));
    }
    m.happen(Event::Reboots, |row| {
        row.cause = Some(cause);
        row.started_at = Some(time::now());
        row.boot = None;
    })
    .await?;
    let op = m.services.ops.begin("machine.restart", &m.name());
    let wanted = start::Wanted {
        wait: WaitFor::Agent,
        cold: true,
    };
    let (m, running) = (m.clone(), op.clone());
    Ok(Some(yields(&op, |superseded| {
        Box::pin(create::run_start(m, running, wanted, start::TIMEOUT, superseded))
    })))
}

/// What a client is told whose session with the machine's guest broke: where the guest has gone down, that and not the connection.
pub async fn explain(m: Arc<Machine>, link: Arc<Link>, error: LinkError) -> ApiError {
    let live = m.live().filter(|live| Arc::ptr_eq(&live.link, &link));
    // A connection that breaks is often the first news of the engine's end; its process follows at once.
    let ended = match live {
        Some(live) => tokio::time::timeout(NEWS, live.exited.cancelled()).await.is_ok(),
        None => true,
    };
    if !ended || matches!(error, LinkError::Refused(_)) {
        return error.into_api();
    }
    // Its task says what becomes of it.
    let settled = m.wait(|state| state != MachineState::Running);
    let _ = tokio::time::timeout(stop::RECORD + NEWS, settled).await;
    match m.row().cause {
        Some(cause) => ApiError::new(
            ErrorCode::Guest,
            format!("the program ended with machine `{}`: {cause}", m.name()),
        ),
        None => error.into_api(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panic() -> End {
        End::Panicked { line: "x".to_owned() }
    }

    #[test]
    fn who_comes_up_again() {
        use MachineState::{Paused, Running, Starting};
        let now = Instant::now();
        let engine = End::Engine("gone".to_owned());
        for (state, end, policy, again) in [
            (Running, End::Rebooted, OnPanic::Stop, true),
            (Running, End::Rebooted, OnPanic::Restart, true),
            (Running, panic(), OnPanic::Stop, false),
            (Running, panic(), OnPanic::Restart, true),
            (Running, End::PoweredOff, OnPanic::Restart, false),
            (Running, engine, OnPanic::Restart, false),
            (Paused, End::Rebooted, OnPanic::Restart, false),
            (Starting, End::Rebooted, OnPanic::Restart, false),
        ] {
            let next = next(state, &end, policy, &mut Restarts::default(), now);
            let expected = if again {
                Next::Start(end.cause())
            } else {
                Next::Stop(end.cause())
            };
            assert_eq!(next, expected, "{state:?} {end:?} {policy:?}");
        }
    }

    #[test]
    fn a_guest_that_goes_down_again_and_again_stays_down() {
        let (mut restarts, begun) = (Restarts::default(), Instant::now());
        let mut at = |seconds| {
            let now = begun + Duration::from_secs(seconds);
            next(MachineState::Running, &End::Rebooted, OnPanic::Stop, &mut restarts, now)
        };
        for n in 0..5 {
            assert!(matches!(at(n), Next::Start(_)), "{n}");
        }
        let Next::Stop(cause) = at(6) else { panic!("it goes on") };
        assert!(
            cause.starts_with("the guest rebooted; ") && cause.contains("5 times"),
            "{cause}"
        );
        // One that reboots now and then may do so for ever.
        assert!(matches!(at(700), Next::Start(_)));
    }
}
