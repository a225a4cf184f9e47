//! `banger vm delete`.

use banger_proto::api::{Accepted, Machine};
use clap::Args;

use crate::cli::{Context, OutputArgs};
use crate::client::operation::{Leaving, follow};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{Done, for_each};
use crate::completion;
use crate::error::Result;
use crate::printer::Activity;
use crate::signals::Signals;

/// Remove machines and their disks for good
///
/// A machine that runs is ended at once: its disks go as well.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm delete build\n  banger vm rm build test")]
pub(crate) struct DeleteArgs {
    /// Machines by name, id or unambiguous prefix
    #[arg(required = true, value_name = "MACHINE", add = completion::machines())]
    machines: Vec<String>,
    /// Taken for those used to it; nothing is asked without it either
    #[arg(short, long, hide = true)]
    force: bool,
    #[command(flatten)]
    output: OutputArgs,
}

impl DeleteArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        context.block_on(async {
            let client = Client::new(&context.places)?;
            for_each(
                context,
                &client,
                &self.machines,
                self.output,
                |client, machine| async move {
                    let activity = context.printer.activity(&format!("vm delete {}", machine.name));
                    delete(&client, &machine, self.force, activity).await
                },
            )
            .await
        })
    }
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
