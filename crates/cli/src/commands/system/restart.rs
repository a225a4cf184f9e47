//! `banger system restart`.

use banger_system::units::Unit;
use clap::Args;

use super::{installed, need_root, systemd};
use crate::cli::Context;
use crate::error::Result;
use crate::system::manager::Manager;

/// Restart the services; machines run on
///
/// Also starts them when they do not run.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sudo banger system restart")]
pub(super) struct RestartArgs {}

impl RestartArgs {
    pub(super) fn run(self, context: &Context) -> Result<u8> {
        need_root(context, "restart")?;
        installed(context)?;
        let systemd = systemd(context);
        let mut activity = context.printer.short_activity("system restart");
        // The helper first: the daemon asks it what there is.
        for unit in [Unit::Helper, Unit::Daemon] {
            activity.stage(&format!("restart {}", unit.name()));
            // One that failed too often is not started otherwise.
            systemd.forget(unit);
            systemd.restart(unit)?;
            systemd.wait(unit)?;
        }
        drop(activity);
        context
            .printer
            .note("both services run anew; machines were not touched");
        Ok(0)
    }
}
