//! A machine's jail: the directory, made before the jailer is started, opened to the owner after, and removed.
//!
//! ```text
//!   <jails>/firecracker/<id>/         root 0700, and an access control list by which the owner's user passes through
//!   <jails>/firecracker/<id>/root/    the chroot. The jailer makes it the engine's own; then it is 0755: a user who passes
//!                                     the directory above enters it and reads in it, and writes nothing
//!           …/root/{root,work}        block nodes of the engine's user, 0600
//!           …/root/*.sock*            the engine's sockets; once opened the owner's, 0600
//!           …/root/metrics            a pipe that the engine writes and the owner reads
//! ```
//!
//! So two users reach what is in the chroot, guest memory included: the owner's, by the list, and the engine's, which is inside. No right
//! comes from the owner's group, which others may have too.
//!
//! Whatever is looked at in the chroot after the engine has started may have been put there by a hostile engine, at any moment.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use banger_system::helper::{HelperCode, HelperError, JailFile};
use banger_system::id::MachineId;
use banger_system::names::{self, jail};
use banger_system::net::jail_uid;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, StatVfsMountFlags, Uid};
use rustix::io::Errno;

use super::dir::Dir;
use super::{Launch, mounts, tree};
use crate::ctx::{Ctx, error, failed};
use crate::disk;
use crate::disk::gate::{self, Access};

/// Mode of what everybody may enter and only root may read.
const ENTER: u32 = 0o711;
/// Mode of a file that is linked into a jail.
const SHARED: u32 = 0o444;

/// Name of a file in a jail.
fn file_name(file: JailFile) -> &'static str {
    match file {
        JailFile::Kernel => jail::KERNEL,
        JailFile::Initrd => jail::INITRD,
        JailFile::Memory => jail::MEMORY,
        JailFile::State => jail::STATE,
    }
}

/// Directory of all jails of Firecracker.
fn jails(ctx: &Ctx) -> Result<Dir, HelperError> {
    Dir::ensure_path(&ctx.layout.jails(), ENTER)?.ensure(names::FIRECRACKER, ENTER)
}

/// Makes a jail with everything that the engine needs in it. What an engine has left there is removed first.
pub(super) fn prepare(ctx: &Ctx, launch: &Launch, files: Vec<OwnedFd>) -> Result<Dir, HelperError> {
    let all = jails(ctx)?;
    tree::remove(&all, launch.machine.as_str()).map_err(|details| HelperError {
        details,
        ..error(
            HelperCode::Failed,
            format!("cannot remove the old jail of machine {}", launch.machine),
        )
    })?;
    let own = all.ensure(launch.machine.as_str(), 0o700)?;
    own.admit(ctx.record.owner.uid)?;
    let root = own.ensure("root", 0o700)?;
    check_mount(&root)?;
    for (file, fd) in launch.files.iter().zip(files) {
        share(ctx, &root, *file, fd)?;
    }
    // As long as the directory is root's, nobody can put anything into the way.
    let uid = jail_uid(launch.slot);
    for role in &launch.disks {
        let dev = disk::device(&launch.machine, *role)?;
        root.block_node(jail::disk(*role), dev, uid, uid)?;
    }
    root.fifo(jail::METRICS, uid)?;
    Ok(root)
}

/// Nodes and programs work where jails are.
fn check_mount(root: &Dir) -> Result<(), HelperError> {
    let fs = rustix::fs::fstatvfs(root.fd()).map_err(|e| failed("look at the jails' file system", e))?;
    for (flag, name) in [
        (StatVfsMountFlags::NODEV, "nodev"),
        (StatVfsMountFlags::NOEXEC, "noexec"),
    ] {
        if fs.f_flag.contains(flag) {
            let text = format!("{} is on a file system that is mounted `{name}`", root.path().display());
            return Err(error(HelperCode::Unsupported, text));
        }
    }
    Ok(())
}

/// Links a file into a jail.
fn share(ctx: &Ctx, root: &Dir, file: JailFile, fd: OwnedFd) -> Result<(), HelperError> {
    let name = file_name(file);
    let checked = gate::regular(fd, name, Access::Read, &[ctx.record.owner.uid, 0])?;
    let denied = |why: String| error(HelperCode::Denied, format!("the {name} is refused: {why}"));
    if checked.stat.st_mode & 0o7777 != SHARED {
        return Err(denied(format!(
            "its mode is {:o}, not 444",
            checked.stat.st_mode & 0o7777
        )));
    }
    if checked.stat.st_dev != root.stat()?.st_dev {
        return Err(denied(format!(
            "it is on another file system than {}",
            root.path().display()
        )));
    }
    match link(ctx, &checked.fd, root, name) {
        // On the same file system, but reached by another mount: the daemon's unit and the helper's have mounts of their own.
        Err(Errno::XDEV) => {
            let same = same_file(ctx, &checked.fd, &checked.stat)?
                .ok_or_else(|| denied("it cannot be reached from where the helper is".into()))?;
            link(ctx, &same, root, name)
        }
        other => other,
    }
    .map_err(|e| match e {
        Errno::NOSPC | Errno::DQUOT => error(
            HelperCode::NoSpace,
            format!("cannot link the {name} into the jail: {e}"),
        ),
        e => failed(format!("link the {name} into the jail"), e),
    })
}

fn link(ctx: &Ctx, fd: &OwnedFd, root: &Dir, name: &str) -> rustix::io::Result<()> {
    let from = ctx.proc.join(format!("self/fd/{}", fd.as_raw_fd()));
    rustix::fs::linkat(rustix::fs::CWD, &from, root.fd(), name, AtFlags::SYMLINK_FOLLOW)
}

/// The same file, or directory, as a descriptor's, opened by this process's own mounts (`O_PATH`). Where it is, the kernel says; that
/// it is the same is checked, and what was opened stays that. None if it is not there.
pub(super) fn same_file(ctx: &Ctx, fd: &OwnedFd, stat: &Stat) -> Result<Option<OwnedFd>, HelperError> {
    let link = ctx.proc.join(format!("self/fd/{}", fd.as_raw_fd()));
    let path = std::fs::read_link(&link).map_err(|e| failed("look where a descriptor leads", e))?;
    let Ok(relative) = path.strip_prefix("/") else {
        return Ok(None);
    };
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = |dir: &OwnedFd, name: &std::ffi::OsStr| rustix::fs::openat(dir, name, flags, Mode::empty());
    let mut here = rustix::fs::open("/", flags, Mode::empty()).map_err(|e| failed("open /", e))?;
    for part in relative.iter() {
        // A link on the way is not followed: opened as itself, nothing is found in it.
        match open(&here, part) {
            Ok(next) => here = next,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS) => return Ok(None),
            Err(e) => return Err(failed(format!("open {}", path.display()), e)),
        }
    }
    let found = rustix::fs::fstat(&here).map_err(|e| failed(format!("look at {}", path.display()), e))?;
    Ok(((found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino)).then_some(here))
}

/// Closes the jails that there are, as [`prepare`] does: those that an older helper made were open to the owner's group.
pub(super) fn close(ctx: &Ctx) -> Result<(), HelperError> {
    let Some(all) = Dir::find_path(&ctx.layout.jails().join(names::FIRECRACKER))? else {
        return Ok(());
    };
    for name in all.names()? {
        if MachineId::parse(&name).is_ok()
            && let Some(own) = all.find(&name)?
        {
            own.trusted()?;
            own.admit(ctx.record.owner.uid)?;
        }
    }
    Ok(())
}

/// Lets the owner into the chroot of an engine that has started: enter and list, no more.
pub(super) fn let_in(root: &Dir) -> Result<(), HelperError> {
    root.set_mode(0o755)?;
    // Written by the jailer, before it became the engine.
    if let Some((fd, stat)) = root.file(jail::PID)?
        && stat.st_uid == rustix::process::geteuid().as_raw()
        && stat.st_nlink == 1
    {
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(SHARED)).map_err(|e| failed("open the pidfile to the owner", e))?;
    }
    Ok(())
}

/// Opens the sockets that an engine has made to the owner. What is not there yet is left out.
pub(super) fn open(ctx: &Ctx, root: &Dir) -> Result<(), HelperError> {
    let (uid, owner) = (root.stat()?.st_uid, ctx.record.owner.uid);
    for name in [jail::API, jail::AGENT] {
        let Some((fd, stat)) = root.place(name)? else { continue };
        let denied = |why: &str| {
            let text = format!("{} is refused: {why}", root.path().join(name).display());
            Err(error(HelperCode::Denied, text))
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
            return denied("it is no socket");
        }
        if stat.st_uid == owner {
            // It has been opened already.
            continue;
        }
        if stat.st_uid != uid {
            return denied("it is not the engine's own");
        }
        if stat.st_nlink != 1 {
            return denied("it has several names");
        }
        // By the descriptor: what the name leads to now does not matter any more.
        let path = ctx.proc.join(format!("self/fd/{}", fd.as_raw_fd()));
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::chownat(fd.as_fd(), c"", Some(Uid::from_raw(owner)), None, AtFlags::EMPTY_PATH)
            .and_then(|()| rustix::fs::chmodat(rustix::fs::CWD, &path, mode, AtFlags::empty()))
            .map_err(|e| failed(format!("open {} to the owner", root.path().join(name).display()), e))?;
    }
    Ok(())
}

/// Removes a machine's jail. None there is fine.
pub(super) fn remove(ctx: &Ctx, machine: &MachineId) -> Result<(), Vec<String>> {
    let base = ctx.layout.jails().join(names::FIRECRACKER);
    let Some(all) = Dir::find_path(&base).map_err(|e| vec![e.message])? else {
        return Ok(());
    };
    let mounted = mounted(ctx, &base.join(machine.as_str()));
    if !mounted.is_empty() {
        return Err(mounted
            .into_iter()
            .map(|at| format!("{} is mounted by somebody, so the jail is left alone", at.display()))
            .collect());
    }
    tree::remove(&all, machine.as_str())
}

/// Mounts at or below a machine's jail. banger makes none: the jailer's are in a namespace of their own.
pub(super) fn mounted(ctx: &Ctx, dir: &Path) -> Vec<std::path::PathBuf> {
    let text = std::fs::read_to_string(ctx.proc.join("self/mountinfo")).unwrap_or_default();
    let below = mounts::below(&text, dir);
    let on = mounts::parse(&text).into_iter().map(|m| m.at).filter(|at| at == dir);
    below.into_iter().chain(on).collect()
}

/// The jails that there are.
pub(super) fn all(ctx: &Ctx) -> Result<Vec<MachineId>, HelperError> {
    let Some(dir) = Dir::find_path(&ctx.layout.jails().join(names::FIRECRACKER))? else {
        return Ok(Vec::new());
    };
    let names = dir.names()?;
    Ok(names.iter().filter_map(|name| MachineId::parse(name).ok()).collect())
}
