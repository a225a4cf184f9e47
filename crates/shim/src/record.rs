//! The record of an engine's end. Its space is taken before there is an engine: the disk may be full when that ends, and that may be
//! why it ends.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use banger_proto::shim::ExitRecord;

/// Space that is taken, in bytes: the last words with every character escaped, and the rest.
const SPACE: usize = 16 << 10;

/// A place for the record.
#[derive(Debug)]
pub(crate) struct Record {
    path: PathBuf,
    part: PathBuf,
    file: File,
}

impl Record {
    /// Takes the space. Until the record is written nothing is at its path.
    pub(crate) fn hold(path: &Path) -> io::Result<Self> {
        let part = path.with_extension("json.part");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)?;
        let held = file.write_all(&[b' '; SPACE]);
        if let Err(e) = held {
            let _ = fs::remove_file(&part);
            return Err(e);
        }
        let path = path.to_owned();
        Ok(Self { path, part, file })
    }

    /// Writes it: whole or not at all.
    pub(crate) fn write(self, record: &ExitRecord) -> io::Result<()> {
        let text = serde_json::to_vec(record)?;
        let written = self
            .file
            .write_all_at(&text, 0)
            .and_then(|()| self.file.set_len(text.len() as u64))
            .and_then(|()| self.file.sync_all())
            .and_then(|()| fs::rename(&self.part, &self.path));
        if written.is_err() {
            let _ = fs::remove_file(&self.part);
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_record_has_its_space_before_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exit.json");
        let held = Record::hold(&path).unwrap();
        assert!(!path.exists());
        let meta = fs::metadata(dir.path().join("exit.json.part")).unwrap();
        assert!(meta.blocks() * 512 >= SPACE as u64);
        let record = ExitRecord {
            code: None,
            signal: Some(7),
            last_words: vec!["\"\\".repeat(2048)],
            at_ms: 1,
        };
        assert!(serde_json::to_vec(&record).unwrap().len() < SPACE);
        held.write(&record).unwrap();
        assert_eq!(
            serde_json::from_slice::<ExitRecord>(&fs::read(&path).unwrap()).unwrap(),
            record
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(Record::hold(&dir.path().join("none/exit.json")).is_err());
    }
}
