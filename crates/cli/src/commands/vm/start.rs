//! `banger vm start`.

use banger_proto::api::{Accepted, Machine, StartMachine};
use clap::Args;

use crate::cli::{Context, OutputArgs};
use crate::client::operation::{Leaving, follow};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{Done, WaitArgs, for_each};
use crate::completion;
use crate::error::Result;
use crate::signals::Signals;

/// Start stopped machines
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger vm start build test")]
pub(crate) struct StartArgs {
    /// Machines by name, id or unambiguous prefix
    #[arg(required = true, value_name = "MACHINE", add = completion::machines())]
    machines: Vec<String>,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    output: OutputArgs,
}

impl StartArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let request = StartMachine {
            wait: self.wait.wait_for(),
            timeout_ms: self.wait.timeout_ms(),
        };
        context.block_on(async {
            let client = Client::new(&context.places)?;
            for_each(context, &client, &self.machines, self.output, |client, machine| {
                let request = &request;
                async move {
                    start(context, &client, &machine, "start", request)
                        .await
                        .map(|()| Done::new(&machine, "started"))
                }
            })
            .await
        })
    }
}

/// Starts or restarts one machine.
pub(crate) async fn start(
    context: &Context,
    client: &Client,
    machine: &Machine,
    verb: &str,
    request: &StartMachine,
) -> Result<()> {
    let accepted: Accepted = client
        .post(&format!("{}/{verb}", machine_path(&machine.id)), request)
        .await?;
    let mut activity = context.printer.activity(&format!("vm {verb} {}", machine.name));
    // Half a restart would leave the machine stopped.
    let leaving = if verb == "start" {
        Leaving::Cancels
    } else {
        Leaving::GoesOn
    };
    follow(
        client,
        accepted.operation,
        leaving,
        &mut activity,
        &mut Signals::ending()?,
    )
    .await?;
    Ok(())
}
