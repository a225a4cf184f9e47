//! `banger vm sessions`.

use banger_proto::api::Session;
use clap::Args;
use serde::Deserialize;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, machine_path};
use crate::completion;
use crate::error::Result;
use crate::table;

/// List the sessions that run in a machine
///
/// A session lives on in the machine when its client goes; `banger vm attach` joins it again.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger vm sessions build")]
pub(crate) struct SessionsArgs {
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    /// Those that have ended too
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Deserialize)]
struct Sessions {
    sessions: Vec<Session>,
}

/// The sessions of a machine.
pub(crate) async fn sessions(client: &Client, machine: &str) -> Result<Vec<Session>> {
    Ok(client
        .get::<Sessions>(&format!("{}/sessions", machine_path(machine)))
        .await?
        .sessions)
}

impl SessionsArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let mut found = context.block_on(async { sessions(&Client::new(&context.places)?, &self.machine).await })?;
        found.retain(|s| self.all || s.running);
        let printer = &context.printer;
        if self.output.json() {
            printer.json(&found.into_iter().map(versioned).collect::<Vec<_>>())?;
        } else if printer.quiet {
            printer.data(found.iter().map(|s| format!("{}\n", s.id)).collect::<String>())?;
        } else {
            let rows = found.iter().map(|s| {
                let state = match (s.running, s.exit_code) {
                    (true, _) => "running".to_owned(),
                    (false, Some(code)) => format!("ended ({code})"),
                    (false, None) => "ended".to_owned(),
                };
                vec![s.id.clone(), state, yes(s.attached), yes(s.tty), command(s)]
            });
            printer.data(table::render(&["ID", "STATE", "ATTACHED", "TTY", "COMMAND"], rows))?;
        }
        Ok(0)
    }
}

fn yes(is: bool) -> String {
    if is { "yes" } else { "no" }.to_owned()
}

/// The command of a session for people, of bounded length.
fn command(session: &Session) -> String {
    const WIDTH: usize = 60;
    if session.command.is_empty() {
        return "(login shell)".to_owned();
    }
    let text = session.command.join(" ");
    match text.char_indices().nth(WIDTH) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}
