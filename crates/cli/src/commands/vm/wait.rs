//! `banger vm wait`.

use std::time::Duration;

use banger_proto::api::Machine;
use clap::{Args, ValueEnum};

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{duration, milliseconds};
use crate::completion;
use crate::error::{Error, Kind, Result};

/// Wait until a machine is in a state
///
/// Prints the state it is in then.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  banger vm wait build\n  banger vm wait build --state running --timeout 1m\n  \
                        banger vm wait build --state suspended"
)]
pub(crate) struct WaitForArgs {
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    /// The state: stopped, running, paused or suspended
    #[arg(long, value_enum, default_value_t, hide_possible_values = true)]
    state: Awaited,
    /// Give up after this time
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Awaited {
    #[default]
    Stopped,
    Running,
    Paused,
    Suspended,
}

impl WaitForArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let state = match self.state {
            Awaited::Stopped => "stopped",
            Awaited::Running => "running",
            Awaited::Paused => "paused",
            Awaited::Suspended => "suspended",
        };
        let machine = context.block_on(async {
            let client = Client::new(&context.places)?;
            // The daemon bounds a single request; without a bound of ours it is asked again.
            const STEP: Duration = Duration::from_secs(60);
            let deadline = self.timeout.map(|t| tokio::time::Instant::now() + t);
            loop {
                let left = deadline.map_or(STEP, |d| {
                    d.saturating_duration_since(tokio::time::Instant::now()).min(STEP)
                });
                let path = format!(
                    "{}/wait?state={state}&timeout_ms={}",
                    machine_path(&self.machine),
                    milliseconds(left)
                );
                let waited = client.long_poll::<Machine>(&path).await;
                let late = deadline.is_some_and(|d| tokio::time::Instant::now() >= d);
                match waited {
                    Ok(machine) if machine.state.as_str() == state => return Ok(machine),
                    Ok(machine) if late => {
                        let message = format!("{} is {}, not {state}", machine.name, machine.state.as_str());
                        return Err(Error::new(Kind::Timeout, message));
                    }
                    Err(error) if error.kind != Kind::Timeout || late => return Err(error),
                    Ok(_) | Err(_) => {}
                }
            }
        })?;
        if self.output.json() {
            context.printer.json(&versioned(machine))?;
        } else {
            context.printer.line(machine.state.as_str())?;
        }
        Ok(0)
    }
}
