//! `banger vm logs`.

use std::rc::Rc;

use banger_proto::api::Machine;
use banger_proto::frame::Open;
use clap::Args;
use http_body_util::BodyExt;
use hyper::body::Incoming;

use crate::cli::Context;
use crate::client::{Client, machine_path};
use crate::commands::vm::exec::run_in;
use crate::completion;
use crate::error::{Error, Kind, Result};
use crate::session::input::DetachKeys;

/// Status of a shell that did not find a program.
const NOT_FOUND: u8 = 127;

/// Show the console of a machine: its kernel and its start-up
///
/// The console is kept over all starts of the machine, up to 2 MiB. That of a machine from a template begins with the template's
/// boot, that of a copy with its source's console.
///
/// With --journal it is the journal of the machine's own systemd: what its services say.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  banger vm logs build\n  banger vm logs build -f --tail 50\n  \
                        banger vm logs build --journal -n 100"
)]
pub(crate) struct LogsArgs {
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    /// Go on as the console or the journal does
    #[arg(short, long)]
    follow: bool,
    /// Show the journal of the machine's systemd instead
    #[arg(long)]
    journal: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<u64>,
}

impl LogsArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        if self.journal {
            return self.show_journal(context);
        }
        context.block_on(async {
            let client = Client::new(&context.places)?;
            let mut path = format!("{}/logs?follow={}", machine_path(&self.machine), self.follow);
            if let Some(tail) = self.tail {
                path.push_str(&format!("&tail={tail}"));
            }
            let copied = copy(context, client.stream(&path).await?).await?;
            if copied == 0 && self.tail != Some(0) {
                context.printer.note(format!(
                    "the console of {0} is empty (`banger vm logs {0} --journal` shows the journal of its system)",
                    self.machine
                ));
            }
            Ok(0)
        })
    }

    fn show_journal(&self, context: &Context) -> Result<u8> {
        let open = Open {
            command: journal(self.follow, self.tail),
            ..Open::default()
        };
        let keys = DetachKeys::parse("").map_err(|e| Error::usage(e.to_string()))?;
        context.block_on(async {
            let client = Client::new(&context.places)?;
            let machine: Machine = client.get(&machine_path(&self.machine)).await?;
            let status = run_in(context, &client, &machine, open, keys, Rc::default()).await?;
            if status == NOT_FOUND {
                return Err(
                    Error::new(Kind::Unsupported, format!("machine {} keeps no journal", machine.name)).hint(format!(
                        "a journal needs an image with systemd; `banger vm logs {}` shows the console",
                        machine.name
                    )),
                );
            }
            Ok(status)
        })
    }
}

/// The command that shows the journal. Without a journal it ends as if there were no such command.
fn journal(follow: bool, tail: Option<u64>) -> Vec<String> {
    let script = "test -d /run/systemd/system && command -v journalctl >/dev/null || exit 127; exec journalctl \"$@\"";
    let mut words = vec!["/bin/sh", "-c", script, "journalctl", "--no-pager"];
    let lines = tail.map(|n| format!("--lines={n}"));
    match &lines {
        Some(lines) => words.push(lines),
        None if follow => words.push("--no-tail"),
        None => {}
    }
    if follow {
        words.push("--follow");
    }
    words.into_iter().map(str::to_owned).collect()
}

/// Copies a text stream to standard output. On a terminal without what could drive it. Returns the bytes that came.
pub(crate) async fn copy(context: &Context, mut body: Incoming) -> Result<u64> {
    let mut copied = 0;
    let harmless = context.printer.stdout_is_terminal();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Error::unavailable(format!("the stream broke off: {e}")))?;
        let Ok(data) = frame.into_data() else { continue };
        copied += data.len() as u64;
        if harmless {
            context.printer.data(defuse(&data))?;
        } else {
            context.printer.data(&data)?;
        }
    }
    Ok(copied)
}

/// Takes out every control byte but line feed and tab. Bytes above 0x7f stay: they are parts of characters.
fn defuse(bytes: &[u8]) -> Vec<u8> {
    bytes
        .iter()
        .copied()
        .filter(|&b| matches!(b, b'\n' | b'\t') || (b >= 0x20 && b != 0x7f))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_is_asked_for_what_was_asked_for() {
        let options = |follow, tail| journal(follow, tail).split_off(5).join(" ");
        assert_eq!(options(false, None), "");
        assert_eq!(options(false, Some(0)), "--lines=0");
        assert_eq!(options(true, None), "--no-tail --follow");
        assert_eq!(options(true, Some(7)), "--lines=7 --follow");
    }

    #[test]
    fn a_console_cannot_drive_the_terminal() {
        assert_eq!(
            defuse("a\x1b]0;title\x07b\r\n\tü".as_bytes()),
            "a]0;titleb\n\tü".as_bytes()
        );
    }
}
