//! `banger vm kill`.

use banger_proto::api::{Accepted, KillMachine, Machine};
use clap::Args;

use crate::cli::{Context, OutputArgs};
use crate::client::operation::{Leaving, follow};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{Done, for_each};
use crate::completion;
use crate::error::Result;
use crate::signals::Signals;

/// End machines at once, as if the power went out; their disks stay
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger vm kill build")]
pub(crate) struct KillArgs {
    /// Machines by name, id or unambiguous prefix
    #[arg(required = true, value_name = "MACHINE", add = completion::machines())]
    machines: Vec<String>,
    /// Signal for the engine's process; KILL otherwise
    #[arg(short, long)]
    signal: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

impl KillArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let request = KillMachine { signal: self.signal };
        context.block_on(async {
            let client = Client::new(&context.places)?;
            for_each(context, &client, &self.machines, self.output, |client, machine| {
                let request = &request;
                async move { kill(context, &client, &machine, request).await }
            })
            .await
        })
    }
}

async fn kill(context: &Context, client: &Client, machine: &Machine, request: &KillMachine) -> Result<Done> {
    let accepted: Accepted = client
        .post(&format!("{}/kill", machine_path(&machine.id)), request)
        .await?;
    let mut activity = context.printer.activity(&format!("vm kill {}", machine.name));
    follow(
        client,
        accepted.operation,
        Leaving::GoesOn,
        &mut activity,
        &mut Signals::ending()?,
    )
    .await?;
    Ok(Done::new(machine, "killed"))
}
