//! A tar stream as a tree. Nothing is written outside the directory it is unpacked below, whatever the stream or the tree that
//! is there already say: names are checked, and the kernel resolves each parent beneath that directory.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use banger_proto::api::FilesWritten;
use banger_proto::error::ErrorCode;
use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType, Header};

/// Entries of one stream at most.
const MAX_ENTRIES: u64 = 20_000_000;

/// What is wrong with a stream, or with the place it is to go to.
#[derive(Debug, thiserror::Error)]
pub(super) enum UnpackError {
    /// The directory can't be made or opened.
    #[error("directory `{path}` can't be written to")]
    Target { path: String, source: io::Error },
    /// The stream is no tar stream, or broke off.
    #[error("the tar stream can't be read")]
    Stream(#[source] io::Error),
    /// An entry must not be unpacked.
    #[error("entry `{name}` is refused: {why}")]
    Refused { name: String, why: &'static str },
    /// An entry could not be written.
    #[error("entry `{name}` can't be written")]
    Write { name: String, source: io::Error },
}

impl UnpackError {
    fn source_error(&self) -> Option<&io::Error> {
        match self {
            Self::Target { source, .. } | Self::Stream(source) | Self::Write { source, .. } => Some(source),
            Self::Refused { .. } => None,
        }
    }

    /// The disk is full.
    pub(super) fn is_no_space(&self) -> bool {
        let errno = self.source_error().and_then(Errno::from_io_error);
        matches!(errno, Some(Errno::NOSPC | Errno::DQUOT))
    }

    /// The kind of error for the host.
    pub(super) fn code(&self) -> ErrorCode {
        match self {
            Self::Refused { .. } | Self::Stream(_) => ErrorCode::BadRequest,
            Self::Target { .. } | Self::Write { .. } => ErrorCode::Guest,
        }
    }
}

/// The parts of an entry's name below the target. `None` when it leads elsewhere.
fn inside(name: &[u8]) -> Option<PathBuf> {
    if name.contains(&0) || name.len() > 4095 {
        return None;
    }
    let mut out = PathBuf::new();
    for part in Path::new(std::ffi::OsStr::from_bytes(name)).components() {
        match part {
            Component::Normal(part) => out.push(part),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(out)
}

/// Unpacks `stream` below `target`, which is made if it is not there.
pub(super) fn unpack<R: Read>(target: &Path, stream: R) -> Result<FilesWritten, UnpackError> {
    let opened = std::fs::create_dir_all(target).and_then(|()| {
        Ok(rustix::fs::open(
            target,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    });
    let root = opened.map_err(|source| UnpackError::Target {
        path: target.display().to_string(),
        source,
    })?;
    let mut unpacker = Unpacker {
        root,
        parent: None,
        directories: Vec::new(),
        written: FilesWritten { entries: 0, bytes: 0 },
    };
    let mut archive = Archive::new(stream);
    for entry in archive.entries().map_err(UnpackError::Stream)? {
        unpacker.entry(entry.map_err(UnpackError::Stream)?)?;
    }
    // What follows the end marker belongs to the stream; without reading it the host could not send it.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(UnpackError::Stream)?;
    unpacker.finish()
}

struct Unpacker {
    root: OwnedFd,
    /// The directory of the entry before: most entries share it.
    parent: Option<(PathBuf, OwnedFd)>,
    /// Directories get their times and permissions at the end, when nothing is written into them any more.
    directories: Vec<(PathBuf, u32, i64)>,
    written: FilesWritten,
}

/// What a header says of the one who owns an entry and when it was changed.
struct Marks {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: i64,
}

impl Marks {
    fn of(header: &Header) -> Self {
        let id = |n: io::Result<u64>| {
            n.ok()
                .and_then(|n| u32::try_from(n).ok())
                .filter(|n| *n != u32::MAX)
                .unwrap_or(0)
        };
        Self {
            mode: header.mode().unwrap_or(0o644) & 0o7777,
            uid: id(header.uid()),
            gid: id(header.gid()),
            mtime: header.mtime().ok().and_then(|t| i64::try_from(t).ok()).unwrap_or(0),
        }
    }

    fn times(&self) -> Timestamps {
        times(self.mtime)
    }
}

fn times(mtime: i64) -> Timestamps {
    let stamp = Timespec {
        tv_sec: mtime,
        tv_nsec: 0,
    };
    Timestamps {
        last_access: stamp,
        last_modification: stamp,
    }
}

impl Unpacker {
    fn entry<R: Read>(&mut self, entry: Entry<'_, R>) -> Result<(), UnpackError> {
        let name = entry.path_bytes().into_owned();
        let shown = String::from_utf8_lossy(&name).into_owned();
        let refuse = |why| {
            Err(UnpackError::Refused {
                name: shown.clone(),
                why,
            })
        };
        let Some(path) = inside(&name) else {
            return refuse("its name leads outside");
        };
        self.written.entries += 1;
        if self.written.entries > MAX_ENTRIES {
            return refuse("there are too many");
        }
        let marks = Marks::of(entry.header());
        let kind = entry.header().entry_type();
        let failed = |source: io::Error| UnpackError::Write {
            name: shown.clone(),
            source,
        };
        match kind {
            EntryType::Directory => self.directory(path, &marks).map_err(failed),
            _ if path.as_os_str().is_empty() => refuse("it has no name"),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.file(&path, &marks, entry).map_err(failed)
            }
            EntryType::Symlink => {
                let Some(to) = entry.link_name_bytes() else {
                    return refuse("it is a link to nothing");
                };
                self.symlink(&path, &marks, &to).map_err(failed)
            }
            EntryType::Link => {
                let Some(to) = entry.link_name_bytes() else {
                    return refuse("it is a link to nothing");
                };
                let Some(to) = inside(&to).filter(|to| !to.as_os_str().is_empty()) else {
                    return refuse("it links outside");
                };
                self.hard_link(&path, &to).map_err(failed)
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => refuse("it is a device or a pipe"),
            // Extended headers without an entry of their own, and kinds of the future.
            _ => Ok(()),
        }
    }

    /// Opens directory `path` below the root; with `make`, what is missing of it is made. Links that stay below the root are
    /// followed, since the tree may have them.
    fn open(&self, path: &Path, make: bool) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        match rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve) {
            Err(Errno::NOENT) if make => {
                let parent = self.open(path.parent().unwrap_or(Path::new("")), true)?;
                if let Some(name) = path.file_name() {
                    match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
                self.open(path, false)
            }
            other => Ok(other?),
        }
    }

    fn parent_of<'p>(&mut self, path: &'p Path) -> io::Result<(&OwnedFd, &'p std::ffi::OsStr)> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let directory = path.parent().unwrap_or(Path::new(""));
        if self.parent.as_ref().is_none_or(|(known, _)| known != directory) {
            self.parent = Some((directory.to_path_buf(), self.open(directory, true)?));
        }
        let fd = self.parent.as_ref().map(|(_, fd)| fd).ok_or(io::ErrorKind::Other)?;
        Ok((fd, name))
    }

    fn directory(&mut self, path: PathBuf, marks: &Marks) -> io::Result<()> {
        if path.as_os_str().is_empty() {
            // The target itself is the caller's, it keeps what it has.
            return Ok(());
        }
        let (parent, name) = self.parent_of(&path)?;
        match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
                let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
                if !kind.is_dir() && !kind.is_symlink() {
                    rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
                    rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700))?;
                }
            }
            Err(e) => return Err(e.into()),
        }
        let fd = self.open(&path, false)?;
        own(&fd, marks)?;
        self.directories.push((path, marks.mode, marks.mtime));
        Ok(())
    }

    fn file<R: Read>(&mut self, path: &Path, marks: &Marks, mut entry: Entry<'_, R>) -> io::Result<()> {
        let (parent, name) = self.parent_of(path)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let fd = match rustix::fs::openat(parent, name, flags, mode) {
            Err(Errno::EXIST) => {
                rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
                rustix::fs::openat(parent, name, flags, mode)?
            }
            other => other?,
        };
        let mut file = File::from(fd);
        self.written.bytes += io::copy(&mut entry, &mut file)?;
        own(&file, marks)?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(marks.mode))?;
        Ok(rustix::fs::futimens(&file, &marks.times())?)
    }

    fn symlink(&mut self, path: &Path, marks: &Marks, to: &[u8]) -> io::Result<()> {
        let (parent, name) = self.parent_of(path)?;
        match rustix::fs::symlinkat(to, parent, name) {
            Err(Errno::EXIST) => {
                rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
                rustix::fs::symlinkat(to, parent, name)?;
            }
            other => other?,
        }
        if rustix::process::geteuid().is_root() {
            let (uid, gid) = (Uid::from_raw(marks.uid), Gid::from_raw(marks.gid));
            rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(rustix::fs::utimensat(
            parent,
            name,
            &marks.times(),
            AtFlags::SYMLINK_NOFOLLOW,
        )?)
    }

    fn hard_link(&mut self, path: &Path, to: &Path) -> io::Result<()> {
        let source = self.open(to.parent().unwrap_or(Path::new("")), false)?;
        let from = to.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let (parent, name) = self.parent_of(path)?;
        // Without the flag to follow it, a link at the end of `to` is what is linked.
        match rustix::fs::linkat(&source, from, parent, name, AtFlags::empty()) {
            Err(Errno::EXIST) => {
                rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
                Ok(rustix::fs::linkat(&source, from, parent, name, AtFlags::empty())?)
            }
            other => Ok(other?),
        }
    }

    fn finish(self) -> Result<FilesWritten, UnpackError> {
        for (path, mode, mtime) in self.directories.iter().rev() {
            let set = self.open(path, false).and_then(|fd| {
                rustix::fs::fchmod(&fd, Mode::from_raw_mode(*mode))?;
                Ok(rustix::fs::futimens(&fd, &times(*mtime))?)
            });
            set.map_err(|source| UnpackError::Write {
                name: path.display().to_string(),
                source,
            })?;
        }
        Ok(self.written)
    }
}

/// Gives it to the owner that the header names. Only root can; tests run as anybody.
fn own(fd: impl std::os::fd::AsFd, marks: &Marks) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Ok(rustix::fs::fchown(
        fd,
        Some(Uid::from_raw(marks.uid)),
        Some(Gid::from_raw(marks.gid)),
    )?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::super::pack;
    use super::*;

    fn archive(entries: &[(&str, EntryType, &str, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, link, text) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(if *kind == EntryType::Directory { 0o750 } else { 0o640 });
            header.set_mtime(1_000_000_000);
            header.set_size(text.len() as u64);
            let gnu = header.as_gnu_mut().unwrap();
            gnu.name[..name.len()].copy_from_slice(name.as_bytes());
            gnu.linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_cksum();
            builder.append(&header, text.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn names_stay_inside() {
        assert_eq!(inside(b"./a//b/./c"), Some("a/b/c".into()));
        assert_eq!(inside(b"./"), Some("".into()));
        for bad in [&b"/etc/passwd"[..], b"..", b"a/../../b", b"a/..", b"a\0b"] {
            assert_eq!(inside(bad), None);
        }
    }

    #[test]
    fn what_is_refused_names_the_entry() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("t");
        std::fs::create_dir(dir.path().join("out")).unwrap();
        use EntryType as T;
        for (entries, what) in [
            (vec![("../evil", T::Regular, "", "x")], "`../evil`"),
            (vec![("/evil", T::Regular, "", "x")], "`/evil`"),
            (vec![("hard", T::Link, "../out", "")], "`hard`"),
            (vec![("dev", T::Char, "", "")], "`dev`"),
            (
                vec![("up", T::Symlink, "../out", ""), ("up/evil", T::Regular, "", "x")],
                "`up/evil`",
            ),
            (
                vec![("abs", T::Symlink, "/tmp", ""), ("abs/evil", T::Regular, "", "x")],
                "`abs/evil`",
            ),
            (
                vec![("abs", T::Symlink, "/tmp", ""), ("abs/evil/", T::Directory, "", "")],
                "`abs/evil/`",
            ),
        ] {
            let error = unpack(&target, archive(&entries).as_slice()).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        assert!(std::fs::read_dir(dir.path().join("out")).unwrap().next().is_none());
        assert!(!dir.path().join("evil").exists());
    }

    #[test]
    fn a_tree_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("tree");
        std::fs::create_dir_all(from.join("sub/empty")).unwrap();
        std::fs::write(from.join("sub/run.sh"), "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(from.join("sub/run.sh"), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::hard_link(from.join("sub/run.sh"), from.join("twin")).unwrap();
        std::os::unix::fs::symlink("sub/run.sh", from.join("link")).unwrap();
        std::fs::write(from.join("long".repeat(50)), vec![7; 300_000]).unwrap();
        std::fs::set_permissions(from.join("sub"), std::fs::Permissions::from_mode(0o555)).unwrap();
        let mut bytes = Vec::new();
        let meta = std::fs::symlink_metadata(&from).unwrap();
        pack::pack(&from, &pack::root_name(&from), &meta, &mut bytes).unwrap();
        let written = unpack(&dir.path().join("to/deep"), bytes.as_slice()).unwrap();
        assert_eq!(written.entries, 7);
        assert_eq!(written.bytes, 300_010);
        let to = dir.path().join("to/deep/tree");
        assert_eq!(std::fs::metadata(to.join("sub/run.sh")).unwrap().mode() & 0o777, 0o755);
        assert_eq!(std::fs::metadata(to.join("sub")).unwrap().mode() & 0o777, 0o555);
        assert_eq!(
            std::fs::metadata(to.join("twin")).unwrap().ino(),
            std::fs::metadata(to.join("sub/run.sh")).unwrap().ino()
        );
        assert_eq!(std::fs::read_link(to.join("link")).unwrap(), Path::new("sub/run.sh"));
        assert_eq!(std::fs::read(to.join("long".repeat(50))).unwrap(), vec![7; 300_000]);
        let mtime = |p: &Path| std::fs::symlink_metadata(p).unwrap().mtime();
        assert_eq!(mtime(&to.join("sub/run.sh")), mtime(&from.join("sub/run.sh")));
        assert_eq!(mtime(&to.join("sub")), mtime(&from.join("sub")));
        // Once more over what is there.
        unpack(&dir.path().join("to/deep"), bytes.as_slice()).unwrap();
        std::fs::set_permissions(from.join("sub"), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::set_permissions(to.join("sub"), std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn garbage_and_broken_streams_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            unpack(dir.path(), &[b'x'; 2048][..]),
            Err(UnpackError::Stream(_))
        ));
        let whole = archive(&[("a", EntryType::Regular, "", "text of some length")]);
        assert!(unpack(dir.path(), &whole[..520]).is_err());
        assert_eq!(unpack(dir.path(), io::empty()).unwrap().entries, 0);
    }
}
