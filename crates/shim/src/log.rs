//! A log of bounded size that never fails: what cannot be written is counted and dropped.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use banger_proto::shim::STARTED;

/// A link in the log's place is not followed.
const NO_LINK: i32 = libc::O_NOFOLLOW;

/// The log.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    old: PathBuf,
    file: Option<File>,
    size: u64,
    limit: u64,
    lost: u64,
    mid_line: bool,
}

impl Log {
    /// Opens the log, and goes on behind what is there: with a line that says so.
    pub(crate) fn open(path: &Path, limit: u64) -> io::Result<Self> {
        let mut log = Self::unopened(path, limit);
        let opened = OpenOptions::new()
            .read(true)
            .append(true)
            .custom_flags(NO_LINK)
            .open(path);
        match opened {
            Ok(file) => log.go_on(file)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => log.rotate()?,
            Err(e) => return Err(e),
        }
        Ok(log)
    }

    /// Opens a fresh log; what is there becomes the old one.
    pub(crate) fn fresh(path: &Path, limit: u64) -> io::Result<Self> {
        let mut log = Self::unopened(path, limit);
        log.rotate()?;
        Ok(log)
    }

    fn unopened(path: &Path, limit: u64) -> Self {
        let mut old: OsString = path.into();
        old.push(".1");
        Self {
            path: path.to_owned(),
            old: old.into(),
            file: None,
            size: 0,
            limit: limit.max(1024),
            lost: 0,
            mid_line: false,
        }
    }

    fn go_on(&mut self, file: File) -> io::Result<()> {
        let size = file.metadata()?.len();
        if size > 0 {
            let mut last = [0];
            file.read_exact_at(&mut last, size - 1)?;
            self.mid_line = last != *b"\n";
        }
        (self.file, self.size) = (Some(file), size);
        if size > 0 {
            let newline = if self.mid_line { "\n" } else { "" };
            self.write(format!("{newline}{STARTED}\n").as_bytes());
        }
        Ok(())
    }

    /// Appends bytes as they are.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        if self.lost > 0 && !bytes.is_empty() {
            let note = format!("\n[banger: {} bytes of output were lost here]\n", self.lost);
            if self.append(note.as_bytes()).is_err() {
                self.lost += bytes.len() as u64;
                return;
            }
            self.lost = 0;
        }
        let step = usize::try_from(self.limit).unwrap_or(usize::MAX);
        for chunk in bytes.chunks(step) {
            match self.append(chunk) {
                Ok(()) => self.mid_line = chunk.last() != Some(&b'\n'),
                Err(written) => self.lost += (chunk.len() - written) as u64,
            }
        }
    }

    /// Appends a line of the engine, marked as such and on a line of its own.
    pub(crate) fn write_engine_line(&mut self, line: &[u8]) {
        let mut marked = Vec::with_capacity(line.len() + 16);
        if self.mid_line {
            marked.push(b'\n');
        }
        marked.extend_from_slice(b"[engine] ");
        marked.extend_from_slice(line);
        marked.push(b'\n');
        self.write(&marked);
    }

    /// `Err` says how much was written.
    fn append(&mut self, bytes: &[u8]) -> Result<(), usize> {
        if (self.file.is_none() || self.size + bytes.len() as u64 > self.limit) && self.rotate().is_err() {
            self.file = None;
            return Err(0);
        }
        let mut rest = bytes;
        while let (Some(file), false) = (self.file.as_mut(), rest.is_empty()) {
            match file.write(rest) {
                Ok(n) if n > 0 => {
                    self.size += n as u64;
                    rest = &rest[n..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => return Err(bytes.len() - rest.len()),
            }
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        match fs::rename(&self.path, &self.old) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.path)?;
        self.file = Some(file);
        self.size = 0;
        Ok(())
    }
}

/// The last bytes of a stream, as lines.
#[derive(Debug, Default)]
pub(crate) struct Tail(Vec<u8>);

/// How much is kept.
const TAIL: usize = 4096;

impl Tail {
    /// Adds bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        if self.0.len() > 2 * TAIL {
            self.0.drain(..self.0.len() - TAIL);
        }
    }

    /// The lines, without those that were cut.
    pub(crate) fn lines(&self) -> Vec<String> {
        let kept = &self.0[self.0.len().saturating_sub(TAIL)..];
        let text = String::from_utf8_lossy(kept);
        let lines: Vec<String> = text
            .lines()
            .map(|l| l.chars().filter(|c| !c.is_control()).collect::<String>())
            .filter(|l| !l.is_empty())
            .collect();
        let cut = usize::from(self.0.len() > TAIL && lines.len() > 1);
        lines[cut..].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path) -> String {
        String::from_utf8(fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn a_flood_stays_within_two_files_of_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = Log::open(&path, 4096).unwrap();
        for n in 0..1000 {
            log.write(format!("line {n:04} of the flood\n").as_bytes());
        }
        log.write(&[b'x'; 20_000]);
        log.write(b"last\n");
        let (new, old) = (
            fs::metadata(&path).unwrap().len(),
            fs::metadata(dir.path().join("console.log.1")).unwrap().len(),
        );
        assert!(new <= 4096 && old <= 4096, "{new} {old}");
        assert!(read(&path).ends_with("last\n"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn the_log_goes_on_behind_the_start_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        Log::open(&path, 4096).unwrap().write(b"first");
        Log::open(&path, 4096).unwrap().write(b"second\n");
        Log::open(&path, 4096).unwrap().write(b"third\n");
        assert_eq!(read(&path), format!("first\n{STARTED}\nsecond\n{STARTED}\nthird\n"));
        assert!(!dir.path().join("console.log.1").exists());
        // However often: within two files of the limit.
        for _ in 0..100 {
            Log::open(&path, 4096).unwrap().write(&[b'x'; 500]);
        }
        let size = |name: &str| fs::metadata(dir.path().join(name)).unwrap().len();
        assert!(size("console.log") <= 4096 && size("console.log.1") <= 4096);
        std::os::unix::fs::symlink("elsewhere", dir.path().join("link")).unwrap();
        assert!(Log::open(&dir.path().join("link"), 4096).is_err());
    }

    #[test]
    fn what_the_disk_does_not_take_is_counted_and_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = Log::open(&path, 4096).unwrap();
        let good = log.file.replace(File::options().write(true).open("/dev/full").unwrap());
        log.write(b"0123456789");
        log.write(b"0123456789");
        log.file = good;
        log.write(b"back\n");
        assert_eq!(read(&path), "\n[banger: 20 bytes of output were lost here]\nback\n");
    }

    #[test]
    fn a_log_that_cannot_be_opened_is_an_error_at_first_and_a_loss_later() {
        assert!(Log::open(Path::new("/nonexistent/console.log"), 4096).is_err());
        let dir = tempfile::tempdir().unwrap();
        let sub = dir.path().join("sub");
        fs::create_dir(&sub).unwrap();
        let mut log = Log::open(&sub.join("console.log"), 1024).unwrap();
        fs::remove_dir_all(&sub).unwrap();
        log.write(&[b'x'; 1000]);
        log.write(&[b'y'; 1000]);
        assert_eq!(log.lost, 1000);
        fs::create_dir(&sub).unwrap();
        log.write(b"back\n");
        assert!(read(&sub.join("console.log")).ends_with("back\n"));
    }

    #[test]
    fn engine_lines_stand_on_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = Log::open(&path, 4096).unwrap();
        log.write(b"no newline");
        log.write_engine_line(b"qemu: oh");
        log.write(b"next\n");
        assert_eq!(read(&path), "no newline\n[engine] qemu: oh\nnext\n");
    }

    #[test]
    fn the_tail_is_bounded_and_clean() {
        let mut tail = Tail::default();
        tail.push(b"one\r\n\x1b[31mtwo\x07\n\n\xff\n");
        assert_eq!(tail.lines(), ["one", "[31mtwo", "\u{fffd}"]);
        for n in 0..10_000 {
            tail.push(format!("line {n}\n").as_bytes());
        }
        let lines = tail.lines();
        assert_eq!(lines.last().unwrap(), "line 9999");
        assert!(lines.iter().map(|l| l.len() + 1).sum::<usize>() <= TAIL);
        assert!(lines.iter().all(|l| l.starts_with("line ")), "{:?}", lines.first());
    }
}
