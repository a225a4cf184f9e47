//! A machine's engine while there is one.

use std::sync::Arc;

use banger_core::id::MachineId;
use banger_vmm::{Engine, Handles};
use tokio_util::sync::CancellationToken;

use crate::agent::Link;
use crate::agent::link::EngineDial;

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
        let link = Arc::new(Link::new(id.clone(), Box::new(dial)));
        let (watched, token) = (handles.clone(), exited.clone());
        let driver = engine.clone();
        tokio::spawn(async move {
            driver.wait_exit(&watched).await;
            token.cancel();
        });
        Self {
            engine,
            handles,
            link,
            exited,
        }
    }
}
