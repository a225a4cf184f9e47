//! The user's terminal: raw while a guest's terminal is shown on it, and restored whatever happens.

use std::io::IsTerminal;
use std::os::fd::AsFd;

use banger_proto::frame::Resize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::error::{Error, Result};

/// Both ends are terminals, so that a program in the guest should see one.
pub(crate) fn interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// Size of the terminal, of whichever end is one.
pub(crate) fn size() -> Option<Resize> {
    let size = tcgetwinsize(std::io::stdout().as_fd())
        .or_else(|_| tcgetwinsize(std::io::stdin().as_fd()))
        .ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some(Resize {
        rows: size.ws_row,
        cols: size.ws_col,
    })
}

/// Keeps the terminal raw; dropping it (also while unwinding) restores what was before.
#[derive(Debug)]
pub(crate) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Makes the terminal on standard input raw; nothing where that is none.
    pub(crate) fn enter() -> Result<Option<Self>> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let refused = |e: rustix::io::Errno| {
            Error::failed(format!(
                "cannot make the terminal raw: {}",
                crate::error::reason(&e.into())
            ))
        };
        let before = tcgetattr(stdin.as_fd()).map_err(refused)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Drain, &raw).map_err(refused)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin().as_fd(), OptionalActions::Drain, &self.before);
    }
}
