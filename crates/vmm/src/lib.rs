//! Engine drivers: start, find again, control and end the process that is a machine.
//!
//! [`Engine`] is what the daemon sees. What a driver can do is data ([`Capabilities`]), so nothing above asks which engine it
//! is. A launched engine is detached: its parent is `banger-shim`, which keeps a bounded console log and records how the
//! engine ended; nothing that happens to the daemon reaches it.
//!
//! * [`engine`]: the interface,
//! * [`host`]: what this host can do,
//! * [`jail`]: what a jailed engine needs of root,
//! * [`identity`]: whether a process is the one that was meant,
//! * [`records`]: what a launched engine leaves behind: console log and exit record,
//! * [`qmp`]: QEMU's control protocol,
//! * [`qemu`]: the QEMU driver,
//! * [`space`]: space on the host's disk,
//! * [`firecracker`]: the Firecracker driver; `start` and `saving` are what the two have in common.

mod dial;
pub mod engine;
pub mod firecracker;
pub mod host;
pub mod identity;
pub mod jail;
mod memory;
mod program;
pub mod qemu;
pub mod qmp;
pub mod records;
mod saving;
pub mod space;
mod start;
mod sys;

pub use engine::{
    AfterSave, Capabilities, Engine, EngineError, EngineExit, FreshLayer, Handles, Liveness, SavePlan, SaveReport,
    Stall, StallKind, Step, Steps, Still, VcpuState,
};
pub use records::{ExitRecord, console_tail, exit_record};
