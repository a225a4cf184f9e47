//! Takes what a jailed engine has saved out of its jail.
//!
//! The engine may put anything under any name of its jail at any moment. So a file is first moved to where only root reaches, and
//! looked at there; what passes becomes the owner's, and goes on to the directory that the owner has opened.

use std::os::fd::OwnedFd;

use banger_system::helper::{HelperCode, HelperError};
use banger_system::id::MachineId;
use banger_system::names::jail;
use rustix::fs::{FileType, Gid, Mode, OFlags, RenameFlags, Stat, Uid};
use rustix::io::Errno;

use super::dir::Dir;
use super::{find, jail as jails, tree};
use crate::ctx::{Ctx, error, failed};

/// From which name in the jail to which name at the owner's.
const SAVED: [(&str, &str); 2] = [(jail::NEW_MEMORY, jail::MEMORY), (jail::NEW_STATE, jail::STATE)];
/// Where a file is while it is looked at: beside the chroot, in a directory of root's.
const ASIDE: &str = "collected";

/// Moves what was saved to a directory.
pub(super) fn collect(ctx: &Ctx, machine: &MachineId, into: OwnedFd) -> Result<(), HelperError> {
    let none = || error(HelperCode::NotFound, format!("machine {machine} has no jail"));
    let own = find::own(ctx, machine).ok_or_else(none)?;
    own.trusted()?;
    let root = own.find("root")?.ok_or_else(none)?;
    let uid = root.stat()?.st_uid;
    if !find::is_jail_user(uid) {
        return Err(error(
            HelperCode::Denied,
            format!("the jail of machine {machine} belongs to user {uid}"),
        ));
    }
    let into = destination(ctx, &own, into)?;
    for (from, to) in SAVED {
        let moved = aside(&root, &own, from).and_then(|()| hand_over(ctx, &own, uid, from, &into, to));
        if let Err(e) = moved {
            let _ = tree::remove(&own, ASIDE);
            return Err(e);
        }
    }
    Ok(())
}

/// The owner's directory, by this process's own mounts.
fn destination(ctx: &Ctx, own: &Dir, into: OwnedFd) -> Result<OwnedFd, HelperError> {
    let denied = |why: &str| error(HelperCode::Denied, format!("the directory is refused: {why}"));
    let flags = rustix::fs::fcntl_getfl(&into).map_err(|e| failed("look at the directory", e))?;
    let stat = rustix::fs::fstat(&into).map_err(|e| failed("look at the directory", e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(denied("it is none"));
    }
    if flags.contains(OFlags::PATH) {
        return Err(denied("its descriptor is a place, not an open directory (O_PATH)"));
    }
    if stat.st_uid != ctx.record.owner.uid {
        return Err(denied(&format!("it belongs to user {}", stat.st_uid)));
    }
    if stat.st_dev != own.stat()?.st_dev {
        return Err(denied("it is on another file system than the jails"));
    }
    if mount_of(&into)? == own.mount_id()? {
        return Ok(into);
    }
    let same = jails::same_file(ctx, &into, &stat)?;
    same.ok_or_else(|| denied("it cannot be reached from where the helper is"))
}

fn mount_of(fd: &OwnedFd) -> Result<u64, HelperError> {
    let stat = rustix::fs::statx(fd, c"", rustix::fs::AtFlags::EMPTY_PATH, rustix::fs::StatxFlags::MNT_ID)
        .map_err(|e| failed("look at the directory", e))?;
    Ok(stat.stx_mnt_id)
}

/// Moves what a name in the jail leads to, whatever it is, to where only root reaches.
fn aside(root: &Dir, own: &Dir, from: &str) -> Result<(), HelperError> {
    tree::remove(own, ASIDE).map_err(|details| HelperError {
        details,
        ..error(HelperCode::Failed, "cannot remove what an earlier collection has left")
    })?;
    rustix::fs::renameat(root.fd(), from, own.fd(), ASIDE).map_err(|e| match e {
        Errno::NOENT => error(HelperCode::NotFound, format!("the engine has not saved `{from}`")),
        e => failed(format!("move `{from}` out of the jail"), e),
    })
}

fn hand_over(ctx: &Ctx, own: &Dir, uid: u32, from: &str, into: &OwnedFd, to: &str) -> Result<(), HelperError> {
    let denied = |why: &str| error(HelperCode::Denied, format!("`{from}` is refused: {why}"));
    let (fd, stat) = own.file(ASIDE)?.ok_or_else(|| denied("it is gone"))?;
    check(&stat, uid).map_err(denied)?;
    let owner = &ctx.record.owner;
    let what = |e| failed(format!("hand over `{from}`"), e);
    rustix::fs::fchown(&fd, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid))).map_err(what)?;
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o444)).map_err(what)?;
    // A second name that was made in between is found now, and none can be made any more: the file is another's.
    let stat = rustix::fs::fstat(&fd).map_err(what)?;
    check(&stat, owner.uid).map_err(denied)?;
    rustix::fs::renameat_with(own.fd(), ASIDE, into, to, RenameFlags::NOREPLACE).map_err(|e| match e {
        Errno::EXIST => error(
            HelperCode::Conflict,
            format!("there is a file `{to}` in the directory already"),
        ),
        e => failed(format!("move `{from}` to the owner"), e),
    })
}

fn check(stat: &Stat, uid: u32) -> Result<(), &'static str> {
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        Err("it is not a regular file")
    } else if stat.st_uid != uid {
        Err("it is not the engine's own")
    } else if stat.st_nlink != 1 {
        Err("it has several names")
    } else {
        Ok(())
    }
}
