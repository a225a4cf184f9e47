//! Taking a tar stream from a machine apart on this host. Every byte of it is hostile.
//!
//! * Names are relative, without `..`, and all below one top entry; anything else ends the copy.
//! * Nothing is followed: directories are entered one element at a time, files are made anew, never written through.
//! * A file replaces the one of its name in one step, when it is complete. Directories that are there keep what they have.
//! * A sparse file costs what its data takes, and its map has a bound.
//! * Links to elsewhere (absolute, or leading out of what is copied), devices, pipes and sockets are left out and counted.
//! * Hard links only to regular files of the same copy. No set-user-id bits, no owner, the umask holds.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use banger_copy::receive::{self, ContentError, Draft};
use banger_copy::{send, sparse};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::fs::{fchmod, futimens, mkdirat, openat, statat};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType, PaxExtensions};

use crate::error::{Error, Result, reason};
use crate::files::beneath::Root;

/// Longest name, and longest target of a link.
const MAX_NAME: u64 = 4096;

/// Longest block of extended attributes.
const MAX_PAX: u64 = 64 * 1024;

/// Most entries of one stream.
const MAX_ENTRIES: u64 = 20_000_000;

/// What came out.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    /// Files, directories and links made.
    pub(crate) entries: u64,
    /// Bytes of file content written.
    pub(crate) bytes: u64,
    /// What was left out, and why; the first few.
    pub(crate) skipped: Vec<String>,
    /// How much was left out.
    pub(crate) skipped_count: u64,
}

/// What the top entry of the stream becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Top {
    /// An entry of this name in the target directory.
    Named(OsString),
    /// The target directory itself.
    Content,
}

/// Takes a stream apart below `target`, a directory that is there.
pub(crate) fn extract(target: &Path, top: Top, stream: impl Read) -> Result<Report> {
    let root = Root::open(target).map_err(|e| Error::io("open", target, e))?;
    let mut extraction = Extraction {
        root,
        top,
        seen_top: None,
        report: Report::default(),
        count: 0,
        directories: Vec::new(),
    };
    let extracted = extraction.all(stream);
    // Also of what came before an error.
    extraction.finish_directories();
    extracted.and_then(|()| extraction.finish())
}

fn broken(error: &io::Error) -> Error {
    Error::failed(format!("the stream from the machine is damaged: {}", reason(error)))
}

fn refused(path: &[u8], why: &str) -> Error {
    Error::failed(format!(
        "the machine sent `{}`, which {why}",
        String::from_utf8_lossy(path).escape_debug()
    ))
    .hint("nothing outside the target was touched; what came before it has been copied")
}

/// What extension headers say about the entry behind them.
#[derive(Debug, Default)]
struct Extended {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    sparse: SparseKeys,
}

/// What they say about a sparse file.
#[derive(Debug, Default)]
struct SparseKeys {
    known: bool,
    unknown: bool,
    name: Option<Vec<u8>>,
    real_size: Option<u64>,
}

impl SparseKeys {
    fn read(&mut self, key: &[u8], value: &[u8]) {
        match std::str::from_utf8(key).unwrap_or_default() {
            sparse::MAJOR => self.known = value == b"1",
            sparse::MINOR => {}
            sparse::NAME => self.name = Some(value.to_vec()),
            sparse::REAL_SIZE => self.real_size = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok()),
            _ => self.unknown = true,
        }
    }

    /// The size of the file with its holes; nothing for a file that is not sparse.
    fn size(&self) -> Result<Option<u64>> {
        match self.real_size {
            Some(size) if self.known && !self.unknown => Ok(Some(size)),
            None if !self.known && !self.unknown && self.name.is_none() => Ok(None),
            _ => Err(Error::failed(
                "the machine sent a sparse file in a format that is not known",
            )),
        }
    }
}

fn extension(entry: &mut Entry<'_, impl Read>, most: u64) -> Result<Vec<u8>> {
    if entry.size() > most {
        return Err(Error::failed(format!(
            "the machine sent a header of {} bytes, more than {most}",
            entry.size()
        )));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(|e| broken(&e))?;
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    Ok(bytes)
}

impl Extended {
    fn read_pax(&mut self, entry: &mut Entry<'_, impl Read>) -> Result<()> {
        let bytes = extension(entry, MAX_PAX)?;
        for pair in PaxExtensions::new(&bytes) {
            let pair = pair.map_err(|e| broken(&e))?;
            match pair.key_bytes() {
                b"path" => self.name = Some(pair.value_bytes().to_vec()),
                b"linkpath" => self.link = Some(pair.value_bytes().to_vec()),
                // The length of what follows would be another one than the header says.
                b"size" => return Err(Error::failed("the machine sent a file with two lengths")),
                key if key.starts_with(b"GNU.sparse.") => self.sparse.read(key, pair.value_bytes()),
                _ => {}
            }
        }
        Ok(())
    }
}

struct Extraction {
    root: Root,
    top: Top,
    /// First element of the first name; all others share it.
    seen_top: Option<OsString>,
    report: Report,
    count: u64,
    /// Directories that were made, with permissions and time of change, which they get when nothing is written into them any more.
    directories: Vec<(PathBuf, u32, u64)>,
}

impl Extraction {
    fn all(&mut self, stream: impl Read) -> Result<()> {
        let mut archive = Archive::new(stream);
        let entries = archive.entries().map_err(|e| broken(&e))?.raw(true);
        let mut next = Extended::default();
        for entry in entries {
            let mut entry = entry.map_err(|e| broken(&e))?;
            match entry.header().entry_type() {
                EntryType::GNULongName => next.name = Some(extension(&mut entry, MAX_NAME)?),
                EntryType::GNULongLink => next.link = Some(extension(&mut entry, MAX_NAME)?),
                EntryType::XHeader => next.read_pax(&mut entry)?,
                EntryType::XGlobalHeader => self.notes(&mut entry)?,
                _ => self.entry(entry, std::mem::take(&mut next))?,
            }
        }
        Ok(())
    }

    /// What the machine left out already.
    fn notes(&mut self, entry: &mut Entry<'_, impl Read>) -> Result<()> {
        let bytes = extension(entry, MAX_PAX)?;
        for pair in PaxExtensions::new(&bytes) {
            let pair = pair.map_err(|e| broken(&e))?;
            if let Some(note) = send::read_note(pair.key_bytes(), pair.value_bytes()) {
                self.left_out(String::from_utf8_lossy(note).escape_debug().to_string());
            }
        }
        Ok(())
    }

    fn entry(&mut self, mut entry: Entry<'_, impl Read>, extended: Extended) -> Result<()> {
        let real_size = extended.sparse.size()?;
        let name = extended
            .sparse
            .name
            .or(extended.name)
            .unwrap_or_else(|| entry.header().path_bytes().into_owned());
        self.count += 1;
        if self.count > MAX_ENTRIES {
            return Err(refused(&name, "is one entry too many"));
        }
        let path = self.place(&name)?;
        let mode = entry.header().mode().unwrap_or(0o644);
        let mtime = entry.header().mtime().unwrap_or(0);
        let kind = entry.header().entry_type();
        let link = || -> Vec<u8> {
            let link = extended.link.clone();
            link.unwrap_or_else(|| {
                entry
                    .header()
                    .link_name_bytes()
                    .map(std::borrow::Cow::into_owned)
                    .unwrap_or_default()
            })
        };
        let made = match kind {
            EntryType::Directory => self.directory(&path, mode, mtime),
            EntryType::Regular | EntryType::Continuous => {
                let Some(path) = path else {
                    return Err(refused(&name, "is a file where a directory was asked for"));
                };
                self.file(&path, mode, mtime, &mut entry, real_size)
            }
            EntryType::Symlink => {
                let target = link();
                let Some(path) = path else {
                    return Err(refused(&name, "is a link where a directory was asked for"));
                };
                self.symlink(&path, &target)
            }
            EntryType::Link => {
                let target = self.place(&link())?;
                let (Some(path), Some(target)) = (path, target) else {
                    return Err(refused(&name, "links the target itself"));
                };
                self.hard_link(&path, &target)
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                self.skip(&name, "a special file");
                return Ok(());
            }
            _ => return Err(refused(&name, "is of an unknown kind")),
        };
        match made {
            Ok(()) => Ok(()),
            Err(Failure::Done(error)) => Err(error),
            Err(Failure::System(Errno::LOOP | Errno::NOTDIR)) => Err(refused(&name, "leads through a link or a file")),
            Err(Failure::System(errno)) => Err(Error::io("make", &shown(&name), errno)),
        }
    }

    fn finish_directories(&mut self) {
        for (path, mode, mtime) in std::mem::take(&mut self.directories).into_iter().rev() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened = self
                .root
                .at(&path, false, |dir, name| openat(dir, name, flags, Mode::empty()));
            // One that is gone meanwhile needs neither, and a file system may have neither.
            if let Ok(fd) = opened {
                let _ = futimens(&fd, &changed(mtime));
                let _ = fchmod(&fd, Mode::from_raw_mode(mode));
            }
        }
    }

    fn finish(self) -> Result<Report> {
        if self.count == 0 {
            return Err(Error::failed("the stream from the machine is empty"));
        }
        Ok(self.report)
    }

    /// Where a name of the stream goes; nothing for the target directory itself.
    fn place(&mut self, name: &[u8]) -> Result<Option<PathBuf>> {
        if name.len() as u64 > MAX_NAME || name.contains(&0) {
            return Err(refused(&name[..name.len().min(64)], "is no usable name"));
        }
        let path = Path::new(OsStr::from_bytes(name));
        let mut elements = Vec::new();
        for component in path.components() {
            match component {
                Component::Normal(element) => elements.push(element),
                Component::CurDir => {}
                _ => return Err(refused(name, "leads out of the target")),
            }
        }
        // A tree's root is packed as `.`; what is in it has no common first element then.
        if matches!(self.seen_top.as_deref(), Some(top) if top == ".")
            || (self.seen_top.is_none() && elements.is_empty())
        {
            self.seen_top.get_or_insert_with(|| OsString::from("."));
            elements.insert(0, OsStr::new("."));
        }
        let Some((first, rest)) = elements.split_first() else {
            return Err(refused(name, "is no usable name"));
        };
        let top = self.seen_top.get_or_insert_with(|| (*first).to_owned());
        if top != first {
            return Err(refused(name, "is not part of what was asked for"));
        }
        let mut place = match &self.top {
            Top::Named(name) => PathBuf::from(name),
            Top::Content => PathBuf::new(),
        };
        place.extend(rest);
        Ok((!place.as_os_str().is_empty()).then_some(place))
    }

    fn directory(&mut self, path: &Option<PathBuf>, mode: u32, mtime: u64) -> Result<(), Failure> {
        let Some(path) = path else { return Ok(()) };
        // Ours to write into until its end.
        let first = Mode::from_raw_mode((mode & 0o777) | 0o700);
        let made = self.root.at(path, true, |dir, name| {
            let made = mkdirat(dir, name, first);
            if !matches!(made, Ok(()) | Err(Errno::EXIST)) {
                made?;
            }
            let found = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
            match FileType::from_raw_mode(found.st_mode) {
                // What the umask took away stays away.
                FileType::Directory => Ok(made.is_ok().then_some(mode & 0o777 & (found.st_mode | 0o700))),
                _ => Err(Errno::NOTDIR),
            }
        })?;
        if let Some(mode) = made {
            self.directories.push((path.clone(), mode, mtime));
        }
        self.report.entries += 1;
        Ok(())
    }

    fn file(
        &mut self,
        path: &Path,
        mode: u32,
        mtime: u64,
        entry: &mut Entry<'_, impl Read>,
        real_size: Option<u64>,
    ) -> Result<(), Failure> {
        let size = entry.size();
        let bytes = self.root.at(path, true, |dir, name| {
            let draft = Draft::new(dir, Mode::from_raw_mode(mode & 0o777))?;
            let written = match real_size {
                Some(real_size) => receive::sparse(entry, size, real_size, draft.file()),
                None => receive::content(entry, size, draft.file()),
            };
            let written = match written {
                Ok(written) => written,
                Err(e) => return Ok(Err(e)),
            };
            // A time that the file system cannot hold is no reason to fail.
            let _ = futimens(draft.file(), &changed(mtime));
            draft.place(name)?;
            Ok(Ok(written))
        })?;
        self.report.bytes += bytes.map_err(|e| match e {
            ContentError::Stream(e) => Failure::Done(broken(&e)),
            ContentError::File(e) => Failure::Done(Error::io("write", path, e)),
        })?;
        self.report.entries += 1;
        Ok(())
    }

    fn symlink(&mut self, path: &Path, target: &[u8]) -> Result<(), Failure> {
        // The top of the copy would lead to what stands beside it.
        let top = matches!(self.top, Top::Named(_)) && path.components().count() == 1;
        if top || target.is_empty() || target.len() as u64 > MAX_NAME || !stays_inside(path, &self.top, target) {
            self.skip(path.as_os_str().as_bytes(), "a link to elsewhere");
            return Ok(());
        }
        self.root.at(path, true, |dir, name| {
            receive::symbolic_link(dir, name, OsStr::from_bytes(target))
        })?;
        self.report.entries += 1;
        Ok(())
    }

    fn hard_link(&mut self, path: &Path, target: &Path) -> Result<(), Failure> {
        let found = self.root.stat(target)?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            self.skip(path.as_os_str().as_bytes(), "a hard link to something that is no file");
            return Ok(());
        }
        if path == target {
            return Ok(());
        }
        // Held open beside the other directory: the root remembers only one.
        let from = self.root.at(target, false, |dir, name| {
            let again = openat(
                dir,
                ".",
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            Ok((again, name.to_owned()))
        })?;
        self.root.at(path, true, |dir, name| {
            receive::hard_link(from.0.as_fd(), &from.1, dir, name)
        })?;
        self.report.entries += 1;
        Ok(())
    }

    fn skip(&mut self, name: &[u8], why: &str) {
        self.left_out(format!("{} ({why})", String::from_utf8_lossy(name).escape_debug()));
    }

    fn left_out(&mut self, what: String) {
        const SHOWN: usize = 10;
        self.report.skipped_count += 1;
        if self.report.skipped.len() < SHOWN {
            self.report.skipped.push(what);
        }
    }
}

enum Failure {
    System(Errno),
    Done(Error),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::System(errno)
    }
}

fn shown(name: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(name.to_vec()))
}

fn changed(mtime: u64) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: i64::try_from(mtime).unwrap_or(0),
            tv_nsec: 0,
        },
    }
}

/// Whether a link at `path` leads to somewhere in what is copied. It may climb only at its beginning: from the real directory it
/// stands in. Behind a name, which can be a link itself, `..` could lead anywhere.
fn stays_inside(path: &Path, top: &Top, target: &[u8]) -> bool {
    // The top entry's own name does not count: one may not climb out of it.
    let above = path.components().count().saturating_sub(1);
    let mut depth = match top {
        Top::Named(_) => above.saturating_sub(1),
        Top::Content => above,
    };
    let mut climbing = true;
    for component in Path::new(OsStr::from_bytes(target)).components() {
        match component {
            Component::Normal(_) => climbing = false,
            Component::CurDir => {}
            Component::ParentDir if climbing && depth > 0 => depth -= 1,
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests;
