//! How long work tells where it is.

use std::fmt;
use std::sync::Arc;

/// A step of long work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// The distribution's package client looks for the kernel package and downloads it.
    DownloadKernel,
    /// Kernel and modules are taken out of the package.
    ExtractKernel,
    /// The bootstrap tool downloads packages.
    DownloadPackages,
    /// The bootstrap tool unpacks and configures packages.
    InstallPackages,
    /// The file system is written.
    WriteImage,
    /// What was made is moved into the store.
    Store,
}

impl Step {
    /// What is being done, as a user reads it.
    pub fn label(self) -> &'static str {
        match self {
            Self::DownloadKernel => "downloading the kernel package",
            Self::ExtractKernel => "extracting the kernel",
            Self::DownloadPackages => "downloading packages",
            Self::InstallPackages => "installing packages",
            Self::WriteImage => "writing the file system",
            Self::Store => "storing",
        }
    }
}

/// What the figures of a [`Stage`] count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Packages, files, steps.
    Items,
}

/// Where the work is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage {
    /// The step.
    pub step: Step,
    /// Done so far.
    pub done: u64,
    /// In all; 0 where that is not known.
    pub total: u64,
    /// What is counted.
    pub unit: Unit,
}

/// Who is told. Cheap to clone; called from any thread, so the callee must be quick.
#[derive(Clone)]
pub struct Progress(Option<Arc<dyn Fn(Stage) + Send + Sync>>);

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}

impl Progress {
    /// Tells `listener`.
    pub fn new(listener: impl Fn(Stage) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(listener)))
    }

    /// Tells nobody.
    pub fn none() -> Self {
        Self(None)
    }

    /// Reports a stage.
    pub fn report(&self, stage: Stage) {
        if let Some(listener) = &self.0 {
            listener(stage);
        }
    }

    /// Reports that a step begins whose extent is not known.
    pub fn begin(&self, step: Step) {
        self.report(Stage {
            step,
            done: 0,
            total: 0,
            unit: Unit::Items,
        });
    }

    /// Reports bytes.
    pub fn bytes(&self, step: Step, done: u64, total: u64) {
        self.report(Stage {
            step,
            done,
            total,
            unit: Unit::Bytes,
        });
    }

    /// Reports items.
    pub fn items(&self, step: Step, done: u64, total: u64) {
        self.report(Stage {
            step,
            done,
            total,
            unit: Unit::Items,
        });
    }
}
