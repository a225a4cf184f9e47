//! A tar stream as a tree. Nothing is written outside the directory it is unpacked below, whatever the stream or the tree that
//! is there already say: names are checked, and the kernel resolves each parent beneath that directory.
//!
//! A file replaces the one that stood there in one step, when it is complete. A directory and something else never replace each
//! other. Directories that are there already keep their owner, permissions and times.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use banger_copy::receive::{self, ContentError, Draft};
use banger_copy::sparse;
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
    let unpacked = unpacker.all(stream);
    // Also of what came before an error: half a tree is not to be less accessible than the whole.
    let finished = unpacker.finish();
    unpacked?;
    finished
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

/// A sparse file in GNU's format 1.0, as its extended headers tell it.
struct Sparse {
    name: Option<Vec<u8>>,
    real_size: u64,
}

impl Sparse {
    fn read<R: Read>(entry: &mut Entry<'_, R>) -> Result<Option<Self>, UnpackError> {
        let (mut name, mut real_size, mut format) = (None, None, None);
        if let Some(pairs) = entry.pax_extensions().map_err(UnpackError::Stream)? {
            for pair in pairs {
                let pair = pair.map_err(UnpackError::Stream)?;
                match pair.key().unwrap_or_default() {
                    sparse::NAME => name = Some(pair.value_bytes().to_vec()),
                    sparse::REAL_SIZE => real_size = pair.value().ok().and_then(|v| v.parse().ok()),
                    sparse::MAJOR => format = Some(pair.value() == Ok("1")),
                    key if key.starts_with("GNU.sparse.") && key != sparse::MINOR => format = format.or(Some(false)),
                    _ => {}
                }
            }
        }
        match (format, real_size) {
            (None, _) => Ok(None),
            (Some(true), Some(real_size)) => Ok(Some(Self { name, real_size })),
            _ => Err(UnpackError::Stream(io::Error::new(
                io::ErrorKind::InvalidData,
                "a sparse file in a format that is not known; GNU tar writes one that is with --sparse-version=1.0",
            ))),
        }
    }
}

impl Unpacker {
    fn all<R: Read>(&mut self, stream: R) -> Result<(), UnpackError> {
        let mut archive = Archive::new(stream);
        for entry in archive.entries().map_err(UnpackError::Stream)? {
            self.entry(entry.map_err(UnpackError::Stream)?)?;
        }
        // What follows the end marker belongs to the stream; without reading it the host could not send it.
        io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(UnpackError::Stream)?;
        Ok(())
    }

    fn entry<R: Read>(&mut self, mut entry: Entry<'_, R>) -> Result<(), UnpackError> {
        if entry.header().entry_type() == EntryType::XGlobalHeader {
            return Ok(());
        }
        let extended = Sparse::read(&mut entry)?;
        let name = match &extended {
            Some(Sparse { name: Some(name), .. }) => name.clone(),
            _ => entry.path_bytes().into_owned(),
        };
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
                self.file(&path, &marks, entry, extended).map_err(|e| match e {
                    ContentError::File(e) => failed(e),
                    ContentError::Stream(e) => UnpackError::Stream(e),
                })
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
                return match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
                    kind if kind.is_dir() => Ok(()),
                    // A link to a directory is as good, if it stays inside.
                    kind if kind.is_symlink() => self.open(&path, false).map(drop),
                    _ => Err(Errno::NOTDIR.into()),
                };
            }
            Err(e) => return Err(e.into()),
        }
        let fd = self.open(&path, false)?;
        own(&fd, marks)?;
        self.directories.push((path, marks.mode, marks.mtime));
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        path: &Path,
        marks: &Marks,
        mut entry: Entry<'_, R>,
        extended: Option<Sparse>,
    ) -> Result<(), ContentError> {
        let size = entry.size();
        let expanded = entry.header().entry_type() == EntryType::GNUSparse;
        let (parent, name) = self.parent_of(path).map_err(ContentError::File)?;
        let system = |e: Errno| ContentError::File(e.into());
        let draft = Draft::new(parent.as_fd(), Mode::from_raw_mode(0o600)).map_err(system)?;
        let written = match extended {
            Some(Sparse { real_size, .. }) => receive::sparse(&mut entry, size, real_size, draft.file()),
            None if expanded => receive::expanded(&mut entry, size, draft.file()),
            None => receive::content(&mut entry, size, draft.file()),
        }?;
        own(draft.file(), marks).map_err(ContentError::File)?;
        rustix::fs::fchmod(draft.file(), Mode::from_raw_mode(marks.mode)).map_err(system)?;
        rustix::fs::futimens(draft.file(), &marks.times()).map_err(system)?;
        draft.place(name).map_err(system)?;
        self.written.bytes += written;
        Ok(())
    }

    fn symlink(&mut self, path: &Path, marks: &Marks, to: &[u8]) -> io::Result<()> {
        let (parent, name) = self.parent_of(path)?;
        receive::symbolic_link(parent.as_fd(), name, std::ffi::OsStr::from_bytes(to))?;
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
        if path == to {
            return Ok(());
        }
        let (parent, name) = self.parent_of(path)?;
        Ok(receive::hard_link(source.as_fd(), from, parent.as_fd(), name)?)
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
    fn a_directory_that_is_there_keeps_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::set_permissions(dir.path().join("d"), std::fs::Permissions::from_mode(0o711)).unwrap();
        let stream = archive(&[
            ("d", EntryType::Directory, "", ""),
            ("d/new", EntryType::Directory, "", ""),
        ]);
        unpack(dir.path(), stream.as_slice()).unwrap();
        let meta = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap();
        assert_eq!(meta("d").mode() & 0o777, 0o711);
        assert_eq!(
            (meta("d/new").mode() & 0o777, meta("d/new").mtime()),
            (0o750, 1_000_000_000)
        );
    }

    #[test]
    fn directories_and_files_do_not_replace_each_other() {
        use EntryType as T;
        for kind in [T::Regular, T::Symlink, T::Link] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("d")).unwrap();
            std::fs::write(dir.path().join("f"), "old").unwrap();
            let error = unpack(dir.path(), archive(&[("d", kind, "f", "")]).as_slice()).unwrap_err();
            assert!(error.to_string().contains("`d`"), "{error}");
            let error = unpack(dir.path(), archive(&[("f", T::Directory, "", "")]).as_slice()).unwrap_err();
            assert!(error.to_string().contains("`f`"), "{error}");
            assert_eq!(std::fs::read_to_string(dir.path().join("f")).unwrap(), "old");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        }
    }

    #[test]
    fn a_file_stays_as_it_is_until_the_new_one_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "old").unwrap();
        let whole = archive(&[
            ("new/", EntryType::Directory, "", ""),
            ("a", EntryType::Regular, "", &"x".repeat(5000)),
        ]);
        for cut in [1024 + 1, 1024 + 4999] {
            assert!(unpack(dir.path(), &whole[..cut]).is_err());
            assert_eq!(std::fs::read_to_string(dir.path().join("a")).unwrap(), "old");
            assert_eq!(
                std::fs::read_dir(dir.path()).unwrap().count(),
                2,
                "something was left behind"
            );
            assert_eq!(std::fs::metadata(dir.path().join("new")).unwrap().mode() & 0o777, 0o750);
        }
        unpack(dir.path(), whole.as_slice()).unwrap();
        assert_eq!(std::fs::read(dir.path().join("a")).unwrap().len(), 5000);
    }

    #[test]
    fn sparse_files_of_every_format_of_tar() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        std::fs::create_dir(&from).unwrap();
        let file = std::fs::File::create(from.join("sparse")).unwrap();
        for at in [0, 5, 1 << 20, 3 << 20, 9 << 20, 11 << 20, 100 << 20] {
            std::os::unix::fs::FileExt::write_all_at(&file, b"data", at).unwrap();
        }
        file.set_len(200 << 20).unwrap();
        let mut own = Vec::new();
        let meta = std::fs::symlink_metadata(&from).unwrap();
        pack::pack(&from, Path::new("from"), &meta, &mut own).unwrap();
        assert!(own.len() < 1 << 20, "{}", own.len());
        let tar = |format: &[&str]| {
            let made = std::process::Command::new("tar")
                .args(["-cS", "-C"])
                .arg(dir.path())
                .args(format)
                .arg("from")
                .output();
            made.unwrap().stdout
        };
        for (nr, stream) in [own, tar(&["--format=gnu"]), tar(&["--format=posix"])]
            .iter()
            .enumerate()
        {
            let to = dir.path().join(format!("to{nr}"));
            unpack(&to, stream.as_slice()).unwrap();
            let copy = std::fs::File::open(to.join("from/sparse")).unwrap();
            assert!(copy.metadata().unwrap().blocks() * 512 < 4 << 20, "{nr}");
            let same = std::process::Command::new("cmp")
                .arg(from.join("sparse"))
                .arg(to.join("from/sparse"))
                .status();
            assert!(same.unwrap().success(), "{nr}");
        }
        let old = tar(&["--format=posix", "--sparse-version=0.1"]);
        assert!(
            unpack(&dir.path().join("old"), old.as_slice())
                .unwrap_err()
                .to_string()
                .contains("can't be read")
        );
    }

    #[test]
    fn what_is_left_out_is_noted() {
        let dir = tempfile::tempdir().unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("pipe"),
            rustix::fs::FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .unwrap();
        let mut bytes = Vec::new();
        let meta = std::fs::symlink_metadata(dir.path()).unwrap();
        pack::pack(dir.path(), Path::new("d"), &meta, &mut bytes).unwrap();
        assert!(String::from_utf8_lossy(&bytes).contains("pipe (a special file)"));
        // And our own end does not take the note for a file.
        assert_eq!(unpack(&dir.path().join("to"), bytes.as_slice()).unwrap().entries, 1);
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
