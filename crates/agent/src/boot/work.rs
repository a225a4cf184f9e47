//! The work disk: `/root`, which outlives the image.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::mount::{MountFlags, mount_move};

use super::{BootError, directory, doing, mount_disk};
use crate::console::say;

/// Where it is mounted first.
const ASIDE: &str = "/work";

/// Entries copied at most, and how deep: the image's `/root` is a few dot files, anything else is not ours to copy at boot.
const MAX_ENTRIES: usize = 10_000;
const MAX_DEPTH: usize = 32;

/// Mounts the work disk at `/root` of `root`. A fresh one gets what the image has there first.
pub(super) fn mount(device: &Path, root: &Path) -> Result<(), BootError> {
    let home = directory(root, "root", 0o700)?;
    doing("make /work", fs::create_dir_all(ASIDE))?;
    mount_disk(device, ASIDE, MountFlags::empty())?;
    let aside = Path::new(ASIDE);
    if is_fresh(aside)
        && let Err(e) = copy(&home, aside, &mut 0, 0)
    {
        say(&format!("can't copy the image's /root to the work disk: {e}"));
    }
    // A home directory has none. Should a check of the file system need it, the check makes it.
    let _ = fs::remove_dir(aside.join("lost+found"));
    doing(
        "set the owner of the work disk",
        std::os::unix::fs::chown(aside, Some(0), Some(0)),
    )?;
    doing(
        "set the permissions of the work disk",
        fs::set_permissions(aside, fs::Permissions::from_mode(0o755)),
    )?;
    doing("move the work disk to /root", mount_move(ASIDE, home))
}

/// Nothing on it but what `mkfs` left.
fn is_fresh(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|entries| entries.flatten().all(|e| e.file_name() == "lost+found"))
}

/// Copies directories, files and links with their owners and permissions.
fn copy(from: &Path, to: &Path, entries: &mut usize, depth: usize) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        *entries += 1;
        if *entries > MAX_ENTRIES || depth > MAX_DEPTH {
            return Err(io::Error::other("there is too much in it"));
        }
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        let meta = entry.metadata()?;
        if meta.is_dir() {
            fs::DirBuilder::new().mode(0o700).create(&to)?;
            copy(&from, &to, entries, depth + 1)?;
        } else if meta.is_file() {
            fs::copy(&from, &to)?;
        } else if meta.is_symlink() {
            symlink(fs::read_link(&from)?, &to)?;
        } else {
            continue;
        }
        std::os::unix::fs::lchown(&to, Some(meta.uid()), Some(meta.gid()))?;
        if !meta.is_symlink() {
            fs::set_permissions(&to, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_disk_gets_the_images_files() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join(".config/x")).unwrap();
        fs::create_dir_all(to.join("lost+found")).unwrap();
        fs::write(from.join(".bashrc"), "alias").unwrap();
        fs::set_permissions(from.join(".bashrc"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();
        assert!(is_fresh(&to));
        copy(&from, &to, &mut 0, 0).unwrap();
        assert!(!is_fresh(&to));
        assert_eq!(fs::read_to_string(to.join(".bashrc")).unwrap(), "alias");
        assert_eq!(fs::metadata(to.join(".bashrc")).unwrap().mode() & 0o777, 0o640);
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/etc/passwd"));
        assert!(to.join(".config/x").is_dir());
    }
}
