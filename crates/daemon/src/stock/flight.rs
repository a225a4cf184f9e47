//! One flight per object: whoever wants what is being made already joins in, with the same progress. When the last one who
//! waits has gone, the making is cancelled.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use banger_proto::api::{Operation, OperationState};
use banger_proto::error::ApiError;
use tokio::sync::watch;

use crate::ops::{Op, Ops, canceled};

type Outcome<T> = Option<Result<T, ApiError>>;

struct Flight<T> {
    op: Op,
    outcome: watch::Receiver<Outcome<T>>,
    waiting: usize,
}

/// The flights under way.
pub struct Flights<T> {
    flights: Mutex<HashMap<String, Flight<T>>>,
    ops: Arc<Ops>,
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    /// None under way.
    pub fn new(ops: Arc<Ops>) -> Self {
        Self {
            flights: Mutex::default(),
            ops,
        }
    }

    /// Joins the making of `key`, or begins it. `op` shows the stages and progress of the making.
    pub async fn join<F>(self: &Arc<Self>, key: &str, op: &Op, make: impl FnOnce(Op) -> F) -> Result<T, ApiError>
    where
        F: Future<Output = Result<T, ApiError>> + Send + 'static,
    {
        let (mut seen, mut outcome) = {
            let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
            let flight = flights
                .entry(key.to_owned())
                .or_insert_with(|| self.begin(key, op, make));
            flight.waiting += 1;
            (flight.op.subscribe(), flight.outcome.clone())
        };
        let _waits = Waits { flights: self, key };
        loop {
            let now: Operation = seen.borrow_and_update().clone();
            if now.state == OperationState::Running {
                op.mirror(&now.stage, now.progress);
            }
            if let Some(result) = outcome.borrow_and_update().clone() {
                return result;
            }
            tokio::select! {
                changed = outcome.changed() => if changed.is_err() { return Err(canceled()) },
                _ = seen.changed() => {}
            }
        }
    }

    fn begin<F>(self: &Arc<Self>, key: &str, first: &Op, make: impl FnOnce(Op) -> F) -> Flight<T>
    where
        F: Future<Output = Result<T, ApiError>> + Send + 'static,
    {
        let snapshot = first.snapshot();
        let op = self.ops.detached("stock", key);
        let (tell, outcome) = watch::channel(None);
        tracing::info!(flight = op.id(), key, first = snapshot.id, "making");
        let making = make(op.clone());
        let (flights, running, name) = (self.clone(), op.clone(), key.to_owned());
        tokio::spawn(async move {
            let work = async {
                tokio::select! {
                    biased;
                    () = running.canceled().cancelled() => Err(canceled()),
                    made = making => made,
                }
            };
            let result = flights.ops.run(&running, work).await;
            let id = running.id();
            // Those who come from now on look again, and begin anew if they must.
            let mut under_way = flights.flights.lock().unwrap_or_else(PoisonError::into_inner);
            if under_way.get(&name).is_some_and(|f| f.op.id() == id) {
                under_way.remove(&name);
            }
            drop(under_way);
            crate::memory::give_back();
            let _ = tell.send(Some(result));
        });
        Flight {
            op,
            outcome,
            waiting: 0,
        }
    }

    fn leave(&self, key: &str) {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get_mut(key) {
            flight.waiting -= 1;
            if flight.waiting == 0
                && let Some(flight) = flights.remove(key)
            {
                flight.op.cancel();
            }
        }
    }
}

struct Waits<'a, T: Clone + Send + Sync + 'static> {
    flights: &'a Flights<T>,
    key: &'a str,
}

impl<T: Clone + Send + Sync + 'static> Drop for Waits<'_, T> {
    fn drop(&mut self) {
        self.flights.leave(self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use banger_proto::error::ErrorCode;

    use super::*;
    use crate::db::Db;

    async fn flights() -> (tempfile::TempDir, Arc<Ops>, Arc<Flights<u32>>) {
        let tmp = tempfile::tempdir().unwrap();
        let db = Db::open(&tmp.path().join("banger.db")).unwrap();
        let ops = Arc::new(Ops::open(db).await.unwrap());
        let flights = Arc::new(Flights::new(ops.clone()));
        (tmp, ops, flights)
    }

    #[tokio::test]
    async fn two_who_want_the_same_share_one_making() {
        let (_tmp, ops, flights) = flights().await;
        let made = Arc::new(AtomicUsize::new(0));
        let make = |made: Arc<AtomicUsize>| {
            move |op: Op| async move {
                op.stage("making");
                made.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(50)).await;
                Ok(7)
            }
        };
        let (a, b) = (ops.begin("machine.create", "a"), ops.begin("machine.create", "b"));
        let (one, two) = tokio::join!(
            flights.join("x", &a, make(made.clone())),
            flights.join("x", &b, make(made.clone()))
        );
        assert_eq!((one.unwrap(), two.unwrap()), (7, 7));
        assert_eq!(made.load(Ordering::SeqCst), 1);
        assert_eq!(b.snapshot().stage, "making");
        assert_eq!(flights.join("x", &a, make(made.clone())).await.unwrap(), 7);
        assert_eq!(made.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn who_leaves_does_not_disturb_who_stays() {
        let (_tmp, ops, flights) = flights().await;
        let make = |_: Op| async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            Ok(1)
        };
        let (a, b) = (ops.begin("machine.create", "a"), ops.begin("machine.create", "b"));
        let leaves = tokio::time::timeout(Duration::from_millis(20), flights.join("x", &a, make));
        let (left, stayed) = tokio::join!(leaves, flights.join("x", &b, make));
        assert!(left.is_err());
        assert_eq!(stayed.unwrap(), 1);
    }

    #[tokio::test]
    async fn when_the_last_one_leaves_the_making_ends() {
        let (_tmp, ops, flights) = flights().await;
        let a = ops.begin("machine.create", "a");
        let dropped = Arc::new(AtomicUsize::new(0));
        struct Told(Arc<AtomicUsize>);
        impl Drop for Told {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let told = Told(dropped.clone());
        let make = move |_: Op| async move {
            let _told = told;
            std::future::pending::<Result<u32, ApiError>>().await
        };
        let _ = tokio::time::timeout(Duration::from_millis(20), flights.join("x", &a, make)).await;
        for _ in 0..100 {
            if dropped.load(Ordering::SeqCst) == 1 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
        let again = flights.join("x", &a, |_| async { Ok(3) }).await;
        assert_eq!(again.unwrap(), 3);
    }

    #[tokio::test]
    async fn all_who_wait_hear_of_a_failure() {
        let (_tmp, ops, flights) = flights().await;
        let make = |_: Op| async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Err(ApiError::new(ErrorCode::NoSpace, "full"))
        };
        let (a, b) = (ops.begin("machine.create", "a"), ops.begin("machine.create", "b"));
        let (one, two) = tokio::join!(flights.join("x", &a, make), flights.join("x", &b, make));
        assert_eq!(one.unwrap_err().code, ErrorCode::NoSpace);
        assert_eq!(two.unwrap_err().code, ErrorCode::NoSpace);
    }
}
