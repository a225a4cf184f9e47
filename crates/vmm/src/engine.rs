//! The engine interface.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use banger_core::plan::{BootPlan, MachinePaths};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

/// A future that can be kept in a trait object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What a driver can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Name of the engine: `qemu`, `firecracker`.
    pub engine: &'static str,
    /// Version as the binary says it.
    pub version: String,
    /// It can pause and resume.
    pub pause: bool,
    /// It can save and restore memory.
    pub snapshot: bool,
    /// It has a user-mode network of its own.
    pub user_network: bool,
    /// It reads copy-on-write files over an image.
    pub qcow2: bool,
}

/// What is true of a launched machine now. Kept in `handles.json`, can be rebuilt by looking.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handles {
    /// Name of the engine.
    pub engine: String,
    /// Engine process.
    pub pid: u32,
    /// Its start time in clock ticks since boot (field 22 of `/proc/PID/stat`), which makes a pid unique.
    pub start_time: u64,
    /// `boot_id` of the host: after a reboot of the host no pid means anything.
    pub host_boot_id: String,
    /// Control socket.
    pub control: PathBuf,
    /// Guest channel.
    pub agent: PathBuf,
}

/// Whether a machine's engine is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Liveness {
    /// Its process was found and its identity verified; the handles are those of now.
    Alive(Handles),
    /// There is no such process. Says why that is known.
    Gone(String),
    /// Something is there that can't be verified (a process that matches, a socket that does not answer). It is neither used
    /// nor signalled.
    Unclear(String),
}

/// How an engine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineExit {
    /// Exit status, if it exited.
    pub code: Option<i32>,
    /// Signal, if one ended it.
    pub signal: Option<i32>,
}

/// What went wrong with an engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The binary is not there.
    #[error("{engine} is not installed: no `{binary}` found")]
    Missing {
        /// Engine name.
        engine: &'static str,
        /// Binary that was looked for.
        binary: String,
    },
    /// The process ended before it was ready.
    #[error("{engine} ended while starting ({how})")]
    Died {
        /// Engine name.
        engine: &'static str,
        /// `exit status 1`, `signal 9`.
        how: String,
        /// The engine's own last words.
        last_words: Vec<String>,
    },
    /// The control socket did not come up or did not answer in time.
    #[error("{engine} did not {what} within {after:?}")]
    Timeout {
        /// Engine name.
        engine: &'static str,
        /// What was waited for.
        what: &'static str,
        /// For how long.
        after: Duration,
    },
    /// The engine refused a command.
    #[error("{engine} refused `{command}`: {message}")]
    Refused {
        /// Engine name.
        engine: &'static str,
        /// The command.
        command: String,
        /// What the engine said.
        message: String,
    },
    /// The process is not, or no longer, this machine's engine.
    #[error("process {pid} is not the engine of this machine: {why}")]
    NotOurs {
        /// The process.
        pid: u32,
        /// What did not fit.
        why: String,
    },
    /// The plan asks for something that the engine cannot do.
    #[error("{engine} cannot {what}")]
    Unsupported {
        /// Engine name.
        engine: &'static str,
        /// What was asked.
        what: String,
    },
    /// An operating system call failed.
    #[error("cannot {what}")]
    Io {
        /// What was being done, with its object.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// A driver.
pub trait Engine: Send + Sync {
    /// What it can do.
    fn capabilities(&self) -> &Capabilities;

    /// Starts the engine, detached, and returns once its control socket has answered with the machine's id. On failure
    /// nothing of it is left.
    fn launch<'a>(&'a self, plan: &'a BootPlan) -> BoxFuture<'a, Result<Handles, EngineError>>;

    /// Finds the engine of a machine again. `handles` are those that were kept, if they could be read.
    fn find<'a>(
        &'a self,
        id: &'a banger_core::id::MachineId,
        paths: &'a MachinePaths,
        handles: Option<&'a Handles>,
    ) -> BoxFuture<'a, Liveness>;

    /// Opens the guest channel.
    fn connect_agent<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<UnixStream, EngineError>>;

    /// Waits until the engine process has ended. Comes back at once if it is gone.
    fn wait_exit<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, ()>;

    /// Sends a signal to the engine process, after verifying that it is this machine's.
    fn signal<'a>(&'a self, handles: &'a Handles, signal: i32) -> BoxFuture<'a, Result<(), EngineError>>;

    /// Stops the virtual CPUs.
    fn pause<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<(), EngineError>>;

    /// Lets them run again.
    fn resume<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<(), EngineError>>;
}
