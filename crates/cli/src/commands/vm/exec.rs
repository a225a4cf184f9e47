//! `banger vm exec`, and what run, shell and attach share with it.

use std::ffi::OsString;
use std::rc::Rc;

use banger_proto::api::Machine;
use banger_proto::arguments;
use banger_proto::frame::Open;
use clap::Args;

use crate::cli::Context;
use crate::client::{Client, machine_path};
use crate::completion;
use crate::error::{Error, Result};
use crate::session::End;
use crate::session::input::DetachKeys;
use crate::session::run::{Job, environment, fresh_id, on_own_streams, status, words};
use crate::session::terminal::interactive;
use crate::signals;
use crate::timings::Marks;

/// Options of a program in the guest.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ProgramArgs {
    /// Set a variable; KEY alone takes the value of ours, which keeps a secret out of the list of processes
    #[arg(short, long = "env", value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Directory to run in; the workspace, or else the user's home
    #[arg(long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User to run as; root otherwise
    #[arg(long)]
    pub(crate) user: Option<String>,
    #[command(flatten)]
    pub(crate) terminal: TerminalArgs,
}

/// Options of a program's terminal.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct TerminalArgs {
    /// Give the program a terminal (the default when both our ends are one)
    #[arg(short, long, overrides_with = "no_tty")]
    pub(crate) tty: bool,
    /// Give the program pipes even on a terminal
    #[arg(short = 'T', long, overrides_with = "tty")]
    no_tty: bool,
    /// Standard input is always passed on; taken for those used to it
    #[arg(short, long, hide = true)]
    interactive: bool,
    /// Keys that leave a program with a terminal running behind; empty for none
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", value_parser = detach_keys)]
    detach_keys: String,
}

impl TerminalArgs {
    /// The program gets a terminal.
    pub(crate) fn wanted(&self) -> bool {
        self.tty || (!self.no_tty && interactive())
    }

    /// The keys that detach.
    pub(crate) fn keys(&self) -> Result<DetachKeys> {
        DetachKeys::parse(&self.detach_keys).map_err(|e| Error::usage(e.to_string()))
    }
}

fn detach_keys(text: &str) -> Result<String, String> {
    DetachKeys::parse(text)
        .map(|_| text.to_owned())
        .map_err(|e| e.to_string())
}

/// Run a command in a machine
///
/// Standard input, output and error and signals pass through; the exit status is the command's. It runs in the machine's
/// workspace where there is one. When the daemon is restarted meanwhile, banger joins the command again by itself.
///
/// A command with a terminal runs on when the terminal is closed; `banger vm attach` returns to it. A SIGHUP that was sent to
/// banger is passed on like other signals. Without a terminal every SIGHUP is.
///
/// `--env KEY=VALUE` is seen by every process of this host while banger runs. For a secret, export the variable and give
/// `--env KEY`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  banger vm exec build -- make test\n  banger vm exec build -- sh -c 'cd /tmp && ls'\n  \
                        git archive HEAD | banger vm exec build -- tar -x -C /srv\n  \
                        TOKEN=… banger vm exec --env TOKEN build -- ./deploy"
)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    program: ProgramArgs,
    /// Do not read standard input
    #[arg(short, long)]
    no_stdin: bool,
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    /// Command and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<OsString>,
}

impl ExecArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let command = words(&self.command)?;
        let open = open(&self.program, command, !self.no_stdin)?;
        let keys = self.program.terminal.keys()?;
        context.block_on(async {
            let client = Client::new(&context.places)?;
            let machine: Machine = client.get(&machine_path(&self.machine)).await?;
            run_in(context, &client, &machine, open, keys, Rc::default()).await
        })
    }
}

/// The request for a program; no words make a login shell.
pub(crate) fn open(program: &ProgramArgs, command: Vec<String>, stdin: bool) -> Result<Open> {
    let open = Open {
        command,
        tty: program.terminal.wanted(),
        env: environment(&program.env, |key| std::env::var_os(key))?,
        workdir: program.workdir.clone(),
        user: program.user.clone(),
        stdin,
        ..Open::default()
    };
    arguments::check(&open)
        .map_err(|e| Error::usage(e.to_string()).hint("pass it on standard input or in a file: `banger vm cp`"))?;
    Ok(open)
}

/// Runs a program in a machine, in its workspace where nothing else is said.
pub(crate) async fn run_in(
    context: &Context,
    client: &Client,
    machine: &Machine,
    mut open: Open,
    detach: DetachKeys,
    marks: Rc<Marks>,
) -> Result<u8> {
    if open.workdir.is_none() {
        open.workdir = machine.workspace.as_ref().map(|w| w.guest_path.clone());
        open.workdir_or_home = true;
    }
    let session = fresh_id()?;
    let job = Job {
        machine: machine.id.clone(),
        session: session.clone(),
        open,
        detach,
        marks,
    };
    let end = on_own_streams(client, &context.printer, job).await?;
    Ok(ended(context, &machine.name, &session, end))
}

/// The exit status of a session that ended; says so when it only was left.
pub(crate) fn ended(context: &Context, machine: &str, session: &str, end: End) -> u8 {
    match end {
        End::Exit(code) => status(code),
        End::Detached => {
            context.printer.note(format!(
                "left session {session}; `banger vm attach {machine} {session}` joins it again"
            ));
            0
        }
        End::HungUp => {
            context.printer.note(format!(
                "the terminal is gone, session {session} runs on; `banger vm attach {machine} {session}` joins it again"
            ));
            status(128 + signals::HUP)
        }
    }
}
