//! The stages of a start: named, timed, shown in the operation.

use std::time::Duration;

use banger_proto::api::{BootReport, StageTime};
use banger_proto::error::{ApiError, ErrorCode};
use tokio::time::Instant;

use crate::ops::{Op, canceled};

/// Times of the stages so far.
#[derive(Debug)]
pub struct Stages {
    op: Op,
    done: Vec<StageTime>,
    current: Option<(&'static str, Instant)>,
    deadline: Instant,
    total: Duration,
    /// No cancel cuts it off any more.
    settled: bool,
}

impl Stages {
    /// Begins. All stages together may take `total`.
    pub fn new(op: &Op, total: Duration) -> Self {
        Self {
            op: op.clone(),
            done: Vec::new(),
            current: None,
            deadline: Instant::now() + total,
            total,
            settled: false,
        }
    }

    /// From here on no cancel cuts it off, and there is time for the rest: to go on loses nothing, to end would.
    pub fn settle(&mut self, rest: Duration) {
        self.settled = true;
        self.deadline = self.deadline.max(Instant::now() + rest);
    }

    async fn canceled(&self) {
        if self.settled {
            std::future::pending::<()>().await;
        }
        self.op.canceled().cancelled().await;
    }

    /// The operation.
    pub fn op(&self) -> &Op {
        &self.op
    }

    /// Enters a stage.
    pub fn enter(&mut self, stage: &'static str) {
        self.close();
        self.op.stage(stage);
        self.current = Some((stage, Instant::now()));
    }

    fn close(&mut self) {
        if let Some((stage, began)) = self.current.take() {
            let ms = began.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
            tracing::info!(stage, ms, "stage done");
            self.done.push(StageTime {
                stage: stage.to_owned(),
                ms,
            });
        }
    }

    /// Starts the clock again: what came before (downloads, builds) does not count against the start.
    pub fn restart_clock(&mut self) {
        self.deadline = Instant::now() + self.total;
    }

    /// When all must be done.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// What is left of the time.
    pub fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Runs a part of the stage that may be cut off: by the deadline, which then names the stage, or by a cancel.
    pub async fn bounded<T>(&self, work: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
        tokio::select! {
            biased;
            () = self.canceled() => Err(canceled()),
            result = tokio::time::timeout_at(self.deadline, work) => result.unwrap_or_else(|_| Err(self.late())),
        }
    }

    /// Runs a part of the stage that may be cut off by a cancel only.
    pub async fn cancellable<T>(&self, work: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
        tokio::select! {
            biased;
            () = self.canceled() => Err(canceled()),
            result = work => result,
        }
    }

    /// Fails if a cancel came during a part that may not be cut off.
    pub fn check(&self) -> Result<(), ApiError> {
        if !self.settled && self.op.canceled().is_cancelled() {
            Err(canceled())
        } else {
            Ok(())
        }
    }

    /// The error of a stage that took too long.
    pub fn late(&self) -> ApiError {
        let stage = self.stage();
        let waited = match stage {
            "agent" => "the guest agent did not answer",
            "personalize" | "identity" => "the guest did not take its identity",
            "system" => "the image's own system did not finish its start-up",
            _ => "it was not done",
        };
        ApiError::new(
            ErrorCode::Timeout,
            format!("stage `{stage}`: {waited} within {:?}", self.total),
        )
        .hint("give it more time with --timeout, or look at the guest's console: `banger vm logs`")
    }

    /// The name of the stage that is under way.
    pub fn stage(&self) -> &'static str {
        self.current.map_or("start", |(stage, _)| stage)
    }

    /// The report, the stage under way included: how the machine started, and from what.
    pub fn report(&mut self, how: &str, from: Option<String>) -> BootReport {
        self.close();
        BootReport {
            how: how.to_owned(),
            from,
            source_paused_ms: None,
            stages: self.done.clone(),
        }
    }
}
