//! The engine interface.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use banger_core::id::MachineId;
use banger_core::plan::{BootPlan, Disk, DiskRole, MachinePaths, Saved};
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
    /// The devices that this driver gives a machine, and the form in which it saves them: memory that was saved with another number
    /// is not restored.
    pub state_form: u32,
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
    /// The process is identified by everything but its answer: boot of the host, pid, start time, name and arguments fit, and its
    /// control socket is gone or silent. It is not used, and signalled only when a user asks for that by the machine's name.
    Silent {
        /// The process, and where its sockets should be.
        handles: Handles,
        /// What is wrong with its answer.
        why: String,
    },
    /// It cannot be told: processes cannot be listed, several fit, another process holds the socket. It is neither used nor signalled.
    Unclear(String),
}

/// What a caller of [`Engine::save`] does at a certain point of it.
pub type Step = BoxFuture<'static, Result<(), EngineError>>;

/// The caller's part in a save. An error of a step ends the save; a step before which the save ends is not begun.
pub struct Steps {
    /// Right before the virtual CPUs stop, when everything that takes long has been: the guest is asked to come to rest.
    pub hold_still: Step,
    /// When they have stopped and the disks have taken what was under way: disks that are not frozen in layers are copied.
    pub while_still: Step,
}

impl Steps {
    /// A caller with no part in it.
    pub fn none() -> Self {
        Self {
            hold_still: Box::pin(std::future::ready(Ok(()))),
            while_still: Box::pin(std::future::ready(Ok(()))),
        }
    }
}

impl std::fmt::Debug for Steps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Steps").finish_non_exhaustive()
    }
}

/// What is saved of a machine, all at one point in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavePlan {
    /// Where memory and devices go: files that do not exist yet. None saves disks only.
    pub memory: Option<Saved>,
    /// The memory file that the engine was started with, if it was: what the guest has not written since is still there. A file
    /// that is not the one makes the save fail.
    pub base: Option<PathBuf>,
    /// Disks that go on in a fresh file, so that what they were is left as it is.
    pub layers: Vec<FreshLayer>,
    /// What becomes of the machine.
    pub then: AfterSave,
}

/// A disk that goes on in a fresh file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreshLayer {
    /// The disk.
    pub serial: DiskRole,
    /// The file that takes the writes from now on. It is there and empty, of the disk's size; what was written to until now is
    /// below it. Its name is never used twice for a machine.
    pub path: PathBuf,
}

/// What becomes of a machine that was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterSave {
    /// Its virtual CPUs are as they were before: they run, or they are paused.
    AsBefore,
    /// Its virtual CPUs stay stopped: its engine is going to be ended.
    Stopped,
}

/// What came of a save.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveReport {
    /// How long the virtual CPUs stood still for it. With [`AfterSave::Stopped`]: until everything was saved.
    pub paused: Duration,
}

/// Why virtual CPUs stand still that are to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Still {
    /// The engine has loaded what was saved, and has not run it yet.
    Loaded,
    /// They ran in this engine and were stopped.
    Paused,
}

/// Whether a machine's virtual CPUs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VcpuState {
    /// They run.
    Running,
    /// They are stopped, and can go on.
    Paused,
    /// They stand still until a disk of the machine can be written: see [`Engine::stalled`].
    Stalled,
    /// The engine has not been told to run them yet, or is not done with loading what was saved.
    Loading,
    /// They can't go on: the guest has shut down, or the engine has given up on it.
    Ended,
}

/// Why a machine is stalled: a disk of it could not be written on the host. Nothing is lost: what was to be written is written when the
/// machine is resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// What is the matter.
    pub kind: StallKind,
    /// The disk, where that is known.
    pub disk: Option<DiskRole>,
}

/// What is the matter with a disk that could not be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StallKind {
    /// The host's disk is full, or a quota is used up.
    NoSpace,
    /// The host's disk has failed.
    Failed,
}

/// How an engine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Nobody in the guest takes calls on the guest channel: not yet, or not any more.
    #[error("nobody in the guest listens on its channel")]
    Silent {
        /// Engine name.
        engine: &'static str,
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
    ///
    /// With `plan.resume` the machine is as it was saved, and paused: [`Engine::resume`] with [`Still::Loaded`] lets it go on. Until then nothing has
    /// been written to its disks.
    fn launch<'a>(&'a self, plan: &'a BootPlan) -> BoxFuture<'a, Result<Handles, EngineError>>;

    /// Finds the engine of a machine again. `handles` are those that were kept, if they could be read.
    fn find<'a>(
        &'a self,
        id: &'a MachineId,
        paths: &'a MachinePaths,
        handles: Option<&'a Handles>,
    ) -> BoxFuture<'a, Liveness>;

    /// Opens the guest channel. Where it tells whether somebody listens, nobody is [`EngineError::Silent`]: to be tried again for
    /// as long as somebody is expected.
    fn connect_agent<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<UnixStream, EngineError>>;

    /// Waits until the engine process has ended. Comes back at once if it is gone.
    fn wait_exit<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, ()>;

    /// Asks whoever started the engine how it ended, where the shim could not see it: where it was somebody else's child. `None`: it is
    /// not known.
    fn ended<'a>(&'a self, id: &'a MachineId) -> BoxFuture<'a, Option<EngineExit>> {
        let _ = id;
        Box::pin(std::future::ready(None))
    }

    /// Sends a signal to the engine process, after verifying that it is this machine's.
    fn signal<'a>(&'a self, handles: &'a Handles, signal: i32) -> BoxFuture<'a, Result<(), EngineError>>;

    /// Stops the virtual CPUs.
    fn pause<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<(), EngineError>>;

    /// Lets them run. Connections on the guest channel that were open before may be closed by it. CPUs that run already are left alone.
    fn resume<'a>(&'a self, handles: &'a Handles, still: Still) -> BoxFuture<'a, Result<(), EngineError>>;

    /// Whether they run.
    fn vcpu_state<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<VcpuState, EngineError>>;

    /// Waits until what holds the machine up is something else than `known`, and says what it is then: `None` is nothing. An engine that
    /// never stops by itself never comes back.
    fn stalled<'a>(
        &'a self,
        _handles: &'a Handles,
        _known: Option<&'a Stall>,
    ) -> BoxFuture<'a, Result<Option<Stall>, EngineError>> {
        Box::pin(std::future::pending())
    }

    /// Lets a machine that is held up try again. Does nothing where nothing holds it up.
    fn try_again<'a>(&'a self, _handles: &'a Handles) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Saves memory, devices and disks of a machine at one point in time, with the virtual CPUs stopped as briefly as possible.
    ///
    /// On failure the machine runs on as before with the disks it had, and files that were begun are removed; unless the engine
    /// itself has gone. An engine whose caller goes away is not left paused either.
    fn save<'a>(
        &'a self,
        handles: &'a Handles,
        plan: &'a SavePlan,
        steps: Steps,
    ) -> BoxFuture<'a, Result<SaveReport, EngineError>>;

    /// The files that take the writes of the machine's disks now, as the engine opened them: for the case that nobody saw
    /// whether a save came as far as its fresh layers.
    fn writes_to<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<Vec<PathBuf>, EngineError>>;

    /// Copies the content of a disk that no engine writes to, all layers together, to a new raw and sparse file.
    fn flatten<'a>(&'a self, disk: &'a Disk, target: &'a Path) -> BoxFuture<'a, Result<(), EngineError>>;
}
