//! The gate of a guest channel. It is closed while the guest is frozen to be saved: requests wait before it, and the time that a
//! frozen guest takes counts against no request's deadline.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::link::LinkError;

/// How long a request waits for a guest that is frozen. A save takes a second or two; a slow disk and a large memory take longer.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The gate. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Gate {
    /// How many keep it closed.
    closed: Arc<watch::Sender<usize>>,
    patience: Duration,
}

/// Keeps a gate closed until it is dropped.
#[derive(Debug)]
#[must_use = "the gate is open again once this is dropped"]
pub struct Closed(Gate);

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.closed.send_modify(|n| *n = n.saturating_sub(1));
    }
}

impl Gate {
    /// An open gate. Requests wait for `patience` at most while it is closed.
    pub fn new(patience: Duration) -> Self {
        Self {
            closed: Arc::new(watch::Sender::new(0)),
            patience,
        }
    }

    /// Closes it.
    pub fn close(&self) -> Closed {
        self.closed.send_modify(|n| *n += 1);
        Closed(self.clone())
    }

    /// Whether somebody keeps it closed.
    pub fn is_closed(&self) -> bool {
        *self.closed.borrow() > 0
    }

    /// Waits until it is open. Fails with [`LinkError::Frozen`] after the gate's patience.
    pub async fn pass(&self) -> Result<(), LinkError> {
        let mut closed = self.closed.subscribe();
        let opened = timeout(self.patience, closed.wait_for(|n| *n == 0)).await;
        // The sender lives in `self`.
        opened.map(drop).map_err(|_| LinkError::Frozen { after: self.patience })
    }

    /// Waits for `work`, for `after` at most; the clock stands still while the gate is closed. `None` when that was too short.
    pub async fn bounded<T>(&self, after: Duration, work: impl Future<Output = T>) -> Result<Option<T>, LinkError> {
        tokio::pin!(work);
        loop {
            if let Ok(done) = timeout(after, &mut work).await {
                return Ok(Some(done));
            }
            if !self.is_closed() {
                return Ok(None);
            }
            tokio::select! {
                done = &mut work => return Ok(Some(done)),
                opened = self.pass() => opened?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep};

    use super::*;

    const SHORT: Duration = Duration::from_millis(100);

    #[tokio::test]
    async fn a_closed_gate_is_waited_at_until_all_have_let_go() {
        let gate = Gate::new(Duration::from_secs(10));
        gate.pass().await.unwrap();
        let (one, two) = (gate.close(), gate.close());
        let began = Instant::now();
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { gate.pass().await }
        });
        drop(one);
        sleep(SHORT).await;
        assert!(!waiting.is_finished(), "one of two still holds it");
        drop(two);
        waiting.await.unwrap().unwrap();
        assert!(began.elapsed() >= SHORT);
    }

    #[tokio::test]
    async fn patience_ends_with_its_reason() {
        let gate = Gate::new(SHORT);
        let _closed = gate.close();
        let error = gate.pass().await.unwrap_err();
        assert!(
            matches!(error, LinkError::Frozen { .. }) && error.to_string().contains("frozen"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn the_clock_of_a_request_stands_still_with_the_guest() {
        let gate = Gate::new(Duration::from_secs(10));
        let closed = gate.close();
        let answer = async {
            sleep(SHORT * 4).await;
            7
        };
        let (answered, ()) = tokio::join!(gate.bounded(SHORT, answer), async {
            sleep(SHORT * 3).await;
            drop(closed);
        });
        assert_eq!(answered.unwrap(), Some(7));
        // With an open gate the bound is what it says.
        assert_eq!(gate.bounded(SHORT, sleep(SHORT * 3)).await.unwrap(), None);
    }
}
