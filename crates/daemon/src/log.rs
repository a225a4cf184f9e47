//! The daemon's log: JSON lines in a file of bounded size, with one older file kept beside it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Size at which the log is turned over.
const MAX: u64 = 4 * 1024 * 1024;

/// A file that is renamed to `<name>.1` when the next write would make it larger than its limit.
#[derive(Debug)]
pub struct BoundedFile {
    path: PathBuf,
    file: File,
    length: u64,
    max: u64,
}

impl BoundedFile {
    /// Opens it to append.
    pub fn open(path: &Path, max: u64) -> io::Result<Self> {
        let file = append(path)?;
        let length = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            file,
            length,
            max,
        })
    }

    fn turn_over(&mut self) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        std::fs::rename(&self.path, old)?;
        self.file = append(&self.path)?;
        self.length = 0;
        Ok(())
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

impl Write for BoundedFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.length > 0 && self.length + line.len() as u64 > self.max {
            self.turn_over()?;
        }
        if let Err(e) = self.file.write_all(line) {
            // No half line on a full disk: the next one would end it.
            let _ = self.file.set_len(self.length);
            return Err(e);
        }
        self.length += line.len() as u64;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Sends what the process has to say to the log. Libraries below speak up only with warnings.
pub fn init(path: &Path, level: &str) -> io::Result<()> {
    let level: LevelFilter = level.parse().unwrap_or(LevelFilter::INFO);
    let writer = Mutex::new(BoundedFile::open(path, MAX)?);
    let targets = Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("banger_daemon", level)
        .with_target("banger_image", level)
        .with_target("banger_vmm", level)
        .with_target("bangerd", level);
    let lines = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_span_list(false)
        .with_writer(writer);
    // A second call in one process (tests) keeps the first log.
    let _ = tracing_subscriber::registry().with(targets).with(lines).try_init();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_stays_bounded() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("log");
        let mut log = BoundedFile::open(&path, 100).unwrap();
        for i in 0..50 {
            log.write_all(format!("line {i:04}\n").as_bytes()).unwrap();
        }
        assert!(std::fs::metadata(&path).unwrap().len() <= 100);
        assert!(std::fs::metadata(tmp.path().join("log.1")).unwrap().len() <= 100);
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("line 0049\n"));
        assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 2);
    }
}
