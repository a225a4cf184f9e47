//! `banger vm delete`.

use banger_proto::api::{Accepted, Machine, MachineState};
use clap::Args;

use crate::cli::{Context, OutputArgs};
use crate::client::operation::{Leaving, follow};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{Done, Meant, confirmed, for_all, machines, named_in_full, resolve};
use crate::completion;
use crate::error::Result;
use crate::printer::Activity;
use crate::session::terminal::interactive;
use crate::signals::Signals;

/// Remove machines and their disks for good
///
/// A machine that runs is ended at once: its disks go as well. On a terminal that is asked before; scripts are not asked.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm delete build\n  banger vm rm build test")]
pub(crate) struct DeleteArgs {
    /// Machines by name, id or four characters or more of an id
    #[arg(required = true, value_name = "MACHINE", add = completion::machines())]
    machines: Vec<String>,
    /// Do not ask; remove a machine whose engine does not answer, too (state `unverified`), if it is named in full
    #[arg(short, long, visible_short_alias = 'y', visible_alias = "yes")]
    force: bool,
    #[command(flatten)]
    output: OutputArgs,
}

impl DeleteArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        context.block_on(async {
            let client = Client::new(&context.places)?;
            let resolved = resolve(&self.machines, &machines(&client).await?, Meant::Exactly);
            let at_work: Vec<&str> = resolved
                .iter()
                .flatten()
                .filter(|m| is_at_work(m.state))
                .map(|m| m.name.as_str())
                .collect();
            if !self.force && interactive() && !at_work.is_empty() {
                let question = format!(
                    "{} would be ended and removed with all disks; go on?",
                    at_work.join(", ")
                );
                if !confirmed(context, &question)? {
                    context.printer.note("nothing removed");
                    return Ok(1);
                }
            }
            let named = &self.machines;
            for_all(context, &client, resolved, self.output, |client, machine| async move {
                // Without an answer its name alone says that it is meant.
                let force = self.force && named_in_full(&machine, named).is_ok();
                let activity = context.printer.activity(&format!("vm delete {}", machine.name));
                delete(&client, &machine, force, activity).await
            })
            .await
        })
    }
}

/// More than disks would be lost: something runs, or is kept in memory.
fn is_at_work(state: MachineState) -> bool {
    !matches!(
        state,
        MachineState::Stopped | MachineState::Error | MachineState::Creating
    )
}

/// Removes one machine.
pub(crate) async fn delete(
    client: &Client,
    machine: &Machine,
    force: bool,
    mut activity: Activity<'_>,
) -> Result<Done> {
    let path = format!("{}?force={force}", machine_path(&machine.id));
    let accepted: Accepted = client.delete(&path).await?;
    follow(
        client,
        accepted.operation,
        Leaving::GoesOn,
        &mut activity,
        &mut Signals::ending()?,
    )
    .await?;
    Ok(Done::new(machine, "deleted"))
}
