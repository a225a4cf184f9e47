//! Seals: what a file was when it was put away, so that damage is found before the file is used.
//!
//! A seal holds size and digest of the content, and by what the file can be known again without reading it: inode, time of its
//! last change, and the boot of the host in which that was seen. As long as those are the same nothing has been written to the
//! file through its file system, and it is not read. After a restart of the host, or for a copy, or when anything was written, the
//! content decides.
//!
//! The digest is that of all 64 KiB blocks that are not zero, each after its number: where the holes are does not matter.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::{Digest, Hasher};
use crate::disk::copy::{for_data, is_zero};
use crate::error::{Error, IoContext, Result};

/// Bytes of a block.
const BLOCK: u64 = 64 << 10;
const BLOCK_USIZE: usize = 64 << 10;

/// What a file was when it was sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// Bytes of the file, holes included.
    pub size: u64,
    /// Digest of the content.
    pub digest: Digest,
    /// By what the file is known again.
    pub seen: Fingerprint,
}

/// By what a file that nobody has written to is known again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Inode.
    pub inode: u64,
    /// Time of the last change: seconds since the epoch …
    pub mtime_s: i64,
    /// … and nanoseconds.
    pub mtime_ns: i64,
    /// Boot of the host in which it was seen.
    pub host_boot_id: String,
}

impl Fingerprint {
    fn of(meta: &Metadata, boot_id: &str) -> Self {
        Self {
            inode: meta.ino(),
            mtime_s: meta.mtime(),
            mtime_ns: meta.mtime_nsec(),
            host_boot_id: boot_id.to_owned(),
        }
    }
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// It is not there.
    #[error("{0} is missing")]
    Missing(PathBuf),
    /// It has another size.
    #[error("{path} is damaged: it has {found} bytes instead of {expected}")]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size when it was sealed.
        expected: u64,
        /// Its size now.
        found: u64,
    },
    /// It has other content.
    #[error("{0} is damaged: its content is not what was written")]
    Content(PathBuf),
    /// It cannot be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Seals a file that nobody writes to any more. Reads all of it.
pub fn seal(path: &Path, boot_id: &str) -> Result<Seal> {
    let file = File::open(path).on("open", path)?;
    let before = file.metadata().on("read", path)?;
    let digest = digest(&file).on("read", path)?;
    let seen = Fingerprint::of(&file.metadata().on("read", path)?, boot_id);
    if seen != Fingerprint::of(&before, boot_id) {
        return Err(Error::Damaged {
            path: path.to_owned(),
            why: "it was written to while it was sealed".to_owned(),
        });
    }
    Ok(Seal {
        size: before.len(),
        digest,
        seen,
    })
}

/// Checks that a file is what it was. Reads it only if it may have been written to since.
pub fn check(path: &Path, seal: &Seal, boot_id: &str) -> Result<(), SealError> {
    let unreadable = |source: io::Error| SealError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let meta = match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(SealError::Missing(path.to_owned())),
        other => other.map_err(unreadable)?,
    };
    if !meta.is_file() {
        return Err(SealError::Content(path.to_owned()));
    }
    if meta.len() != seal.size {
        return Err(SealError::Size {
            path: path.to_owned(),
            expected: seal.size,
            found: meta.len(),
        });
    }
    if Fingerprint::of(&meta, boot_id) == seal.seen {
        return Ok(());
    }
    let found = File::open(path).and_then(|file| digest(&file)).map_err(unreadable)?;
    if found == seal.digest {
        Ok(())
    } else {
        Err(SealError::Content(path.to_owned()))
    }
}

pub(crate) fn digest(file: &File) -> io::Result<Digest> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; BLOCK_USIZE];
    // The next block that has not been looked at: one block may hold several stretches of data.
    let mut next = 0;
    for_data(file, |range| {
        for number in (range.start / BLOCK).max(next)..range.end.div_ceil(BLOCK) {
            let block = read_block(file, number, &mut buffer)?;
            if !is_zero(block) {
                hasher.update(&number.to_le_bytes());
                hasher.update(block);
            }
            next = number + 1;
        }
        Ok(())
    })?;
    Ok(hasher.finish())
}

/// A block; the last one of a file may be shorter.
fn read_block<'a>(file: &File, number: u64, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, number * BLOCK + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(buffer.get(..filled).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::time::{Duration, SystemTime};

    use proptest::prelude::*;

    use super::*;

    const BOOT: &str = "0f";

    /// Writes pieces to a file of this size; zeros in full where `dense`.
    fn file(path: &Path, size: u64, pieces: &[(u64, Vec<u8>)], dense: bool) {
        let _ = fs::remove_file(path);
        let file = File::create(path).unwrap();
        if dense {
            file.write_all_at(&vec![0; usize::try_from(size).unwrap()], 0).unwrap();
        }
        file.set_len(size).unwrap();
        for (at, bytes) in pieces {
            let room = usize::try_from(size.saturating_sub(*at)).unwrap().min(bytes.len());
            file.write_all_at(&bytes[..room], *at).unwrap();
        }
    }

    /// Changes a byte and makes it look as if nobody had.
    fn flip(path: &Path, at: u64) {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        // A clock that ticks coarsely may show the same time as before.
        file.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
    }

    #[test]
    fn an_unchanged_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        file(&path, 1 << 20, &[(70_000, vec![7; 10])], false);
        let seal = seal(&path, BOOT).unwrap();
        let mut lie = seal.clone();
        lie.digest = Digest::of(b"another");
        check(&path, &lie, BOOT).unwrap();
        // In another boot of the host, as a copy or after a change it is.
        assert!(matches!(check(&path, &lie, "1f"), Err(SealError::Content(p)) if p == path));
        check(&path, &seal, "1f").unwrap();
        let copy = dir.path().join("copy");
        fs::copy(&path, &copy).unwrap();
        check(&copy, &seal, BOOT).unwrap();
        assert!(matches!(check(&copy, &lie, BOOT), Err(SealError::Content(p)) if p == copy));
        // A hard link is the same file.
        let link = dir.path().join("link");
        fs::hard_link(&path, &link).unwrap();
        check(&link, &lie, BOOT).unwrap();
    }

    #[test]
    fn what_is_wrong_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        file(&path, 100_000, &[(99_999, vec![1])], false);
        let sealed = seal(&path, BOOT).unwrap();
        flip(&path, 0);
        let error = check(&path, &sealed, BOOT).unwrap_err();
        assert!(matches!(&error, SealError::Content(p) if *p == path), "{error}");
        fs::write(&path, b"short").unwrap();
        let error = check(&path, &sealed, BOOT).unwrap_err();
        assert!(
            matches!(
                &error,
                SealError::Size {
                    expected: 100_000,
                    found: 5,
                    ..
                }
            ),
            "{error}"
        );
        fs::remove_file(&path).unwrap();
        assert!(matches!(check(&path, &sealed, BOOT), Err(SealError::Missing(_))));
        assert!(seal(&path, BOOT).is_err());
        fs::create_dir(&path).unwrap();
        assert!(check(&path, &sealed, BOOT).is_err());
        let text = serde_json::to_string(&sealed).unwrap();
        assert_eq!(serde_json::from_str::<Seal>(&text).unwrap(), sealed);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Holes or zeros, it is the same content; any byte that differs is found.
        #[test]
        fn content_decides(
            size in 1u64..400_000,
            pieces in proptest::collection::vec((0u64..400_000, proptest::collection::vec(0u8..3, 1..5000)), 0..6),
            at: proptest::sample::Index,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (sparse, dense) = (dir.path().join("sparse"), dir.path().join("dense"));
            file(&sparse, size, &pieces, false);
            file(&dense, size, &pieces, true);
            let sealed = seal(&sparse, BOOT).unwrap();
            let other = seal(&dense, BOOT).unwrap();
            prop_assert_eq!((sealed.size, sealed.digest), (other.size, other.digest));
            check(&dense, &sealed, BOOT).unwrap();
            let at = at.index(usize::try_from(size).unwrap()) as u64;
            flip(&dense, at);
            prop_assert!(matches!(check(&dense, &sealed, BOOT), Err(SealError::Content(_))));
            flip(&dense, at);
            check(&dense, &sealed, BOOT).unwrap();
        }
    }
}
