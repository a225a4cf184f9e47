//! `banger vm stop`.

use std::time::Duration;

use banger_proto::api::{Accepted, Machine, StopMachine};
use clap::Args;

use crate::cli::{Context, OutputArgs};
use crate::client::operation::{Leaving, follow};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{Done, duration, for_each, milliseconds};
use crate::completion;
use crate::error::Result;
use crate::signals::Signals;

/// Shut machines down; their disks stay
///
/// A machine that does not go down in time is ended.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm stop build\n  banger vm stop build test --timeout 5s")]
pub(crate) struct StopArgs {
    /// Machines by name, id or unambiguous prefix
    #[arg(required = true, value_name = "MACHINE", add = completion::machines())]
    machines: Vec<String>,
    /// How long a machine may take to go down by itself
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    output: OutputArgs,
}

impl StopArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let request = StopMachine {
            timeout_ms: self.timeout.map(milliseconds),
        };
        context.block_on(async {
            let client = Client::new(&context.places)?;
            for_each(context, &client, &self.machines, self.output, |client, machine| {
                let request = &request;
                async move { stop(context, &client, &machine, request).await }
            })
            .await
        })
    }
}

async fn stop(context: &Context, client: &Client, machine: &Machine, request: &StopMachine) -> Result<Done> {
    let accepted: Accepted = client
        .post(&format!("{}/stop", machine_path(&machine.id)), request)
        .await?;
    let mut activity = context.printer.activity(&format!("vm stop {}", machine.name));
    follow(
        client,
        accepted.operation,
        Leaving::GoesOn,
        &mut activity,
        &mut Signals::ending()?,
    )
    .await?;
    Ok(Done::new(machine, "stopped"))
}
