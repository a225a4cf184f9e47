//! `banger vm prune`.

use std::io::IsTerminal;

use banger_proto::api::{Machine, MachineState};
use clap::Args;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{self, Done, for_all, machines};
use crate::commands::vm::delete::delete;
use crate::error::{Error, Kind, Result};

/// Remove every machine that does not run
///
/// Never touches one that does, or that is on its way, nor one that is paused or suspended: its memory would be lost.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm prune --dry-run\n  banger vm prune --force")]
pub(crate) struct PruneArgs {
    /// Do not ask
    #[arg(short, long)]
    force: bool,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    output: OutputArgs,
}

impl PruneArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        context.block_on(async {
            let client = Client::new(&context.places)?;
            let idle: Vec<Machine> = machines(&client)
                .await?
                .into_iter()
                .filter(|m| is_idle(m.state))
                .collect();
            if self.dry_run {
                if self.output.json() {
                    let would: Vec<_> = idle.iter().map(|m| versioned(Done::new(m, "would delete"))).collect();
                    context.printer.json(&would)?;
                } else {
                    context
                        .printer
                        .data(idle.iter().map(|m| format!("{}\n", m.name)).collect::<String>())?;
                }
                return Ok(0);
            }
            if !idle.is_empty() && !self.force && !confirmed(context, &idle)? {
                context.printer.note("nothing removed");
                return Ok(1);
            }
            let idle = idle.into_iter().map(Ok).collect();
            for_all(context, &client, idle, self.output, |client, machine| async move {
                // It may have been started since the list was made.
                let now: Machine = client.get(&machine_path(&machine.id)).await?;
                if !is_idle(now.state) {
                    let message = format!("{} is {} by now and was left alone", now.name, now.state.as_str());
                    return Err(Error::new(Kind::Conflict, message));
                }
                let activity = context.printer.activity(&format!("vm delete {}", machine.name));
                delete(&client, &machine, false, activity).await
            })
            .await
        })
    }
}

fn is_idle(state: MachineState) -> bool {
    matches!(state, MachineState::Stopped | MachineState::Error)
}

fn confirmed(context: &Context, idle: &[Machine]) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(Error::usage("will not remove machines without being asked twice")
            .hint("use --force, or --dry-run to see which ones"));
    }
    let names: Vec<&str> = idle.iter().map(|m| m.name.as_str()).collect();
    common::confirmed(context, &format!("remove {} and their disks?", names.join(", ")))
}
