//! Nodes of the disks of engines that run outside a jail: `/dev/banger/<id>/<role>`, the owner's alone.
//!
//! The directories are root's, so no other user puts anything into the way. A node is made worthless and removed **before** its device
//! ([`Dir::retire`]): a number that has become another device's must not be reachable by the old name, nor by a descriptor of the node
//! that the owner has kept.

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
    own.retire(role.as_str())?;
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
        own.retire(role.as_str())?;
    }
    nodes.rmdir(machine.as_str())
}

/// The directory of a machine's nodes.
fn find(ctx: &Ctx, machine: &MachineId) -> Result<Option<Dir>, HelperError> {
    match Dir::find_path(&ctx.layout.nodes())? {
        Some(nodes) => nodes.find(machine.as_str()),
        None => Ok(None),
    }
}

/// Removes one node. None there is fine.
pub(super) fn remove_one(ctx: &Ctx, machine: &MachineId, role: DiskRole) -> Result<(), HelperError> {
    match find(ctx, machine)? {
        Some(own) => own.retire(role.as_str()),
        None => Ok(()),
    }
}

/// Removes a node whose number is not its device's: another program has removed the device (`dmsetup remove`), and the number may be
/// another device's by now. `device` is the number of the device that there is.
pub(super) fn remove_stale(
    ctx: &Ctx,
    machine: &MachineId,
    role: DiskRole,
    device: Option<u64>,
) -> Result<(), HelperError> {
    let Some(own) = find(ctx, machine)? else { return Ok(()) };
    match own.stat_of(role.as_str())? {
        Some(stat) if Some(stat.st_rdev) != device => own.retire(role.as_str()),
        _ => Ok(()),
    }
}

/// The machines that have nodes.
pub(super) fn machines(ctx: &Ctx) -> Result<Vec<MachineId>, HelperError> {
    let Some(nodes) = Dir::find_path(&ctx.layout.nodes())? else {
        return Ok(Vec::new());
    };
    let names = nodes.names()?;
    Ok(names.iter().filter_map(|name| MachineId::parse(name).ok()).collect())
}
