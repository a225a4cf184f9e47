//! Block devices of machines: device-mapper snapshots of read-only loops.
//!
//! * [`gate`]: which descriptors are taken,
//! * [`table`]: the tables, and what a snapshot says of itself,
//! * [`loops`], [`dm`]: the two drivers, by way of [`sys`],
//! * [`nodes`]: nodes for engines outside a jail.
//!
//! All names follow from the machine and the disk. What stands under such a name without banger's UUID is somebody else's and is left
//! alone.

mod dm;
pub(crate) mod gate;
mod loops;
mod nodes;
mod sys;
mod table;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use banger_system::disk::{CHUNK, MAX_DISK, SECTOR};
use banger_system::helper::{DiskRole, DiskStatus, EngineUser, HelperCode, HelperError, HostObject, ObjectKind};
use banger_system::id::MachineId;
use banger_system::names;

use crate::ctx::{Ctx, error, failed};
use dm::Control;
use gate::{Access, Checked};

const ROLES: [DiskRole; 2] = [DiskRole::Root, DiskRole::Work];
/// What the name of a machine's extended base ends with, and its UUID.
const BASE: &str = "-base";
/// What the names of banger's devices begin with.
const DM_PREFIX: &str = "fc-";

/// Makes a disk's device. The node, for engines outside a jail.
pub(crate) fn attach(
    ctx: &Ctx,
    machine: &MachineId,
    role: DiskRole,
    bytes: u64,
    user: EngineUser,
    fds: Vec<OwnedFd>,
) -> Result<Option<PathBuf>, HelperError> {
    let Ok([base, changes]) = <[OwnedFd; 2]>::try_from(fds) else {
        return Err(error(HelperCode::BadRequest, "a disk has a base and changes"));
    };
    let owner = ctx.record.owner.uid;
    let base = gate::regular(base, "base", Access::Read, &[owner, 0])?;
    let changes = gate::regular(changes, "file of changes", Access::ReadWrite, &[owner])?;
    check_sizes(size(&base), size(&changes), bytes)?;
    check_header(&changes)?;
    let control = Control::needed()?;
    let name = names::dm_name(machine, role);
    for name in [name.clone(), format!("{name}{BASE}")] {
        if control
            .info(&name)
            .map_err(|e| failed(format!("look for {name}"), e))?
            .is_some()
        {
            return Err(error(
                HelperCode::Conflict,
                format!("there is a block device {name} already"),
            ));
        }
    }
    let made = build(ctx, &control, machine, role, bytes, &base, &changes).and_then(|dev| match user {
        EngineUser::Owner => nodes::make(ctx, machine, role, dev).map(Some),
        EngineUser::Jail(_) => Ok(None),
    });
    if made.is_err() {
        // The error that counts is the first one. The node goes first, as always.
        let _ = nodes::remove_one(ctx, machine, role).and_then(|()| undo(ctx, &control, machine, role));
    }
    made
}

fn size(file: &Checked) -> u64 {
    file.stat.st_size.cast_unsigned()
}

fn check_sizes(base: u64, changes: u64, disk: u64) -> Result<(), HelperError> {
    let wrong = |text: String| Err(error(HelperCode::BadRequest, text));
    if disk == 0 || !disk.is_multiple_of(SECTOR) || disk > MAX_DISK {
        return wrong(format!("a disk cannot have {disk} bytes"));
    }
    if base == 0 || !base.is_multiple_of(SECTOR) || base > disk {
        return wrong(format!("a base of {base} bytes does not fit a disk of {disk}"));
    }
    // A header, a table, a change: below that the kernel refuses it.
    if changes < 3 * CHUNK || !changes.is_multiple_of(SECTOR) || changes > 2 * MAX_DISK {
        return wrong(format!("a file of {changes} bytes has no room for changes of {disk}"));
    }
    Ok(())
}

/// Refuses changes whose header has the kernel work in other chunks than banger's.
fn check_header(changes: &Checked) -> Result<(), HelperError> {
    let mut header = [0; banger_system::disk::HEADER];
    let read = rustix::io::pread(&changes.fd, &mut header, 0).map_err(|e| failed("read the file of changes", e))?;
    if read == header.len() && banger_system::disk::is_usable(header) {
        return Ok(());
    }
    Err(unusual())
}

fn unusual() -> HelperError {
    error(
        HelperCode::Denied,
        "the file of changes is refused: its header is not that of a disk of banger's",
    )
}

/// Loops, then the extended base where it is needed, then the snapshot.
fn build(
    ctx: &Ctx,
    control: &Control,
    machine: &MachineId,
    role: DiskRole,
    bytes: u64,
    base: &Checked,
    changes: &Checked,
) -> Result<u64, HelperError> {
    let (name, uuid) = (names::dm_name(machine, role), names::dm_uuid(machine, role));
    let below = loops::base(ctx, base)?;
    let above = loops::changes(ctx, changes, &format!("{machine}:{}", role.as_str()))?;
    let make = |name: &str, uuid: &str, targets: &[table::Target], read_only| {
        let step = |what: &str, e: std::io::Error| device_error(what, name, &e);
        let dev = control.create(name, uuid).map_err(|e| step("make", e))?;
        control
            .activate(name, targets, read_only)
            .map_err(|e| step("start", e))?;
        Ok::<u64, HelperError>(dev)
    };
    let origin = match table::extended(&below.device(), size(base), bytes) {
        Some(targets) => {
            let dev = make(&format!("{name}{BASE}"), &format!("{uuid}{BASE}"), &targets, true)?;
            table::device(dev)
        }
        None => below.device(),
    };
    // From here on device-mapper holds the loops.
    let dev = make(&name, &uuid, &table::snapshot(&origin, &above.device(), bytes), false)?;
    // The file is the owner's, who may have written another header since it was looked at.
    let works_by = control.table(&name).map_err(|e| device_error("look at", &name, &e))?;
    match &works_by[..] {
        [(_, params)] if table::has_usual_chunks(params) => Ok(dev),
        _ => Err(unusual()),
    }
}

fn device_error(what: &str, name: &str, e: &std::io::Error) -> HelperError {
    match e.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => error(
            HelperCode::Conflict,
            format!("cannot {what} the block device {name}: it is in use"),
        ),
        Some(libc::EINVAL) => error(
            HelperCode::Failed,
            format!("cannot {what} the block device {name}: the kernel refuses its table (see `dmesg`): {e}"),
        ),
        _ => failed(format!("{what} the block device {name}"), e),
    }
}

/// Removes a disk's devices: the snapshot, then what it stands on. Its loops go by themselves; that is waited for.
fn undo(ctx: &Ctx, control: &Control, machine: &MachineId, role: DiskRole) -> Result<(), HelperError> {
    let mut below = Vec::new();
    for tail in ["", BASE] {
        let name = format!("{}{tail}", names::dm_name(machine, role));
        if let Some(info) = own(control, &name, &format!("{}{tail}", names::dm_uuid(machine, role)))? {
            below.extend(loops::below(ctx, info.dev));
            control.remove(&name)?;
        }
    }
    loops::wait(ctx, &below)
}

/// A device by its name, if it is there; refused if it is not what it is called.
fn own(control: &Control, name: &str, uuid: &str) -> Result<Option<dm::Info>, HelperError> {
    match control.info(name).map_err(|e| failed(format!("look for {name}"), e))? {
        Some(info) if info.uuid != uuid => Err(error(
            HelperCode::Denied,
            format!(
                "the block device {name} is not banger's: its UUID is `{}`",
                info.uuid.escape_default()
            ),
        )),
        found => Ok(found),
    }
}

/// Removes the devices of a machine, and every node of theirs first. Refused, with nothing changed, while one is open. The caller has seen
/// that no engine and no jail of the machine is there ([`crate::engine::check_none`]).
pub(crate) fn detach(ctx: &Ctx, machine: &MachineId) -> Result<(), HelperError> {
    let control = Control::open()?;
    if let Some(control) = &control {
        for role in ROLES {
            let name = names::dm_name(machine, role);
            // One that is not banger's is told of below.
            if let Ok(Some(_)) = own(control, &name, &names::dm_uuid(machine, role)) {
                control.unused(&name)?;
            }
        }
    }
    let mut failures = Vec::new();
    let mut step = |result: Result<(), HelperError>| {
        if let Err(e) = result {
            failures.push(e.message);
        }
    };
    match nodes::remove(ctx, machine) {
        Ok(()) => {
            if let Some(control) = &control {
                for role in ROLES {
                    step(undo(ctx, control, machine, role));
                }
            }
        }
        // The device stays as long as there is a node that leads to its number.
        failed => step(failed),
    }
    crate::dispatch::collected(
        format!("cannot remove all block devices of machine {machine}"),
        failures,
    )
}

/// Removes every node whose device another program has removed.
pub(crate) fn remove_stale_nodes(ctx: &Ctx) -> Result<(), HelperError> {
    let machines = nodes::machines(ctx)?;
    let control = Control::open()?;
    for (machine, role) in machines.iter().flat_map(|machine| ROLES.map(|role| (machine, role))) {
        let found = match &control {
            Some(control) => own(control, &names::dm_name(machine, role), &names::dm_uuid(machine, role))
                .ok()
                .flatten(),
            None => None,
        };
        nodes::remove_stale(ctx, machine, role, found.map(|info| info.dev))?;
    }
    Ok(())
}

/// How the devices of a machine are.
pub(crate) fn status(_ctx: &Ctx, machine: &MachineId) -> Result<Vec<DiskStatus>, HelperError> {
    let Some(control) = Control::open()? else {
        return Ok(Vec::new());
    };
    let mut disks = Vec::new();
    for role in ROLES {
        let name = names::dm_name(machine, role);
        if own(&control, &name, &names::dm_uuid(machine, role))?.is_none() {
            continue;
        }
        let targets = control
            .status(&name)
            .map_err(|e| failed(format!("ask for the state of {name}"), e))?;
        let line = targets.iter().find(|(kind, _)| kind == "snapshot");
        let usage = line.map_or(table::Usage::Invalid, |(_, line)| table::usage(line));
        let (used, total, invalid) = match usage {
            table::Usage::Good { used, total } => (used, total, false),
            table::Usage::Invalid => (0, 0, true),
        };
        disks.push(DiskStatus {
            role,
            used,
            total,
            invalid,
        });
    }
    Ok(disks)
}

/// Number of a disk's device, for a node in a jail.
pub(crate) fn device(machine: &MachineId, role: DiskRole) -> Result<u64, HelperError> {
    let name = names::dm_name(machine, role);
    let found = own(&Control::needed()?, &name, &names::dm_uuid(machine, role))?;
    found.map(|info| info.dev).ok_or_else(|| {
        error(
            HelperCode::NotFound,
            format!("machine {machine} has no block device for its {} disk", role.as_str()),
        )
    })
}

/// Devices, loops and nodes that are banger's.
pub(crate) fn inventory(ctx: &Ctx) -> Result<Vec<HostObject>, HelperError> {
    let mut objects = Vec::new();
    if let Some(control) = Control::open()? {
        let all = control.names().map_err(|e| failed("list the block devices", e))?;
        for name in all.iter().filter(|name| name.starts_with(DM_PREFIX)) {
            let info = control.info(name).map_err(|e| failed(format!("look at {name}"), e))?;
            let machine = info.and_then(|info| names::of_dm_uuid(&info.uuid));
            if machine.is_some() {
                objects.push(HostObject {
                    kind: ObjectKind::Dm,
                    name: name.clone(),
                    machine,
                });
            }
        }
    }
    for (number, mark) in loops::marked(ctx) {
        let whose = mark
            .trim_start_matches(loops::MARK)
            .split(':')
            .next()
            .unwrap_or_default();
        objects.push(HostObject {
            kind: ObjectKind::Loop,
            name: format!("loop{number}"),
            machine: MachineId::parse(whose).ok(),
        });
    }
    for machine in nodes::machines(ctx)? {
        objects.push(HostObject {
            kind: ObjectKind::Node,
            name: ctx.layout.nodes().join(machine.as_str()).display().to_string(),
            machine: Some(machine),
        });
    }
    Ok(objects)
}
