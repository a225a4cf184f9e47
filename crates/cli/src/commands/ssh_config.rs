//! `banger ssh-config`.

use clap::Args;

use crate::cli::Context;
use crate::error::{Error, Result};
use crate::ssh::{Files, config, own_program};

/// Make `ssh NAME.vm` and remote editors work
///
/// --install puts one marked block into ~/.ssh/config that includes a file of banger's own; --uninstall takes it out again.
/// Without either, shows what would be done.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger ssh-config --install && ssh build.vm\n  banger ssh-config --uninstall")]
pub(crate) struct SshConfigArgs {
    /// Put the block into ~/.ssh/config
    #[arg(long, conflicts_with = "uninstall")]
    install: bool,
    /// Take the block out of ~/.ssh/config
    #[arg(long)]
    uninstall: bool,
}

impl SshConfigArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let (printer, places) = (&context.printer, &context.places);
        let users = places.home()?.join(".ssh/config");
        let ours = places.config_dir()?.join("ssh_config");
        let include = config::include_line(&ours)?;
        if self.install {
            let text = config::own_file(&own_program()?, &Files::of(places)?)?;
            config::replace(&ours, &text, 0o600)?;
            let changed = config::edit(&users, |text| config::install(text, &include))?;
            printer.note(if changed {
                format!("{} now includes {}; try `ssh NAME.vm`", users.display(), ours.display())
            } else {
                format!("{} includes {} already", users.display(), ours.display())
            });
        } else if self.uninstall {
            let changed = config::edit(&users, config::uninstall)?;
            match std::fs::remove_file(&ours) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", &ours, error));
                }
                _ => {}
            }
            printer.note(if changed {
                format!("the block is out of {}", users.display())
            } else {
                format!("{} has no block of banger's", users.display())
            });
        } else {
            printer.line(&include)?;
            printer.note(format!(
                "`banger ssh-config --install` puts this at the top of {}",
                users.display()
            ));
        }
        Ok(0)
    }
}
