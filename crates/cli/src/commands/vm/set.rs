//! `banger vm set`.

use std::time::Duration;

use banger_proto::api::{Forward, Machine, MachineSpec, MachineState, OnPanic, PatchMachine};
use clap::Args;

use crate::cli::{Context, OutputArgs};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{
    Done, Meant, NatArgs, Panicked, disk, duration, for_each, forwards, memory, milliseconds, publish, vcpu,
};
use crate::completion;
use crate::error::{Error, Result};

/// Change what machines are made of, how they are reached, and when they are suspended or restarted
///
/// Processors and memory change with the next start, ports and NAT at once. The disk only grows, and only while the machine is
/// stopped. A machine that is suspended for want of use is woken by the next one: exec, shell, ssh, cp, a connection to a port.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm set build --vcpu 4 --memory 4G\n  \
                        banger vm set build --idle-suspend-after 30m\n  banger vm set web --on-panic restart\n  banger vm set web -p 8080:80 -p 8443:443")]
pub(crate) struct SetArgs {
    /// Machines by name, id or unambiguous prefix
    #[arg(required = true, value_name = "MACHINE", add = completion::machines())]
    machines: Vec<String>,
    /// Virtual processors
    #[arg(long, value_name = "N", value_parser = vcpu)]
    vcpu: Option<u32>,
    /// Memory, like 512M or 2G
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    memory: Option<u64>,
    /// Size of the root disk, like 16G
    #[arg(long, value_name = "SIZE", value_parser = disk)]
    disk_size: Option<u64>,
    /// Suspend them when they were not used for this long, like 30m; 0 is never
    #[arg(long, value_name = "TIME", value_parser = duration)]
    idle_suspend_after: Option<Duration>,
    /// When the guest's kernel has panicked: stop the machine, or restart it from its disks
    #[arg(long, value_enum, value_name = "WHAT")]
    on_panic: Option<Panicked>,
    #[command(flatten)]
    nat: NatArgs,
    /// Port of this host that leads to one of the machine, like 8080:80; may be repeated. They take the place of those it has
    #[arg(short, long, value_name = "[IP:]HOST:GUEST", value_parser = publish, conflicts_with = "no_publish")]
    publish: Vec<Forward>,
    /// No port of this host leads to the machine any more
    #[arg(long)]
    no_publish: bool,
    #[command(flatten)]
    output: OutputArgs,
}

impl SetArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let patch = PatchMachine {
            vcpu: self.vcpu,
            memory_mib: self.memory,
            disk_bytes: self.disk_size,
            idle_suspend_after_ms: self.idle_suspend_after.map(milliseconds),
            on_panic: self.on_panic.map(OnPanic::from),
            nat: self.nat.wanted(),
            forwards: (self.no_publish || !self.publish.is_empty()).then(|| self.publish.clone()),
            ..PatchMachine::default()
        };
        if patch == PatchMachine::default() {
            return Err(Error::usage("nothing to set").hint(
                "give --vcpu, --memory, --disk-size, --idle-suspend-after, --on-panic, --nat, --no-nat, --publish or --no-publish",
            ));
        }
        context.block_on(async {
            let client = Client::new(&context.places)?;
            for_each(
                context,
                &client,
                (&self.machines, Meant::Loosely),
                self.output,
                |client, machine| {
                    let patch = &patch;
                    async move {
                        let changed: Machine = client.patch(&machine_path(&machine.id), patch).await?;
                        if settings(&changed) == settings(&machine) {
                            return Ok(Done::nothing(&changed, "is set so already"));
                        }
                        let later = patch.vcpu.is_some() || patch.memory_mib.is_some();
                        if later && !matches!(changed.state, MachineState::Stopped | MachineState::Error) {
                            context
                                .printer
                                .note(format!("{} takes it up with its next start", changed.name));
                        }
                        if patch.forwards.is_some() && !changed.forwards.is_empty() {
                            context
                                .printer
                                .note(format!("{} ports: {}", changed.name, forwards(&changed)));
                        }
                        Ok(Done::new(&changed, "changed"))
                    }
                },
            )
            .await
        })
    }
}

/// Everything of a machine that can be set.
fn settings(machine: &Machine) -> (&MachineSpec, &[Forward], u64) {
    (&machine.spec, &machine.forwards, machine.idle_suspend_after_ms)
}
