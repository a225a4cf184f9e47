//! Room that is kept for the end of machines: on a full disk a removal must still be written down, which is what makes room.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate};

/// More than the pages of a few rows in the write-ahead log.
const SIZE: u64 = 512 * 1024;

/// A file that is there to be removed.
#[derive(Debug, Clone)]
pub(super) struct Reserve {
    path: PathBuf,
}

impl Reserve {
    /// The reserve beside a database.
    pub(super) fn beside(database: &Path) -> Self {
        let reserve = Self {
            path: database.with_extension("reserve"),
        };
        reserve.fill();
        reserve
    }

    /// Takes the room again, and says whether it is there.
    pub(super) fn fill(&self) -> bool {
        if std::fs::metadata(&self.path).is_ok_and(|m| m.len() >= SIZE) {
            return true;
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let made = rustix::fs::open(&self.path, flags, Mode::RUSR | Mode::WUSR)
            .and_then(|fd| fallocate(File::from(fd).as_fd(), FallocateFlags::empty(), 0, SIZE));
        match made {
            Ok(()) => true,
            // A file system without the call: what is kept there is kept by luck.
            Err(rustix::io::Errno::OPNOTSUPP) => true,
            Err(e) => {
                tracing::warn!(error = %e, "no room is kept for the removal of machines");
                self.release();
                false
            }
        }
    }

    /// Gives the room away.
    pub(super) fn release(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_taken_and_given() {
        let tmp = tempfile::tempdir().unwrap();
        let reserve = Reserve::beside(&tmp.path().join("banger.db"));
        let file = tmp.path().join("banger.reserve");
        assert_eq!(std::fs::metadata(&file).unwrap().len(), SIZE);
        reserve.release();
        assert!(!file.exists());
        assert!(reserve.fill() && file.exists());
    }
}
