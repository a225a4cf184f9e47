//! `banger internal`: called by other programs, not by people.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::cli::Context;
use crate::error::{Error, Result};
use crate::{reference, ssh};

/// What other programs call
#[derive(Debug, Args)]
#[command(hide = true, arg_required_else_help = true)]
pub(crate) struct InternalArgs {
    #[command(subcommand)]
    command: InternalCommand,
}

#[derive(Debug, Subcommand)]
enum InternalCommand {
    /// Connect standard input and output with the sshd of a machine
    SshProxy {
        /// Machine by name, id or prefix, or NAME.vm
        machine: String,
    },
    /// Succeed if ssh, which calls this, takes no RemoteForward from its configuration
    SshForwards,
    /// Write the reference of the command line
    CliReference {
        /// File; standard output otherwise
        file: Option<PathBuf>,
    },
}

impl InternalArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        match self.command {
            InternalCommand::SshProxy { machine } => ssh::proxy::run(context, &machine),
            InternalCommand::SshForwards => ssh::forwards::run(context),
            InternalCommand::CliReference { file: None } => {
                context.printer.data(reference::markdown())?;
                Ok(0)
            }
            InternalCommand::CliReference { file: Some(file) } => {
                std::fs::write(&file, reference::markdown()).map_err(|e| Error::io("write", &file, e))?;
                Ok(0)
            }
        }
    }
}
