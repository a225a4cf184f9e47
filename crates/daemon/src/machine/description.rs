//! `machine.json`: what a machine is, beside its disks. With it a machine is taken back whose row is lost ([`crate::recover`]).
//!
//! It is written after the row, whenever that has changed in what lasts. What is true only now (state, cause) is not in it: files and
//! processes tell that.

use std::path::PathBuf;

use banger_core::id::MachineId;
use banger_core::name::MachineName;
use banger_core::plan::MachinePaths;
use banger_proto::api::{Forward, MachineSpec, MachineState, OnPanic, Timestamp, Workspace};
use serde::{Deserialize, Serialize};

use super::disks::read_json;
use super::handles::write_whole;
use crate::db::MachineRow;

/// The form of the file. Another form is not read.
const FORMAT: u32 = 1;

/// What lasts of a machine. Fields are those of its row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Description {
    format: u32,
    id: String,
    name: String,
    spec: MachineSpec,
    created_at: Timestamp,
    started_at: Option<Timestamp>,
    workspace: Option<Workspace>,
    auto_remove: bool,
    idle_suspend_after_ms: u64,
    #[serde(default)]
    on_panic: OnPanic,
    slot: Option<u32>,
    forwards: Vec<Forward>,
}

/// Where it is.
pub fn path(paths: &MachinePaths) -> PathBuf {
    paths.state.join("machine.json")
}

impl Description {
    /// Of a row.
    pub fn of(row: &MachineRow) -> Self {
        Self {
            format: FORMAT,
            id: row.id.to_string(),
            name: row.name.clone(),
            spec: row.spec.clone(),
            created_at: row.created_at.clone(),
            started_at: row.started_at.clone(),
            workspace: row.workspace.clone(),
            auto_remove: row.auto_remove,
            idle_suspend_after_ms: row.idle_suspend_after_ms,
            on_panic: row.on_panic,
            slot: row.slot,
            forwards: row.forwards.clone(),
        }
    }

    /// The row of it, in a state that files and processes tell.
    pub fn row(self, id: MachineId, state: MachineState) -> MachineRow {
        MachineRow {
            id,
            name: self.name,
            state,
            cause: None,
            spec: self.spec,
            created_at: self.created_at,
            started_at: self.started_at,
            workspace: self.workspace,
            boot: None,
            auto_remove: self.auto_remove,
            idle_suspend_after_ms: self.idle_suspend_after_ms,
            on_panic: self.on_panic,
            slot: self.slot,
            forwards: self.forwards,
        }
    }

    /// The machine's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is made of.
    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// When it was created.
    pub fn created_at(&self) -> &str {
        &self.created_at
    }

    /// Its place in the network of system mode.
    pub fn slot(&self) -> Option<u32> {
        self.slot
    }

    /// Whether it ever began to start, and so has disks.
    pub fn was_started(&self) -> bool {
        self.started_at.is_some()
    }

    /// Reads the one in a machine's directory; `Err` says in words why it is of no use.
    pub fn read(id: &MachineId, paths: &MachinePaths) -> Result<Self, String> {
        let path = path(paths);
        let found: Option<Self> = read_json(&path).map_err(|e| e.message)?;
        let found = found.ok_or_else(|| format!("there is no {}", path.display()))?;
        found.check(id).map_err(|why| format!("{}: {why}", path.display()))
    }

    fn check(self, id: &MachineId) -> Result<Self, String> {
        if self.format != FORMAT {
            return Err(format!("it has form {}, this banger reads {FORMAT}", self.format));
        }
        if self.id != id.as_str() {
            return Err(format!("it is that of machine {}", self.id.escape_default()));
        }
        MachineName::parse(&self.name).map_err(|e| e.to_string())?;
        Ok(self)
    }

    /// Writes it where the file says something else. A machine without a directory has none.
    pub fn keep(&self, paths: &MachinePaths) -> std::io::Result<()> {
        let path = path(paths);
        if read_json::<Self>(&path).is_ok_and(|kept| kept.as_ref() == Some(self)) || !paths.state.is_dir() {
            return Ok(());
        }
        write_whole(&path, &serde_json::to_vec_pretty(self).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::test_row as row;

    #[test]
    fn what_lasts_reads_back_and_what_is_wrong_is_told() {
        let tmp = tempfile::tempdir().unwrap();
        let paths = MachinePaths {
            state: tmp.path().join("m"),
            run: tmp.path().join("r"),
        };
        let mut wanted = row(7, "box");
        wanted.started_at = Some("x".to_owned());
        wanted.slot = Some(3);
        let description = Description::of(&wanted);
        // Without a directory there is nothing to keep it in.
        description.keep(&paths).unwrap();
        assert!(Description::read(&wanted.id, &paths).unwrap_err().contains("no "));
        std::fs::create_dir(&paths.state).unwrap();
        description.keep(&paths).unwrap();
        let read = Description::read(&wanted.id, &paths).unwrap();
        assert_eq!(read, description);
        wanted.state = MachineState::Running;
        assert_eq!(read.row(wanted.id.clone(), MachineState::Running), wanted);
        // It is not written again for nothing.
        let inode = || std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path(&paths)).unwrap());
        let before = inode();
        description.keep(&paths).unwrap();
        assert_eq!(inode(), before);
        let other = row(8, "other");
        assert!(
            Description::read(&other.id, &paths)
                .unwrap_err()
                .contains("that of machine")
        );
        let good = std::fs::read_to_string(path(&paths)).unwrap();
        for bad in [
            good.replace("\"format\": 1", "\"format\": 2"),
            good.replace("\"box\"", "\"../x\""),
            String::new(),
            "{".to_owned(),
        ] {
            std::fs::write(path(&paths), bad).unwrap();
            assert!(Description::read(&wanted.id, &paths).is_err());
        }
    }
}
