//! The clocks of running guests are compared with the host's now and then, and corrected, without a network.
//!
//! A guest that keeps its clock right by itself is left alone. A machine that goes on after it was saved or suspended is given the
//! time with its `Renew`, before anything of it runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use banger_proto::agent::Clock;
use banger_proto::api::MachineState;
use tokio::task::JoinSet;

use crate::machine::{Machine, save};
use crate::services::Services;

/// How often the clocks are looked at.
const EVERY: Duration = Duration::from_secs(30);
/// How long a guest may take to say what its clock says.
const WITHIN: Duration = Duration::from_secs(5);
/// A smaller difference stays.
const TOLERANCE: Duration = Duration::from_millis(20);

/// Looks at the clocks of all machines until the daemon stops.
pub async fn watch(services: Arc<Services>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = services.stopping.cancelled() => return,
        }
        let mut looks = JoinSet::new();
        for m in services.machines() {
            looks.spawn(async move { look(&m).await });
        }
        looks.join_all().await;
    }
}

async fn look(m: &Machine) {
    let (MachineState::Running, Some(live)) = (m.state(), m.live()) else {
        return;
    };
    // Not a use of the machine: one that no one uses is suspended all the same.
    let (before, began) = (save::now_ns(), Instant::now());
    let clock = match live.link.clock(WITHIN).await {
        Ok(clock) => clock,
        Err(e) => return tracing::debug!(machine = %m.id, error = %e, "its clock is not known"),
    };
    let Some(by_ns) = correction(before, began.elapsed(), &clock) else {
        return;
    };
    match live.link.adjust_clock(by_ns, WITHIN).await {
        Ok(_) => tracing::info!(machine = %m.id, by_ms = by_ns / 1_000_000, "its clock is corrected"),
        Err(e) => tracing::warn!(machine = %m.id, by_ms = by_ns / 1_000_000, error = %e, "its clock is not corrected"),
    }
}

/// By how many nanoseconds a guest's clock is to be changed. It was asked at `before`, by the host's clock, and the answer took
/// `took`; so half of that is how exactly the difference is known.
fn correction(before: u64, took: Duration, clock: &Clock) -> Option<i64> {
    if clock.synchronised {
        return None;
    }
    let half = i128::try_from(took.as_nanos() / 2).ok()?;
    let by = i128::from(before) + half - i128::from(clock.time_ns);
    let tolerance = i128::try_from(TOLERANCE.as_nanos()).ok()? + half;
    // What is further away takes several rounds.
    let by = by.clamp(i128::from(i64::MIN), i128::from(i64::MAX));
    (by.abs() > tolerance).then(|| i64::try_from(by).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_to_be_wrong_is_corrected() {
        const MS: u64 = 1_000_000;
        let now = 1_800_000_000_000 * MS;
        let with = |time_ns, took_ms, synchronised| {
            correction(now, Duration::from_millis(took_ms), &Clock { time_ns, synchronised })
        };
        assert_eq!(with(now, 0, false), None);
        assert_eq!(with(now + 19 * MS, 0, false), None);
        assert_eq!(with(now - 50 * MS, 0, false), Some(50_000_000));
        assert_eq!(with(now + 3_600_000 * MS, 0, false), Some(-3_600_000_000_000));
        assert_eq!(
            with(now + 3_600_000 * MS, 0, true),
            None,
            "it is kept right by the guest"
        );
        // The answer came late: the guest was asked somewhere in between.
        assert_eq!(with(now + 2_000 * MS, 4_000, false), None);
        assert_eq!(with(now, 4_000, false), None);
        assert_eq!(with(now - 3_000 * MS, 4_000, false), Some(5_000_000_000));
        // Whatever a guest says.
        assert!(with(0, 0, false).is_some());
        assert_eq!(with(u64::MAX, 0, false), Some(i64::MIN));
    }
}
