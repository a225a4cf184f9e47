//! Writing below a directory of the image without being led elsewhere by its links.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

/// Files larger than this are taken for empty.
const MAX_READ: u64 = 1024 * 1024;

/// A directory, open.
pub struct Place(OwnedFd);

impl Place {
    /// Opens `path` itself, which is not the image's.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(rustix::fs::open(
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?))
    }

    /// The directory `path` below this one. No part of it may be a link.
    pub fn below(&self, path: &str) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        Ok(Self(rustix::fs::openat2(&self.0, path, flags, Mode::empty(), resolve)?))
    }

    /// The same, each part made with `mode` where it is missing.
    pub fn make(&self, path: &str, mode: u32) -> io::Result<Self> {
        let mut at = Self(self.0.try_clone()?);
        for part in path.split('/').filter(|p| !p.is_empty()) {
            match rustix::fs::mkdirat(&at.0, part, Mode::from_raw_mode(mode)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            }
            at = at.below(part)?;
        }
        Ok(at)
    }

    /// The text of file `name`, empty when there is no such plain file.
    pub fn read(&self, name: &str) -> String {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(fd) = rustix::fs::openat2(&self.0, name, flags, Mode::empty(), resolve) else {
            return String::new();
        };
        let file = std::fs::File::from(fd);
        let mut text = Vec::new();
        if file.metadata().is_ok_and(|m| m.is_file() && m.len() <= MAX_READ) {
            let _ = file.take(MAX_READ).read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Puts file `name` there, whatever stood in its place: a link is replaced, not followed.
    pub fn write(&self, name: &str, mode: u32, text: &str) -> io::Result<()> {
        let new = format!(".{name}.banger");
        match rustix::fs::unlinkat(&self.0, &new, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(e.into()),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.0, &new, flags, Mode::from_raw_mode(mode))?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode))?;
        let mut file = std::fs::File::from(fd);
        file.write_all(text.as_bytes())?;
        Ok(rustix::fs::renameat(&self.0, &new, &self.0, name)?)
    }

    /// Makes something else of the text of file `name`. Nothing is written when that is the same. A plain file that is only
    /// here is written in place if it does not get shorter: that saves the file system the making of a new one, and a machine
    /// that goes on from memory most of the time this takes.
    pub fn edit(&self, name: &str, mode: u32, change: impl FnOnce(&str) -> String) -> io::Result<()> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let Ok(fd) = rustix::fs::openat2(&self.0, name, flags, Mode::empty(), resolve) else {
            return self.write(name, mode, &change(""));
        };
        let mut file = std::fs::File::from(fd);
        let meta = file.metadata()?;
        let mut old = Vec::new();
        if meta.is_file() && meta.len() <= MAX_READ {
            (&mut file).take(MAX_READ).read_to_end(&mut old)?;
        }
        let new = change(&String::from_utf8_lossy(&old));
        let fits = meta.is_file()
            && meta.nlink() == 1
            && meta.uid() == rustix::process::geteuid().as_raw()
            && meta.mode() & 0o7777 == mode
            && meta.len() == old.len() as u64
            && new.len() >= old.len();
        if !fits {
            return self.write(name, mode, &new);
        }
        let same = new.bytes().zip(&old).take_while(|(new, old)| new == *old).count();
        file.write_all_at(&new.as_bytes()[same..], same as u64)
    }

    /// Writes what is in file `name` over itself, as [`Self::edit`] would write something else.
    pub fn rewrite(&self, name: &str) -> io::Result<()> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let mut file = std::fs::File::from(rustix::fs::openat2(&self.0, name, flags, Mode::empty(), resolve)?);
        let mut text = Vec::new();
        if file.metadata()?.is_file() {
            (&mut file).take(MAX_READ).read_to_end(&mut text)?;
            file.write_all_at(&text, 0)?;
        }
        Ok(())
    }

    /// Removes directory `name` with the plain files in it. A directory in it is none of ours, and stays with it.
    pub fn remove_flat(&self, name: &str) -> io::Result<()> {
        let inner = match self.below(name) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        let listed = rustix::fs::openat(
            &inner.0,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let names: Vec<_> = rustix::fs::Dir::new(listed)?
            .filter_map(|entry| Some(entry.ok()?.file_name().to_owned()))
            .filter(|name| ![c".", c".."].contains(&name.as_c_str()))
            .collect();
        for name in names {
            rustix::fs::unlinkat(&inner.0, &name, AtFlags::empty())?;
        }
        Ok(rustix::fs::unlinkat(&self.0, name, AtFlags::REMOVEDIR)?)
    }

    /// Removes file `name` if it is there.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.0, name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Puts a link there.
    pub fn link(&self, name: &str, target: &str) -> io::Result<()> {
        let there = rustix::fs::readlinkat(&self.0, name, Vec::new());
        if there.is_ok_and(|there| there.as_bytes() == target.as_bytes()) {
            return Ok(());
        }
        match rustix::fs::symlinkat(target, &self.0, name) {
            Err(Errno::EXIST) => {
                rustix::fs::unlinkat(&self.0, name, AtFlags::empty())?;
                Ok(rustix::fs::symlinkat(target, &self.0, name)?)
            }
            other => Ok(other?),
        }
    }

    /// Permissions of the directory itself.
    pub fn mode(&self) -> io::Result<u32> {
        Ok(rustix::fs::fstat(&self.0)?.st_mode & 0o7777)
    }

    /// Sets owner and permissions of the directory itself.
    pub fn set(&self, mode: u32, owner: Option<u32>) -> io::Result<()> {
        // A descriptor opened by path only takes neither call, so the directory is opened again for them.
        let fd = rustix::fs::openat(
            &self.0,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        if let Some(owner) = owner {
            rustix::fs::fchown(&fd, Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)))?;
        }
        Ok(rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_edited_in_place_where_that_harms_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("name");
        let place = Place::open(dir.path()).unwrap();
        let inode = || std::fs::symlink_metadata(&path).unwrap().ino();
        place.edit("name", 0o644, |old| format!("{old}a\n")).unwrap();
        let first = inode();
        place.edit("name", 0o644, |old| format!("{old}bc\n")).unwrap();
        place.edit("name", 0o644, str::to_owned).unwrap();
        assert_eq!(
            (std::fs::read_to_string(&path).unwrap().as_str(), inode()),
            ("a\nbc\n", first)
        );
        place.edit("name", 0o644, |_| "x\n".to_owned()).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "x\n", "shorter");
        place.edit("name", 0o600, |_| "yy\n".to_owned()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let other = dir.path().join("other");
        std::fs::hard_link(&path, &other).unwrap();
        place.edit("name", 0o600, |_| "zzz\n".to_owned()).unwrap();
        assert_eq!(
            std::fs::read_to_string(&other).unwrap(),
            "yy\n",
            "a file of two names is left alone"
        );
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        place.edit("name", 0o600, |old| format!("{old}n")).unwrap();
        assert_eq!(
            std::fs::read_to_string(&other).unwrap(),
            "yy\n",
            "and so is what a link leads to"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "n");
    }

    #[test]
    fn rewritten_files_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::open(dir.path()).unwrap();
        std::fs::write(dir.path().join("a"), "text").unwrap();
        place.rewrite("a").unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("a")).unwrap(), "text");
        assert!(place.rewrite("b").is_err());
    }

    #[test]
    fn flat_directories_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::open(dir.path()).unwrap();
        std::fs::create_dir(dir.path().join("flat")).unwrap();
        std::fs::write(dir.path().join("flat/a"), "").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("flat/b")).unwrap();
        place.remove_flat("flat").unwrap();
        place.remove_flat("flat").unwrap();
        assert!(!dir.path().join("flat").exists());
        std::fs::create_dir_all(dir.path().join("deep/er")).unwrap();
        assert!(place.remove_flat("deep").is_err());
        std::os::unix::fs::symlink("deep", dir.path().join("link")).unwrap();
        assert!(place.remove_flat("link").is_err() && place.remove("none").is_ok());
    }

    #[test]
    fn links_are_replaced_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        std::fs::create_dir_all(inside.join("etc")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("secret"), "s").unwrap();
        std::os::unix::fs::symlink(outside.join("secret"), inside.join("etc/resolv.conf")).unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("root")).unwrap();
        let place = Place::open(&inside).unwrap();
        let etc = place.below("etc").unwrap();
        assert_eq!(etc.read("resolv.conf"), "");
        etc.write("resolv.conf", 0o644, "nameserver 1.1.1.1\n").unwrap();
        assert_eq!(etc.read("resolv.conf"), "nameserver 1.1.1.1\n");
        assert_eq!(std::fs::read_to_string(outside.join("secret")).unwrap(), "s");
        assert!(place.make("root/.ssh", 0o700).is_err());
        assert!(!outside.join(".ssh").exists());
        assert!(place.below("../out").is_err());
        place
            .make("run/systemd/system.control", 0o755)
            .unwrap()
            .link("a.service", "/dev/null")
            .unwrap();
        assert_eq!(
            std::fs::read_link(inside.join("run/systemd/system.control/a.service")).unwrap(),
            Path::new("/dev/null")
        );
    }
}
