//! `banger vm show`.

use banger_core::size;
use banger_proto::api::{BootReport, Machine, OnPanic};
use clap::Args;
use jiff::Timestamp;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, machine_path};
use crate::commands::stock;
use crate::commands::vm::common::forwards;
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
        ("network", network(machine)),
        ("created", stock::moment(&machine.created_at, now)),
    ]);
    if !machine.forwards.is_empty() {
        rows.push(("ports", forwards(machine)));
    }
    let how = machine.boot.as_ref().map(how);
    match (&machine.started_at, &how) {
        (Some(at), Some(how)) => rows.push(("started", format!("{how}, {at} ({})", table::ago(at, now)))),
        (Some(at), None) => rows.push(("started", stock::moment(at, now))),
        (None, Some(how)) => rows.push(("started", how.clone())),
        (None, None) => {}
    }
    if let Some(boot) = &machine.boot {
        let stages: Vec<String> = boot
            .stages
            .iter()
            .map(|s| format!("{} {}", s.stage, table::span(s.ms)))
            .collect();
        rows.push(("stages", stages.join(", ")));
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
    if machine.idle_suspend_after_ms > 0 {
        let after = table::span(machine.idle_suspend_after_ms);
        rows.push(("suspended", format!("when it was not used for {after}")));
    }
    if machine.on_panic != OnPanic::Stop {
        rows.push(("on panic", machine.on_panic.as_str().to_owned()));
    }
    if machine.auto_remove {
        rows.push(("removed", "with the command that made it".to_owned()));
    }
    table::pairs(rows)
}

/// What it reaches, and as whom: `bridge, 172.16.0.2, no NAT, group db`.
fn network(machine: &Machine) -> String {
    let spec = &machine.spec;
    let mut words = vec![spec.network.clone()];
    words.extend(machine.address.clone());
    if !spec.nat {
        words.push("no NAT".to_owned());
    }
    words.extend(spec.net_group.as_ref().map(|group| format!("group {group}")));
    words.join(", ")
}

/// How it started, and how long that took.
fn how(boot: &BootReport) -> String {
    let took = table::span(boot.stages.iter().map(|s| s.ms).sum());
    let from = boot.from.as_deref().unwrap_or("?");
    match boot.how.as_str() {
        "boot" => format!("by a boot in {took}"),
        "template" => format!("from template {} in {took}", table::short(from)),
        "wake" => format!("from its own suspended memory in {took}"),
        "fork" => {
            let paused = boot.source_paused_ms.map(table::span);
            let paused = paused.map_or_else(String::new, |p| format!(", which paused for {p}"));
            format!("as a copy of {from}{paused}, in {took}")
        }
        "snapshot" => format!("from snapshot {from} in {took}"),
        other => format!("by {other} in {took}"),
    }
}

#[cfg(test)]
mod tests {
    use banger_proto::api::StageTime;

    use super::*;
    use crate::commands::vm::common::tests::machine;

    #[test]
    fn the_network_is_told() {
        let mut shown = machine("0123456789abcdef", "web");
        assert_eq!(network(&shown), "user");
        shown.address = Some("172.16.0.2".into());
        shown.spec.network = "bridge".into();
        shown.spec.nat = false;
        shown.spec.net_group = Some("db".into());
        shown.forwards = vec![banger_core::forward::parse("8080:80").unwrap()];
        assert_eq!(network(&shown), "bridge, 172.16.0.2, no NAT, group db");
        let now = "2026-11-22T10:05:00Z".parse().unwrap();
        let text = render(&shown, now);
        assert!(
            text.lines()
                .any(|l| l.starts_with("ports ") && l.ends_with(" 127.0.0.1:8080->80")),
            "{text}"
        );
    }

    #[test]
    fn every_way_to_start_is_told() {
        let told = |how: &str, from: Option<&str>, paused| {
            let stages = [("launch", 12), ("agent", 200)].map(|(stage, ms)| StageTime {
                stage: stage.to_owned(),
                ms,
            });
            let machine = Machine {
                boot: Some(BootReport {
                    how: how.to_owned(),
                    from: from.map(str::to_owned),
                    source_paused_ms: paused,
                    stages: stages.to_vec(),
                }),
                idle_suspend_after_ms: 1_800_000,
                ..machine("0123456789abcdef", "build")
            };
            let now = "2026-11-22T10:05:00Z".parse().unwrap();
            render(&machine, now)
        };
        let line = |text: &str, key: &str| {
            let line = text.lines().find(|l| l.starts_with(key)).unwrap_or_default();
            line.split_at(key.len()).1.trim_start().to_owned()
        };
        let template = told("template", Some("0123456789abcdef"), None);
        assert_eq!(line(&template, "started"), "from template 0123456789ab in 212 ms");
        assert_eq!(line(&template, "stages"), "launch 12 ms, agent 200 ms");
        assert_eq!(line(&template, "suspended"), "when it was not used for 30 min 0 s");
        assert_eq!(line(&told("boot", None, None), "started"), "by a boot in 212 ms");
        assert_eq!(
            line(&told("fork", Some("web"), Some(31)), "started"),
            "as a copy of web, which paused for 31 ms, in 212 ms"
        );
    }
}
