//! Operations: long pieces of work as resources with stages, progress, an end that is always told, and cancellation.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use banger_proto::api::{Operation, OperationState, Progress};
use banger_proto::error::{ApiError, ErrorCode};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::db::{Db, DbError};
use crate::time;

/// Operations that are remembered after they ended.
const KEEP: usize = 100;

tokio::task_local! {
    static CURRENT: String;
}

/// The operation that this is part of, if it is part of one.
pub fn current() -> Option<String> {
    CURRENT.try_with(Clone::clone).ok()
}

/// Work for a task of its own that stays part of this operation: its calls of the root helper bear the operation's id.
pub fn part<F: Future>(work: F) -> impl Future<Output = F::Output> {
    let op = current();
    async move {
        match op {
            Some(op) => CURRENT.scope(op, work).await,
            None => work.await,
        }
    }
}

/// One operation. Cheap to clone; all clones are the same operation.
#[derive(Debug, Clone)]
pub struct Op {
    state: Arc<watch::Sender<Operation>>,
    cancel: CancellationToken,
}

impl Op {
    /// Its identifier.
    pub fn id(&self) -> String {
        self.state.borrow().id.clone()
    }

    /// As it is now.
    pub fn snapshot(&self) -> Operation {
        self.state.borrow().clone()
    }

    /// Follows it. Changes may be coalesced, the last one never is.
    pub fn subscribe(&self) -> watch::Receiver<Operation> {
        self.state.subscribe()
    }

    /// Says what it is doing now.
    pub fn stage(&self, stage: &str) {
        tracing::info!(stage, "stage");
        self.mirror(stage, None);
    }

    /// Says that it finds nothing to do.
    pub fn unchanged(&self) {
        self.state.send_modify(|o| o.unchanged = true);
    }

    /// Says how far the stage is.
    pub fn progress(&self, progress: Progress) {
        self.state.send_modify(|o| o.progress = Some(progress));
    }

    /// Takes over stage and progress of another piece of work.
    pub fn mirror(&self, stage: &str, progress: Option<Progress>) {
        self.state.send_if_modified(|o| {
            let changed = o.stage != stage || o.progress != progress;
            if changed {
                stage.clone_into(&mut o.stage);
                o.progress = progress;
            }
            changed
        });
    }

    /// Cancelled when somebody wants it to end.
    pub fn canceled(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Asks it to end. It undoes what it did, and ends as cancelled.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        self.state.borrow().state != OperationState::Running
    }

    fn finish(&self, result: Result<(), ApiError>) {
        self.state.send_modify(|o| {
            o.ended_at = Some(time::now());
            o.progress = None;
            match result {
                Ok(()) => o.state = OperationState::Done,
                Err(mut error) => {
                    o.state = if error.code == ErrorCode::Canceled {
                        OperationState::Canceled
                    } else {
                        OperationState::Failed
                    };
                    error.operation = Some(o.id.clone());
                    o.error = Some(error);
                }
            }
        });
    }
}

/// All operations of a daemon.
#[derive(Debug)]
pub struct Ops {
    list: Mutex<VecDeque<Op>>,
    db: Db,
}

impl Ops {
    /// The registry, with what earlier daemons left. What was running then has ended with its daemon.
    pub async fn open(db: Db) -> Result<Self, DbError> {
        let mut list = VecDeque::new();
        for mut operation in db.operations().await? {
            if operation.state == OperationState::Running {
                operation.state = OperationState::Failed;
                operation.ended_at = Some(time::now());
                let mut error = ApiError::new(
                    ErrorCode::Unavailable,
                    "the daemon ended while the operation was under way",
                )
                .hint("look at the machine (`banger vm show`): the next daemon has finished or undone the operation");
                error.operation = Some(operation.id.clone());
                operation.error = Some(error);
                match db.put_operation(operation.clone(), KEEP).await {
                    // It is told all the same, and again by the next daemon.
                    Err(e) if e.is_full() => tracing::warn!(op = operation.id, error = %e, "operation not recorded"),
                    put => put?,
                }
            }
            list.push_back(Op {
                state: Arc::new(watch::Sender::new(operation)),
                cancel: CancellationToken::new(),
            });
        }
        Ok(Self {
            list: Mutex::new(list),
            db,
        })
    }

    /// A new operation. It must be given to [`Ops::run`].
    pub fn begin(&self, kind: &str, target: &str) -> Op {
        let op = self.detached(kind, target);
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.push_back(op.clone());
        while list.len() > KEEP {
            let Some(oldest) = list.iter().position(Op::ended) else {
                break;
            };
            list.remove(oldest);
        }
        op
    }

    /// A piece of work that is shown only through the operations that wait for it.
    pub fn detached(&self, kind: &str, target: &str) -> Op {
        let mut random = [0; 4];
        // Only uniqueness is asked of it; the clock does when there is no randomness.
        if getrandom::fill(&mut random).is_err() {
            random = jiff::Timestamp::now().subsec_nanosecond().to_be_bytes();
        }
        let operation = Operation {
            id: format!("op-{}", banger_core::id::hex(&random)),
            kind: kind.to_owned(),
            target: target.to_owned(),
            state: OperationState::Running,
            stage: "queued".to_owned(),
            progress: None,
            error: None,
            started_at: time::now(),
            ended_at: None,
            unchanged: false,
        };
        Op {
            state: Arc::new(watch::Sender::new(operation)),
            cancel: CancellationToken::new(),
        }
    }

    /// Carries an operation out, to its end whatever happens: a panic in it is a failure of it. Every log line in it carries
    /// its id.
    pub async fn run<T>(&self, op: &Op, work: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
        let snapshot = op.snapshot();
        let span = tracing::info_span!("op", op = %snapshot.id, kind = %snapshot.kind, target = %snapshot.target);
        let ending = Ending { op: op.clone() };
        let work = async {
            tracing::info!("begins");
            self.keep(op).await;
            let result = work.await;
            match &result {
                Ok(_) => tracing::info!("done"),
                Err(e) => tracing::warn!(code = ?e.code, error = %e.message, details = ?e.details, "failed"),
            }
            result
        };
        let mut result = CURRENT.scope(snapshot.id.clone(), work).instrument(span).await;
        ending.op.finish(match &result {
            Ok(_) => Ok(()),
            Err(e) => Err(e.clone()),
        });
        if let Err(e) = &mut result {
            e.operation = Some(snapshot.id);
        }
        drop(ending);
        self.keep(op).await;
        result
    }

    async fn keep(&self, op: &Op) {
        if self.get(&op.id()).is_none() {
            return;
        }
        if let Err(e) = self.db.put_operation(op.snapshot(), KEEP).await {
            tracing::warn!(error = %e, op = op.id(), "operation not recorded");
        }
    }

    /// The operation with this id.
    pub fn get(&self, id: &str) -> Option<Op> {
        self.list
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .find(|o| o.state.borrow().id == id)
            .cloned()
    }

    /// All that are remembered, newest first.
    pub fn list(&self) -> Vec<Operation> {
        self.list
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .rev()
            .map(Op::snapshot)
            .collect()
    }

    /// How many are under way.
    pub fn running(&self) -> usize {
        self.list
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .filter(|o| !o.ended())
            .count()
    }
}

/// Ends the operation as failed when its work is dropped without an end (a panic, a daemon that stops).
struct Ending {
    op: Op,
}

impl Drop for Ending {
    fn drop(&mut self) {
        if !self.op.ended() {
            self.op.finish(Err(ApiError::new(
                ErrorCode::Internal,
                "the operation was dropped before its end",
            )));
        }
    }
}

/// The error of an operation that was asked to end.
pub fn canceled() -> ApiError {
    ApiError::new(ErrorCode::Canceled, "canceled")
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ops() -> (tempfile::TempDir, Db, Ops) {
        let tmp = tempfile::tempdir().unwrap();
        let db = Db::open(&tmp.path().join("banger.db")).unwrap();
        let ops = Ops::open(db.clone()).await.unwrap();
        (tmp, db, ops)
    }

    #[tokio::test]
    async fn an_operation_ends_once_and_says_how() {
        let (_tmp, _db, ops) = ops().await;
        let op = ops.begin("machine.create", "box");
        let mut seen = op.subscribe();
        let failed = ops
            .run(&op, async {
                op.stage("disks");
                Err::<(), _>(ApiError::new(ErrorCode::NoSpace, "disk full"))
            })
            .await;
        assert_eq!(failed.unwrap_err().operation, Some(op.id()));
        let last = seen.borrow_and_update().clone();
        assert_eq!(last.state, OperationState::Failed);
        assert_eq!(last.stage, "disks");
        assert!(last.ended_at.is_some());
        assert_eq!(ops.running(), 0);
    }

    #[tokio::test]
    async fn dropped_work_is_a_failed_operation() {
        let (_tmp, _db, ops) = ops().await;
        let op = ops.begin("machine.start", "box");
        let work = ops.run(&op, std::future::pending::<Result<(), ApiError>>());
        let _ = tokio::time::timeout(std::time::Duration::from_millis(20), work).await;
        assert_eq!(op.snapshot().state, OperationState::Failed);
    }

    #[tokio::test]
    async fn only_so_many_are_kept_and_a_restart_ends_them() {
        let (_tmp, db, ops) = ops().await;
        let still = ops.begin("machine.create", "slow");
        ops.keep(&still).await;
        for i in 0..KEEP + 20 {
            let op = ops.begin("machine.stop", &format!("m{i}"));
            ops.run(&op, async { Ok(()) }).await.unwrap();
        }
        assert!(ops.list().len() <= KEEP);
        assert!(ops.get(&still.id()).is_some(), "what runs is not forgotten");
        let again = Ops::open(db).await.unwrap();
        assert!(again.list().len() <= KEEP);
        assert_eq!(again.running(), 0);
    }
}
