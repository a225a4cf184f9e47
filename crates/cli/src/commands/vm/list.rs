//! `banger vm list` and `banger ps`.

use banger_core::size;
use banger_proto::api::{Machine, MachineState};
use clap::Args;
use jiff::Timestamp;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::Client;
use crate::commands::vm::common::{forwards, machines_and_lost};
use crate::error::Result;
use crate::table;

/// List machines
///
/// With --quiet only their ids, one a line.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm list\n  banger ps --running --json")]
pub(crate) struct ListArgs {
    /// Only machines that run
    #[arg(long)]
    running: bool,
    /// Stopped machines too (the default; for those used to it)
    #[arg(short, long, conflicts_with = "running", hide = true)]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
}

impl ListArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let (mut found, lost) = context.block_on(async { machines_and_lost(&Client::new(&context.places)?).await })?;
        if self.running {
            // A stalled machine runs again as soon as its disk can be written.
            found.retain(|m| matches!(m.state, MachineState::Running | MachineState::Stalled));
        }
        let printer = &context.printer;
        if self.output.json() {
            printer.json(&found.into_iter().map(versioned).collect::<Vec<_>>())?;
        } else if printer.quiet {
            printer.data(found.iter().map(|m| format!("{}\n", m.id)).collect::<String>())?;
        } else {
            printer.data(render(&found, Timestamp::now()))?;
        }
        if lost > 0 {
            let machines = match lost {
                1 => "1 machine has files but is".to_owned(),
                n => format!("{n} machines have files but are"),
            };
            printer.warn(format!(
                "{machines} not in the database: `banger vm recover` lists what can be taken back"
            ));
        }
        Ok(0)
    }
}

fn render(machines: &[Machine], now: Timestamp) -> String {
    // What only some installations and machines have takes no room where none has it.
    let addresses = machines.iter().any(|m| m.address.is_some());
    let ports = machines.iter().any(|m| !m.forwards.is_empty());
    let or_dash = |text: Option<String>| text.filter(|t| !t.is_empty()).unwrap_or_else(|| "-".to_owned());
    let mut headings = vec!["ID", "NAME", "STATE", "IMAGE"];
    headings.extend(addresses.then_some("IP"));
    headings.extend(["VCPU", "MEM", "DISK", "ENGINE", "WORKSPACE"]);
    headings.extend(ports.then_some("PORTS"));
    headings.push("CREATED");
    let row = |m: &Machine| {
        let mut cells = vec![
            table::short(&m.id),
            m.name.clone(),
            m.state.as_str().to_owned(),
            m.spec.image.clone(),
        ];
        cells.extend(addresses.then(|| or_dash(m.address.clone())));
        cells.extend([
            m.spec.vcpu.to_string(),
            format!("{} MiB", m.spec.memory_mib),
            size::format(m.spec.disk_bytes),
            format!("{}/{}", m.spec.engine, m.spec.accel),
            or_dash(m.workspace.as_ref().map(|w| w.guest_path.clone())),
        ]);
        cells.extend(ports.then(|| or_dash(Some(forwards(m)))));
        cells.push(table::ago(&m.created_at, now));
        cells
    };
    table::render(&headings, machines.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::vm::common::tests::machine;

    #[test]
    fn a_table_has_a_row_for_each_machine() {
        let now = "2026-11-22T10:05:00Z".parse().unwrap();
        assert_eq!(
            render(&[machine("0123456789abcdef", "swift-otter")], now),
            "ID            NAME         STATE    IMAGE   VCPU  MEM       DISK  ENGINE    WORKSPACE  CREATED\n\
             0123456789ab  swift-otter  running  debian  2     1024 MiB  8G    qemu/tcg  -          5 minutes ago\n"
        );
        assert_eq!(render(&[], now).lines().count(), 1);
        let mut bridged = machine("0123456789abcdef", "web");
        bridged.address = Some("172.16.0.2".into());
        bridged.forwards = vec![banger_core::forward::parse("8080:80").unwrap()];
        assert_eq!(
            render(&[bridged, machine("aaaa456789abcdef", "b")], now),
            "ID            NAME  STATE    IMAGE   IP          VCPU  MEM       DISK  ENGINE    WORKSPACE  PORTS               CREATED\n\
             0123456789ab  web   running  debian  172.16.0.2  2     1024 MiB  8G    qemu/tcg  -          127.0.0.1:8080->80  5 minutes ago\n\
             aaaa456789ab  b     running  debian  -           2     1024 MiB  8G    qemu/tcg  -          -                   5 minutes ago\n"
        );
    }
}
