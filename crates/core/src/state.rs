//! The life of a machine, and what may be asked of it when.
//!
//! ```text
//!                 disks ready        start             agent answers
//!   (row) ─▶ creating ──────▶ stopped ─────▶ starting ──────────────▶ running ◀──────▶ paused
//!               │                ▲  ▲          ▲ │ failed, engine       │ │ │    pause,   │
//!               │ failed         │  └──────────┼─┘ gone                 │ │ │    resume   │ stop
//!               ▼                │             │                   stop │ │ │             ▼
//!            (no row)            ├───────── stopping ◀──────────────────┘ │ │        (stopping)
//!                                │   engine gone                          │ │        a reboot: back to starting
//!                                ├────────────────────────────────────────┘ │ suspend
//!                                │ engine gone  │  by itself                ▼
//!                                │              │ start                 suspending
//!                  memory put    │              │    memory saved           │
//!                  back, dropped └────────▶ suspended ◀─────────────────────┘
//!   stopped, suspended, error ── delete ──▶ deleting ──▶ (no row)      damaged disks: ──▶ error
//! ```
//!
//! A running machine whose disk can't be written on the host is `stalled` for as long as that lasts. The database does not know that state:
//! it is what the engine says, shown in place of `running`.
//!
//! A delete or a stop of a machine that is starting interrupts the start; a delete of a running one stops it first. A machine whose
//! wake fails before its guest has run again is suspended as before; its disks have not changed.

use banger_proto::api::MachineState as State;

/// What a client asks of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Bring it up.
    Start,
    /// Shut it down.
    Stop,
    /// Shut it down and bring it up.
    Restart,
    /// End its engine at once.
    Kill,
    /// Remove it.
    Delete,
    /// Talk to its agent: exec, files, connections.
    Agent,
    /// Change its name.
    Rename,
    /// Change its CPUs or memory for the next start.
    Resize,
    /// Grow its disk.
    GrowDisk,
    /// Stop its virtual CPUs.
    Pause,
    /// Let them run again.
    Resume,
    /// Write its memory to disk and end its engine.
    Suspend,
    /// Keep its disks, and its memory if it runs, as they are now.
    Snapshot,
    /// Put it back to a snapshot.
    Restore,
    /// Make running copies of it.
    Fork,
    /// Read its disk as a whole.
    Commit,
}

/// What is done with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Carry it out.
    Do,
    /// Nothing to do: it is so already.
    Already,
    /// Interrupt the start that is under way, then decide again.
    Interrupt,
    /// Refuse it.
    Refuse(Refusal),
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It needs a running machine.
    NotRunning,
    /// It needs a stopped machine.
    NotStopped,
    /// Another change of the machine is under way.
    Busy,
    /// Its virtual CPUs are stopped.
    Paused,
    /// Its disk can't be written on the host.
    Stalled,
    /// Its memory is on disk, and would be lost.
    Suspended,
    /// Its disks are damaged; only delete is left.
    Broken,
    /// It is being removed.
    Gone,
}

impl Refusal {
    /// In words, to follow "machine `x` is `state`: ".
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotRunning => "it is not running",
            Self::NotStopped => "it has to be stopped for this",
            Self::Busy => "another change of it is under way",
            Self::Paused => "its processors stand still",
            Self::Stalled => "its disk cannot be written on the host",
            Self::Suspended => "what is in its memory would be lost",
            Self::Broken => "its disks are damaged",
            Self::Gone => "it is being removed",
        }
    }
}

/// What is done with a request in a state.
pub fn decide(state: State, request: Request) -> Decision {
    use Decision::{Already, Do, Interrupt};
    use Request as R;
    let refuse = Decision::Refuse;
    match (state, request) {
        // Shown, never a machine's own: its task answers by what it knows.
        (State::Unverified, R::Delete) => Do,
        (State::Unverified, _) => refuse(Refusal::Busy),
        (State::Deleting, R::Delete) => Already,
        (State::Deleting, _) => refuse(Refusal::Gone),
        (State::Error, R::Delete | R::Rename) => Do,
        (State::Error, _) => refuse(Refusal::Broken),
        (State::Creating | State::Starting, R::Delete | R::Stop | R::Kill) => Interrupt,
        (State::Creating, _) => refuse(Refusal::Busy),

        (_, R::Rename) => Do,
        // What is in memory has the size it has.
        (State::Suspending | State::Suspended, R::Resize) => refuse(Refusal::Suspended),
        (_, R::Resize) => Do,

        (State::Stopped, R::Start | R::Restart | R::Delete | R::GrowDisk | R::Snapshot | R::Restore | R::Commit) => Do,
        (State::Stopped, R::Stop | R::Kill) => Already,
        (State::Stopped, R::Agent | R::Pause | R::Resume | R::Suspend | R::Fork) => refuse(Refusal::NotRunning),

        (State::Starting, R::Start) => Already,
        // The agent may answer long before the image's init has finished its start-up.
        (State::Starting, R::Agent) => Do,
        (State::Starting, R::GrowDisk | R::Commit) => refuse(Refusal::NotStopped),
        (State::Starting, _) => refuse(Refusal::Busy),

        (State::Running, R::Start | R::Resume) => Already,
        (State::Running, R::GrowDisk | R::Commit) => refuse(Refusal::NotStopped),
        (State::Running, _) => Do,

        (State::Stalled, R::Start) => Already,
        (State::Stalled, R::Resume | R::Stop | R::Restart | R::Kill | R::Delete | R::Restore) => Do,
        (State::Stalled, R::Agent | R::Pause | R::Suspend | R::Snapshot | R::Fork) => refuse(Refusal::Stalled),
        (State::Stalled, R::GrowDisk | R::Commit) => refuse(Refusal::NotStopped),

        (State::Paused, R::Pause) => Already,
        (State::Paused, R::Resume | R::Stop | R::Restart | R::Kill | R::Delete | R::Restore) => Do,
        (State::Paused, R::Start | R::Agent | R::Suspend | R::Snapshot | R::Fork) => refuse(Refusal::Paused),
        (State::Paused, R::GrowDisk | R::Commit) => refuse(Refusal::NotStopped),

        (State::Suspending, R::Suspend) => Already,
        // They come when it is suspended, and are decided then.
        (State::Suspending, R::Start | R::Kill | R::Delete | R::Restore) => Do,
        (State::Suspending, R::GrowDisk | R::Commit) => refuse(Refusal::NotStopped),
        (State::Suspending, _) => refuse(Refusal::Busy),

        (State::Suspended, R::Suspend) => Already,
        // A kill drops the memory.
        (State::Suspended, R::Start | R::Kill | R::Delete | R::Restore) => Do,
        (State::Suspended, _) => refuse(Refusal::Suspended),

        (State::Stopping, R::Stop) => Already,
        // A guest that does not go down may be killed, and a machine that goes down removed.
        (State::Stopping, R::Kill | R::Delete) => Do,
        (State::Stopping, R::Agent) => refuse(Refusal::NotRunning),
        (State::Stopping, R::GrowDisk | R::Commit) => refuse(Refusal::NotStopped),
        (State::Stopping, _) => refuse(Refusal::Busy),
    }
}

/// What happens to a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Its disks are there.
    DisksReady,
    /// A start begins.
    StartBegins,
    /// The agent answered and took its identity.
    AgentReady,
    /// A stop begins.
    StopBegins,
    /// Its engine is gone.
    EngineGone,
    /// Its engine ended because the guest rebooted, or is to be started again: it is brought up at once.
    Reboots,
    /// Its virtual CPUs were stopped; also when a suspension came to nothing and its guest does not answer.
    Pauses,
    /// They run again; also when a suspension came to nothing.
    Resumes,
    /// A suspension begins.
    SuspendBegins,
    /// Its memory is on disk and its engine is gone; also when a wake failed before the guest ran, and when a snapshot's memory was
    /// put in place.
    MemorySaved,
    /// Its memory on disk is no more.
    MemoryDropped,
    /// Its disks can't be used.
    Damaged,
    /// Its removal begins.
    DeleteBegins,
}

/// The state after an event, `None` where the event can't happen.
pub fn next(state: State, event: Event) -> Option<State> {
    match (state, event) {
        (State::Deleting, Event::EngineGone | Event::DeleteBegins) => Some(State::Deleting),
        (State::Deleting, _) => None,
        (_, Event::DeleteBegins) => Some(State::Deleting),
        (State::Creating, Event::DisksReady) => Some(State::Stopped),
        (State::Stopped | State::Suspended, Event::StartBegins) => Some(State::Starting),
        (State::Running, Event::Reboots) => Some(State::Starting),
        (State::Starting, Event::AgentReady) => Some(State::Running),
        // A suspension that came to nothing leaves a guest that does not answer standing still.
        (State::Running | State::Suspending, Event::Pauses) => Some(State::Paused),
        (State::Paused | State::Suspending, Event::Resumes) => Some(State::Running),
        (State::Running, Event::SuspendBegins) => Some(State::Suspending),
        (State::Suspending | State::Starting | State::Stopped, Event::MemorySaved) => Some(State::Suspended),
        (State::Suspended, Event::MemoryDropped) => Some(State::Stopped),
        (State::Starting | State::Running | State::Paused, Event::StopBegins) => Some(State::Stopping),
        (State::Starting | State::Running | State::Paused | State::Suspending | State::Stopping, Event::EngineGone) => {
            Some(State::Stopped)
        }
        (State::Creating | State::Starting | State::Stopped, Event::Damaged) => Some(State::Error),
        _ => None,
    }
}

/// Whether an engine process may exist in this state.
pub fn may_have_engine(state: State) -> bool {
    matches!(
        state,
        State::Starting
            | State::Running
            | State::Paused
            | State::Stalled
            | State::Suspending
            | State::Stopping
            | State::Deleting
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STATES: [State; 11] = [
        State::Creating,
        State::Starting,
        State::Running,
        State::Paused,
        State::Stalled,
        State::Suspending,
        State::Suspended,
        State::Stopping,
        State::Stopped,
        State::Error,
        State::Deleting,
    ];
    const REQUESTS: [Request; 16] = [
        Request::Start,
        Request::Stop,
        Request::Restart,
        Request::Kill,
        Request::Delete,
        Request::Agent,
        Request::Rename,
        Request::Resize,
        Request::GrowDisk,
        Request::Pause,
        Request::Resume,
        Request::Suspend,
        Request::Snapshot,
        Request::Restore,
        Request::Fork,
        Request::Commit,
    ];
    const EVENTS: [Event; 13] = [
        Event::DisksReady,
        Event::StartBegins,
        Event::AgentReady,
        Event::Reboots,
        Event::StopBegins,
        Event::EngineGone,
        Event::Pauses,
        Event::Resumes,
        Event::SuspendBegins,
        Event::MemorySaved,
        Event::MemoryDropped,
        Event::Damaged,
        Event::DeleteBegins,
    ];

    /// The event that carrying out a request begins with.
    fn begins(request: Request) -> Option<Event> {
        match request {
            Request::Start => Some(Event::StartBegins),
            Request::Stop | Request::Restart | Request::Kill => Some(Event::StopBegins),
            Request::Delete => Some(Event::DeleteBegins),
            Request::Pause => Some(Event::Pauses),
            Request::Resume => Some(Event::Resumes),
            Request::Suspend => Some(Event::SuspendBegins),
            _ => None,
        }
    }

    #[test]
    fn a_delete_is_never_refused() {
        for state in STATES {
            assert!(
                !matches!(decide(state, Request::Delete), Decision::Refuse(_)),
                "{state:?}"
            );
        }
    }

    #[test]
    fn disks_change_and_are_read_only_while_nothing_else_uses_them() {
        for state in STATES {
            for request in [Request::GrowDisk, Request::Commit] {
                assert_eq!(
                    decide(state, request) == Decision::Do,
                    state == State::Stopped,
                    "{state:?} {request:?}"
                );
            }
        }
    }

    #[test]
    fn memory_is_dropped_by_nothing_but_kill_delete_and_restore() {
        for request in REQUESTS {
            let harmless = matches!(request, Request::Start | Request::Rename);
            let drops = matches!(request, Request::Kill | Request::Delete | Request::Restore);
            let done = decide(State::Suspended, request) == Decision::Do;
            assert_eq!(done, harmless || drops, "{request:?}");
        }
    }

    #[test]
    fn the_agent_is_asked_only_where_an_engine_may_be() {
        for state in STATES {
            assert!(
                decide(state, Request::Agent) != Decision::Do || may_have_engine(state),
                "{state:?}"
            );
        }
    }

    #[test]
    fn a_stalled_machine_can_be_ended_and_nothing_asks_its_guest() {
        for request in REQUESTS {
            let done = decide(State::Stalled, request);
            let ends = matches!(
                request,
                Request::Stop | Request::Kill | Request::Delete | Request::Restart | Request::Restore
            );
            assert!(!ends || done == Decision::Do, "{request:?}");
            assert!(done != Decision::Do || decide(State::Running, request) != Decision::Refuse(Refusal::NotRunning));
        }
        assert_eq!(
            decide(State::Stalled, Request::Agent),
            Decision::Refuse(Refusal::Stalled)
        );
        assert_eq!(decide(State::Stalled, Request::Resume), Decision::Do);
        // No event leads to it or away from it.
        for event in EVENTS {
            for state in STATES {
                assert_ne!(next(state, event), Some(State::Stalled));
            }
            assert!(
                matches!(next(State::Stalled, event), None | Some(State::Deleting)),
                "{event:?}"
            );
        }
    }

    #[test]
    fn what_is_allowed_can_begin() {
        // A stalled machine is a running one in the database.
        for state in STATES.into_iter().filter(|state| *state != State::Stalled) {
            for request in REQUESTS {
                // A restart of a stopped machine is a start; a kill of a stopping one only hurries it.
                let other = matches!(
                    (state, request),
                    (State::Stopped, Request::Restart) | (State::Stopping, Request::Kill)
                ) || matches!(state, State::Suspending | State::Suspended) && request != Request::Start;
                // While it is being suspended a start waits.
                let other = other || (state, request) == (State::Suspending, Request::Start);
                let event = begins(request).filter(|_| decide(state, request) == Decision::Do && !other);
                assert!(event.is_none_or(|e| next(state, e).is_some()), "{state:?} {request:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_course_of_events_leaves_the_rules(events in prop::collection::vec(prop::sample::select(EVENTS.to_vec()), 0..40)) {
            let mut state = State::Creating;
            let mut deleting = false;
            for event in events {
                let Some(after) = next(state, event) else { continue };
                // An engine appears only through a start, and a machine that is being removed never comes back.
                prop_assert!(!may_have_engine(after) || may_have_engine(state) || matches!(event, Event::StartBegins | Event::DeleteBegins));
                deleting |= after == State::Deleting;
                prop_assert!(!deleting || after == State::Deleting);
                prop_assert!(state != State::Error || after == State::Deleting);
                state = after;
            }
        }
    }
}
