//! `banger system uninstall`.

use std::io::IsTerminal;

use banger_proto::api::{Accepted, Machine, MachineState};
use clap::Args;
use serde::Serialize;

use super::{ground, installed, need_root, systemd};
use crate::cli::{Context, OutputArgs, versioned};
use crate::client::operation::{Leaving, carry_out};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{self, machines};
use crate::error::{Error, Kind, Result};
use crate::paths::Installation;
use crate::system::manager::Manager;
use crate::system::plan::Words;
use crate::system::remove::{self, Outcome};
use crate::table;

/// Remove system mode from this host
///
/// Takes away what the installation made: services, network, rules, programs, units, records. Machines, images and kernels stay in
/// /var/lib/banger/state unless --purge is given; a later installation for the same owner finds them again. Refuses while machines
/// run.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  sudo banger system uninstall\n  sudo banger system uninstall --purge --yes")]
pub(super) struct UninstallArgs {
    /// Also remove machines, images, kernels and the configuration; ends machines that run
    #[arg(long)]
    purge: bool,
    /// End machines that run, and go on when something cannot be removed
    #[arg(long)]
    force: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Report {
    /// What was done.
    steps: Vec<Words>,
    /// What was left, and why.
    kept: Vec<String>,
}

impl UninstallArgs {
    pub(super) fn run(self, context: &Context) -> Result<u8> {
        need_root(context, "uninstall")?;
        let installation = installed(context)?;
        let net = &installation.record.network;
        let manager = systemd(context);
        let running = Running::find(context, &installation, &manager);
        if !running.names.is_empty() && !self.force && !self.purge {
            let message = match running.names.len() {
                1 => "a machine runs".to_owned(),
                n => format!("{n} machines run"),
            };
            return Err(
                Error::new(Kind::Conflict, format!("{message}: {}", running.names.join(", ")))
                    .hint("stop them with `banger vm stop`, or let --force end them"),
            );
        }
        if !self.yes && !confirmed(context, self.purge, &running.names)? {
            return Err(Error::failed("nothing was removed"));
        }
        running.end(context, &installation)?;
        let ground = ground(installation.layout.clone(), Vec::new());
        let mut outcome = remove::clear_host(&ground, &manager, net);
        if outcome.failed.is_empty() || self.force {
            remove::remove(&ground, &manager, self.purge, &mut outcome);
        }
        show(context, self.output, &outcome)?;
        remove::unfinished(&outcome).map_or(Ok(0), Err)
    }
}

/// Machines that run.
struct Running {
    /// Those that the daemon knows.
    machines: Vec<Machine>,
    /// Names, or identifiers where only the helper answers.
    names: Vec<String>,
}

impl Running {
    fn find(context: &Context, installation: &Installation, manager: &dyn Manager) -> Self {
        let known = context.block_on(async { machines(&Client::installed(installation)).await });
        let Ok(known) = known else {
            // Whoever does not answer either has no machines to name.
            let ids = remove::running(manager).unwrap_or_default();
            return Self {
                machines: Vec::new(),
                names: ids.iter().map(|id| id.as_str().to_owned()).collect(),
            };
        };
        let machines: Vec<Machine> = known.into_iter().filter(|m| has_engine(m.state)).collect();
        Self {
            names: machines.iter().map(|m| m.name.clone()).collect(),
            machines,
        }
    }

    /// Stops what the daemon knows; the rest is removed with the host's objects.
    fn end(&self, context: &Context, installation: &Installation) -> Result<()> {
        context.block_on(async {
            let client = Client::installed(installation);
            for machine in &self.machines {
                let path = format!("{}/stop", machine_path(&machine.id));
                let label = format!("vm stop {}", machine.name);
                let request = serde_json::json!({});
                let stopped: Result<Accepted> =
                    carry_out(context, &client, &path, &request, &label, Leaving::GoesOn).await;
                if let Err(error) = stopped {
                    context.printer.warn(format!(
                        "{} could not be stopped and will be ended: {error}",
                        machine.name
                    ));
                }
            }
            Ok(())
        })
    }
}

fn has_engine(state: MachineState) -> bool {
    !matches!(
        state,
        MachineState::Stopped | MachineState::Error | MachineState::Suspended
    )
}

fn confirmed(context: &Context, purge: bool, running: &[String]) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(Error::usage("will not uninstall without being asked twice").hint("use --yes"));
    }
    let mut question = "remove banger's system mode from this host".to_owned();
    if !running.is_empty() {
        question.push_str(&format!(", end {}", running.join(", ")));
    }
    if purge {
        question.push_str(", and delete all machines, images and kernels");
    }
    common::confirmed(context, &format!("{question}?"))
}

fn show(context: &Context, output: OutputArgs, outcome: &Outcome) -> Result<()> {
    if output.json() {
        return context.printer.json(&versioned(Report {
            steps: outcome.done.clone(),
            kept: outcome.kept.clone(),
        }));
    }
    let rows = outcome.done.iter().map(|s| (s.action, s.object.clone()));
    context.printer.data(table::pairs(rows))?;
    for kept in &outcome.kept {
        context.printer.note(format!("kept {kept}"));
    }
    Ok(())
}
