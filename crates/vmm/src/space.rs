//! Space on the host's disk: whether there is some, and files that hold theirs for good.
//!
//! A file system says that it is full in many ways: `ENOSPC`, `EDQUOT`, an error of a library or the words of a program. Where only
//! words are left, [`is_full`] asks the file system itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom, fallocate, fstatfs, open, seek, statvfs};
use rustix::io::Errno;

/// Bytes that are written at a time.
const BATCH: usize = 64 << 10;
/// How much has to be there so that a disk does not count as full, in bytes.
const LITTLE: u64 = 256 << 10;
/// `TMPFS_MAGIC`
const TMPFS: i64 = 0x0102_1994;

/// Whether an error says that there is no space, or that a quota is used up.
pub fn says_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Takes so many bytes in the directory, as this user, and gives them back at once. An error says why they can't be had; a quota and
/// the blocks that some file systems keep for root count.
pub fn probe(dir: &Path, bytes: u64) -> io::Result<()> {
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let taken =
        open(dir, flags, Mode::RUSR | Mode::WUSR).and_then(|file| fallocate(&file, FallocateFlags::empty(), 0, bytes));
    match taken {
        // File systems without such files, or without such a call.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {
            let found = statvfs(dir)?;
            match found.f_bavail.saturating_mul(found.f_frsize) >= bytes {
                true => Ok(()),
                false => Err(io::ErrorKind::StorageFull.into()),
            }
        }
        other => Ok(other?),
    }
}

/// Whether the directory's file system is full for this user. False where that can't be told.
pub fn is_full(dir: &Path) -> bool {
    probe(dir, LITTLE).is_err_and(|e| says_full(&e))
}

/// An I/O error of something that failed in the directory: a full disk if the disk is full, else the error as it is.
pub(crate) fn judged(dir: &Path, error: io::Error) -> io::Error {
    match !says_full(&error) && is_full(dir) {
        true => io::Error::new(io::ErrorKind::StorageFull, error),
        false => error,
    }
}

/// Gives every byte of a file a block of its own, its first `at_least` bytes at any rate: holes and what is missing at its end are
/// written with zeros, so that overwriting any of it needs no new space. The file is made if it is not there. What could not be
/// written stays missing; the file's content is what it was.
pub fn fill(path: &Path, at_least: u64) -> io::Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    let length = file.metadata()?.len();
    let mut changed = false;
    let mut at = 0;
    while at < length {
        // Where the file system knows no holes there are none that could be found.
        let Ok(hole) = seek(&file, SeekFrom::Hole(at)) else {
            break;
        };
        if hole >= length {
            break;
        }
        let end = match seek(&file, SeekFrom::Data(hole)) {
            Ok(end) => end.min(length),
            Err(Errno::NXIO) => length,
            Err(_) => break,
        };
        zeros(&file, hole, end)?;
        (changed, at) = (true, end);
    }
    if length < at_least {
        zeros(&file, length, at_least)?;
        changed = true;
    }
    // A file system may promise blocks that it does not find in the end.
    if changed { file.sync_data() } else { Ok(()) }
}

fn zeros(file: &File, from: u64, to: u64) -> io::Result<()> {
    let zeros = [0; BATCH];
    let mut at = from;
    while at < to {
        let count = usize::try_from(to - at).map_or(BATCH, |left| left.min(BATCH));
        file.write_all_at(zeros.get(..count).unwrap_or_default(), at)?;
        at += count as u64;
    }
    Ok(())
}

/// Makes sure that a mapped file can be read to its end. On tmpfs even a hole takes memory when it is read, and a process that reads
/// one while there is none is ended by SIGBUS: there the whole file gets its memory now. Elsewhere a hole costs nothing.
pub fn settle_mapped(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    if fstatfs(&file)?.f_type != TMPFS {
        return Ok(());
    }
    let meta = file.metadata()?;
    if meta.blocks().saturating_mul(512) >= meta.len() {
        return Ok(());
    }
    let file = OpenOptions::new().write(true).open(path)?;
    match fallocate(&file, FallocateFlags::KEEP_SIZE, 0, meta.len()) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_what_is_missing_get_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = File::create(&path).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"middle", 200_000).unwrap();
        file.set_len(300_000).unwrap();
        // Promised is not written: overwriting it may need space for what lists it.
        fallocate(&file, FallocateFlags::empty(), 0, 100_000).unwrap();
        drop(file);
        fill(&path, 500_000).unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!(meta.len(), 500_000);
        assert!(meta.blocks() * 512 >= 500_000, "{} blocks", meta.blocks());
        let file = File::open(&path).unwrap();
        assert_eq!(seek(&file, SeekFrom::Hole(0)).unwrap(), 500_000);
        let mut bytes = vec![1; 500_000];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!((&bytes[..5], &bytes[200_000..200_006]), (&b"begin"[..], &b"middle"[..]));
        assert_eq!(bytes.iter().filter(|b| **b != 0).count(), 11);
        // What has all its blocks is not written again.
        let before = std::fs::metadata(&path).unwrap().mtime_nsec();
        fill(&path, 1000).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mtime_nsec(), before);
    }

    #[test]
    fn what_is_mapped_from_tmpfs_has_all_its_pages() {
        let shared = Path::new("/dev/shm");
        let on_tmpfs = open(shared, OFlags::RDONLY, Mode::empty())
            .and_then(|dir| fstatfs(&dir))
            .is_ok_and(|found| found.f_type == TMPFS);
        let Ok(dir) = tempfile::tempdir_in(shared).map_err(drop) else {
            eprintln!("skipped: no /dev/shm");
            return;
        };
        if !on_tmpfs {
            eprintln!("skipped: /dev/shm is no tmpfs");
            return;
        }
        let path = dir.path().join("memory");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        settle_mapped(&path).unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.len(), meta.blocks() * 512), (1 << 20, 1 << 20));
        let found = statvfs(dir.path()).unwrap();
        let all = found.f_blocks.saturating_mul(found.f_frsize);
        if (1..1 << 40).contains(&all) {
            File::create(&path).unwrap().set_len(all * 2).unwrap();
            let refused = settle_mapped(&path).unwrap_err();
            assert!(says_full(&refused), "{refused}");
        }
    }

    #[test]
    fn more_than_there_is_cannot_be_had() {
        let dir = tempfile::tempdir().unwrap();
        probe(dir.path(), 4096).unwrap();
        assert!(!is_full(dir.path()));
        let found = statvfs(dir.path()).unwrap();
        let all = found.f_blocks.saturating_mul(found.f_frsize);
        let refused = probe(dir.path(), all.saturating_mul(2)).unwrap_err();
        // Where one file may not be so large, that is said first.
        assert!(
            says_full(&refused) || refused.kind() == io::ErrorKind::FileTooLarge,
            "{refused}"
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(
            probe(&dir.path().join("none"), 1).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
