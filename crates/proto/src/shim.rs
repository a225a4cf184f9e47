//! What the daemon and `banger-shim` say to each other: one job on its standard input, reports as lines of JSON on its standard
//! output, one record of the engine's end in a file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The line of a console log behind which the engine was started once more, by a boot or with saved memory.
pub const STARTED: &str = "[banger: the engine starts]";

/// What to start and where to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimJob {
    /// The engine's binary.
    pub engine: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Where the engine's output goes. When it is full it is renamed to `<name>.1`, in place of an earlier one.
    pub console_log: PathBuf,
    /// Size at which it is full.
    pub log_limit: u64,
    /// Where the engine's end is written down.
    pub exit_record: PathBuf,
    /// The engine's working directory; `/` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<PathBuf>,
    /// A named pipe and the bounded file that takes what is written to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
}

/// What to keep of an engine that somebody else starts: the first line, as JSON, of what comes in on standard input. The engine's
/// output follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogJob {
    /// Where the output goes, as in [`ShimJob`].
    pub console_log: PathBuf,
    /// Size at which it is full.
    pub log_limit: u64,
    /// Where the end of the output is written down as the engine's: how that ended nobody has seen.
    pub exit_record: PathBuf,
    /// As in [`ShimJob`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
}

/// Metrics of an engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// The named pipe. One that is not there is fine.
    pub pipe: PathBuf,
    /// Where they go. A full one is renamed to `<name>.1`.
    pub file: PathBuf,
    /// Size at which it is full.
    pub limit: u64,
}

/// A line of the shim's standard output. After the last one it is closed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShimReport {
    /// The engine's process was started.
    Started {
        /// Process.
        pid: u32,
        /// Its start time, field 22 of `/proc/PID/stat`.
        start_time: u64,
    },
    /// The output of an engine that somebody else starts is being read.
    Reading,
    /// It could not be started, and nothing was left behind.
    Failed {
        /// What failed.
        message: String,
    },
    /// It has ended, and this was written down (or could not be).
    Ended(ExitRecord),
}

/// How an engine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Exit status, if it exited.
    pub code: Option<i32>,
    /// Signal, if one ended it.
    pub signal: Option<i32>,
    /// The engine's own last messages (not the guest's), bounded.
    #[serde(default)]
    pub last_words: Vec<String>,
    /// When, in milliseconds since 1970.
    #[serde(default)]
    pub at_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_form_is_what_older_shims_and_daemons_read() {
        let started = ShimReport::Started { pid: 7, start_time: 9 };
        assert_eq!(
            serde_json::to_string(&started).unwrap(),
            r#"{"started":{"pid":7,"start_time":9}}"#
        );
        let record: ExitRecord = serde_json::from_str(r#"{"code":1,"signal":null,"later":true}"#).unwrap();
        assert_eq!(
            record,
            ExitRecord {
                code: Some(1),
                signal: None,
                last_words: Vec::new(),
                at_ms: 0
            }
        );
        let job = r#"{"engine":"/q","args":["-S"],"console_log":"/c","log_limit":1,"exit_record":"/e"}"#;
        assert_eq!(
            serde_json::to_string(&serde_json::from_str::<ShimJob>(job).unwrap()).unwrap(),
            job
        );
        let job =
            r#"{"console_log":"/c","log_limit":1,"exit_record":"/e","metrics":{"pipe":"/p","file":"/f","limit":2}}"#;
        assert_eq!(
            serde_json::to_string(&serde_json::from_str::<LogJob>(job).unwrap()).unwrap(),
            job
        );
    }
}
