//! `banger daemon`: the process behind it all.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::time::Duration;

use banger_core::size;
use banger_proto::api::DaemonStatus;
use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Serialize;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, Renew, skew};
use crate::error::{Error, Kind, Result};
use crate::printer::clean;
use crate::table;

/// How long a daemon may take to end.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Look after the daemon
///
/// It is started when a command needs it. Machines do not depend on it: they run on when it ends, and the next one adopts them.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "Examples:\n  banger daemon status\n  banger daemon logs --follow"
)]
pub(crate) struct DaemonArgs {
    #[command(subcommand)]
    command: DaemonCommand,
}

#[derive(Debug, Subcommand)]
enum DaemonCommand {
    Start(StartArgs),
    Status(StatusArgs),
    Stop(StopArgs),
    Restart(RestartArgs),
    Logs(LogsArgs),
}

/// Start the daemon, when it does not run yet
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger daemon start")]
struct StartArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// Show whether the daemon runs, and where its files are
///
/// The exit status is 9 when it does not run.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger daemon status --json")]
struct StatusArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// Stop the daemon; machines run on
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger daemon stop")]
struct StopArgs {}

/// Stop the daemon and start it again; machines run on
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger daemon restart")]
struct RestartArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// Show the daemon's log
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger daemon logs -f")]
struct LogsArgs {
    /// Go on as the log does
    #[arg(short, long)]
    follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "LINES", default_value_t = 100)]
    tail: usize,
}

impl DaemonArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        match self.command {
            DaemonCommand::Start(args) => start(context, args.output),
            DaemonCommand::Status(args) => args.run(context),
            DaemonCommand::Stop(StopArgs {}) => {
                systemds_to(context, "stop", "sudo systemctl stop bangerd")?;
                context.block_on(stop(context))
            }
            DaemonCommand::Restart(args) => {
                systemds_to(context, "restart", "sudo banger system restart")?;
                context.block_on(stop(context))?;
                start(context, args.output)
            }
            DaemonCommand::Logs(args) => args.run(context),
        }
    }
}

/// In system mode the daemon is systemd's; stopping it takes root.
fn systemds_to(context: &Context, verb: &str, command: &str) -> Result<()> {
    if context.places.system()?.is_none() {
        return Ok(());
    }
    let message = format!("the installed daemon is systemd's to {verb}");
    Err(Error::new(Kind::Conflict, message).hint(format!("use `{command}`; machines run on")))
}

fn start(context: &Context, output: OutputArgs) -> Result<u8> {
    let status = context.block_on(async { Client::new(&context.places)?.get("daemon").await })?;
    print(context, output, status)
}

#[derive(Serialize)]
struct State {
    running: bool,
    #[serde(flatten)]
    status: Option<DaemonStatus>,
}

fn print(context: &Context, output: OutputArgs, status: DaemonStatus) -> Result<u8> {
    if output.json() {
        context.printer.json(&versioned(State {
            running: true,
            status: Some(status),
        }))?;
        return Ok(0);
    }
    let started = format!(
        "{} ({})",
        status.started_at,
        table::ago(&status.started_at, Timestamp::now())
    );
    let renew = if status.mode == "system" {
        Renew::Install
    } else {
        Renew::Stop
    };
    let other = skew(&status.version, renew).map(|e| e.message);
    // Older daemons have only this one.
    let mode = if status.mode.is_empty() { "user" } else { &status.mode };
    context.printer.data(table::pairs([
        ("daemon", "running".to_owned()),
        ("mode", mode.to_owned()),
        (
            "version",
            format!("{} (commit {})", status.version.version, status.version.commit),
        ),
        ("pid", status.pid.to_string()),
        ("started", started),
        ("memory", size::format(status.resident_bytes)),
        ("machines", format!("{} ({} running)", status.machines, status.running)),
        ("socket", status.socket),
        ("state", status.state_dir),
        ("log", status.log),
    ]))?;
    if let Some(message) = other {
        context.printer.warn(message);
    }
    Ok(0)
}

impl StatusArgs {
    fn run(self, context: &Context) -> Result<u8> {
        let found = context.block_on(async { Client::passive(&context.places)?.get("daemon").await });
        match found {
            Ok(status) => print(context, self.output, status),
            Err(error) if error.kind == Kind::Unavailable && error.code.is_none() => {
                if self.output.json() {
                    context.printer.json(&versioned(State {
                        running: false,
                        status: None,
                    }))?;
                } else {
                    context.printer.data(table::pairs([("daemon", error.message)]))?;
                }
                Ok(Kind::Unavailable.status())
            }
            Err(error) => Err(error),
        }
    }
}

async fn stop(context: &Context) -> Result<u8> {
    let client = Client::passive(&context.places)?;
    // Asked first, since it is the process that has to be gone. One of another version may answer what is not understood.
    let status: Result<DaemonStatus> = client.get("daemon").await;
    match client.post_only("daemon/stop", &serde_json::json!({})).await {
        Ok(()) => {}
        Err(error) if error.kind == Kind::Unavailable => {
            context.printer.note("the daemon is not running");
            return Ok(0);
        }
        Err(error) => return Err(error),
    }
    let socket = context.places.socket()?;
    let process = status.ok().and_then(|s| i32::try_from(s.pid).ok());
    // Gone means that nothing listens any more, and that the process with its locks is gone: another daemon can start.
    let deadline = tokio::time::Instant::now() + STOP_DEADLINE;
    while tokio::net::UnixStream::connect(&socket).await.is_ok() || process.is_some_and(runs) {
        if tokio::time::Instant::now() >= deadline {
            let message = format!("waited {} s for the daemon to end", STOP_DEADLINE.as_secs());
            return Err(Error::new(Kind::Timeout, message).hint("see `banger daemon logs`"));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    context.printer.note("the daemon has stopped; machines run on");
    Ok(0)
}

/// Whether a process of this number runs. A number that is given anew meanwhile costs a wait, nothing more.
fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state stands behind the name, which is in parentheses and may hold anything.
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

impl LogsArgs {
    fn run(self, context: &Context) -> Result<u8> {
        // Read from the file: the log matters most when the daemon does not run.
        let path = context.places.state_dir()?.join("daemon.log");
        let file = std::fs::File::open(&path).map_err(|e| Error::io("open the daemon's log", &path, e))?;
        let mut lines = VecDeque::new();
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        while read_line(&mut reader, &mut line, &path)? {
            if lines.len() == self.tail {
                lines.pop_front();
            }
            if self.tail > 0 {
                lines.push_back(String::from_utf8_lossy(&line).into_owned());
            }
        }
        for line in lines {
            context.printer.line(clean(&line))?;
        }
        if self.follow {
            context.block_on(follow(context, reader, path))?;
        }
        Ok(0)
    }
}

fn read_line(reader: &mut BufReader<std::fs::File>, line: &mut Vec<u8>, path: &std::path::Path) -> Result<bool> {
    line.clear();
    let read = reader
        .take(1024 * 1024)
        .read_until(b'\n', line)
        .map_err(|e| Error::io("read", path, e))?;
    while line.last().is_some_and(|b| matches!(b, b'\n' | b'\r')) {
        line.pop();
    }
    Ok(read > 0)
}

async fn follow(context: &Context, mut reader: BufReader<std::fs::File>, path: PathBuf) -> Result<()> {
    let mut line = Vec::new();
    loop {
        while read_line(&mut reader, &mut line, &path)? {
            context.printer.line(clean(&String::from_utf8_lossy(&line)))?;
        }
        // A log that was rotated is shorter than where we are, or another file.
        let position = reader.stream_position().map_err(|e| Error::io("read", &path, e))?;
        if replaced(&reader, &path, position)
            && let Ok(file) = std::fs::File::open(&path)
        {
            reader = BufReader::new(file);
            let _ = reader.seek(SeekFrom::Start(0));
            continue;
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

fn replaced(reader: &BufReader<std::fs::File>, path: &std::path::Path, position: u64) -> bool {
    use std::os::unix::fs::MetadataExt;
    let (Ok(open), Ok(named)) = (reader.get_ref().metadata(), std::fs::metadata(path)) else {
        return false;
    };
    open.ino() != named.ino() || named.len() < position
}
