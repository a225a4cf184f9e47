//! The stage that stays: starts the engine, reads what it prints, waits for its end and writes that down.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use banger_proto::shim::{ExitRecord, ShimJob, ShimReport};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::log::{Log, Tail};
use crate::record::Record;
use crate::source::{GATHER, Metrics, Source, wait};
use crate::start;

/// More than any job needs.
const JOB_LIMIT: u64 = 1 << 20;
/// Longest line of the engine that stays in one piece.
const LINE: usize = 1024;

/// Runs one job from standard input.
pub(crate) fn monitor() -> Result<(), String> {
    let outcome = begin();
    let (mut engine, job, place, mut log) = match outcome {
        Ok(started) => started,
        Err(message) => {
            let _ = report(&ShimReport::Failed {
                message: message.clone(),
            });
            return Err(message);
        }
    };
    let mut tail = Tail::default();
    let mut metrics = job.metrics.clone().map(Metrics::new);
    let watched = watch(&mut engine, &mut log, &mut tail, &mut metrics);
    // Whatever went wrong with reading: the engine's end is still waited for, and by nobody else.
    let status = engine.wait();
    let mut last_words = tail.lines();
    if let Err(e) = watched {
        last_words.push(format!("banger-shim: cannot read the engine's output: {e}"));
    }
    ended(place, record(status, last_words), &mut log);
    Ok(())
}

/// Writes down and reports the engine's end.
pub(crate) fn ended(place: Record, record: ExitRecord, log: &mut Log) {
    if let Err(e) = place.write(&record) {
        log.write_engine_line(format!("cannot write the exit record: {e}").as_bytes());
    }
    let _ = report(&ShimReport::Ended(record));
}

/// Reads the job and starts the engine.
fn begin() -> Result<(Child, ShimJob, Record, Log), String> {
    let mut text = Vec::new();
    io::stdin()
        .take(JOB_LIMIT)
        .read_to_end(&mut text)
        .map_err(|e| format!("cannot read the job: {e}"))?;
    let job: ShimJob = serde_json::from_slice(&text).map_err(|e| format!("cannot understand the job: {e}"))?;
    drop(text);
    let log = Log::open(&job.console_log, job.log_limit)
        .map_err(|e| format!("cannot write {}: {e}", job.console_log.display()))?;
    let place =
        Record::hold(&job.exit_record).map_err(|e| format!("cannot write {}: {e}", job.exit_record.display()))?;
    let cwd = job.cwd.as_deref().unwrap_or(Path::new("/"));
    let mut engine = Command::new(start::SELF)
        .arg0("banger-shim")
        .current_dir(cwd)
        .arg("exec")
        .arg(&job.engine)
        .args(&job.args)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("cannot start {}: {e}", job.engine.display()))?;
    // Nobody who heard of the engine means nobody who would ever end it.
    let told = start_time(engine.id()).and_then(|start_time| {
        report(&ShimReport::Started {
            pid: engine.id(),
            start_time,
        })
    });
    if let Err(e) = told {
        let _ = engine.kill();
        let _ = engine.wait();
        return Err(format!("cannot report the engine: {e}"));
    }
    Ok((engine, job, place, log))
}

/// Reads console and messages until the engine ends.
fn watch(engine: &mut Child, log: &mut Log, tail: &mut Tail, metrics: &mut Option<Metrics>) -> io::Result<()> {
    let pid = i32::try_from(engine.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let mut console = Source::new(engine.stdout.take().map(OwnedFd::from))?;
    let mut messages = Source::new(engine.stderr.take().map(OwnedFd::from))?;
    let mut line = Vec::new();
    let mut over = false;
    loop {
        let last = over;
        console.drain(|bytes| log.write(bytes));
        messages.drain(|bytes| {
            tail.push(bytes);
            for piece in bytes.split_inclusive(|b| *b == b'\n') {
                line.extend_from_slice(piece);
                if piece.ends_with(b"\n") || line.len() >= LINE {
                    log.write_engine_line(line.trim_ascii_end());
                    line.clear();
                }
            }
        });
        if let Some(metrics) = metrics {
            metrics.drain();
        }
        if last {
            if !line.is_empty() {
                log.write_engine_line(line.trim_ascii_end());
            }
            return Ok(());
        }
        // Once it has ended there is one more round, for what it left in the pipes. A console writes single bytes: they are
        // left to gather, or following them would take a third of what the guest gets.
        let sources = [&console, &messages];
        over = wait(Some(&ended), &sources, metrics.as_ref(), None)? || wait(Some(&ended), &[], None, Some(&GATHER))?;
    }
}

fn record(status: io::Result<ExitStatus>, mut last_words: Vec<String>) -> ExitRecord {
    let (code, signal) = match status {
        Ok(status) => (status.code(), status.signal()),
        Err(e) => {
            last_words.push(format!("banger-shim: cannot wait for the engine: {e}"));
            (None, None)
        }
    };
    ExitRecord {
        code,
        signal,
        last_words,
        at_ms: now_ms(),
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(0))
}

pub(crate) fn report(report: &ShimReport) -> io::Result<()> {
    let mut text = serde_json::to_vec(report)?;
    text.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&text)?;
    out.flush()
}

/// Field 22 of `/proc/PID/stat`. The child cannot have been replaced by another process: it is not waited for yet.
fn start_time(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat"))?;
    let after = stat.iter().rposition(|b| *b == b')').map_or(0, |at| at + 1);
    String::from_utf8_lossy(&stat[after..])
        .split_ascii_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("/proc/{pid}/stat has no start time"),
            )
        })
}
