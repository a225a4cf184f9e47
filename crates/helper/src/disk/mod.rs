//! Block devices of machines.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use banger_system::helper::{DiskRole, DiskStatus, EngineUser, HelperCode, HelperError, HostObject};
use banger_system::id::MachineId;

use crate::ctx::{Ctx, error};

/// Makes a disk's device. The node, for engines outside a jail.
pub(crate) fn attach(
    _ctx: &Ctx,
    _machine: &MachineId,
    _role: DiskRole,
    _bytes: u64,
    _user: EngineUser,
    _fds: Vec<OwnedFd>,
) -> Result<Option<PathBuf>, HelperError> {
    Err(error(HelperCode::Unsupported, "not here yet"))
}

/// Removes the devices of a machine.
pub(crate) fn detach(_ctx: &Ctx, _machine: &MachineId) -> Result<(), HelperError> {
    Ok(())
}

/// How the devices of a machine are.
pub(crate) fn status(_ctx: &Ctx, _machine: &MachineId) -> Result<Vec<DiskStatus>, HelperError> {
    Err(error(HelperCode::Unsupported, "not here yet"))
}

/// Devices, loops and nodes that are banger's.
pub(crate) fn inventory(_ctx: &Ctx) -> Result<Vec<HostObject>, HelperError> {
    Ok(Vec::new())
}
