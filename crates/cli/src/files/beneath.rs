//! Opening files beneath a directory, one path element at a time and never through a link, so that nothing in a tree (a
//! hostile repository, a half-extracted archive) leads out of it.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, Stat, mkdirat, openat, readlinkat, statat};
use rustix::io::{Errno, Result};

/// A directory that is never left.
#[derive(Debug)]
pub(crate) struct Root {
    dir: OwnedFd,
    /// The directory that was opened last; files mostly come directory by directory.
    last: Option<(PathBuf, OwnedFd)>,
}

const DIRECTORY: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

impl Root {
    /// Opens the directory itself; links on the way to it are followed, that is the user's own choice.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            dir: openat(CWD, path, flags, Mode::empty())?,
            last: None,
        })
    }

    /// The directory of `path` and the last element of it. With `make`, directories that are missing are made.
    fn parent<'p>(&mut self, path: &'p Path, make: bool) -> Result<(BorrowedFd<'_>, &'p OsStr)> {
        let (Some(Component::Normal(name)), Some(parent)) = (path.components().next_back(), path.parent()) else {
            return Err(Errno::INVAL);
        };
        if parent.as_os_str().is_empty() {
            return Ok((self.dir.as_fd(), name));
        }
        if self.last.as_ref().is_none_or(|last| last.0 != parent) {
            let mut current: Option<OwnedFd> = None;
            for component in parent.components() {
                let Component::Normal(element) = component else {
                    return Err(Errno::INVAL);
                };
                let at = current.as_ref().map_or(self.dir.as_fd(), AsFd::as_fd);
                let next = match openat(at, element, DIRECTORY, Mode::empty()) {
                    Err(Errno::NOENT) if make => {
                        match mkdirat(at, element, Mode::from_raw_mode(0o777)) {
                            Ok(()) | Err(Errno::EXIST) => {}
                            Err(error) => return Err(error),
                        }
                        openat(at, element, DIRECTORY, Mode::empty())?
                    }
                    other => other?,
                };
                current = Some(next);
            }
            self.last = Some((parent.to_owned(), current.ok_or(Errno::INVAL)?));
        }
        let (_, dir) = self.last.as_ref().ok_or(Errno::INVAL)?;
        Ok((dir.as_fd(), name))
    }

    /// Runs a call on the directory of `path` and its last element.
    pub(crate) fn at<T>(
        &mut self,
        path: &Path,
        make: bool,
        call: impl FnOnce(BorrowedFd<'_>, &OsStr) -> Result<T>,
    ) -> Result<T> {
        let (dir, name) = self.parent(path, make)?;
        call(dir, name)
    }

    /// What stands at a path; a link itself, not what it points to.
    pub(crate) fn stat(&mut self, path: &Path) -> Result<Stat> {
        self.at(path, false, |dir, name| statat(dir, name, AtFlags::SYMLINK_NOFOLLOW))
    }

    /// Opens a file for reading. Never waits for a writer of a pipe that took its place.
    pub(crate) fn read(&mut self, path: &Path) -> Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        self.at(path, false, |dir, name| openat(dir, name, flags, Mode::empty()))
            .map(File::from)
    }

    /// Where a link points.
    pub(crate) fn read_link(&mut self, path: &Path) -> Result<Vec<u8>> {
        self.at(path, false, |dir, name| readlinkat(dir, name, Vec::new()))
            .map(std::ffi::CString::into_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_never_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "x").unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/b/f"), "y").unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("a/out")).unwrap();
        std::os::unix::fs::symlink("b/f", dir.path().join("a/in")).unwrap();
        let mut root = Root::open(dir.path()).unwrap();
        assert!(root.read(Path::new("a/b/f")).is_ok());
        for path in ["a/out/secret", "a/in", "../x", "/etc/passwd", "a/../a/b/f", "", ".."] {
            assert!(root.read(Path::new(path)).is_err(), "{path}");
        }
        assert_eq!(root.read_link(Path::new("a/in")).unwrap(), b"b/f");
    }

    #[test]
    fn a_pipe_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        rustix::fs::mknodat(CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        let file = Root::open(dir.path()).unwrap().read(Path::new("p")).unwrap();
        assert!(!file.metadata().unwrap().is_file());
    }
}
