//! `banger ssh-config`.

use std::path::Path;

use clap::Args;

use crate::cli::Context;
use crate::error::{Error, Result};
use crate::ssh::{Files, config, own_program};

/// Make `ssh NAME.vm` and remote editors work
///
/// --install puts two marked blocks into ~/.ssh/config: the first includes a file of banger's own, the last one clears lists that
/// ssh only adds to. --uninstall takes them out again. Without either, shows what would be done.
///
/// For machines no agent, display, RemoteForward, variable or command of your other settings is in force. To allow one, name the
/// machine above the first block: `Host build.vm` and below it `ForwardAgent yes`. If your settings for all hosts have a RemoteForward,
/// editors and `ssh -L` need `ClearAllForwardings no` there.
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
            let loose = loosened(&users);
            if !loose.is_empty() {
                printer.warn(format!(
                    "other lines of {} win over banger's for all machines: {}; move them between its two blocks",
                    users.display(),
                    loose.join(", ")
                ));
            }
        } else if self.uninstall {
            let changed = config::edit(&users, config::uninstall)?;
            match std::fs::remove_file(&ours) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", &ours, error));
                }
                _ => {}
            }
            printer.note(if changed {
                format!("the blocks are out of {}", users.display())
            } else {
                format!("{} has no block of banger's", users.display())
            });
        } else {
            printer.line(&include)?;
            printer.note(format!(
                "`banger ssh-config --install` puts this at the top of {}, and a second block at its end",
                users.display()
            ));
        }
        Ok(0)
    }
}

/// What the user's file has otherwise than we pin it, for a machine that it does not name. Nothing where ssh can't be asked.
fn loosened(users: &Path) -> Vec<String> {
    let shown = std::process::Command::new("ssh")
        .arg("-F")
        .arg(users)
        .args(["-G", "banger-any-machine.vm"])
        .stdin(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .output();
    match shown {
        Ok(shown) if shown.status.success() => config::loosened(&String::from_utf8_lossy(&shown.stdout)),
        _ => Vec::new(),
    }
}
