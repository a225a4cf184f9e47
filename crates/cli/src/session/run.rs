//! A session on the user's own terminal or pipes.

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use banger_proto::frame::Open;
use tokio::sync::mpsc;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::printer::Printer;
use crate::session::input::{DetachKeys, read_stdin};
use crate::session::opening::Patience;
use crate::session::output::Output;
use crate::session::terminal::{RawMode, Screen, size};
use crate::session::{End, Heard, Session, Streams};
use crate::signals::{self, Signals};
use crate::timings::Marks;

/// A fresh session id: sixteen hexadecimal digits.
pub(crate) fn fresh_id() -> Result<String> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|e| Error::failed(format!("cannot get random numbers: {e}")))?;
    Ok(banger_core::id::hex(&bytes))
}

/// What to run where.
#[derive(Debug)]
pub(crate) struct Job {
    /// Id of the machine.
    pub(crate) machine: String,
    /// Id of the session.
    pub(crate) session: String,
    /// What to run or join.
    pub(crate) open: Open,
    /// Keys that detach from a terminal.
    pub(crate) detach: DetachKeys,
    /// Where the session notes its times.
    pub(crate) marks: Rc<Marks>,
}

/// Runs a session wired to this process's streams and signals.
pub(crate) async fn on_own_streams(client: &Client, printer: &Printer, job: Job) -> Result<End> {
    let mut open = job.open;
    let tty = open.tty;
    open.stdin = open.stdin && stdin_is_readable() && !stdin_is_empty();
    if tty {
        open.size = size();
        if let Ok(term) = std::env::var("TERM")
            && !term.is_empty()
        {
            open.env.entry("TERM".to_owned()).or_insert(term);
        }
    }
    let screen = if tty { Screen::find().map(Arc::new) } else { None };
    let signals = forward_signals(screen.clone())?;
    // Entered late and left early, so that messages before and after read as usual.
    let raw = if tty { RawMode::enter()? } else { None };
    let session = Session {
        client,
        printer,
        machine: job.machine,
        id: job.session,
        open,
        detach: tty.then_some(job.detach),
        marks: job.marks,
        patience: Patience::default(),
    };
    let streams = Streams {
        input: read_stdin,
        output: Output::to_process(),
        signals,
        screen,
    };
    let end = session.run(streams).await;
    drop(raw);
    end
}

/// Reading from a terminal that belongs to another job would stop us.
fn stdin_is_readable() -> bool {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return true;
    }
    match rustix::termios::tcgetpgrp(stdin.as_fd()) {
        Ok(foreground) => foreground == rustix::process::getpgrp(),
        Err(_) => true,
    }
}

/// Nothing will ever come from the null device: that is said at once, and saves a thread here and a message to the guest.
fn stdin_is_empty() -> bool {
    let null = rustix::fs::makedev(1, 3);
    rustix::fs::fstat(std::io::stdin()).is_ok_and(|stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice
            && stat.st_rdev == null
    })
}

/// Takes signals over. A SIGHUP that comes with the end of the terminal is not one that somebody sent.
fn forward_signals(screen: Option<Arc<Screen>>) -> Result<mpsc::Receiver<Heard>> {
    let mut signals = Signals::take(&[
        signals::INT,
        signals::TERM,
        signals::HUP,
        signals::QUIT,
        signals::USR1,
        signals::USR2,
        signals::WINCH,
    ])?;
    let (sender, receiver) = mpsc::channel(32);
    tokio::spawn(async move {
        loop {
            let heard = match (signals.next().await, &screen) {
                (signals::HUP, Some(screen)) if screen.goes().await => Heard::HungUp,
                (number, _) => Heard::Signal(number),
            };
            if sender.send(heard).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

/// The caller's values for `--env KEY` and `--env KEY=VALUE`.
pub(crate) fn environment(
    wanted: &[String],
    lookup: impl Fn(&str) -> Option<std::ffi::OsString>,
) -> Result<banger_proto::api::Env> {
    let mut env = banger_proto::api::Env::new();
    for item in wanted {
        let (key, value) = match item.split_once('=') {
            Some((key, value)) => (key, value.to_owned()),
            None => {
                let value = lookup(item).ok_or_else(|| {
                    Error::usage(format!("--env {item}: the variable is not set here"))
                        .hint(format!("write `--env {item}=VALUE`, or export it first"))
                })?;
                let value = value
                    .into_string()
                    .map_err(|_| Error::usage(format!("--env {item}: its value is not valid UTF-8")))?;
                (item.as_str(), value)
            }
        };
        if key.is_empty() || key.contains('\0') || value.contains('\0') {
            return Err(
                Error::usage(format!("--env {item}: not a variable")).hint("write `--env KEY=VALUE` or `--env KEY`")
            );
        }
        env.insert(key.to_owned(), value);
    }
    Ok(env)
}

/// The words of a guest command, which travel as text.
pub(crate) fn words(command: &[std::ffi::OsString]) -> Result<Vec<String>> {
    command
        .iter()
        .map(|word| {
            word.to_str().map(str::to_owned).ok_or_else(|| {
                Error::usage(format!("argument `{}` is not valid UTF-8", word.display()))
                    .hint("pass such bytes on standard input or in a file")
            })
        })
        .collect()
}

/// The status that a session's end gives our own process.
pub(crate) fn status(code: i32) -> u8 {
    u8::try_from(code.clamp(0, 255)).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_takes_values_from_the_caller() {
        let lookup = |key: &str| (key == "TOKEN").then(|| "secret".into());
        let env = environment(&["A=b=c".into(), "TOKEN".into(), "E=".into()], lookup).unwrap();
        assert_eq!(env["A"], "b=c");
        assert_eq!(env["TOKEN"], "secret");
        assert_eq!(env["E"], "");
        assert!(
            environment(&["MISSING".into()], lookup)
                .unwrap_err()
                .message
                .contains("not set")
        );
        assert!(environment(&["=x".into()], lookup).is_err());
    }

    #[test]
    fn ids_are_fresh() {
        let (a, b) = (fresh_id().unwrap(), fresh_id().unwrap());
        assert_eq!(a.len(), 16);
        assert_ne!(a, b);
    }
}
