//! Nodes of the disks of engines that run outside a jail: `/dev/banger/<id>/<role>`, the owner's alone.
//!
//! The directories are root's, so nobody puts anything into the way. A node is removed **before** its device: a number that has become
//! another device's must not be reachable by the old name.

use std::path::PathBuf;

use banger_system::helper::{DiskRole, HelperError};
use banger_system::id::MachineId;

use crate::ctx::Ctx;
use crate::engine::dir::Dir;

/// Mode of the directories: entered by everybody, read by root.
const ENTER: u32 = 0o711;

/// Makes a disk's node for the owner.
pub(super) fn make(ctx: &Ctx, machine: &MachineId, role: DiskRole, dev: u64) -> Result<PathBuf, HelperError> {
    let nodes = Dir::ensure_path(&ctx.layout.nodes(), ENTER)?;
    let own = nodes.ensure(machine.as_str(), ENTER)?;
    own.unlink(role.as_str())?;
    own.block_node(role.as_str(), dev, ctx.record.owner.uid, ctx.record.owner.gid)?;
    Ok(ctx.layout.node(machine, role))
}

/// Removes a machine's nodes, and its directory. None there is fine.
pub(super) fn remove(ctx: &Ctx, machine: &MachineId) -> Result<(), HelperError> {
    let Some(nodes) = Dir::find_path(&ctx.layout.nodes())? else {
        return Ok(());
    };
    let Some(own) = nodes.find(machine.as_str())? else {
        return Ok(());
    };
    for role in [DiskRole::Root, DiskRole::Work] {
        own.unlink(role.as_str())?;
    }
    nodes.rmdir(machine.as_str())
}
