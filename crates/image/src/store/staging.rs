//! Directories in which things are made, and the removal of what a crash left of them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::{Store, read_limited};
use crate::build::SCRATCH_PREFIX;
use crate::error::{Error, IoContext, Result};
use crate::files;

impl Store {
    /// Removes what crashed work left behind. What somebody works in is left alone. Returns how many were removed.
    pub fn sweep_staging(&self) -> Result<usize> {
        let dir = self.root.join("staging");
        let mut removed = 0;
        for entry in fs::read_dir(&dir).on("read the directory", &dir)? {
            let path = entry.on("read the directory", &dir)?.path();
            let Ok(lock) = File::open(&path) else { continue };
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            sweep_outside(&path);
            match files::remove_tree(&path) {
                Ok(()) => removed += 1,
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "cannot remove what unfinished work left behind")
                }
            }
        }
        Ok(removed)
    }
}

/// Removes the scratch directory outside of the store that a build noted in its staging directory.
fn sweep_outside(staging: &Path) {
    let Ok(bytes) = read_limited(&staging.join("outside"), 4096) else {
        return;
    };
    let Ok(text) = String::from_utf8(bytes) else { return };
    let path = Path::new(&text);
    // Only what was made for this purpose, and by this user.
    let named = path.is_absolute()
        && path
            .file_name()
            .and_then(|n| n.to_str())
            .is_some_and(|n| n.starts_with(SCRATCH_PREFIX));
    let owned = fs::symlink_metadata(path).is_ok_and(|m| m.is_dir() && m.uid() == rustix::process::getuid().as_raw());
    if named
        && owned
        && let Err(error) = files::remove_tree(path)
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove what an unfinished build left behind");
    }
}

/// A directory in which something is made. Locked while it is in use, removed afterwards.
#[derive(Debug)]
pub(crate) struct Staging {
    path: PathBuf,
    _lock: File,
}

impl Staging {
    pub(super) fn new(root: &Path) -> Result<Self> {
        let base = root.join("staging");
        loop {
            let path = tempfile::Builder::new()
                .prefix("work-")
                .tempdir_in(&base)
                .on("make a directory in", &base)?
                .keep();
            let lock = match File::open(&path) {
                Ok(lock) => lock,
                // A sweep was faster than the lock.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io(format!("open {}", path.display()), error)),
            };
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() && path.exists() {
                return Ok(Self { path, _lock: lock });
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What cannot be removed now (a tool is still cleaning up in it) is swept later.
        let _ = files::remove_tree(&self.path);
    }
}
