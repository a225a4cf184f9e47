//! Small helpers for files: durable writes, and removal of trees that never leaves the file system it began in.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{IoContext, Result};

/// Makes a directory and its parents, for this user alone.
pub(crate) fn make_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .on("make the directory", path)
}

/// Writes a new file and brings it to the disk.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .on("make the file", path)?;
    file.write_all(bytes).on("write", path)?;
    file.sync_data().on("write", path)
}

/// Brings a directory's entries to the disk.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .on("write the directory", path)
}

/// Removes a tree. Does nothing where there is none. Never descends into another file system: an installation that was cut short may
/// have left mounts.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(meta) => remove_below(path, &meta, meta.dev()),
    }
}

fn remove_below(path: &Path, meta: &fs::Metadata, device: u64) -> io::Result<()> {
    if meta.dev() != device {
        return Err(io::Error::new(
            io::ErrorKind::CrossesDevices,
            format!("something is mounted on {}", path.display()),
        ));
    }
    if !meta.is_dir() {
        return fs::remove_file(path);
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        remove_below(&entry.path(), &entry.metadata()?, device)?;
    }
    fs::remove_dir(path)
}

/// Bytes that a file takes on the disk.
pub(crate) fn allocated(meta: &fs::Metadata) -> u64 {
    meta.blocks() * 512
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_are_removed_and_links_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "x").unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("a/link")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists() && outside.join("file").exists());
        remove_tree(&tree).unwrap();
    }

    #[test]
    fn other_file_systems_are_left_alone() {
        assert_eq!(
            remove_below(Path::new("/proc/self"), &fs::metadata("/proc/self").unwrap(), 0)
                .unwrap_err()
                .kind(),
            io::ErrorKind::CrossesDevices
        );
    }
}
