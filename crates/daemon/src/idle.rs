//! Machines that nobody uses: who uses one now, when one was last used, and what becomes of it then.
//!
//! A machine is used by a request to its guest for as long as that lasts (a session, a transfer, a forwarded connection), by a
//! session that runs without a client, and by a guest that computes. One that was not used for `idle_suspend_after` is suspended,
//! one that was not used for `auto_stop_stale_after` is stopped. Whoever wants something of a suspended machine's guest wakes it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use banger_proto::api::MachineState;

use crate::machine::{Machine, Request, request, stop};
use crate::services::Services;
use crate::stats;

/// How often machines are looked at, at most and at least.
const OFTEN: Duration = Duration::from_millis(250);
const SELDOM: Duration = Duration::from_secs(10);
/// CPU time of an engine, in thousandths of one CPU, above which its guest computes. An idle emulated guest needs some ten.
const BUSY_PERMILLE: u128 = 80;

/// Who uses a machine, and when it was last used.
#[derive(Debug)]
pub struct Usage {
    users: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    last: Instant,
    /// Engine, its CPU time in milliseconds, and when that was read.
    cpu: Option<(u32, u64, Instant)>,
}

/// A use that lasts.
#[derive(Debug)]
pub struct Use(Arc<Machine>);

impl Drop for Use {
    fn drop(&mut self) {
        self.0.used.touch();
        self.0.used.users.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Usage {
    /// One that begins now.
    pub fn new() -> Self {
        Self {
            users: AtomicUsize::new(0),
            state: Mutex::new(State {
                last: Instant::now(),
                cpu: None,
            }),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is used now.
    pub fn touch(&self) {
        self.state().last = Instant::now();
    }

    /// Whether a use lasts.
    pub fn in_use(&self) -> bool {
        self.users.load(Ordering::SeqCst) > 0
    }

    /// For how long it was not used.
    fn unused(&self) -> Duration {
        if self.in_use() {
            Duration::ZERO
        } else {
            self.state().last.elapsed()
        }
    }

    /// Takes a reading of its engine's CPU time; one that computes is used.
    fn computes(&self, pid: u32, cpu_ms: u64, now: Instant) {
        let mut state = self.state();
        if let Some((before, ms, then)) = state.cpu.replace((pid, cpu_ms, now))
            && before == pid
            && busy(cpu_ms.saturating_sub(ms), now.duration_since(then))
        {
            state.last = now;
        }
    }
}

impl Default for Usage {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether so much CPU time in so much time is more than that of an idle guest.
fn busy(cpu_ms: u64, time: Duration) -> bool {
    u128::from(cpu_ms) * 1000 > time.as_millis().max(1) * BUSY_PERMILLE
}

/// Begins a use of the machine.
pub fn begin(m: &Arc<Machine>) -> Use {
    m.used.users.fetch_add(1, Ordering::SeqCst);
    m.used.touch();
    Use(m.clone())
}

/// When a machine is to be suspended and when stopped; `None` is never.
fn limits(m: &Machine) -> (Option<Duration>, Option<Duration>) {
    let some = |d: Duration| (!d.is_zero()).then_some(d);
    (
        some(Duration::from_millis(m.row().idle_suspend_after_ms)),
        some(m.services.config.auto_stop_stale_after.0),
    )
}

/// How long until machines are looked at again: a quarter of the shortest limit.
fn pause(limits: impl Iterator<Item = Duration>) -> Duration {
    limits
        .min()
        .map_or(SELDOM, |shortest| (shortest / 4).clamp(OFTEN, SELDOM))
}

/// Looks at all machines until the daemon stops.
pub async fn watch(services: Arc<Services>) {
    loop {
        let machines = services.machines();
        let all = machines.iter().flat_map(|m| {
            let (suspend, stop) = limits(m);
            [suspend, stop].into_iter().flatten()
        });
        let pause = pause(all);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = services.stopping.cancelled() => return,
        }
        for m in services.machines() {
            look(&m).await;
        }
    }
}

async fn look(m: &Arc<Machine>) {
    let (suspend, stop) = limits(m);
    if m.state() != MachineState::Running || suspend.or(stop).is_none() {
        return;
    }
    let Some(live) = m.live() else { return };
    if let Some(cpu) = stats::cpu_of(live.handles.pid) {
        m.used.computes(live.handles.pid, cpu, Instant::now());
    }
    let over = |limit: Option<Duration>| limit.is_some_and(|limit| m.used.unused() >= limit);
    if !over(suspend) && !over(stop) {
        return;
    }
    match live.link.sessions().await {
        Ok(sessions) if sessions.iter().any(|s| s.running) => return m.used.touch(),
        Ok(_) => {}
        Err(e) => return tracing::debug!(machine = %m.id, error = %e, "its sessions are not known"),
    }
    let request = if over(suspend) {
        Request::SuspendIdle
    } else {
        Request::Stop(stop::TIMEOUT)
    };
    tracing::info!(machine = %m.id, ?request, "nobody uses it");
    match request::ask(m, request).await {
        Ok(op) => {
            let mut state = op.subscribe();
            let _ = state.wait_for(|o| o.ended_at.is_some()).await;
            if op.snapshot().error.is_some() {
                // Not again at every look.
                m.used.touch();
            }
        }
        Err(e) => tracing::debug!(machine = %m.id, error = %e.message, "refused"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_guest_is_told_from_one_that_computes() {
        let second = Duration::from_secs(1);
        assert!(!busy(30, second));
        assert!(busy(100, second));
        assert!(busy(1, Duration::ZERO));
        let usage = Usage::new();
        let began = Instant::now();
        usage.state().last = began;
        usage.computes(7, 1000, began);
        usage.computes(7, 1010, began + second);
        assert_eq!(usage.state().last, began);
        usage.computes(7, 1510, began + 2 * second);
        assert_eq!(usage.state().last, began + 2 * second);
        // Another engine begins at nothing.
        usage.computes(8, 90_000, began + 3 * second);
        assert_eq!(usage.state().last, began + 2 * second);
    }

    #[test]
    fn looks_come_as_often_as_the_shortest_limit_needs() {
        let seconds = |s: &[u64]| pause(s.iter().map(|s| Duration::from_secs(*s)));
        assert_eq!(seconds(&[]), SELDOM);
        assert_eq!(seconds(&[600, 8]), Duration::from_secs(2));
        assert_eq!(pause([Duration::from_millis(1)].into_iter()), OFTEN);
    }
}
