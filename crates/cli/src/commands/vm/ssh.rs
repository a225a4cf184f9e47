//! `banger vm ssh`.

use std::ffi::OsString;
use std::process::Command;

use banger_proto::api::{Machine, MachineState, StallKind};
use clap::Args;

use crate::cli::Context;
use crate::client::{Client, machine_path};
use crate::commands::vm::shell::remind;
use crate::completion;
use crate::error::{Error, Kind, Result, reason};
use crate::signals::{self, Signals};
use crate::ssh::{Files, options, own_program};

/// Log into a machine with OpenSSH, as root
///
/// Goes through the machine's agent, with a key and known hosts of banger's own. The image needs an sshd; `banger vm shell`
/// does without. The exit status is ssh's.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm ssh build\n  banger vm ssh build -- -L 8080:localhost:80 -N")]
pub(crate) struct SshArgs {
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    /// Further options of ssh, and a command
    #[arg(last = true, value_name = "SSH-ARGUMENT")]
    arguments: Vec<OsString>,
}

impl SshArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        context.block_on(async {
            let client = Client::new(&context.places)?;
            let machine: Machine = client.get(&machine_path(&self.machine)).await?;
            if let Some(stalled) = &machine.stalled {
                let kind = match stalled.kind {
                    StallKind::NoSpace => Kind::NoSpace,
                    StallKind::DiskFailed => Kind::Failed,
                };
                let cause = machine.cause.clone().unwrap_or_default();
                return Err(Error::new(kind, cause).hint("it resumes by itself when its disk can be written"));
            }
            // The connection wakes one that is suspended.
            if !matches!(machine.state, MachineState::Running | MachineState::Suspended) {
                let verb = if machine.state == MachineState::Paused {
                    "resume"
                } else {
                    "start"
                };
                let message = format!("{} is {}, not running", machine.name, machine.state.as_str());
                return Err(Error::new(Kind::Conflict, message)
                    .hint(format!("{verb} it with `banger vm {verb} {}`", machine.name)));
            }
            let mut command = Command::new("ssh");
            command.args(["-F", "/dev/null"]);
            for option in options(&own_program()?, &Files::of(&context.places)?, &machine.id)? {
                command.arg("-o").arg(option);
            }
            // Options of the user come before the host, a command behind it.
            let (flags, rest) = split(&self.arguments);
            command.args(flags).arg(format!("{}.vm", machine.name)).args(rest);
            // These go to ssh as well, which belongs to the same terminal; it decides what they mean.
            let _signals = Signals::take(&[signals::INT, signals::QUIT])?;
            let mut child = command.spawn().map_err(|e| {
                Error::new(Kind::Unsupported, format!("cannot run ssh: {}", reason(&e)))
                    .hint("install the OpenSSH client, or use `banger vm shell`")
            })?;
            let status = child
                .wait()
                .map_err(|e| Error::failed(format!("cannot wait for ssh: {}", reason(&e))))?;
            remind(context, &machine.name);
            Ok(crate::session::run::status(status.code().unwrap_or(255)))
        })
    }
}

/// Splits ssh's options from the command behind them. Options that take a value in the next word are ssh's, see ssh(1).
fn split(arguments: &[OsString]) -> (&[OsString], &[OsString]) {
    const WITH_VALUE: &str = "BbcDEeFIiJLlmOopQRSWw";
    let mut at = 0;
    while let Some(word) = arguments.get(at) {
        let bytes = word.as_encoded_bytes();
        if bytes == b"--" {
            return (&arguments[..at], &arguments[at + 1..]);
        }
        if bytes.len() < 2 || bytes[0] != b'-' {
            break;
        }
        // The value is in the next word when the option that takes it is the last letter.
        let takes = bytes[1..].iter().position(|&b| WITH_VALUE.as_bytes().contains(&b));
        at += if takes == Some(bytes.len() - 2) { 2 } else { 1 };
    }
    arguments.split_at(at.min(arguments.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_stand_before_the_host_and_commands_behind() {
        for (line, flags) in [
            ("", 0),
            ("uname -a", 0),
            ("-v", 1),
            ("-L 8080:localhost:80 -N", 3),
            ("-L8080:localhost:80 uname -r", 1),
            ("-vvi key make -j2", 2),
            ("-i", 1),
        ] {
            let words: Vec<OsString> = line.split_whitespace().map(Into::into).collect();
            assert_eq!(split(&words).0.len(), flags, "{line}");
        }
    }
}
