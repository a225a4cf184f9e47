//! `banger vm stats`.

use banger_core::size;
use banger_proto::api::{MachineState, MachineStats};
use clap::Args;
use futures_util::future::join_all;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{Meant, machines, resolve};
use crate::completion;
use crate::error::{Error, Result};
use crate::table;

/// Show what running machines use
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm stats\n  banger vm stats build --json")]
pub(crate) struct StatsArgs {
    /// Machines by name, id or unambiguous prefix; all that run otherwise
    #[arg(value_name = "MACHINE", add = completion::machines())]
    machines: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

impl StatsArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let found = context.block_on(async {
            let client = Client::new(&context.places)?;
            let all = machines(&client).await?;
            let wanted = if self.machines.is_empty() {
                all.into_iter()
                    .filter(|m| m.state == MachineState::Running)
                    .map(Ok)
                    .collect()
            } else {
                resolve(&self.machines, &all, Meant::Loosely)
            };
            let stats = wanted.into_iter().map(|machine| async {
                let client = client.another();
                client
                    .get::<MachineStats>(&format!("{}/stats", machine_path(&machine?.id)))
                    .await
            });
            Ok(join_all(stats).await)
        })?;
        let (stats, failures): (Vec<_>, Vec<_>) = found.into_iter().partition(Result::is_ok);
        let stats: Vec<MachineStats> = stats.into_iter().flatten().collect();
        if self.output.json() {
            context
                .printer
                .json(&stats.into_iter().map(versioned).collect::<Vec<_>>())?;
        } else if !stats.is_empty() || failures.is_empty() {
            context.printer.data(render(&stats))?;
        }
        let mut failures: Vec<Error> = failures.into_iter().filter_map(Result::err).collect();
        let Some(first) = (!failures.is_empty()).then(|| failures.remove(0)) else {
            return Ok(0);
        };
        failures.iter().for_each(|e| context.printer.error(e));
        Err(first)
    }
}

fn render(stats: &[MachineStats]) -> String {
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let rows = stats.iter().map(|s| {
        vec![
            s.name.clone(),
            or_dash(s.cpu_percent.map(|p| format!("{p:.1} %"))),
            table::span(s.cpu_ms),
            size::format(s.resident_bytes),
            or_dash(s.guest_memory_used_bytes.map(size::format)),
            size::format(s.disk_allocated_bytes),
            or_dash(s.guest_uptime_ms.map(table::span)),
        ]
    });
    table::render(
        &[
            "NAME",
            "CPU",
            "CPU TIME",
            "HOST MEM",
            "GUEST MEM",
            "DISK USED",
            "UPTIME",
        ],
        rows,
    )
}
