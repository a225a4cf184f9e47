//! The QEMU driver.
//!
//! * [`args`] and `block`: the command line for a plan, a pure function,
//! * `detect`: which QEMU is there,
//! * `launch`: starting it, detached, letting it load what was saved, and undoing a failed start,
//! * `find`: finding it again and being sure that it is the one,
//! * `save`: memory, devices and disks of a running one; `layers` is about its disks, `still` about its guest channel,
//! * `stall`: why one stands still that nobody has stopped,
//! * `flatten`: all layers of a disk in one file.

pub mod args;
mod block;
mod detect;
mod find;
mod flatten;
mod launch;
mod layers;
mod save;
mod stall;
mod still;

use std::path::{Path, PathBuf};
use std::time::Duration;

use banger_core::id::MachineId;
use banger_core::plan::{BootPlan, Disk, MachinePaths};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

use crate::dial::{dial, peer};
use crate::engine::{
    BoxFuture, Capabilities, Engine, EngineError, Handles, Liveness, SavePlan, SaveReport, Stall, Steps, Still,
    VcpuState,
};
use crate::host::Roots;
use crate::identity::Mismatch;
use crate::qmp::{QmpError, Status};
use crate::start::io_error;

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
    qboot: bool,
}

impl Qemu {
    /// Finds the binary and asks it for its version. Blocks for some 50 ms.
    pub fn detect(options: Options) -> Result<Self, EngineError> {
        let found = detect::detect(options.binary.as_deref())?;
        Ok(Self {
            options,
            binary: found.binary,
            capabilities: Capabilities {
                engine: ENGINE,
                version: found.version,
                pause: true,
                snapshot: true,
                state_form: args::STATE_FORM,
                user_network: true,
                qcow2: true,
            },
            qboot: found.qboot,
        })
    }

    /// The binary that is used.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    async fn command(&self, handles: &Handles, command: &'static str) -> Result<(), EngineError> {
        let mut client = find::command_client(self, handles).await?;
        match client.execute::<Value>(command, None).await {
            Ok(_) => Ok(()),
            Err(error) => Err(control_error(self, handles, error)),
        }
    }

    async fn agent(&self, handles: &Handles) -> Result<UnixStream, EngineError> {
        find::open_or_refuse(&self.options.roots.proc, handles)?;
        let limit = self.options.answer_timeout;
        let stream = dial(&handles.agent, Instant::now() + limit)
            .await
            .map_err(|e| match e.kind() {
                std::io::ErrorKind::TimedOut => EngineError::Timeout {
                    engine: ENGINE,
                    what: "take a connection on its guest channel",
                    after: limit,
                },
                _ => io_error(format!("connect to {}", handles.agent.display()), e),
            })?;
        match peer(&stream).filter(|peer| *peer != handles.pid) {
            Some(peer) => Err(EngineError::NotOurs {
                pid: handles.pid,
                why: format!("its guest channel belongs to process {peer}"),
            }),
            None => Ok(stream),
        }
    }

    async fn exited(&self, handles: &Handles) {
        loop {
            match find::open(&self.options.roots.proc, handles) {
                Ok(process) => {
                    if process.ended().await.is_ok() {
                        return;
                    }
                }
                Err(Mismatch::Gone(_)) => return,
                Err(Mismatch::Unclear(_)) => {}
            }
            // Only where a process cannot be watched (no descriptors left, no /proc).
            sleep(Duration::from_secs(1)).await;
        }
    }
}

impl Engine for Qemu {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn launch<'a>(&'a self, plan: &'a BootPlan) -> BoxFuture<'a, Result<Handles, EngineError>> {
        Box::pin(launch::launch(self, plan))
    }

    fn find<'a>(
        &'a self,
        id: &'a MachineId,
        paths: &'a MachinePaths,
        handles: Option<&'a Handles>,
    ) -> BoxFuture<'a, Liveness> {
        Box::pin(find::find(self, id, paths, handles))
    }

    fn connect_agent<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<UnixStream, EngineError>> {
        Box::pin(self.agent(handles))
    }

    fn wait_exit<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, ()> {
        Box::pin(self.exited(handles))
    }

    fn signal<'a>(&'a self, handles: &'a Handles, signal: i32) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async move {
            let process = find::open_or_refuse(&self.options.roots.proc, handles)?;
            process
                .signal(signal)
                .map_err(|e| io_error(format!("send signal {signal} to process {}", handles.pid), e))
        })
    }

    fn pause<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(self.command(handles, "stop"))
    }

    fn resume<'a>(&'a self, handles: &'a Handles, _: Still) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(self.command(handles, "cont"))
    }

    fn vcpu_state<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<VcpuState, EngineError>> {
        Box::pin(async move {
            let mut client = find::command_client(self, handles).await?;
            match client.status().await {
                Ok(status) => Ok(vcpu_state(&status)),
                Err(error) => Err(control_error(self, handles, error)),
            }
        })
    }

    fn stalled<'a>(
        &'a self,
        handles: &'a Handles,
        known: Option<&'a Stall>,
    ) -> BoxFuture<'a, Result<Option<Stall>, EngineError>> {
        Box::pin(stall::changed(self, handles, known))
    }

    fn try_again<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(stall::try_again(self, handles))
    }

    fn save<'a>(
        &'a self,
        handles: &'a Handles,
        plan: &'a SavePlan,
        steps: Steps,
    ) -> BoxFuture<'a, Result<SaveReport, EngineError>> {
        Box::pin(save::save(self, handles, plan, steps))
    }

    fn writes_to<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<Vec<PathBuf>, EngineError>> {
        Box::pin(async move {
            let mut client = find::command_client(self, handles).await?;
            match layers::active(&mut client).await {
                Ok(active) => Ok(active.files()),
                Err(error) => Err(control_error(self, handles, error)),
            }
        })
    }

    fn flatten<'a>(&'a self, disk: &'a Disk, target: &'a Path) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(flatten::flatten(self, disk, target))
    }
}

/// What QEMU's own states mean for the virtual CPUs.
fn vcpu_state(status: &Status) -> VcpuState {
    if status.running {
        return VcpuState::Running;
    }
    match status.status.as_str() {
        "prelaunch" | "inmigrate" | "restore-vm" | "colo" => VcpuState::Loading,
        "shutdown" | "internal-error" | "guest-panicked" => VcpuState::Ended,
        "io-error" => VcpuState::Stalled,
        // Stopped by somebody, or for being saved: `cont` lets it go on.
        _ => VcpuState::Paused,
    }
}

/// A fault on the control connection, as an error of the interface.
fn control_error(qemu: &Qemu, handles: &Handles, error: QmpError) -> EngineError {
    match error {
        QmpError::Refused { command, message } => EngineError::Refused {
            engine: ENGINE,
            command,
            message,
        },
        QmpError::Timeout(_) => EngineError::Timeout {
            engine: ENGINE,
            what: "answer on its control socket",
            after: qemu.options.answer_timeout,
        },
        other => io_error(
            format!("control the engine through {}", handles.control.display()),
            std::io::Error::other(other),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_of_the_engine_and_of_the_processors() {
        let state = |status: &str, running| {
            vcpu_state(&Status {
                status: status.to_owned(),
                running,
            })
        };
        assert_eq!(state("running", true), VcpuState::Running);
        for loading in ["prelaunch", "inmigrate"] {
            assert_eq!(state(loading, false), VcpuState::Loading);
        }
        for ended in ["shutdown", "internal-error", "guest-panicked"] {
            assert_eq!(state(ended, false), VcpuState::Ended);
        }
        assert_eq!(state("io-error", false), VcpuState::Stalled);
        for paused in ["paused", "postmigrate", "save-vm", "debug", "what may come"] {
            assert_eq!(state(paused, false), VcpuState::Paused);
        }
    }
}
