//! What is done when a full disk has space again, without anybody asking: stalled machines resume, the space for the end of
//! machines is taken anew, and rows are written that could not be.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::machine::stall::{self, Tried};
use crate::services::Services;

/// How often it is looked for while a machine waits for it, and else.
const OFTEN: Duration = Duration::from_secs(1);
const SELDOM: Duration = Duration::from_secs(3);

/// Looks after it until the daemon stops.
pub async fn watch(services: Arc<Services>) {
    let mut short = false;
    let mut tried = BTreeMap::new();
    loop {
        if !services.db.holds_room() {
            let held = services.db.keep_room().await;
            if held == short {
                short = !held;
                match held {
                    true => tracing::info!("space is held again for the end of machines"),
                    false => tracing::warn!("the disk is full: no space is held for the end of machines"),
                }
            }
        }
        let mut waiting = BTreeMap::new();
        for m in services.machines() {
            m.catch_up().await;
            if let Some(live) = m.live()
                && let Some(stall) = live.stalled_now()
            {
                let mut before: Tried = tried.get(&m.id).copied().unwrap_or_default();
                stall::look(&m, &live, &stall, &mut before).await;
                waiting.insert(m.id.clone(), before);
            }
        }
        tried = waiting;
        let pause = if tried.is_empty() { SELDOM } else { OFTEN };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = services.stopping.cancelled() => return,
        }
    }
}
