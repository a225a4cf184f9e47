//! `banger vm snapshot`: a machine's disks and memory at one point in time.

use banger_core::size;
use banger_proto::api::{CreateSnapshot, Snapshot};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Serialize;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::operation::{Leaving, carry_out};
use crate::client::{Client, element, machine_path};
use crate::commands::stock::{self, Kept};
use crate::commands::vm::common::machine_name;
use crate::completion;
use crate::error::Result;
use crate::table;

/// Keep a machine's state, and go back to it
///
/// A snapshot of a running machine holds its memory and its disks at the same moment: a restore goes on there. One of a stopped
/// machine, or one with --disk-only, holds its disks.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "Examples:\n  banger vm snapshot create build before-upgrade\n  banger vm snapshot list build\n  \
                  banger vm snapshot restore build before-upgrade"
)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    Create(CreateArgs),
    #[command(visible_alias = "ls")]
    List(ListArgs),
    Show(ShowArgs),
    Restore(RestoreArgs),
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
}

/// Take a snapshot of a machine
///
/// A running machine stands still for a moment, which is told, and goes on; sessions in it notice nothing. Prints the snapshot's
/// name.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm snapshot create build before-upgrade\n  \
                  banger vm snapshot create build clean --disk-only")]
struct CreateArgs {
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    /// Name of the snapshot, unique within the machine
    #[arg(value_parser = machine_name)]
    name: String,
    /// Disks only, after the guest has written out what it held back
    #[arg(long)]
    disk_only: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// List the snapshots of a machine
///
/// Sizes are what is allocated on the host. Layers of disks are shared with what came after them, so they do not add up.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger vm snapshot list build")]
struct ListArgs {
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// Show everything about a snapshot
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger vm snapshot show build before-upgrade")]
struct ShowArgs {
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    /// Name of the snapshot
    #[arg(add = completion::snapshots())]
    name: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// Bring a machine back to a snapshot
///
/// What the machine has in memory and on its disks now is lost; take another snapshot first to keep it. With memory the machine
/// runs afterwards, where it was then; sessions of that time are gone. Without, it is stopped. The snapshot stays. Prints the
/// machine's name.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger vm snapshot restore build before-upgrade")]
struct RestoreArgs {
    /// Machine by name, id or four characters or more of an id
    #[arg(add = completion::machines())]
    machine: String,
    /// Name of the snapshot
    #[arg(add = completion::snapshots())]
    name: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// Remove snapshots of a machine
///
/// The machine, its other snapshots and its forks keep what they share with them.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger vm snapshot delete build before-upgrade")]
struct DeleteArgs {
    /// Machine by name, id or four characters or more of an id
    #[arg(add = completion::machines())]
    machine: String,
    /// Names of snapshots
    #[arg(required = true, value_name = "NAME", add = completion::snapshots())]
    names: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

impl Kept for Snapshot {
    const LIST: &'static str = "snapshots";
    const HEADINGS: &'static [&'static str] = &["NAME", "STATE", "MEMORY", "DISKS", "PAUSED", "CREATED"];

    fn name(&self) -> &str {
        &self.name
    }

    fn row(&self, now: Timestamp) -> Vec<String> {
        let (memory, paused) = if self.memory {
            (size::format(self.memory_bytes), table::span(self.paused_ms))
        } else {
            ("-".to_owned(), "-".to_owned())
        };
        vec![
            self.name.clone(),
            if self.damaged.is_some() { "damaged" } else { "whole" }.to_owned(),
            memory,
            size::format(self.disk_bytes),
            paused,
            table::ago(&self.created_at, now),
        ]
    }

    fn pairs(&self, now: Timestamp) -> Vec<(&'static str, String)> {
        let memory = if self.memory {
            format!("{} (allocated)", size::format(self.memory_bytes))
        } else {
            "none: the machine is stopped after a restore".to_owned()
        };
        vec![
            ("name", self.name.clone()),
            ("machine", self.machine.clone()),
            (
                "state",
                self.damaged
                    .as_ref()
                    .map_or_else(|| "whole".to_owned(), |why| format!("damaged: {why}")),
            ),
            ("memory", memory),
            (
                "disks",
                format!("{} (allocated, shared)", size::format(self.disk_bytes)),
            ),
            ("paused", table::span(self.paused_ms)),
            ("created", stock::moment(&self.created_at, now)),
        ]
    }
}

/// Where the snapshots of a machine are kept.
pub(crate) fn path(machine: &str) -> String {
    format!("{}/snapshots", machine_path(machine))
}

impl SnapshotArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        match self.command {
            SnapshotCommand::Create(args) => args.run(context),
            SnapshotCommand::List(args) => stock::list::<Snapshot>(context, args.output, &path(&args.machine)),
            SnapshotCommand::Show(args) => {
                stock::show::<Snapshot>(context, args.output, &path(&args.machine), &args.name)
            }
            SnapshotCommand::Restore(args) => args.run(context),
            SnapshotCommand::Delete(args) => stock::remove(context, args.output, &path(&args.machine), &args.names),
        }
    }
}

impl CreateArgs {
    fn run(self, context: &Context) -> Result<u8> {
        let request = CreateSnapshot {
            name: self.name,
            disk_only: self.disk_only,
        };
        let path = path(&self.machine);
        let snapshot: Snapshot = context.block_on(async {
            let client = Client::new(&context.places)?;
            carry_out(context, &client, &path, &request, "vm snapshot", Leaving::Cancels).await?;
            stock::get(&client, &path, &request.name).await
        })?;
        if snapshot.memory {
            let (machine, paused) = (&snapshot.machine, table::span(snapshot.paused_ms));
            context.printer.note(format!("{machine} paused for {paused}"));
        }
        stock::made(context, self.output, snapshot)
    }
}

impl RestoreArgs {
    fn run(self, context: &Context) -> Result<u8> {
        #[derive(Serialize)]
        struct Nothing {}
        let path = format!("{}/{}/restore", path(&self.machine), element(&self.name));
        let machine = context.block_on(async {
            let client = Client::new(&context.places)?;
            // Half a restore would be neither the one state nor the other.
            let accepted = carry_out(
                context,
                &client,
                &path,
                &Nothing {},
                "vm snapshot restore",
                Leaving::GoesOn,
            )
            .await?;
            // What the machine was when it began says nothing any more.
            let id = accepted.machine.map_or(self.machine, |m| m.id);
            client.get::<banger_proto::api::Machine>(&machine_path(&id)).await
        })?;
        if self.output.json() {
            context.printer.json(&versioned(machine))?;
        } else {
            context.printer.line(machine.name)?;
        }
        Ok(0)
    }
}
