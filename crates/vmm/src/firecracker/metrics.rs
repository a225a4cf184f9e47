//! Metrics: Firecracker writes them to a named pipe, once a minute and when asked; the shim keeps the last of them in a bounded
//! file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use banger_core::plan::MachinePaths;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::api::Action;
use super::{ENGINE, Firecracker, config, find};
use crate::engine::{EngineError, Handles};
use crate::start::{io_error, timed_out};

/// Size at which the file is full: some ten lines.
pub(super) const LIMIT: u64 = 256 << 10;
/// How often the file is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// Asks for metrics and reads them.
pub(super) async fn metrics(
    firecracker: &Firecracker,
    handles: &Handles,
    paths: &MachinePaths,
) -> Result<Option<Value>, EngineError> {
    let file = config::metrics_file(paths);
    let before = mark(&file);
    if before.is_none() {
        return Ok(None);
    }
    let limit = firecracker.options.answer_timeout;
    let deadline = Instant::now() + limit;
    let mut client = find::command_client(firecracker, handles).await?;
    let asked = client.action(Action::FlushMetrics).await;
    asked.map_err(|e| firecracker.fault(handles, e))?;
    loop {
        if mark(&file) != before
            && let Some(found) = last(&file).map_err(|e| io_error(format!("read {}", file.display()), e))?
        {
            return Ok(Some(found));
        }
        if Instant::now() >= deadline {
            return Err(timed_out(ENGINE, "write its metrics", limit));
        }
        sleep(LOOK).await;
    }
}

/// What changes when something is written.
fn mark(file: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(file).ok().map(|m| (m.ino(), m.len()))
}

/// The last line, if it is whole.
fn last(path: &Path) -> std::io::Result<Option<Value>> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LIMIT)))?;
    let mut bytes = Vec::new();
    file.take(LIMIT).read_to_end(&mut bytes)?;
    let Some(whole) = bytes.strip_suffix(b"\n") else {
        return Ok(None);
    };
    let line = whole.rsplit(|b| *b == b'\n').next().unwrap_or_default();
    Ok(serde_json::from_slice(line).ok())
}
