//! `banger vm restart`.

use banger_proto::api::StartMachine;
use clap::Args;

use crate::cli::{Context, OutputArgs};
use crate::client::Client;
use crate::commands::vm::common::{Done, WaitArgs, for_each};
use crate::commands::vm::start::start;
use crate::completion;
use crate::error::Result;

/// Shut machines down and start them again
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger vm restart build")]
pub(crate) struct RestartArgs {
    /// Machines by name, id or unambiguous prefix
    #[arg(required = true, value_name = "MACHINE", add = completion::machines())]
    machines: Vec<String>,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    output: OutputArgs,
}

impl RestartArgs {
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
                    start(context, &client, &machine, "restart", request)
                        .await
                        .map(|()| Done::new(&machine, "restarted"))
                }
            })
            .await
        })
    }
}
