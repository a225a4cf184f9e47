//! `journal.json`: what a machine is in the middle of, where row and files alone do not say how to go on.
//!
//! It is written before the first step that cannot be taken back, and removed after the last one. A daemon that finds it at its start
//! carries the work to its end, at most once: it removes the journal before the step that may fail again.

use std::path::PathBuf;

use banger_proto::error::ApiError;
use serde::{Deserialize, Serialize};

use super::disks::read_json;
use super::handles::write_atomically;
use super::record::Machine;
use super::stop::remove_file;
use crate::error;

/// The form of the file. A file of another form is not read, and the work counts as broken off.
const FORMAT: u32 = 1;

/// What was begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "work", rename_all = "snake_case")]
pub enum Begun {
    /// The machine is put back to a snapshot. Everything that takes its place is prepared.
    Restore(Restore),
    /// It is stopped to be started again.
    Restart,
}

/// What a restore makes of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// Name of the snapshot.
    pub snapshot: String,
    /// The snapshot holds memory, and the machine runs with it in the end.
    pub memory: bool,
    /// Virtual CPUs.
    pub vcpu: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Size of the root disk in bytes.
    pub disk_bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct File {
    format: u32,
    #[serde(flatten)]
    begun: Begun,
}

fn path(m: &Machine) -> PathBuf {
    m.paths.state.join("journal.json")
}

/// Writes down what is begun. It outlives the host's power.
pub fn write(m: &Machine, begun: Begun) -> Result<(), ApiError> {
    let file = File { format: FORMAT, begun };
    let text = serde_json::to_vec_pretty(&file).unwrap_or_default();
    let path = path(m);
    write_atomically(&path, &text).map_err(|e| error::io(format_args!("write {}", path.display()), e))
}

/// What was begun and not ended. What cannot be read was never written whole.
pub fn read(m: &Machine) -> Option<Begun> {
    match read_json::<File>(&path(m)) {
        Ok(Some(file)) if file.format == FORMAT => Some(file.begun),
        Ok(Some(file)) => {
            tracing::warn!(machine = %m.id, format = file.format, "the journal was written by another version; not used");
            None
        }
        Ok(None) => None,
        Err(e) => {
            tracing::warn!(machine = %m.id, error = %e.message, "the journal cannot be read; not used");
            None
        }
    }
}

/// It is done, or broken off.
pub fn clear(m: &Machine) -> Result<(), ApiError> {
    remove_file(&path(m))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_reads_back_and_tells_its_form() {
        let restore = Restore {
            snapshot: "s".to_owned(),
            memory: true,
            vcpu: 2,
            memory_mib: 512,
            disk_bytes: 1 << 30,
        };
        for begun in [Begun::Restart, Begun::Restore(restore)] {
            let text = serde_json::to_string(&File {
                format: FORMAT,
                begun: begun.clone(),
            })
            .unwrap();
            assert!(text.contains("\"format\":1"), "{text}");
            let file: File = serde_json::from_str(&text).unwrap();
            assert_eq!((file.format, file.begun), (FORMAT, begun));
        }
        assert!(serde_json::from_str::<File>("{\"format\":1,\"work\":\"dance\"}").is_err());
    }
}
