//! Jailed engines.

use std::os::fd::OwnedFd;

use banger_system::helper::{DiskRole, HelperCode, HelperError, HostObject, JailFile, Signal};
use banger_system::id::MachineId;

use crate::ctx::{Ctx, error};

/// What is launched.
#[derive(Debug)]
#[allow(dead_code)]
pub(crate) struct Launch {
    /// The machine.
    pub(crate) machine: MachineId,
    /// Its slot.
    pub(crate) slot: u32,
    /// Virtual CPUs.
    pub(crate) vcpu: u32,
    /// Memory in MiB.
    pub(crate) memory_mib: u64,
    /// What the descriptors behind the first are.
    pub(crate) files: Vec<JailFile>,
    /// Disks.
    pub(crate) disks: Vec<DiskRole>,
}

/// Starts a jailed engine: pid and start time. The first descriptor is where its output goes.
pub(crate) fn launch(_ctx: &Ctx, _launch: &Launch, _fds: Vec<OwnedFd>) -> Result<(u32, u64), HelperError> {
    Err(error(HelperCode::Unsupported, "not here yet"))
}

/// Sends a signal to a machine's jailed engine.
pub(crate) fn signal(_ctx: &Ctx, _machine: &MachineId, _signal: Signal) -> Result<(), HelperError> {
    Err(error(HelperCode::Unsupported, "not here yet"))
}

/// Opens a jail's sockets to the owner.
pub(crate) fn open(_ctx: &Ctx, _machine: &MachineId) -> Result<(), HelperError> {
    Err(error(HelperCode::Unsupported, "not here yet"))
}

/// Moves saved state out of a jail.
pub(crate) fn collect(_ctx: &Ctx, _machine: &MachineId, _fds: Vec<OwnedFd>) -> Result<(), HelperError> {
    Err(error(HelperCode::Unsupported, "not here yet"))
}

/// Puts an engine of the daemon's into a scope.
pub(crate) fn scope(
    _ctx: &Ctx,
    _machine: &MachineId,
    _pid: u32,
    _start_time: u64,
    _memory_mib: u64,
) -> Result<Option<String>, HelperError> {
    Err(error(HelperCode::Unsupported, "not here yet"))
}

/// Kills a machine's jailed engine and waits until it is gone. None there is fine.
pub(crate) fn end(_ctx: &Ctx, _machine: &MachineId) -> Result<(), HelperError> {
    Ok(())
}

/// Removes a machine's scope with what runs in it. None there is fine.
pub(crate) fn end_scope(_ctx: &Ctx, _machine: &MachineId) -> Result<(), HelperError> {
    Ok(())
}

/// Removes a machine's jail: mounts, directory, control group. None there is fine.
pub(crate) fn remove_jail(_ctx: &Ctx, _machine: &MachineId) -> Result<(), HelperError> {
    Ok(())
}

/// Processes, jails, mounts, control groups and scopes that are banger's.
pub(crate) fn inventory(_ctx: &Ctx) -> Result<Vec<HostObject>, HelperError> {
    Ok(Vec::new())
}
