//! Putting a file in its place, whole or not at all, with a way back.

use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode, Uid};

use crate::error::{Error, Result};

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// This text.
    Text(String),
    /// What this file holds.
    Copy(PathBuf),
}

/// Mode and owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rights {
    /// Permissions.
    pub(crate) mode: u32,
    /// User.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
}

impl Rights {
    /// Those of something that is there.
    pub(crate) fn of(found: &Metadata) -> Self {
        Self {
            mode: found.mode() & 0o7777,
            uid: found.uid(),
            gid: found.gid(),
        }
    }

    /// Gives them to something that is open.
    pub(crate) fn give(self, what: impl AsFd) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        rustix::fs::fchown(&what, Some(uid), Some(gid))?;
        // Behind it: a change of the owner takes special bits away.
        Ok(rustix::fs::fchmod(&what, Mode::from_raw_mode(self.mode))?)
    }
}

/// What is at a path, links not followed. None: nothing.
pub(crate) fn look(path: &Path) -> Result<Option<Metadata>> {
    match std::fs::symlink_metadata(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(Error::io("look at", path, error)),
    }
}

/// Whether a file holds this.
pub(crate) fn holds(path: &Path, content: &Content) -> Result<bool> {
    let open = |path: &Path| -> Result<(File, u64)> {
        let opened = File::open(path).and_then(|file| file.metadata().map(|found| (file, found.len())));
        opened.map_err(|e| Error::io("read", path, e))
    };
    let (file, length) = open(path)?;
    let same = match content {
        Content::Text(text) if length != text.len() as u64 => return Ok(false),
        Content::Text(text) => equal(file, text.as_bytes()),
        Content::Copy(source) => match open(source)? {
            (_, other) if other != length => return Ok(false),
            (source, _) => equal(file, source),
        },
    };
    same.map_err(|e| Error::io("read", path, e))
}

fn equal(mut a: impl Read, mut b: impl Read) -> io::Result<bool> {
    let (mut left, mut right) = (vec![0; 1 << 18], vec![0; 1 << 18]);
    loop {
        let n = a.read(&mut left)?;
        if n == 0 {
            return Ok(b.read(&mut right[..1])? == 0);
        }
        match b.read_exact(&mut right[..n]) {
            Ok(()) if left[..n] == right[..n] => {}
            Ok(()) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

/// A name beside a file, for what will be it or was it.
fn beside(path: &Path, end: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.banger-{end}"))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Puts a file in its place in one step. What was there before stays beside it: the answer is its path.
pub(crate) fn put(path: &Path, content: &Content, rights: Rights) -> Result<Option<PathBuf>> {
    let (new, old) = (beside(path, "new"), beside(path, "old"));
    let write = || -> io::Result<Option<PathBuf>> {
        // Left by one that was cut off.
        remove_if_there(&new)?;
        remove_if_there(&old)?;
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
        match content {
            Content::Text(text) => file.write_all(text.as_bytes())?,
            Content::Copy(source) => {
                io::copy(&mut File::open(source)?, &mut file)?;
            }
        }
        rights.give(&file)?;
        file.sync_all()?;
        let kept = match std::fs::hard_link(path, &old) {
            Ok(()) => Some(old.clone()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        std::fs::rename(&new, path)?;
        Ok(kept)
    };
    write().map_err(|error| {
        let _ = remove_if_there(&new);
        let _ = remove_if_there(&old);
        Error::io("write", path, error)
    })
}

/// Makes a directory with these rights, whatever the umask.
pub(crate) fn make_dir(path: &Path, rights: Rights) -> Result<()> {
    let make = || -> io::Result<()> {
        std::fs::create_dir(path)?;
        give(path, rights)
    };
    make().map_err(|e| Error::io("make the directory", path, e))
}

/// Gives a directory other rights.
pub(crate) fn fix_dir(path: &Path, rights: Rights) -> Result<()> {
    give(path, rights).map_err(|e| Error::io("set the rights of", path, e))
}

fn give(path: &Path, rights: Rights) -> io::Result<()> {
    let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC;
    rights.give(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Removes a file; answers whether it was there.
pub(crate) fn remove(path: &Path) -> Result<bool> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(error) => Err(Error::io("remove", path, error)),
    }
}

/// Removes a directory with all that is in it, links not followed; answers whether it was there.
pub(crate) fn remove_tree(path: &Path) -> Result<bool> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("remove", path, error)),
    }
}

/// Removes a directory when nothing is in it; answers whether it is gone by this.
pub(crate) fn remove_empty(path: &Path) -> Result<bool> {
    match std::fs::remove_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => Ok(false),
        Err(error) => Err(Error::io("remove", path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Rights {
        Rights {
            mode: 0o640,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
        }
    }

    #[test]
    fn a_file_comes_with_its_rights_and_the_old_one_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let text = |t: &str| Content::Text(t.to_owned());
        assert_eq!(put(&path, &text("one"), own()).unwrap(), None);
        assert_eq!(Rights::of(&look(&path).unwrap().unwrap()), own());
        // Left by a run that was cut off.
        std::fs::write(dir.path().join(".f.banger-new"), "half").unwrap();
        std::fs::write(dir.path().join(".f.banger-old"), "older").unwrap();
        let old = put(&path, &text("two"), own()).unwrap().unwrap();
        assert_eq!(std::fs::read_to_string(&old).unwrap(), "one");
        assert!(holds(&path, &text("two")).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        let missing = Content::Copy(dir.path().join("missing"));
        assert!(put(&path, &missing, own()).unwrap_err().message.contains("/f"));
        assert!(holds(&path, &text("two")).unwrap(), "and nothing has changed");
        assert!(holds(&path, &missing).unwrap_err().message.contains("missing"));
    }

    #[test]
    fn contents_are_compared_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let long: Vec<u8> = (0..600_000u32).map(|n| n as u8).collect();
        std::fs::write(&a, &long).unwrap();
        for (other, same) in [
            (long.clone(), true),
            (long[1..].to_vec(), false),
            ([&long[..], &[1]].concat(), false),
            ([&long[..long.len() - 1], &[9]].concat(), false),
        ] {
            std::fs::write(&b, other).unwrap();
            assert_eq!(holds(&a, &Content::Copy(b.clone())).unwrap(), same);
        }
        std::fs::write(&a, "").unwrap();
        assert!(holds(&a, &Content::Text(String::new())).unwrap());
        assert!(!holds(&a, &Content::Text("x".into())).unwrap());
    }

    #[test]
    fn what_is_gone_is_no_error_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        assert!(
            !remove(&path("x")).unwrap() && !remove_tree(&path("x")).unwrap() && !remove_empty(&path("x")).unwrap()
        );
        std::fs::create_dir_all(path("d/e")).unwrap();
        std::fs::write(path("kept"), "k").unwrap();
        std::os::unix::fs::symlink(path("kept"), path("d/link")).unwrap();
        assert!(!remove_empty(&path("d")).unwrap());
        assert!(look(&path("d/link")).unwrap().unwrap().is_symlink());
        assert!(fix_dir(&path("d/link"), own()).is_err());
        assert!(remove_tree(&path("d")).unwrap() && path("kept").exists());
    }
}
