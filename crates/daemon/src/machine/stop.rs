//! Ending a machine's engine: asked nicely, by a signal, or found gone.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use banger_core::state::Event;
use banger_proto::api::MachineState;
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::Still;

use super::live::Live;
use super::record::Machine;
use super::start::remove_dir;
use super::{handles, stall};
use crate::error::{self, IntoApi};
use crate::failpoint;
use crate::ops::Op;

/// How long a guest may take to shut down when the request does not say.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// How long the agent may take to accept the request.
const ASK: Duration = Duration::from_secs(10);
/// How long an engine may take to end by itself after a signal that asks it to; it writes out its disks' tables.
const TERM: Duration = Duration::from_secs(5);
/// How long the kernel may take to end a process that was killed.
pub const KILL: Duration = Duration::from_secs(10);

/// How long the record of an engine's end may take to be written.
pub const RECORD: Duration = Duration::from_secs(2);

/// Shuts the guest down and waits for its engine's end; ends the engine when that takes too long.
pub async fn stop(m: &Arc<Machine>, op: &Op, timeout: Duration) -> Result<(), ApiError> {
    // A stop that failed is gone on with.
    let paused = m.state() == MachineState::Paused;
    if m.state() != MachineState::Stopping {
        m.happen(Event::StopBegins, |_| {}).await?;
    }
    if paused && let Some(live) = m.live() {
        // A guest that stands still cannot shut down.
        let _ = live.engine.resume(&live.handles, Still::Paused).await;
    }
    failpoint::hit("stop.row").await?;
    finish_stop(m, op, timeout).await
}

/// The same for a machine that is stopping already.
pub async fn finish_stop(m: &Arc<Machine>, op: &Op, timeout: Duration) -> Result<(), ApiError> {
    let Some(live) = m.live() else {
        return engine_gone(m, None).await;
    };
    op.stage("shutdown");
    let asked = tokio::select! {
        () = live.exited.cancelled() => Ok(()),
        asked = live.link.shutdown(true, ASK.min(timeout)) => asked,
    };
    failpoint::hit("stop.asked").await?;
    let mut forced = None;
    match asked {
        Ok(()) => {
            let down = async {
                tokio::select! {
                    () = live.exited.cancelled() => None,
                    stall = live.stalled() => Some(format!("{}; its engine was ended", stall::words(&stall))),
                }
            };
            forced = tokio::time::timeout(timeout, down).await.unwrap_or_else(|_| {
                Some(format!(
                    "the guest did not shut down within {timeout:?}, its engine was ended"
                ))
            });
        }
        Err(e) => {
            // A guest that powers off may break the connection before it has answered.
            if tokio::time::timeout(Duration::from_secs(1), live.exited.cancelled())
                .await
                .is_err()
            {
                forced = Some(format!(
                    "the guest could not be asked to shut down ({e}), its engine was ended"
                ));
            }
        }
    }
    if let Some(why) = &forced {
        tracing::warn!(machine = %m.id, why, "ending the engine");
        op.stage("end");
        end_engine(&live).await?;
    }
    failpoint::hit("stop.exited").await?;
    engine_gone(m, forced).await
}

/// Ends the engine by a signal, and makes sure that it ends.
pub async fn kill(m: &Arc<Machine>, op: &Op, signal: i32) -> Result<(), ApiError> {
    if m.state() == MachineState::Suspended {
        return super::suspend::drop_memory(m).await;
    }
    let Some(live) = m.live() else {
        return engine_gone(m, None).await;
    };
    op.stage("signal");
    signal_engine(&live, signal).await?;
    if tokio::time::timeout(TERM, live.exited.cancelled()).await.is_err() {
        end_engine(&live).await?;
    }
    engine_gone(m, Some(format!("ended by request with signal {signal}"))).await
}

/// Ends an engine: asked first, so that it leaves its disks in order, then killed.
pub async fn end_engine(live: &Live) -> Result<(), ApiError> {
    for (signal, within) in [(15, TERM), (9, KILL)] {
        signal_engine(live, signal).await?;
        if tokio::time::timeout(within, live.exited.cancelled()).await.is_ok() {
            return Ok(());
        }
    }
    let pid = live.handles.pid;
    Err(ApiError::new(
        ErrorCode::Engine,
        format!("the engine (process {pid}) did not end within {KILL:?} after signal 9"),
    ))
}

/// Sends a signal; an engine that is gone already is fine.
async fn signal_engine(live: &Live, signal: i32) -> Result<(), ApiError> {
    match live.engine.signal(&live.handles, signal).await {
        Ok(()) => Ok(()),
        Err(_) if live.exited.is_cancelled() => Ok(()),
        Err(e) => {
            // The news of the end may be on its way.
            match tokio::time::timeout(Duration::from_millis(500), live.exited.cancelled()).await {
                Ok(()) => Ok(()),
                Err(_) => Err(e.into_api()),
            }
        }
    }
}

/// Clears what an engine leaves behind: sockets, handles, what the host has of the machine. Every step runs; the first error is told.
pub async fn clean_up(m: &Machine) -> Result<(), ApiError> {
    if let Some(live) = m.clear_live() {
        live.link.disconnect().await;
    }
    let removed = handles::remove(&m.paths.handles());
    // Nobody maps it any more.
    let unmapped = remove_file(&m.paths.memory());
    // By the id alone, whatever the handles said or say no more.
    let released = m.services.hosting.release(&m.id).await;
    remove_dir(&m.paths.run).and(removed).and(unmapped).and(released)
}

/// Removes a file; one that is not there is fine.
pub fn remove_file(path: &Path) -> Result<(), ApiError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(error::io(format_args!("remove {}", path.display()), e))
        }
        _ => Ok(()),
    }
}

/// Ends an engine without asking it: what it would write is not wanted.
pub async fn kill_now(live: &Live) -> Result<(), ApiError> {
    // A failing signal may mean that it is gone; `end_engine` finds out.
    let _ = live.engine.signal(&live.handles, 9).await;
    if tokio::time::timeout(TERM, live.exited.cancelled()).await.is_ok() {
        return Ok(());
    }
    end_engine(live).await
}

/// The engine is gone: cleans up and says so.
pub async fn engine_gone(m: &Arc<Machine>, cause: Option<String>) -> Result<(), ApiError> {
    let cleaned = clean_up(m).await;
    m.happen(Event::EngineGone, |row| row.cause = cause).await?;
    cleaned
}

/// The number of a signal that an engine may be sent.
pub fn signal_number(name: &str) -> Result<i32, ApiError> {
    banger_core::signal::number(name).ok_or_else(|| {
        let message = format!(
            "unknown signal `{}`",
            name.chars().take(20).flat_map(char::escape_default).collect::<String>()
        );
        ApiError::new(ErrorCode::BadRequest, message).hint(format!("possible: {}", banger_core::signal::names()))
    })
}
