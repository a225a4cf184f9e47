//! `banger system`: the installation of system mode.

use std::path::PathBuf;

use banger_proto::api::VersionInfo;
use banger_system::install::Layout;
use banger_system::units::Unit;
use clap::{Args, Subcommand};

use crate::cli::Context;
use crate::client::Client;
use crate::error::{Error, Kind, Result};
use crate::paths::Installation;
use crate::system::ground::{Ground, Program, programs};
use crate::system::manager::Systemd;

mod install;
mod restart;
mod status;
mod uninstall;

/// Install banger as a service of this host, with everything that takes root
///
/// In system mode one user's machines run on Firecracker in its jail, or on QEMU, on a bridge of their own with names below
/// .vm; two systemd services look after them. Machines run on when these are restarted, updated or killed.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "Examples:\n  sudo banger system install\n  banger system status\n  sudo banger system uninstall"
)]
pub(crate) struct SystemArgs {
    #[command(subcommand)]
    command: SystemCommand,
}

#[derive(Debug, Subcommand)]
enum SystemCommand {
    Install(install::InstallArgs),
    Status(status::StatusArgs),
    Restart(restart::RestartArgs),
    Uninstall(uninstall::UninstallArgs),
}

impl SystemArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        match self.command {
            SystemCommand::Install(args) => args.run(context),
            SystemCommand::Status(args) => args.run(context),
            SystemCommand::Restart(args) => args.run(context),
            SystemCommand::Uninstall(args) => args.run(context),
        }
    }
}

/// Only root may go on, and only on the host itself: below another root directory there is no systemd to talk to.
fn need_root(context: &Context, verb: &str) -> Result<()> {
    if context.places.layout() != Layout::default() {
        return Err(Error::usage(format!(
            "`banger system {verb}` works on this host, not below BANGER_ROOT={}",
            context.places.layout().root().display()
        )));
    }
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    // sudo has a search path of its own, on which this program need not be.
    let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("banger"));
    Err(Error::failed(format!("`banger system {verb}` needs root"))
        .hint(format!("sudo {} system {verb}", program.display())))
}

/// The programs that stand with this one.
fn own_programs() -> Result<Vec<Program>> {
    let own = std::env::current_exe().map_err(|e| Error::failed(format!("cannot tell where this program is: {e}")))?;
    programs(&own)
}

/// This host.
fn ground(layout: Layout, programs: Vec<Program>) -> Ground {
    Ground {
        layout,
        root: (0, 0),
        programs,
    }
}

/// systemd and the services of this host.
fn systemd(context: &Context) -> Systemd<'_> {
    let layout = context.places.layout();
    let ask = move || {
        // Read at each question: while it is being installed, the record is not there from the beginning.
        let installation = context.places.installation().map_err(|e| e.message)?;
        let installation = installation.ok_or("there is no record of an installation")?;
        daemon_version(context, &installation)
            .map(|v| v.version)
            .map_err(|e| e.message)
    };
    Systemd::new(layout.helper_socket(), Box::new(ask))
}

fn daemon_version(context: &Context, installation: &Installation) -> Result<VersionInfo> {
    context.block_on(async {
        let client = Client::installed(installation);
        let version = client.get::<VersionInfo>("version");
        let patience = std::time::Duration::from_secs(5);
        tokio::time::timeout(patience, version).await.unwrap_or_else(|_| {
            Err(Error::new(
                Kind::Timeout,
                format!("{} did not answer within 5 s", Unit::Daemon.name()),
            ))
        })
    })
}

/// The installation, which has to be there.
fn installed(context: &Context) -> Result<Installation> {
    context.places.installation()?.ok_or_else(|| {
        Error::new(Kind::NotFound, "banger is not installed in system mode on this host")
            .hint("install it with `sudo banger system install`")
    })
}
