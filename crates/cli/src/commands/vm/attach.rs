//! `banger vm attach`.

use std::rc::Rc;

use banger_proto::api::{Machine, MachineState, Session, StartMachine};
use banger_proto::frame::Open;
use clap::Args;

use crate::cli::Context;
use crate::client::operation::{Leaving, carry_out};
use crate::client::{Client, machine_path};
use crate::commands::vm::exec::{TerminalArgs, ended};
use crate::commands::vm::sessions::sessions;
use crate::completion;
use crate::error::{Error, Kind, Result};
use crate::session::run::{Job, on_own_streams};

/// Join a session of a machine again
///
/// Shows what the session has written lately, then goes on with it. A suspended machine is woken for it. The exit status is that of its command. Without
/// SESSION the only one that runs is meant.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm attach build\n  banger vm attach build 4f1c9a02b7d86e35")]
pub(crate) struct AttachArgs {
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    /// Session by id or unambiguous prefix
    session: Option<String>,
    #[command(flatten)]
    terminal: TerminalArgs,
}

impl AttachArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let keys = self.terminal.keys()?;
        context.block_on(async {
            let client = Client::new(&context.places)?;
            let machine: Machine = client.get(&machine_path(&self.machine)).await?;
            if machine.state == MachineState::Suspended {
                let path = format!("{}/start", machine_path(&machine.id));
                let label = format!("vm start {}", machine.name);
                carry_out(
                    context,
                    &client,
                    &path,
                    &StartMachine::default(),
                    &label,
                    Leaving::Cancels,
                )
                .await?;
            }
            let all = sessions(&client, &machine.id).await?;
            let session = choose(&all, self.session.as_deref(), &machine.name)?;
            let open = Open {
                attach_only: true,
                tty: session.tty,
                stdin: true,
                ..Open::default()
            };
            let job = Job {
                machine: machine.id.clone(),
                session: session.id.clone(),
                open,
                detach: keys,
                marks: Rc::default(),
            };
            let end = on_own_streams(&client, &context.printer, job).await?;
            Ok(ended(context, &machine.name, &session.id, end))
        })
    }
}

/// The session that is meant.
fn choose<'a>(all: &'a [Session], wanted: Option<&str>, machine: &str) -> Result<&'a Session> {
    let list = format!("`banger vm sessions {machine}` shows them");
    let fitting: Vec<&Session> = match wanted {
        Some(wanted) => match all.iter().find(|s| s.id == wanted) {
            Some(session) => return Ok(session),
            None => all
                .iter()
                .filter(|s| !wanted.is_empty() && s.id.starts_with(wanted))
                .collect(),
        },
        None => all.iter().filter(|s| s.running).collect(),
    };
    match (fitting.as_slice(), wanted) {
        ([one], _) => Ok(one),
        ([], Some(wanted)) => {
            Err(Error::new(Kind::NotFound, format!("{machine} has no session `{wanted}`")).hint(list))
        }
        ([], None) => Err(Error::new(Kind::NotFound, format!("no session runs in {machine}"))
            .hint(format!("`banger vm shell {machine}` opens a new one"))),
        (several, _) => {
            Err(Error::new(Kind::NotFound, format!("{} sessions of {machine} fit", several.len())).hint(list))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(id: &str, running: bool) -> Session {
        Session {
            id: id.into(),
            command: vec![],
            tty: false,
            running,
            attached: false,
            exit_code: None,
        }
    }

    #[test]
    fn the_only_running_session_is_meant() {
        let all = [session("aa11", false), session("aa22", true)];
        assert_eq!(choose(&all, None, "m").unwrap().id, "aa22");
        assert_eq!(choose(&all, Some("aa1"), "m").unwrap().id, "aa11");
        assert_eq!(choose(&all, Some("aa"), "m").unwrap_err().kind, Kind::NotFound);
        assert_eq!(choose(&all, Some("x"), "m").unwrap_err().kind, Kind::NotFound);
        assert!(choose(&[], None, "m").is_err());
        assert!(choose(&[session("a", true), session("b", true)], None, "m").is_err());
    }
}
