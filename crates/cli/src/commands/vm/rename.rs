//! `banger vm rename`.

use banger_proto::api::{Machine, PatchMachine};
use clap::Args;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::machine_name;
use crate::completion;
use crate::error::Result;

/// Give a machine another name
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger vm rename swift-otter build")]
pub(crate) struct RenameArgs {
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    /// New name
    #[arg(value_parser = machine_name)]
    name: String,
    #[command(flatten)]
    output: OutputArgs,
}

impl RenameArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let patch = PatchMachine {
            name: Some(self.name),
            ..PatchMachine::default()
        };
        let (before, machine) = context.block_on(async {
            let client = Client::new(&context.places)?;
            let before: Machine = client.get(&machine_path(&self.machine)).await?;
            let machine: Machine = client.patch(&machine_path(&before.id), &patch).await?;
            Ok((before, machine))
        })?;
        if before.name == machine.name {
            context.printer.note(format!("{} has this name already", machine.name));
        }
        if self.output.json() {
            context.printer.json(&versioned(machine))?;
        } else {
            context.printer.line(machine.name)?;
        }
        Ok(0)
    }
}
