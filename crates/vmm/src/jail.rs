//! What a jailed engine needs of whoever is root: the driver asks through this, the daemon answers with its root helper.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use banger_system::helper::{DiskRole, JailFile, Signal};
use banger_system::id::MachineId;

use crate::engine::{BoxFuture, EngineError, EngineExit};

/// An engine that is to be started in a jail of its own.
#[derive(Debug)]
pub struct JailLaunch {
    /// The machine.
    pub id: MachineId,
    /// Its slot, from which user and group follow.
    pub slot: u32,
    /// Virtual CPUs, for the limits.
    pub vcpu: u32,
    /// Memory in MiB, for the limits.
    pub memory_mib: u64,
    /// Where its output goes.
    pub console: OwnedFd,
    /// Files that are to be in the jail.
    pub files: Vec<(JailFile, File)>,
    /// Disks that are to be in the jail; their block devices are there.
    pub disks: Vec<DiskRole>,
}

/// Root's part in running a jailed engine.
pub trait Jail: Send + Sync + std::fmt::Debug {
    /// A machine's chroot. Its owner may enter it and read in it, and write nothing.
    fn chroot(&self, id: &MachineId) -> PathBuf;

    /// Starts the engine. Comes back with its process and start time when its API socket is there and open to the owner.
    fn launch(&self, launch: JailLaunch) -> BoxFuture<'_, Result<(u32, u64), EngineError>>;

    /// Opens the sockets in the jail to the owner: after the engine has made the one of the guest channel.
    fn open<'a>(&'a self, id: &'a MachineId) -> BoxFuture<'a, Result<(), EngineError>>;

    /// Sends the engine a signal. One that has gone is fine.
    fn signal<'a>(&'a self, id: &'a MachineId, signal: Signal) -> BoxFuture<'a, Result<(), EngineError>>;

    /// How the engine ended, where root has seen it.
    fn ended<'a>(&'a self, id: &'a MachineId) -> BoxFuture<'a, Result<Option<EngineExit>, EngineError>>;

    /// Moves what the engine has saved (`memory.new`, `state.new`) to `memory` and `state` in an open directory.
    fn collect<'a>(&'a self, id: &'a MachineId, into: File) -> BoxFuture<'a, Result<(), EngineError>>;
}
