//! Which descriptors are taken: what a hostile daemon hands over is looked at here before the kernel is told of it.

use std::os::fd::{AsFd, OwnedFd};

use banger_system::helper::{HelperCode, HelperError};
use rustix::fs::{FileType, OFlags, Stat};

use crate::ctx::{error, failed};

/// How a file has to be open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// For reading, and nothing else.
    Read,
    /// For reading and writing.
    ReadWrite,
}

/// A file system that files may be on: one whose reads and writes depend on nobody else than the kernel. Of a file system in user
/// space (FUSE) a block device would wait for a process of the owner's; what is below `/proc` and `/sys` is no storage at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Storage {
    /// Direct I/O works on it, and pages that change while they are written do no harm.
    Direct,
    /// It is gone through the page cache.
    Cached,
}

/// Kinds of file systems by their magic numbers.
fn storage(magic: u64) -> Option<Storage> {
    match magic {
        // ext2, ext3, ext4; XFS
        0xEF53 | 0x5846_5342 => Some(Storage::Direct),
        // btrfs (checksums over pages that may still change); tmpfs; overlayfs; F2FS; bcachefs; ZFS
        0x9123_683E | 0x0102_1994 | 0x794c_7630 | 0xF2F5_2010 | 0xca45_1a4e | 0x2fc1_2fc1 => Some(Storage::Cached),
        _ => None,
    }
}

/// A descriptor that has passed.
#[derive(Debug)]
pub(crate) struct Checked {
    /// It.
    pub(crate) fd: OwnedFd,
    /// Of the file.
    pub(crate) stat: Stat,
    /// Where it is.
    pub(crate) storage: Storage,
}

/// Takes a regular file of one of the owners, open in just this way, on a file system that stores.
pub(crate) fn regular(fd: OwnedFd, what: &str, access: Access, owners: &[u32]) -> Result<Checked, HelperError> {
    let denied = |why: String| error(HelperCode::Denied, format!("the {what} is refused: {why}"));
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(|e| failed(format!("look at the {what}"), e))?;
    if flags.contains(OFlags::PATH) {
        return Err(denied("its descriptor is a place, not an open file (O_PATH)".into()));
    }
    let stat = rustix::fs::fstat(&fd).map_err(|e| failed(format!("look at the {what}"), e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(denied("it is not a regular file".into()));
    }
    let wanted = match access {
        Access::Read => OFlags::RDONLY,
        Access::ReadWrite => OFlags::RDWR,
    };
    if flags & OFlags::ACCMODE != wanted {
        let way = match access {
            Access::Read => "for reading alone",
            Access::ReadWrite => "for reading and writing",
        };
        return Err(denied(format!("it is not open {way}")));
    }
    if flags.contains(OFlags::APPEND) {
        return Err(denied("it is open for appending".into()));
    }
    if !owners.contains(&stat.st_uid) {
        return Err(denied(format!("it belongs to user {}", stat.st_uid)));
    }
    let storage = storage_of(&fd)?.ok_or_else(|| denied("it is on a file system that stores no files".into()))?;
    Ok(Checked { fd, stat, storage })
}

/// Where a file is.
fn storage_of(fd: impl AsFd) -> Result<Option<Storage>, HelperError> {
    let fs = rustix::fs::fstatfs(fd).map_err(|e| failed("look at a file system", e))?;
    Ok(storage(u64::from((fs.f_type as u64) as u32)))
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    fn me() -> u32 {
        rustix::process::getuid().as_raw()
    }

    fn code(file: File, access: Access, owners: &[u32]) -> Result<(), HelperCode> {
        regular(file.into(), "base", access, owners)
            .map(drop)
            .map_err(|e| e.code)
    }

    #[test]
    fn only_regular_files_of_the_owner_opened_just_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "x").unwrap();
        let read = || File::open(&path).unwrap();
        let write = || OpenOptions::new().read(true).write(true).open(&path).unwrap();
        assert_eq!(code(read(), Access::Read, &[me()]), Ok(()));
        assert_eq!(code(write(), Access::ReadWrite, &[me()]), Ok(()));
        let refused = Err(HelperCode::Denied);
        assert_eq!(code(read(), Access::ReadWrite, &[me()]), refused);
        assert_eq!(
            code(write(), Access::Read, &[me()]),
            refused,
            "who could write could change it later"
        );
        assert_eq!(code(read(), Access::Read, &[me() + 1]), refused, "another's");
        let place = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(&path)
            .unwrap();
        assert_eq!(code(place, Access::Read, &[me()]), refused, "O_PATH");
        let append = OpenOptions::new().read(true).append(true).open(&path).unwrap();
        assert_eq!(code(append, Access::ReadWrite, &[me()]), refused, "O_APPEND");
        for special in ["/dev/null", "/proc/self/maps", "/sys/kernel/uevent_seqnum", "/tmp"] {
            let file = File::open(special).unwrap();
            assert_eq!(code(file, Access::Read, &[0, me()]), refused, "{special}");
        }
        let (end, _other) = rustix::pipe::pipe().unwrap();
        assert_eq!(code(end.into(), Access::Read, &[me()]), refused, "a pipe");
    }
}
