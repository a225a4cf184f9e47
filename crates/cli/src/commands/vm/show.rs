//! `banger vm show`.

use banger_core::size;
use banger_proto::api::Machine;
use clap::Args;
use jiff::Timestamp;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, machine_path};
use crate::completion;
use crate::error::Result;
use crate::table;

/// Show everything about a machine
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm show build\n  banger vm show build --json")]
pub(crate) struct ShowArgs {
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    #[command(flatten)]
    output: OutputArgs,
}

impl ShowArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let machine: Machine =
            context.block_on(async { Client::new(&context.places)?.get(&machine_path(&self.machine)).await })?;
        if self.output.json() {
            context.printer.json(&versioned(machine))?;
        } else {
            context.printer.data(render(&machine, Timestamp::now()))?;
        }
        Ok(0)
    }
}

fn render(machine: &Machine, now: Timestamp) -> String {
    let spec = &machine.spec;
    let mut rows = vec![
        ("name", machine.name.clone()),
        ("id", machine.id.clone()),
        ("state", machine.state.as_str().to_owned()),
    ];
    if let Some(cause) = &machine.cause {
        rows.push(("cause", cause.clone()));
    }
    rows.extend([
        (
            "image",
            format!("{} ({})", spec.image, table::short(&spec.image_digest)),
        ),
        (
            "kernel",
            format!("{} ({})", spec.kernel, table::short(&spec.kernel_digest)),
        ),
        ("engine", format!("{}/{}", spec.engine, spec.accel)),
        ("vcpu", spec.vcpu.to_string()),
        ("memory", format!("{} MiB", spec.memory_mib)),
        ("disk", size::format(spec.disk_bytes)),
        ("network", spec.network.clone()),
        (
            "created",
            format!("{} ({})", machine.created_at, table::ago(&machine.created_at, now)),
        ),
    ]);
    if let Some(started) = &machine.started_at {
        rows.push(("started", format!("{started} ({})", table::ago(started, now))));
    }
    if let Some(pid) = machine.pid {
        rows.push(("pid", pid.to_string()));
    }
    if let Some(guest) = &machine.guest {
        rows.extend([
            ("guest kernel", guest.kernel.clone()),
            ("guest system", guest.system.clone()),
            ("agent", guest.agent_version.clone()),
            ("boot id", guest.boot_id.clone()),
        ]);
    }
    if let Some(workspace) = &machine.workspace {
        let branch = workspace
            .branch
            .as_deref()
            .map_or_else(|| "detached".to_owned(), |b| format!("branch {b}"));
        rows.extend([
            (
                "workspace",
                format!("{} from {}", workspace.guest_path, workspace.source),
            ),
            ("commit", format!("{} ({branch})", table::short(&workspace.head))),
        ]);
    }
    if let Some(boot) = &machine.boot {
        let stages: Vec<String> = boot
            .stages
            .iter()
            .map(|s| format!("{} {}", s.stage, table::span(s.ms)))
            .collect();
        rows.push(("last start", format!("{}: {}", boot.how, stages.join(", "))));
    }
    if machine.auto_remove {
        rows.push(("removed", "with the command that made it".to_owned()));
    }
    table::pairs(rows)
}
