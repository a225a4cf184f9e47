//! `banger vm shell`.

use std::io::IsTerminal;
use std::rc::Rc;

use banger_proto::api::Machine;
use clap::Args;

use crate::cli::Context;
use crate::client::{Client, machine_path};
use crate::commands::vm::exec::{ProgramArgs, open, run_in};
use crate::completion;
use crate::error::Result;

/// Open a login shell in a machine
///
/// Needs nothing in the machine but a shell. Without a terminal the shell reads its commands from standard input. When the
/// terminal is closed the shell runs on; `banger vm attach` returns to it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm shell build\n  banger vm shell build < script.sh")]
pub(crate) struct ShellArgs {
    #[command(flatten)]
    program: ProgramArgs,
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
}

impl ShellArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let open = open(&self.program, Vec::new(), true)?;
        let keys = self.program.terminal.keys()?;
        context.block_on(async {
            let client = Client::new(&context.places)?;
            let machine: Machine = client.get(&machine_path(&self.machine)).await?;
            let status = run_in(context, &client, &machine, open, keys, Rc::default()).await?;
            remind(context, &machine.name);
            Ok(status)
        })
    }
}

/// Reminds a person at a terminal of a machine that is left running. In a script its name was given, so it is known there.
pub(crate) fn remind(context: &Context, machine: &str) {
    if context.printer.stderr_is_terminal() && std::io::stdin().is_terminal() {
        left_running(context, machine);
    }
}

/// Says which machine is left running.
pub(crate) fn left_running(context: &Context, machine: &str) {
    context.printer.note(format!(
        "{machine} is still running (stop with `banger vm stop {machine}`)"
    ));
}
