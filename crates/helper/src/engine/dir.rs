//! Directories that root writes to, held open: everything below them is reached from the descriptor, one name at a time, and no link is
//! ever followed.
//!
//! `openat2` would say the same in fewer calls, but a unit with `RestrictSUIDSGID` has none (its filter cannot look at the mode).

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use banger_system::helper::{HelperCode, HelperError};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, StatxFlags, Uid};
use rustix::io::Errno;

use crate::ctx::{error, failed};

/// A directory, open.
#[derive(Debug)]
pub(crate) struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

/// A name in a directory: one component, nothing that leads elsewhere.
fn is_name(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    !bytes.is_empty() && bytes != b"." && bytes != b".." && !bytes.iter().any(|b| matches!(b, b'/' | 0))
}

const OPEN: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

impl Dir {
    /// A directory of root's, by its path; none if it is not there. Links above its parent are root's business.
    pub(crate) fn find_path(path: &Path) -> Result<Option<Self>, HelperError> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(error(
                HelperCode::Failed,
                format!("{} names no directory", path.display()),
            ));
        };
        let fd = match rustix::fs::open(parent, OPEN.difference(OFlags::NOFOLLOW), Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(failed(format!("open {}", parent.display()), e)),
        };
        let parent = Self {
            fd,
            path: parent.to_owned(),
        };
        let Some(dir) = parent.find(name)? else {
            return Ok(None);
        };
        dir.trusted()?;
        Ok(Some(dir))
    }

    /// The same, made where it is not there.
    pub(crate) fn ensure_path(path: &Path, mode: u32) -> Result<Self, HelperError> {
        if let Some(dir) = Self::find_path(path)? {
            return Ok(dir);
        }
        let parent = path.parent().unwrap_or(Path::new("/"));
        std::fs::DirBuilder::new()
            .recursive(true)
            .create(parent)
            .map_err(|e| failed(format!("make {}", parent.display()), e))?;
        let fd = rustix::fs::open(parent, OPEN.difference(OFlags::NOFOLLOW), Mode::empty())
            .map_err(|e| failed(format!("open {}", parent.display()), e))?;
        let parent = Self {
            fd,
            path: parent.to_owned(),
        };
        let name = path.file_name().unwrap_or_default();
        parent.ensure(name, mode)
    }

    /// Where it is, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn at(&self, name: &OsStr) -> String {
        self.path.join(name).display().to_string()
    }

    fn check(&self, name: &OsStr) -> Result<(), HelperError> {
        if is_name(name) {
            Ok(())
        } else {
            Err(error(
                HelperCode::Denied,
                format!(
                    "`{}` is not a name in {}",
                    name.as_bytes().escape_ascii(),
                    self.path.display()
                ),
            ))
        }
    }

    /// Of the directory itself.
    pub(crate) fn stat(&self) -> Result<Stat, HelperError> {
        rustix::fs::fstat(&self.fd).map_err(|e| failed(format!("look at {}", self.path.display()), e))
    }

    /// Of what has a name in it, links not followed; none if there is nothing.
    pub(crate) fn stat_of(&self, name: impl AsRef<OsStr>) -> Result<Option<Stat>, HelperError> {
        let name = name.as_ref();
        self.check(name)?;
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(failed(format!("look at {}", self.at(name)), e)),
        }
    }

    /// Which mount it is on.
    pub(crate) fn mount_id(&self) -> Result<u64, HelperError> {
        let stat = rustix::fs::statx(&self.fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
            .map_err(|e| failed(format!("look at {}", self.path.display()), e))?;
        Ok(stat.stx_mnt_id)
    }

    /// Refuses a directory that anybody else than root can change.
    pub(crate) fn trusted(&self) -> Result<(), HelperError> {
        let stat = self.stat()?;
        if stat.st_uid == rustix::process::geteuid().as_raw() && stat.st_mode & 0o022 == 0 {
            return Ok(());
        }
        Err(error(
            HelperCode::Denied,
            format!(
                "{} is not root's alone (user {}, mode {:o})",
                self.path.display(),
                stat.st_uid,
                stat.st_mode & 0o7777
            ),
        ))
    }

    /// A directory in it; none if there is nothing of that name. A link, or what else is no directory, is refused.
    pub(crate) fn find(&self, name: impl AsRef<OsStr>) -> Result<Option<Self>, HelperError> {
        let name = name.as_ref();
        self.check(name)?;
        match rustix::fs::openat(&self.fd, name, OPEN, Mode::empty()) {
            Ok(fd) => Ok(Some(Self {
                fd,
                path: self.path.join(name),
            })),
            Err(Errno::NOENT) => Ok(None),
            Err(e @ (Errno::LOOP | Errno::NOTDIR)) => Err(error(
                HelperCode::Denied,
                format!("{} is not a directory: {e}", self.at(name)),
            )),
            Err(e) => Err(failed(format!("open {}", self.at(name)), e)),
        }
    }

    /// A directory of root's in it, made where it is not there, with just this mode.
    pub(crate) fn ensure(&self, name: impl AsRef<OsStr>, mode: u32) -> Result<Self, HelperError> {
        let name = name.as_ref();
        self.check(name)?;
        match rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(mode)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(made(e, "make", &self.at(name))),
        }
        let dir = self
            .find(name)?
            .ok_or_else(|| failed(format!("make {}", self.at(name)), "somebody removed it again"))?;
        dir.trusted()?;
        dir.set_mode(mode)?;
        Ok(dir)
    }

    /// Changes its mode.
    pub(crate) fn set_mode(&self, mode: u32) -> Result<(), HelperError> {
        rustix::fs::fchmod(&self.fd, Mode::from_raw_mode(mode))
            .map_err(|e| failed(format!("change the mode of {}", self.path.display()), e))
    }

    /// Closes it to everybody but root and one user, who may pass through.
    pub(crate) fn admit(&self, uid: u32) -> Result<(), HelperError> {
        super::acl::admit(&self.fd, uid).map_err(|e| match e {
            Errno::OPNOTSUPP => error(
                HelperCode::Unsupported,
                format!(
                    "{} is on a file system without access control lists, which jails need",
                    self.path.display()
                ),
            ),
            e => failed(format!("let user {uid} into {}", self.path.display()), e),
        })
    }

    /// Opens a regular file in it for reading; none if there is nothing of that name. Anything else is refused.
    pub(crate) fn file(&self, name: impl AsRef<OsStr>) -> Result<Option<(OwnedFd, Stat)>, HelperError> {
        let name = name.as_ref();
        self.check(name)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        // Looked at before it is opened: to open a device or a pipe is to do something to it.
        match self.stat_of(name)? {
            None => return Ok(None),
            Some(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {}
            Some(_) => {
                return Err(error(
                    HelperCode::Denied,
                    format!("{} is not a regular file", self.at(name)),
                ));
            }
        }
        match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => {
                let stat = rustix::fs::fstat(&fd).map_err(|e| failed(format!("look at {}", self.at(name)), e))?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                    return Err(error(
                        HelperCode::Denied,
                        format!("{} is not a regular file", self.at(name)),
                    ));
                }
                Ok(Some((fd, stat)))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::LOOP) => Err(error(HelperCode::Denied, format!("{} is a link", self.at(name)))),
            Err(e) => Err(failed(format!("open {}", self.at(name)), e)),
        }
    }

    /// A place in it (`O_PATH`), whatever it is; none if there is nothing of that name.
    pub(crate) fn place(&self, name: impl AsRef<OsStr>) -> Result<Option<(OwnedFd, Stat)>, HelperError> {
        let name = name.as_ref();
        self.check(name)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => {
                let stat = rustix::fs::fstat(&fd).map_err(|e| failed(format!("look at {}", self.at(name)), e))?;
                Ok(Some((fd, stat)))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(failed(format!("look at {}", self.at(name)), e)),
        }
    }

    /// Removes a name that is no directory's. None there is fine.
    pub(crate) fn unlink(&self, name: impl AsRef<OsStr>) -> Result<(), HelperError> {
        let name = name.as_ref();
        self.check(name)?;
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(failed(format!("remove {}", self.at(name)), e)),
        }
    }

    /// Removes a name; a device node is made worthless first ([`disarm`]). None there is fine.
    pub(crate) fn retire(&self, name: impl AsRef<OsStr>) -> Result<(), HelperError> {
        let name = name.as_ref();
        if let Some((node, stat)) = self.place(name)?
            && matches!(
                FileType::from_raw_mode(stat.st_mode),
                FileType::BlockDevice | FileType::CharacterDevice
            )
        {
            disarm(&node).map_err(|e| failed(format!("disarm the node {}", self.at(name)), e))?;
        }
        self.unlink(name)
    }

    /// Makes the directory root's, mode 0700: from now on no other user changes what is in it.
    pub(crate) fn seize(&self) -> Result<(), HelperError> {
        let (uid, gid) = root();
        rustix::fs::fchown(&self.fd, Some(uid), Some(gid))
            .and_then(|()| rustix::fs::fchmod(&self.fd, Mode::from_raw_mode(0o700)))
            .map_err(|e| failed(format!("make {} root's", self.path.display()), e))
    }

    /// Removes an empty directory. None there is fine.
    pub(crate) fn rmdir(&self, name: impl AsRef<OsStr>) -> Result<(), HelperError> {
        let name = name.as_ref();
        self.check(name)?;
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(failed(format!("remove {}", self.at(name)), e)),
        }
    }

    /// Makes a block node of somebody's, 0600. This must be a directory of root's: between its making and its handing over nobody else
    /// may be able to put another in its place.
    pub(crate) fn block_node(&self, name: impl AsRef<OsStr>, dev: u64, uid: u32, gid: u32) -> Result<(), HelperError> {
        let name = name.as_ref();
        self.check(name)?;
        self.trusted()?;
        rustix::fs::mknodat(&self.fd, name, FileType::BlockDevice, Mode::from_raw_mode(0o600), dev)
            .map_err(|e| made(e, "make the node", &self.at(name)))?;
        rustix::fs::chownat(
            &self.fd,
            name,
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|e| failed(format!("hand over {}", self.at(name)), e))
    }

    /// Makes a pipe that a user writes, and that everybody reads who reaches it. As for nodes, this must be a directory of root's.
    pub(crate) fn fifo(&self, name: &str, uid: u32) -> Result<(), HelperError> {
        self.trusted()?;
        let path = self.at(name.as_ref());
        rustix::fs::mkfifoat(&self.fd, name, Mode::from_raw_mode(0o600))
            .map_err(|e| made(e, "make the pipe", &path))?;
        rustix::fs::chmodat(&self.fd, name, Mode::from_raw_mode(0o644), AtFlags::empty())
            .and_then(|()| {
                let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
                rustix::fs::chownat(&self.fd, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            })
            .map_err(|e| failed(format!("hand over {path}"), e))
    }

    /// Names in it, at most so many.
    pub(crate) fn some_names(&self, most: usize) -> Result<Vec<OsString>, HelperError> {
        let what = |e| failed(format!("list {}", self.path.display()), e);
        let mut found = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).map_err(what)? {
            let entry = entry.map_err(what)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if is_name(name) {
                found.push(name.to_owned());
                if found.len() >= most {
                    break;
                }
            }
        }
        Ok(found)
    }

    /// All names in it that are text.
    pub(crate) fn names(&self) -> Result<Vec<String>, HelperError> {
        let all = self.some_names(usize::MAX)?;
        Ok(all.into_iter().filter_map(|name| name.into_string().ok()).collect())
    }
}

/// User and group of this process: root's, where it is not a test's.
fn root() -> (Uid, Gid) {
    (rustix::process::geteuid(), rustix::process::getegid())
}

/// Makes a device node worthless for all users but root, also for one that holds a descriptor of it (`O_PATH`), a hard link or a bind mount of it.
///
/// A node's number outlives its device: the kernel gives it to the next device. To open the node again by a kept descriptor
/// (`/proc/self/fd/N`) the kernel asks for the rights of the **node**, so these have to go before the name does. The owner goes first:
/// whom the node belongs to could give the rights back. Mode 0 is also the mask of an access control list that the owner may have set.
/// What is already open for reading or writing is not concerned: it keeps its device from being removed.
fn disarm(node: &OwnedFd) -> rustix::io::Result<()> {
    let (uid, gid) = root();
    rustix::fs::chownat(node, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
    let path = format!("/proc/self/fd/{}", node.as_raw_fd());
    rustix::fs::chmodat(rustix::fs::CWD, path, Mode::empty(), AtFlags::empty())
}

/// An error of making something: a full file system is worth its own word.
fn made(e: Errno, what: &str, path: &str) -> HelperError {
    let code = match e {
        Errno::NOSPC | Errno::DQUOT => HelperCode::NoSpace,
        Errno::EXIST => HelperCode::Conflict,
        _ => HelperCode::Failed,
    };
    error(code, format!("cannot {what} {path}: {e}"))
}
