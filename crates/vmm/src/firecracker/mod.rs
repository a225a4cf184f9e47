//! The Firecracker driver.
//!
//! * [`api`] over [`http`]: Firecracker's API, typed,
//! * [`config`]: what it is told for a plan, pure functions,
//! * `detect`: which Firecracker is there, and whether it may be used,
//! * `launch`: starting it, outside of a jail or in one, letting it load what was saved, and undoing a failed start,
//! * [`find`]: finding it again and being sure that it is the one,
//! * `save`: memory and devices of a running one,
//! * `resume`: letting a paused one run, with its guest channel,
//! * `flatten`: a disk in one file.
//!
//! With a [`Jail`] every engine is started in a jail of its own, by whoever is root; without one it is started by the shim, as
//! this user. What follows is the same for both: the control socket and the guest channel are reached in the machine's run
//! directory, where those of a jail are links into it, short enough for the address of a socket.

pub mod api;
pub mod config;
mod detect;
pub mod find;
mod flatten;
pub mod http;
mod launch;
mod metrics;
mod resume;
mod save;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use banger_core::id::MachineId;
use banger_core::plan::{BootPlan, Disk, MachinePaths};
use banger_proto::agent::VSOCK_PORT;
use banger_system::helper::Signal;
use rustix::process::Signal as Number;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout_at};

use self::api::{Action, ApiError, State, Vm};
use crate::dial::{dial, peer};
use crate::engine::{
    BoxFuture, Capabilities, Engine, EngineError, EngineExit, Handles, Liveness, SavePlan, SaveReport, Steps, Still,
    VcpuState,
};
use crate::host::Roots;
use crate::identity::Mismatch;
use crate::jail::Jail;
use crate::start::{io_error, timed_out};

/// Name of the engine.
pub const ENGINE: &str = "firecracker";

/// Name of the binary, and what its processes are called.
pub const BINARY: &str = "firecracker";

/// The longest answer to a call on the guest channel: `OK 4294967295`.
const GREETING: usize = 32;

/// What the driver needs to know of its surroundings.
#[derive(Debug, Clone)]
pub struct Options {
    /// The Firecracker binary; looked up in `PATH` when `None`.
    pub binary: Option<PathBuf>,
    /// The `banger-shim` binary.
    pub shim: PathBuf,
    /// Where the kernel's own file systems are.
    pub roots: Roots,
    /// How long Firecracker may take until its API answers, and until it has loaded what was saved.
    pub launch_timeout: Duration,
    /// How long a running Firecracker may take to answer.
    pub answer_timeout: Duration,
    /// Root's part, where every engine gets a jail. The binary is then what root starts, and must be root's alone.
    pub jail: Option<Arc<dyn Jail>>,
}

impl Options {
    /// The usual ones, without jails.
    pub fn new(shim: impl Into<PathBuf>) -> Self {
        Self {
            binary: None,
            shim: shim.into(),
            roots: Roots::default(),
            launch_timeout: Duration::from_secs(20),
            answer_timeout: Duration::from_secs(3),
            jail: None,
        }
    }
}

/// The Firecracker driver.
#[derive(Debug, Clone)]
pub struct Firecracker {
    options: Options,
    binary: PathBuf,
    capabilities: Capabilities,
    warning: Option<String>,
}

impl Firecracker {
    /// Finds the binary, makes sure that it may be used and asks it for its version. Blocks for some milliseconds.
    pub fn detect(options: Options) -> Result<Self, EngineError> {
        let found = detect::detect(options.binary.as_deref(), options.jail.is_some())?;
        // A jail has other names for the same files.
        let state_form = config::STATE_FORM * 2 + u32::from(options.jail.is_some());
        Ok(Self {
            options,
            binary: found.binary,
            capabilities: Capabilities {
                engine: ENGINE,
                version: found.version,
                pause: true,
                snapshot: true,
                state_form,
                user_network: false,
                qcow2: false,
            },
            warning: found.warning,
        })
    }

    /// The binary that is used.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// What is to be said about its version, for `doctor`.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    fn proc(&self) -> &Path {
        &self.options.roots.proc
    }

    async fn vm(&self, handles: &Handles, vm: Vm) -> Result<(), EngineError> {
        let mut client = find::command_client(self, handles).await?;
        client.vm(vm).await.map_err(|e| self.fault(handles, e))
    }

    /// Presses Ctrl, Alt and Del: a guest without an agent takes that as a wish to end.
    pub async fn press_ctrl_alt_del(&self, handles: &Handles) -> Result<(), EngineError> {
        let mut client = find::command_client(self, handles).await?;
        let pressed = client.action(Action::SendCtrlAltDel).await;
        pressed.map_err(|e| self.fault(handles, e))
    }

    /// The engine's own account of what it does, as of now. `None` where it keeps none.
    pub async fn metrics(
        &self,
        handles: &Handles,
        paths: &MachinePaths,
    ) -> Result<Option<serde_json::Value>, EngineError> {
        metrics::metrics(self, handles, paths).await
    }

    async fn agent(&self, handles: &Handles) -> Result<UnixStream, EngineError> {
        find::open_or_refuse(self.proc(), handles)?;
        let limit = self.options.answer_timeout;
        let deadline = Instant::now() + limit;
        let late = || timed_out(ENGINE, "take a connection on its guest channel", limit);
        let cannot = |e| io_error(format!("connect to {}", handles.agent.display()), e);
        let mut stream = match dial(&handles.agent, deadline).await {
            Ok(stream) => stream,
            Err(e) if e.kind() == std::io::ErrorKind::TimedOut => return Err(late()),
            Err(e) => return Err(cannot(e)),
        };
        if let Some(peer) = peer(&stream).filter(|peer| *peer != handles.pid) {
            return Err(EngineError::NotOurs {
                pid: handles.pid,
                why: format!("its guest channel belongs to process {peer}"),
            });
        }
        match timeout_at(deadline, call(&mut stream)).await {
            Ok(Ok(true)) => Ok(stream),
            Ok(Ok(false)) => Err(EngineError::Silent { engine: ENGINE }),
            Ok(Err(e)) => Err(cannot(e)),
            // The engine took the call, and has nobody to pass it to before the guest's kernel has its device.
            Err(_) => Err(EngineError::Silent { engine: ENGINE }),
        }
    }

    async fn exited(&self, handles: &Handles) {
        loop {
            match find::open(self.proc(), handles) {
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

    async fn send(&self, handles: &Handles, signal: i32) -> Result<(), EngineError> {
        let process = find::open_or_refuse(self.proc(), handles)?;
        let failed = |e| io_error(format!("send signal {signal} to process {}", handles.pid), e);
        let Some((jail, id)) = find::jail_of(self, handles)? else {
            return process.signal(signal).map_err(failed);
        };
        let known = known(signal).ok_or_else(|| failed(std::io::ErrorKind::InvalidInput.into()))?;
        jail.signal(&id, known).await
    }

    /// A fault on the API, as an error of the interface.
    fn fault(&self, handles: &Handles, error: ApiError) -> EngineError {
        fault(&handles.control, self.options.answer_timeout, error)
    }
}

/// A fault on an API, as an error of the interface.
fn fault(control: &Path, limit: Duration, error: ApiError) -> EngineError {
    match error {
        ApiError::Refused { call, message } => EngineError::Refused {
            engine: ENGINE,
            command: call,
            message,
        },
        ApiError::Http {
            source: http::HttpError::Timeout,
            ..
        } => timed_out(ENGINE, "answer on its API socket", limit),
        other => io_error(
            format!("control the engine through {}", control.display()),
            std::io::Error::other(other),
        ),
    }
}

/// Calls the agent over the engine's socket. False: the guest does not take the call.
async fn call(stream: &mut UnixStream) -> std::io::Result<bool> {
    let dialled = stream.write_all(format!("CONNECT {VSOCK_PORT}\n").as_bytes()).await;
    let mut answer = Vec::new();
    // What follows the line is the agent's.
    while answer.len() < GREETING {
        match stream.read_u8().await {
            Ok(b'\n') => {
                let port = std::str::from_utf8(&answer).ok().and_then(|a| a.strip_prefix("OK "));
                return match port.map(str::parse::<u32>) {
                    Some(Ok(_)) => Ok(true),
                    _ => Err(std::io::Error::other("it answers a call with something else")),
                };
            }
            Ok(byte) => answer.push(byte),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
            // Closed with what was written to it unread.
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ok(false),
            Err(e) => return Err(e),
        }
    }
    dialled.and(Err(std::io::Error::other("it answers a call with something else")))
}

/// The signals that whoever is root passes on.
fn known(signal: i32) -> Option<Signal> {
    let all = [
        (Number::TERM, Signal::Term),
        (Number::KILL, Signal::Kill),
        (Number::INT, Signal::Int),
        (Number::HUP, Signal::Hup),
        (Number::QUIT, Signal::Quit),
        (Number::USR1, Signal::Usr1),
        (Number::USR2, Signal::Usr2),
        (Number::ABORT, Signal::Abrt),
    ];
    all.iter()
        .find(|(number, _)| number.as_raw() == signal)
        .map(|(_, s)| *s)
}

impl Engine for Firecracker {
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

    fn ended<'a>(&'a self, id: &'a MachineId) -> BoxFuture<'a, Option<EngineExit>> {
        Box::pin(async move {
            let ended = self.options.jail.as_ref()?.ended(id).await;
            ended.unwrap_or_else(|error| {
                tracing::warn!(machine = %id, %error, "how the engine ended is not known");
                None
            })
        })
    }

    fn signal<'a>(&'a self, handles: &'a Handles, signal: i32) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(self.send(handles, signal))
    }

    fn pause<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(self.vm(handles, Vm::Paused))
    }

    fn resume<'a>(&'a self, handles: &'a Handles, still: Still) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(resume::resume(self, handles, still))
    }

    fn vcpu_state<'a>(&'a self, handles: &'a Handles) -> BoxFuture<'a, Result<VcpuState, EngineError>> {
        Box::pin(async move {
            let mut client = find::command_client(self, handles).await?;
            match client.info().await {
                Ok(info) => Ok(vcpu_state(info.state)),
                Err(error) => Err(self.fault(handles, error)),
            }
        })
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
            let config = client.config().await.map_err(|e| self.fault(handles, e))?;
            let told = config.drives.into_iter().filter_map(|drive| drive.path_on_host);
            find::resolve(self, handles, told)
        })
    }

    fn flatten<'a>(&'a self, disk: &'a Disk, target: &'a Path) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(flatten::flatten(disk, target))
    }
}

/// What an instance's state means for its processors. A guest that has ended takes its engine with it.
fn vcpu_state(state: State) -> VcpuState {
    match state {
        State::NotStarted => VcpuState::Loading,
        State::Running => VcpuState::Running,
        State::Paused => VcpuState::Paused,
    }
}
