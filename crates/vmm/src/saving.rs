//! What saving a machine has in common, whichever engine it is: a task that outlives its caller, and files that go unless the
//! save succeeds.

use std::fs;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::oneshot;

use crate::engine::{AfterSave, EngineError, SavePlan, SaveReport, Steps};
use crate::start::{io_error, unsupported};

/// Whether anybody waits for a save.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted(Arc<AtomicBool>);

impl Wanted {
    /// An error once nobody does.
    pub(crate) fn check(&self) -> Result<(), EngineError> {
        if self.0.load(Ordering::Relaxed) {
            return Err(io_error("save the machine", io::ErrorKind::Interrupted.into()));
        }
        Ok(())
    }

    /// Set once nobody does.
    pub(crate) fn stop(&self) -> Arc<AtomicBool> {
        self.0.clone()
    }
}

/// A save that was done.
pub(crate) struct Done {
    pub(crate) report: SaveReport,
    /// The machine's processors ran before.
    pub(crate) ran: bool,
}

/// The steps of a save.
pub(crate) trait Saving: Send + Sync + 'static {
    /// What is saved.
    fn plan(&self) -> &SavePlan;

    /// Does it all. On failure the machine is as it was before.
    fn run(&self, steps: Steps) -> impl Future<Output = Result<Done, EngineError>> + Send;

    /// Whatever went wrong first: an engine that has ended is the reason.
    fn explained(&self, error: EngineError) -> EngineError;

    /// Lets the machine run again.
    fn go_on(&self) -> impl Future<Output = ()> + Send;
}

/// Saves a machine, as a task of its own, so that a caller who goes away leaves no machine paused and no half files.
pub(crate) async fn attended<S: Saving>(job: S, wanted: Wanted, steps: Steps) -> Result<SaveReport, EngineError> {
    let (mut tell, told) = oneshot::channel();
    tokio::spawn(async move {
        let outcome = {
            let work = job.run(steps);
            tokio::pin!(work);
            tokio::select! {
                outcome = &mut work => outcome,
                () = tell.closed() => {
                    wanted.0.store(true, Ordering::Relaxed);
                    work.await
                }
            }
        };
        let (outcome, ran) = match outcome {
            Ok(done) => (Ok(done.report), done.ran),
            Err(error) => (Err(job.explained(error)), false),
        };
        // Nobody is left who would end it, and once it runs its memory is another.
        if let Err(Ok(_)) = tell.send(outcome)
            && job.plan().then == AfterSave::Stopped
        {
            drop(Files::of(job.plan()));
            if ran {
                job.go_on().await;
            }
        }
    });
    told.await.unwrap_or_else(|_| {
        Err(io_error(
            "save the machine",
            io::Error::other("the task that saves it has ended"),
        ))
    })
}

/// Files that a save makes. They are removed unless they are kept.
pub(crate) struct Files(Vec<PathBuf>);

impl Files {
    fn of(plan: &SavePlan) -> Self {
        let saved = plan.memory.iter();
        Self(
            saved
                .flat_map(|saved| [saved.memory.clone(), saved.state.clone()])
                .collect(),
        )
    }

    /// They must not be there yet: what is there is somebody else's.
    pub(crate) fn absent(engine: &'static str, plan: &SavePlan) -> Result<Self, EngineError> {
        let files = Self::of(plan);
        let there = files.0.iter().find(|path| path.symlink_metadata().is_ok());
        if let Some(path) = there.cloned() {
            files.keep();
            return Err(io_error(
                format!("make {}", path.display()),
                io::ErrorKind::AlreadyExists.into(),
            ));
        }
        if let Some(path) = files.0.iter().find(|path| !path.is_absolute()) {
            return Err(unsupported(
                engine,
                format!("save to {}: it is not an absolute path", path.display()),
            ));
        }
        Ok(files)
    }

    /// They stay.
    pub(crate) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(e) = fs::remove_file(path)
                && e.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), error = %e, "cannot remove what was begun");
            }
        }
    }
}

/// Runs what blocks where it may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(e) => Err(io::Error::other(e)),
    }
}
