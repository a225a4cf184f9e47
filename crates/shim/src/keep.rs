//! The stage that stays with an engine that somebody else starts: it reads what the engine prints until nobody can print any more,
//! which is when the engine has ended.

use std::io;
use std::os::fd::AsFd;

use banger_proto::shim::{ExitRecord, LogJob, ShimReport};

use crate::log::Log;
use crate::monitor;
use crate::record::Record;
use crate::source::{GATHER, Metrics, Source, wait};

/// More than any job needs, and less than a pipe holds.
const JOB_LIMIT: usize = 32 << 10;

/// Keeps the output that comes in on standard input, after a line that says where.
pub(crate) fn keep() -> Result<(), String> {
    let (job, place, mut log, mut console) = match begin() {
        Ok(begun) => begun,
        Err(message) => {
            let _ = monitor::report(&ShimReport::Failed {
                message: message.clone(),
            });
            return Err(message);
        }
    };
    let mut metrics = job.metrics.clone().map(Metrics::new);
    let mut fault = None;
    while !console.is_closed() {
        let waited = wait(None, &[&console], metrics.as_ref(), None)
            // Single bytes are left to gather.
            .and_then(|_| wait(None, &[], None, Some(&GATHER)));
        if let Err(e) = waited {
            fault = Some(format!("banger-shim: cannot read the engine's output: {e}"));
            break;
        }
        console.drain(|bytes| log.write(bytes));
        if let Some(metrics) = &mut metrics {
            metrics.drain();
        }
    }
    let record = ExitRecord {
        code: None,
        signal: None,
        last_words: fault.into_iter().collect(),
        at_ms: monitor::now_ms(),
    };
    monitor::ended(place, record, &mut log);
    Ok(())
}

fn begin() -> Result<(LogJob, Record, Log, Source), String> {
    let line = first_line().map_err(|e| format!("cannot read the job: {e}"))?;
    let job: LogJob = serde_json::from_slice(&line).map_err(|e| format!("cannot understand the job: {e}"))?;
    let log = Log::open(&job.console_log, job.log_limit)
        .map_err(|e| format!("cannot write {}: {e}", job.console_log.display()))?;
    let place =
        Record::hold(&job.exit_record).map_err(|e| format!("cannot write {}: {e}", job.exit_record.display()))?;
    let console = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .and_then(|fd| Source::new(Some(fd)))
        .map_err(|e| format!("cannot read the engine's output: {e}"))?;
    // Nobody who heard of this means nobody who would start the engine.
    monitor::report(&ShimReport::Reading).map_err(|e| format!("cannot report: {e}"))?;
    Ok((job, place, log, console))
}

/// Byte by byte: what follows is the engine's.
fn first_line() -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < JOB_LIMIT {
        match rustix::io::read(rustix::stdio::stdin(), &mut byte) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) if byte[0] == b'\n' => return Ok(line),
            Ok(_) => line.push(byte[0]),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "it does not end"))
}
