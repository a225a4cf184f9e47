//! `banger system install`.

use std::path::PathBuf;

use banger_proto::api::DaemonStatus;
use banger_system::install::Installed;
use clap::{Args, ValueHint};
use serde::Serialize;

use super::{ground, need_root, own_programs, systemd};
use crate::cli::{Context, OutputArgs, versioned};
use crate::client::Client;
use crate::commands::version;
use crate::error::Result;
use crate::system::apply::carry_out;
use crate::system::facts::{self, Facts, Wanted};
use crate::system::manager::Manager;
use crate::system::plan::{Words, plan, refused};
use crate::table;

/// Install system mode, or bring an installation up to date
///
/// Copies banger's programs to /usr/local, writes /etc/banger/install.toml and the systemd units, and starts them. Looks first, and
/// touches nothing when something of others is in the way. What is as it should be stays; what fails is taken back. Machines
/// run on when the programs are replaced.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  sudo banger system install --dry-run\n  sudo banger system install\n  \
                  sudo banger system install --owner dev --firecracker /usr/local/bin/firecracker --jailer /usr/local/bin/jailer"
)]
pub(super) struct InstallArgs {
    /// Whose machines they will be; who calls sudo when absent
    #[arg(long, value_name = "USER", value_hint = ValueHint::Username)]
    owner: Option<String>,
    /// Firecracker's program; /usr/local/bin/firecracker when absent. Only root may be able to change it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    firecracker: Option<PathBuf>,
    /// Firecracker's jailer; /usr/local/bin/jailer when absent. Only root may be able to change it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    jailer: Option<PathBuf>,
    /// Address of the bridge and prefix of the machines' network, /16 to /29; the first free one of some when absent. Nothing that
    /// this host has an address or a route of
    #[arg(long, value_name = "ADDRESS/PREFIX")]
    network: Option<String>,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Report {
    owner: String,
    version: String,
    dry_run: bool,
    /// Name of the bridge.
    bridge: String,
    /// Its address, with the prefix of the machines' network.
    network: String,
    /// What was done, or would be.
    steps: Vec<Words>,
    notes: Vec<String>,
}

impl InstallArgs {
    pub(super) fn run(self, context: &Context) -> Result<u8> {
        need_root(context, "install")?;
        let ground = ground(context.places.layout(), own_programs()?);
        let systemd = systemd(context);
        let caller = std::env::var("SUDO_USER").ok().filter(|u| !u.is_empty());
        let wanted = Wanted {
            owner: self.owner,
            sudo_user: caller.clone(),
            firecracker: self.firecracker,
            jailer: self.jailer,
            network: self.network,
            installed: Some(Installed {
                at: now(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                commit: version::commit().to_owned(),
            }),
        };
        let facts = facts::read(&ground, &wanted, &systemd)?;
        let steps = plan(&facts).map_err(refused)?;
        if !self.dry_run {
            let mut activity = context.printer.short_activity("system install");
            carry_out(&ground.layout, &steps, &systemd as &dyn Manager, |step| {
                let words = step.words();
                activity.stage(&format!("{} {}", words.action, words.object));
                Ok(())
            })?;
        }
        let report = Report {
            owner: facts.wanted.owner.user.clone(),
            version: facts.wanted.installed.version.clone(),
            dry_run: self.dry_run,
            bridge: facts.wanted.network.bridge().to_owned(),
            network: facts.wanted.network.text(),
            steps: steps.iter().map(|s| s.words()).collect(),
            notes: notes(context, &facts, caller.as_deref()),
        };
        show(context, self.output, report)
    }
}

fn show(context: &Context, output: OutputArgs, report: Report) -> Result<u8> {
    if output.json() {
        context.printer.json(&versioned(report))?;
        return Ok(0);
    }
    let rows = report.steps.iter().map(|s| (s.action, s.object.clone()));
    context.printer.data(table::pairs(rows))?;
    context.printer.note(format!(
        "machines have the network {} on the bridge {}",
        report.network, report.bridge
    ));
    for note in &report.notes {
        context.printer.note(note);
    }
    let (owner, version) = (&report.owner, &report.version);
    context.printer.note(match (report.steps.is_empty(), report.dry_run) {
        (true, _) => format!("banger {version} is installed for {owner} as it should be; nothing to do"),
        (false, true) => "nothing has been done yet; without --dry-run it will be".to_owned(),
        (false, false) => {
            format!("banger {version} is installed for {owner}; `banger doctor` says what it can do here")
        }
    });
    Ok(0)
}

/// What somebody should know who is not the owner: whose it is, and how that is changed.
fn of_another(owner: &str, caller: Option<&str>) -> Option<String> {
    let caller = caller.filter(|caller| *caller != owner && *caller != "root")?;
    Some(format!(
        "the owner is {owner}, not {caller}: {caller} goes on in user mode; to change that: sudo banger system uninstall, then \
         sudo banger system install --owner {caller}"
    ))
}

fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// What the one who installs should know.
fn notes(context: &Context, facts: &Facts, caller: Option<&str>) -> Vec<String> {
    let owner = &facts.wanted.owner;
    let mut notes: Vec<String> = of_another(&owner.user, caller).into_iter().collect();
    if let Some(socket) = &facts.own_daemon {
        let status = context.block_on(async {
            Client::of_user(socket.clone(), owner.uid)
                .get::<DaemonStatus>("daemon")
                .await
        });
        let machines = status.map(|s| s.machines).unwrap_or_default();
        if machines > 0 {
            notes.push(format!(
                "{}'s own daemon has {machines} machine(s); they go on, and BANGER_MODE=user reaches them",
                owner.user
            ));
        }
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn somebody_else_is_told_whose_it_is() {
        assert_eq!(of_another("dev", Some("dev")), None);
        assert_eq!(of_another("dev", Some("root")), None);
        assert_eq!(of_another("dev", None), None);
        let text = of_another("dev", Some("eve")).unwrap();
        assert!(
            text.starts_with("the owner is dev, not eve") && text.ends_with("install --owner eve"),
            "{text}"
        );
    }
}
