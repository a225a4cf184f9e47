//! What is done when a full disk has space again, without anybody asking: the space for the end of machines is taken anew, and rows are
//! written that could not be.

use std::sync::Arc;
use std::time::Duration;

use crate::services::Services;

/// How often it is looked for.
const OFTEN: Duration = Duration::from_secs(5);

/// Looks after it until the daemon stops.
pub async fn watch(services: Arc<Services>) {
    let mut short = false;
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
        for m in services.machines() {
            m.catch_up().await;
        }
        tokio::select! {
            () = tokio::time::sleep(OFTEN) => {}
            () = services.stopping.cancelled() => return,
        }
    }
}
