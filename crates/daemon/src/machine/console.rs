//! The console log of a machine that goes on from another one's memory begins with what that one wrote.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Most that is taken over, in bytes.
const MOST: u64 = 256 * 1024;

/// Where a checkpoint keeps the console of the machine that was saved.
fn kept(dir: &Path) -> PathBuf {
    dir.join("console.log")
}

/// Keeps the end of a machine's console beside its saved memory. It is no part of that: without it copies work as well.
pub fn keep(console: &Path, dir: &Path) {
    if let Err(e) = tail(console).and_then(|bytes| create(&kept(dir), &[&bytes])) {
        tracing::debug!(dir = %dir.display(), error = %e, "the console is not kept");
    }
}

/// Begins the log of a machine that goes on from a checkpoint, unless it has one.
pub fn inherit(dir: &Path, log: &Path, of: &str) {
    let begun = tail(&kept(dir)).and_then(|bytes| {
        let newline: &[u8] = if bytes.last().is_none_or(|b| *b == b'\n') {
            b""
        } else {
            b"\n"
        };
        let (begin, end) = (
            format!("[banger: {of}]\n"),
            "[banger: from here on it is this machine]\n",
        );
        create(log, &[begin.as_bytes(), &bytes, newline, end.as_bytes()])
    });
    match begun {
        Err(e) if !matches!(e.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => {
            tracing::debug!(log = %log.display(), error = %e, "the console is not taken over");
        }
        _ => {}
    }
}

/// The last whole lines.
fn tail(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let skipped = size.saturating_sub(MOST);
    file.seek(SeekFrom::Start(skipped))?;
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes)?;
    if skipped > 0
        && let Some(end) = bytes.iter().position(|b| *b == b'\n')
    {
        bytes.drain(..=end);
    }
    Ok(bytes)
}

fn create(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    parts.iter().try_for_each(|part| file.write_all(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_of_a_copy_begins_with_its_sources() {
        let dir = tempfile::tempdir().unwrap();
        let (source, log) = (dir.path().join("source"), dir.path().join("log"));
        inherit(dir.path(), &log, "nothing");
        assert!(!log.exists(), "nothing was kept");
        std::fs::write(&source, "booted\nlogin:").unwrap();
        keep(&source, dir.path());
        inherit(dir.path(), &log, "the boot of its template");
        let text = "[banger: the boot of its template]\nbooted\nlogin:\n[banger: from here on it is this machine]\n";
        assert_eq!(std::fs::read_to_string(&log).unwrap(), text);
        inherit(dir.path(), &log, "again");
        assert_eq!(std::fs::read_to_string(&log).unwrap(), text);
    }

    #[test]
    fn only_whole_lines_of_the_end_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        let line = "0123456789abcde\n";
        std::fs::write(&source, format!("x{}", line.repeat(20_000))).unwrap();
        let bytes = tail(&source).unwrap();
        assert!(bytes.len() as u64 <= MOST && bytes.len() as u64 > MOST - 32);
        assert!(bytes.starts_with(b"0123"));
    }
}
