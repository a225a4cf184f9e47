//! Files under their names in one step. Whatever stood there stays whole until the new file is complete, and a copy that fails
//! or is interrupted leaves nothing beside it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, openat, renameat, symlinkat, unlinkat};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

use crate::sparse::{MAX_SIZE, Map};

/// Bytes that are read at a time.
const BUFFER: usize = 128 * 1024;

/// A file that has no name yet.
///
/// Where the file system can do it, nothing has to be cleaned up: the kernel frees a file without a name however its process
/// ends. Elsewhere it has a name of its own until then, which goes with this value.
#[derive(Debug)]
pub struct Draft<'d> {
    directory: BorrowedFd<'d>,
    file: File,
    name: Option<OsString>,
}

impl<'d> Draft<'d> {
    /// Makes one in the directory that it will have its name in. The process's umask applies to `mode`.
    ///
    /// # Errors
    /// Errors of the system.
    pub fn new(directory: BorrowedFd<'d>, mode: Mode) -> rustix::io::Result<Self> {
        let flags = OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC;
        match openat(directory, ".", flags, mode) {
            Ok(fd) => Ok(Self {
                directory,
                file: File::from(fd),
                name: None,
            }),
            // Not every file system has such files; old kernels take the flag for an attempt to open a directory.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => Self::named(directory, mode),
            Err(e) => Err(e),
        }
    }

    fn named(directory: BorrowedFd<'d>, mode: Mode) -> rustix::io::Result<Self> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let (file, name) = under_fresh_name(|name| openat(directory, name, flags, mode))?;
        Ok(Self {
            directory,
            file: File::from(file),
            name: Some(name),
        })
    }

    /// The file, open for writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives it its name. A file or link of that name is replaced, a directory is not.
    ///
    /// # Errors
    /// Errors of the system: `EISDIR` for a directory.
    pub fn place(mut self, name: &OsStr) -> rustix::io::Result<()> {
        if self.name.is_none() {
            let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            match linkat(CWD, &own, self.directory, name, AtFlags::SYMLINK_FOLLOW) {
                Err(Errno::EXIST) => {}
                other => return other,
            }
            let directory = self.directory;
            let link = |fresh: &OsStr| linkat(CWD, &own, directory, fresh, AtFlags::SYMLINK_FOLLOW);
            self.name = Some(under_fresh_name(link)?.1);
        }
        let Some(own) = &self.name else { return Ok(()) };
        renameat(self.directory, own, self.directory, name)?;
        self.name = None;
        Ok(())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // An error here has no one to go to: what led here is reported.
            let _ = unlinkat(self.directory, name, AtFlags::empty());
        }
    }
}

/// Runs a call with names that nothing has, until one is free.
fn under_fresh_name<T>(call: impl Fn(&OsStr) -> rustix::io::Result<T>) -> rustix::io::Result<(T, OsString)> {
    loop {
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty())?;
        let name = OsString::from(format!(".banger-copy-{:016x}", u64::from_ne_bytes(bytes)));
        match call(&name) {
            Err(Errno::EXIST) => {}
            Ok(done) => return Ok((done, name)),
            Err(e) => return Err(e),
        }
    }
}

/// Makes something under a fresh name and moves it over `name`, unless `name` is free.
fn over(
    directory: BorrowedFd<'_>,
    name: &OsStr,
    make: impl Fn(&OsStr) -> rustix::io::Result<()>,
) -> rustix::io::Result<()> {
    match make(name) {
        Err(Errno::EXIST) => {}
        other => return other,
    }
    let ((), fresh) = under_fresh_name(&make)?;
    let moved = renameat(directory, &fresh, directory, name);
    // Two names of one file: renaming does nothing, and leaves both.
    match unlinkat(directory, &fresh, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => moved,
        Err(e) => moved.and(Err(e)),
    }
}

/// Makes a symbolic link. A file or link of that name is replaced, a directory is not.
///
/// # Errors
/// Errors of the system.
pub fn symbolic_link(directory: BorrowedFd<'_>, name: &OsStr, target: &OsStr) -> rustix::io::Result<()> {
    over(directory, name, |name| symlinkat(target, directory, name))
}

/// Makes a hard link to `source` in `from`; a symbolic link there is linked itself. A file or link of that name is replaced, a
/// directory is not.
///
/// # Errors
/// Errors of the system.
pub fn hard_link(
    from: BorrowedFd<'_>,
    source: &OsStr,
    directory: BorrowedFd<'_>,
    name: &OsStr,
) -> rustix::io::Result<()> {
    over(directory, name, |name| {
        linkat(from, source, directory, name, AtFlags::empty())
    })
}

/// Why content did not get into its file.
#[derive(Debug)]
pub enum ContentError {
    /// The stream broke off, or contradicts itself.
    Stream(io::Error),
    /// The file could not be written.
    File(io::Error),
}

/// Writes what an entry of `size` bytes holds into an empty file; returns the bytes written.
///
/// # Errors
/// `Stream` for a stream that ends early.
pub fn content(entry: &mut impl Read, size: u64, file: &File) -> Result<u64, ContentError> {
    let mut buffer = vec![0; BUFFER.min(usize::try_from(size).unwrap_or(BUFFER).max(1))];
    run(entry, file, 0, size, &mut buffer)?;
    Ok(size)
}

/// Writes a sparse file: the map, then its data. `stored` is the size of the entry, `real_size` that of the file in bytes. Returns
/// the bytes of data.
///
/// # Errors
/// `Stream` for a stream that ends early, and for a map that is damaged or does not fit the entry.
pub fn sparse(entry: &mut impl Read, stored: u64, real_size: u64, file: &File) -> Result<u64, ContentError> {
    let mut counted = entry.take(stored);
    let map = Map::decode(real_size, &mut counted).map_err(ContentError::Stream)?;
    if counted.limit() != map.stored() {
        return Err(ContentError::Stream(io::Error::new(
            io::ErrorKind::InvalidData,
            "the map of a sparse file does not fit its data",
        )));
    }
    file.set_len(map.size()).map_err(ContentError::File)?;
    let mut buffer = vec![0; BUFFER];
    for piece in map.pieces() {
        run(&mut counted, file, piece.offset, piece.length, &mut buffer)?;
    }
    Ok(map.stored())
}

/// Writes a file whose holes come as zeros; they become holes again. Returns the bytes of data.
///
/// # Errors
/// `Stream` for a stream that ends early, and a size of more than 16 TiB.
pub fn expanded(entry: &mut impl Read, size: u64, file: &File) -> Result<u64, ContentError> {
    if size > MAX_SIZE {
        return Err(ContentError::Stream(io::Error::new(
            io::ErrorKind::InvalidData,
            "a sparse file of more than 16 TiB",
        )));
    }
    file.set_len(size).map_err(ContentError::File)?;
    let mut buffer = vec![0; BUFFER];
    let (mut at, mut written) = (0, 0);
    while at < size {
        let n = some(entry, size - at, &mut buffer)?;
        if buffer[..n].iter().any(|b| *b != 0) {
            file.write_all_at(&buffer[..n], at).map_err(ContentError::File)?;
            written += n as u64;
        }
        at += n as u64;
    }
    Ok(written)
}

fn run(entry: &mut impl Read, file: &File, offset: u64, length: u64, buffer: &mut [u8]) -> Result<(), ContentError> {
    let mut done = 0;
    while done < length {
        let n = some(entry, length - done, buffer)?;
        file.write_all_at(&buffer[..n], offset + done)
            .map_err(ContentError::File)?;
        done += n as u64;
    }
    Ok(())
}

/// The next bytes of a stream that owes `left` more.
fn some(entry: &mut impl Read, left: u64, buffer: &mut [u8]) -> Result<usize, ContentError> {
    let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
    loop {
        match entry.read(&mut buffer[..most]) {
            Ok(0) => return Err(ContentError::Stream(io::ErrorKind::UnexpectedEof.into())),
            Ok(n) => return Ok(n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ContentError::Stream(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use super::*;
    use crate::sparse::Piece;

    fn open(path: &Path) -> std::os::fd::OwnedFd {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat(CWD, path, flags, Mode::empty()).unwrap()
    }

    fn names(path: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(path)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn draft<'d>(directory: &'d std::os::fd::OwnedFd, named: bool) -> Draft<'d> {
        let make = if named { Draft::named } else { Draft::new };
        make(directory.as_fd(), Mode::from_raw_mode(0o600)).unwrap()
    }

    #[test]
    fn a_file_gets_its_name_when_it_is_complete() {
        for named in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let fd = open(dir.path());
            std::fs::write(dir.path().join("old"), "old").unwrap();
            std::fs::create_dir(dir.path().join("dir")).unwrap();
            let made = draft(&fd, named);
            content(&mut &b"half"[..], 4, made.file()).unwrap();
            drop(made);
            assert_eq!(names(dir.path()), ["dir", "old"], "what is given up leaves nothing");
            for name in ["old", "new"] {
                let made = draft(&fd, named);
                content(&mut &b"text"[..], 4, made.file()).unwrap();
                made.place(OsStr::new(name)).unwrap();
                assert_eq!(std::fs::read_to_string(dir.path().join(name)).unwrap(), "text");
            }
            let made = draft(&fd, named);
            assert_eq!(made.place(OsStr::new("dir")), Err(Errno::ISDIR));
            assert_eq!(names(dir.path()), ["dir", "new", "old"]);
        }
    }

    #[test]
    fn links_replace_files_and_links_but_no_directory() {
        let dir = tempfile::tempdir().unwrap();
        let fd = open(dir.path());
        std::fs::write(dir.path().join("a"), "a").unwrap();
        std::fs::write(dir.path().join("b"), "b").unwrap();
        std::fs::create_dir(dir.path().join("dir")).unwrap();
        let (at, name) = (fd.as_fd(), OsStr::new);
        for _ in 0..2 {
            hard_link(at, name("a"), at, name("b")).unwrap();
            symbolic_link(at, name("l"), name("a")).unwrap();
        }
        let inode = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().ino();
        assert_eq!(inode("a"), inode("b"));
        assert_eq!(std::fs::read_link(dir.path().join("l")).unwrap(), Path::new("a"));
        assert!(hard_link(at, name("a"), at, name("dir")).is_err());
        assert!(symbolic_link(at, name("dir"), name("a")).is_err());
        assert_eq!(names(dir.path()), ["a", "b", "dir", "l"]);
    }

    #[test]
    fn a_sparse_file_stays_sparse() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("f")).unwrap();
        let pieces = vec![
            Piece {
                offset: 4096,
                length: 3,
            },
            Piece {
                offset: 1 << 29,
                length: 1,
            },
        ];
        let map = Map::new(1 << 30, pieces).unwrap();
        let bytes = [map.encode().as_slice(), b"abcd"].concat();
        assert_eq!(
            sparse(&mut bytes.as_slice(), bytes.len() as u64, 1 << 30, &file).unwrap(),
            4
        );
        let meta = file.metadata().unwrap();
        assert_eq!(meta.len(), 1 << 30);
        assert!(meta.blocks() * 512 < 1 << 20);
        let whole = File::open(dir.path().join("f")).unwrap();
        let mut text = [0; 3];
        whole.read_exact_at(&mut text, 4096).unwrap();
        assert_eq!(&text, b"abc");
        // The entry has more or less data than its map says, or ends early.
        for (stored, bytes) in [(516 - 1, &bytes[..]), (516 + 1, &bytes[..]), (516, &bytes[..515])] {
            let mut bytes = bytes;
            let error = sparse(&mut bytes, stored, 1 << 30, &file).unwrap_err();
            assert!(matches!(error, ContentError::Stream(_)), "{error:?}");
        }
        let zeros = io::repeat(0).take(1 << 24).chain(&b"x"[..]);
        let file = File::create(dir.path().join("g")).unwrap();
        assert!(expanded(&mut { zeros }, (1 << 24) + 1, &file).unwrap() <= BUFFER as u64);
        assert_eq!(file.metadata().unwrap().len(), (1 << 24) + 1);
        assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn a_stream_that_ends_early_is_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("f")).unwrap();
        assert!(matches!(
            content(&mut &b"ab"[..], 3, &file),
            Err(ContentError::Stream(_))
        ));
        assert!(matches!(
            expanded(&mut &b"ab"[..], 3, &file),
            Err(ContentError::Stream(_))
        ));
        assert!(matches!(
            expanded(&mut io::repeat(0), u64::MAX, &file),
            Err(ContentError::Stream(_))
        ));
    }
}
