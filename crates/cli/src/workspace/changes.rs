//! Which files of a work tree are not what a commit says. Decided by their bytes, since git could run a filter to decide it.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Stat};
use sha1::Digest;

use crate::error::Result;
use crate::files::beneath::Root;
use crate::workspace::IndexEntry;
use crate::workspace::mirror::Mirror;

/// Attributes that make git convert line ends.
const LINE_ENDS: [&str; 3] = ["text", "eol", "crlf"];

/// What the index keeps of a file, to know it again: the low 32 bits of each number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    changed: (u32, u32),
    modified: (u32, u32),
    inode: u32,
    size: u32,
}

/// Tracked paths that differ from a commit, in the index or in the work tree. `tree` are the commit's files.
///
/// A file is unchanged when the index knows it by its time and size; when its bytes are those of the commit; or when they are so
/// but for line ends, where a conversion of line ends is asked for.
pub(crate) fn changed(
    mirror: &Mirror,
    root: &mut Root,
    tree: &[IndexEntry],
    index: &[IndexEntry],
) -> Result<Vec<PathBuf>> {
    let known: HashMap<&Path, &IndexEntry> = tree.iter().map(|e| (e.path.as_path(), e)).collect();
    let listed: HashSet<&Path> = index.iter().map(|e| e.path.as_path()).collect();
    let stamps = Stamps::read(mirror)?;
    let modes = mirror.settings.flag(b"core.filemode") != Some(false);
    let mut changed: Vec<&Path> = tree
        .iter()
        .map(|e| e.path.as_path())
        .filter(|path| !listed.contains(path))
        .collect();
    let mut doubtful = Vec::new();
    for entry in index.iter().filter(|e| !e.skip_worktree) {
        let path = entry.path.as_path();
        let Some(committed) = known.get(path).filter(|_| entry.stage == "0") else {
            changed.push(path);
            continue;
        };
        let Ok(stat) = root.stat(path) else {
            changed.push(path);
            continue;
        };
        if !same_kind(&committed.mode, &stat, modes) {
            changed.push(path);
        } else if !(committed.hash == entry.hash && stamps.fit(path, &stat))
            && raw_name(mirror, root, path, &stat).as_deref() != Some(&committed.hash)
        {
            doubtful.push(*committed);
        }
    }
    let converted = with_line_ends(mirror, &doubtful)?;
    for committed in doubtful {
        let path = committed.path.as_path();
        let same = converted.contains(path) && unix_name(mirror, root, path).as_deref() == Some(&committed.hash);
        if !same {
            changed.push(path);
        }
    }
    changed.sort_unstable();
    changed.dedup();
    Ok(changed.into_iter().map(Path::to_owned).collect())
}

/// Whether what is on disk is a file of this mode. Without `modes` the work tree knows no executables.
fn same_kind(mode: &str, stat: &Stat, modes: bool) -> bool {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Symlink => mode == "120000",
        FileType::RegularFile => {
            let executable = stat.st_mode & 0o100 != 0;
            mode.starts_with("100") && (!modes || executable == (mode == "100755"))
        }
        _ => false,
    }
}

/// What the index says of files, for those that it can't be wrong about.
struct Stamps {
    known: HashMap<PathBuf, Stamp>,
    /// When the index was written. A file that was changed after that, or at that moment, may have changed unseen.
    written: (i64, i64),
}

impl Stamps {
    fn read(mirror: &Mirror) -> Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let index = mirror.place.git_dir.join("index");
        let written = std::fs::symlink_metadata(&index).map_or((0, 0), |m| (m.mtime(), m.mtime_nsec()));
        let listed = mirror.git.output(&["ls-files", "--debug", "-z"], b"")?;
        Ok(Self {
            // Git promises no format here. Without it every file is read.
            known: parse_stamps(&listed).unwrap_or_default(),
            written,
        })
    }

    fn fit(&self, path: &Path, stat: &Stat) -> bool {
        let modified = (stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(i64::MAX));
        modified < self.written && self.known.get(path) == Some(&Stamp::of(stat))
    }
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the index keeps the low bits"
)]
impl Stamp {
    fn of(stat: &Stat) -> Self {
        Self {
            changed: (stat.st_ctime as u32, stat.st_ctime_nsec as u32),
            modified: (stat.st_mtime as u32, stat.st_mtime_nsec as u32),
            inode: stat.st_ino as u32,
            size: stat.st_size as u32,
        }
    }
}

/// `PATH`, a zero, and five lines, for each file. Nothing when it is something else.
fn parse_stamps(bytes: &[u8]) -> Option<HashMap<PathBuf, Stamp>> {
    let mut stamps = HashMap::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let end = rest.iter().position(|&b| b == 0)?;
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(&rest[..end]));
        rest = &rest[end + 1..];
        let mut numbers = Vec::new();
        for (prefix, separator) in [
            ("  ctime: ", ':'),
            ("  mtime: ", ':'),
            ("  dev: ", '\t'),
            ("  uid: ", '\t'),
            ("  size: ", '\t'),
        ] {
            let end = rest.iter().position(|&b| b == b'\n')?;
            let line = std::str::from_utf8(&rest[..end]).ok()?.strip_prefix(prefix)?;
            rest = &rest[end + 1..];
            let (one, other) = line.split_once(separator)?;
            numbers.push((one.parse::<u32>().ok()?, other.to_owned()));
        }
        let [changed, modified, (_, inode), _, (size, _)] = numbers.as_slice() else {
            return None;
        };
        let stamp = Stamp {
            changed: (changed.0, changed.1.parse().ok()?),
            modified: (modified.0, modified.1.parse().ok()?),
            inode: inode.strip_prefix("ino: ")?.parse().ok()?,
            size: *size,
        };
        stamps.insert(path, stamp);
    }
    Some(stamps)
}

/// Those of the files whose line ends git converts.
fn with_line_ends(mirror: &Mirror, files: &[&IndexEntry]) -> Result<HashSet<PathBuf>> {
    if files.is_empty() {
        return Ok(HashSet::new());
    }
    let mut input = Vec::new();
    for file in files {
        input.extend_from_slice(file.path.as_os_str().as_bytes());
        input.push(0);
    }
    let arguments = [&["check-attr", "-z", "--stdin"], &LINE_ENDS[..]].concat();
    let said = mirror.git.output(&arguments, &input)?;
    let always = mirror
        .setting(b"core.autocrlf")
        .is_some_and(|value| value == b"input" || value == b"true");
    Ok(attributes(&said, always))
}

/// Reads `PATH`, attribute and value, each ended by a zero. `always`: without a word of the attributes line ends are converted.
fn attributes(bytes: &[u8], always: bool) -> HashSet<PathBuf> {
    let mut fields = bytes.split(|&b| b == 0);
    let (mut asked, mut refused) = (HashSet::new(), HashSet::new());
    while let (Some(path), Some(attribute), Some(value)) = (fields.next(), fields.next(), fields.next()) {
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(path));
        match (attribute, value) {
            (b"text" | b"crlf", b"unset") => drop(refused.insert(path)),
            (_, b"unset") => {}
            (_, b"unspecified") if !always => {}
            _ => drop(asked.insert(path)),
        }
    }
    asked.retain(|path| !refused.contains(path));
    asked
}

/// The name that git would give to what is on disk, as it is.
fn raw_name(mirror: &Mirror, root: &mut Root, path: &Path, stat: &Stat) -> Option<String> {
    let format = &mirror.object_format;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
        let target = root.read_link(path).ok()?;
        return blob_name(format, target.len() as u64, target.as_slice()).ok();
    }
    let file = root.read(path).ok()?;
    let found = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
    blob_name(format, found.len(), file).ok()
}

/// The name that git would give to a file with the line ends of Unix.
fn unix_name(mirror: &Mirror, root: &mut Root, path: &Path) -> Option<String> {
    let mut open = || {
        let file = root.read(path).ok()?;
        file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        Some(UnixLines::new(io::BufReader::with_capacity(64 * 1024, file)))
    };
    let size = io::copy(&mut open()?, &mut io::sink()).ok()?;
    blob_name(&mirror.object_format, size, open()?).ok()
}

fn blob_name(format: &str, size: u64, content: impl Read) -> io::Result<String> {
    match format {
        "sha256" => hash::<sha2::Sha256>(size, content),
        _ => hash::<sha1::Sha1>(size, content),
    }
}

fn hash<D: Digest>(size: u64, mut content: impl Read) -> io::Result<String> {
    let mut digest = D::new();
    digest.update(format!("blob {size}\0"));
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = content.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        digest.update(&buffer[..n]);
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Reads `\r\n` as `\n`.
struct UnixLines<R> {
    inner: R,
    /// A carriage return was read, and what follows it is not known yet.
    held: bool,
}

impl<R: io::BufRead> UnixLines<R> {
    fn new(inner: R) -> Self {
        Self { inner, held: false }
    }
}

impl<R: io::BufRead> Read for UnixLines<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut n = 0;
        while n < buffer.len() {
            let available = self.inner.fill_buf()?;
            let Some(&next) = available.first() else {
                if std::mem::take(&mut self.held) {
                    buffer[n] = b'\r';
                    n += 1;
                }
                break;
            };
            if std::mem::take(&mut self.held) && next != b'\n' {
                buffer[n] = b'\r';
                n += 1;
                continue;
            }
            let plain = available.iter().position(|&b| b == b'\r').unwrap_or(available.len());
            let taken = plain.min(buffer.len() - n);
            buffer[n..n + taken].copy_from_slice(&available[..taken]);
            n += taken;
            let at_return = taken == plain && plain < available.len();
            self.held = at_return;
            self.inner.consume(taken + usize::from(at_return));
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_read_or_left() {
        let text = b"a b\0  ctime: 1:2\n  mtime: 3:4\n  dev: 5\tino: 6\n  uid: 7\tgid: 8\n  size: 9\tflags: 0\n\
                     c\n\0  ctime: 1:2\n  mtime: 3:4\n  dev: 5\tino: 16\n  uid: 7\tgid: 8\n  size: 9\tflags: 20000000\n";
        let stamps = parse_stamps(text).unwrap();
        assert_eq!(stamps.len(), 2);
        let expected = Stamp {
            changed: (1, 2),
            modified: (3, 4),
            inode: 16,
            size: 9,
        };
        assert_eq!(stamps[Path::new("c\n")], expected);
        assert_eq!(parse_stamps(b"a\0  ctime: x\n"), None);
        assert_eq!(parse_stamps(b"a"), None);
    }

    #[test]
    fn attributes_say_whether_line_ends_are_converted() {
        let said = b"a\0text\0auto\0a\0eol\0unspecified\0a\0crlf\0unspecified\0b\0text\0unset\0b\0eol\0crlf\0b\0crlf\0unspecified\0\
                     c\0text\0unspecified\0c\0eol\0unspecified\0c\0crlf\0unspecified\0";
        let converted = attributes(said, false);
        assert_eq!(converted, HashSet::from([PathBuf::from("a")]));
        assert_eq!(attributes(said, true).len(), 2);
    }

    #[test]
    fn names_are_gits() {
        let name = |format, text: &str| blob_name(format, text.len() as u64, text.as_bytes()).unwrap();
        assert_eq!(name("sha1", "hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
        assert_eq!(
            name("sha256", "hello\n"),
            "2cf8d83d9ee29543b34a87727421fdecb7e3f3a183d337639025de576db9ebb4"
        );
    }

    #[test]
    fn line_ends_become_those_of_unix() {
        for (text, expected) in [
            ("a\r\nb\r\n", "a\nb\n"),
            ("a\rb\r\r\n\r", "a\rb\r\n\r"),
            ("", ""),
            ("\r\n", "\n"),
            ("plain\n", "plain\n"),
        ] {
            for (capacity, size) in [(1, 1), (2, 3), (64, 64)] {
                let mut reader = UnixLines::new(io::BufReader::with_capacity(capacity, text.as_bytes()));
                let (mut read, mut buffer) = (Vec::new(), vec![0; size]);
                loop {
                    let n = reader.read(&mut buffer).unwrap();
                    if n == 0 {
                        break;
                    }
                    read.extend_from_slice(&buffer[..n]);
                }
                assert_eq!(read, expected.as_bytes(), "{text:?} {capacity} {size}");
            }
        }
    }
}
