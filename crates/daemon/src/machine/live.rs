//! A machine's engine while there is one.

use std::sync::Arc;

use banger_core::id::MachineId;
use banger_vmm::{Engine, Handles, Stall};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::agent::Link;
use crate::agent::link::EngineDial;

/// Pause before an engine is asked again whether it is stalled, when it did not answer.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(1);

/// A launched engine, the connection to its guest, and the news of its end.
#[derive(Clone)]
pub struct Live {
    /// The driver.
    pub engine: Arc<dyn Engine>,
    /// Process and sockets.
    pub handles: Handles,
    /// The guest's agent.
    pub link: Arc<Link>,
    /// Cancelled once the engine process has ended.
    pub exited: CancellationToken,
    /// Why it is stalled, if it is.
    pub stall: watch::Receiver<Option<Stall>>,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live")
            .field("handles", &self.handles)
            .finish_non_exhaustive()
    }
}

impl Live {
    /// Takes charge of a launched engine and begins to watch for its end. Nothing happens to the engine when this is dropped.
    pub fn new(id: &MachineId, engine: Arc<dyn Engine>, handles: Handles) -> Self {
        let exited = CancellationToken::new();
        let dial = EngineDial {
            engine: engine.clone(),
            handles: handles.clone(),
        };
        let (tell, stall) = watch::channel(None);
        let link = Arc::new(Link::new(id.clone(), Box::new(dial)).may_stall(stall.clone()));
        let (watched, token) = (handles.clone(), exited.clone());
        let driver = engine.clone();
        tokio::spawn(async move {
            driver.wait_exit(&watched).await;
            token.cancel();
        });
        let live = Self {
            engine,
            handles,
            link,
            exited,
            stall,
        };
        tokio::spawn(watch_stall(
            id.clone(),
            live.engine.clone(),
            live.handles.clone(),
            live.exited.clone(),
            tell,
        ));
        live
    }

    /// Why it is stalled now.
    pub fn stalled_now(&self) -> Option<Stall> {
        *self.stall.borrow()
    }

    /// Waits until it is stalled.
    pub async fn stalled(&self) -> Stall {
        let mut stall = self.stall.clone();
        match stall.wait_for(Option::is_some).await.map(|stall| *stall) {
            Ok(Some(stall)) => stall,
            _ => std::future::pending().await,
        }
    }
}

/// Follows whether an engine is stalled, to its end.
async fn watch_stall(
    id: MachineId,
    engine: Arc<dyn Engine>,
    handles: Handles,
    exited: CancellationToken,
    tell: watch::Sender<Option<Stall>>,
) {
    let follow = async {
        let mut known = None;
        loop {
            match engine.stalled(&handles, known.as_ref()).await {
                Ok(now) => {
                    match &now {
                        Some(stall) => tracing::error!(machine = %id, ?stall, "it is stalled"),
                        None => tracing::info!(machine = %id, "it runs again"),
                    }
                    known = now;
                    tell.send_replace(now);
                }
                Err(e) => {
                    tracing::debug!(machine = %id, error = %e, "whether it is stalled is not known");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    };
    tokio::select! {
        () = exited.cancelled() => {}
        () = follow => {}
    }
}
