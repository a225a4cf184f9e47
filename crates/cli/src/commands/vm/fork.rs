//! `banger vm fork`: running copies of a running machine.

use std::time::Duration;

use banger_proto::api::{ForkAccepted, ForkMachine, Machine};
use clap::Args;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::operation::{Leaving, follow_shown};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{duration, machine_name, machines, milliseconds};
use crate::completion;
use crate::error::{Error, Result};
use crate::signals::Signals;

/// Make running copies of a running machine
///
/// A copy goes on from the source's memory and disks of one moment, with a name, addresses, keys and randomness of its own;
/// sessions of the source stay with the source. Prints the names of the copies, one a line, and how long the source stood still.
/// Either all copies run or none is left.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm fork build\n  banger vm fork build -n 4 --name try")]
pub(crate) struct ForkArgs {
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    /// How many copies
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Name of the copy; several are NAME-1 to NAME-N. Made up otherwise
    #[arg(long, value_parser = machine_name)]
    name: Option<String>,
    /// Longest time for the start of a copy, like 90s or 5m
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    output: OutputArgs,
}

impl ForkArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let request = ForkMachine {
            count: self.count,
            name: self.name,
            timeout_ms: self.timeout.map(milliseconds),
        };
        let copies = context.block_on(async {
            let client = Client::new(&context.places)?;
            let mut signals = Signals::ending()?;
            let path = format!("{}/fork", machine_path(&self.machine));
            let ForkAccepted {
                operation,
                machines: begun,
            } = client.post(&path, &request).await?;
            follow_shown(context, &client, operation, "vm fork", Leaving::Cancels, &mut signals).await?;
            // As they are now that they run, in the order of their numbers.
            let mut known = machines(&client).await?;
            begun
                .into_iter()
                .map(|copy| {
                    let at = known.iter().position(|m| m.id == copy.id);
                    at.map(|at| known.swap_remove(at))
                        .ok_or_else(|| Error::failed(format!("{} is gone already", copy.name)))
                })
                .collect::<Result<Vec<Machine>>>()
        })?;
        if let Some(paused) = paused(&copies) {
            context.printer.note(format!("source paused for {paused} ms"));
        }
        if self.output.json() {
            context
                .printer
                .json(&copies.into_iter().map(versioned).collect::<Vec<_>>())?;
        } else {
            context
                .printer
                .data(copies.iter().map(|m| format!("{}\n", m.name)).collect::<String>())?;
        }
        Ok(0)
    }
}

/// How long the source stood still: once for all copies.
fn paused(copies: &[Machine]) -> Option<u64> {
    copies.iter().filter_map(|m| m.boot.as_ref()?.source_paused_ms).max()
}
