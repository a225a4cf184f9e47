//! The user's terminal: raw while a guest's terminal is shown on it, and restored whatever happens.

use std::io::IsTerminal;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use banger_proto::frame::Resize;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::fcntl_dupfd_cloexec;
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

/// How long after a SIGHUP the terminal may go that it is about.
const GOES_WITHIN: Duration = Duration::from_millis(250);

/// The terminal that a session is shown on.
///
/// A SIGHUP alone does not tell whether the terminal is gone or somebody sent the signal: a shell that the kernel tells passes
/// it on by `kill`, as anybody could. The terminal does: one that is gone says so to whoever asks.
#[derive(Debug)]
pub(crate) struct Screen(OwnedFd);

impl Screen {
    /// That of our own streams.
    pub(crate) fn find() -> Option<Self> {
        let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
        [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]
            .into_iter()
            .find(IsTerminal::is_terminal)
            .and_then(Self::of)
    }

    /// This terminal.
    pub(crate) fn of(fd: BorrowedFd<'_>) -> Option<Self> {
        fcntl_dupfd_cloexec(fd, 3).ok().map(Self)
    }

    /// It was hung up: its window is closed, or the connection behind it.
    pub(crate) fn is_gone(&self) -> bool {
        self.goes_within(Duration::ZERO)
    }

    /// Waits a little for it to go.
    pub(crate) async fn goes(self: &Arc<Self>) -> bool {
        let screen = Arc::clone(self);
        tokio::task::spawn_blocking(move || screen.goes_within(GOES_WITHIN))
            .await
            .unwrap_or(false)
    }

    fn goes_within(&self, time: Duration) -> bool {
        // A hang-up is told without being asked for.
        let mut fds = [PollFd::new(&self.0, PollFlags::empty())];
        let time = Timespec::try_from(time).ok();
        poll(&mut fds, time.as_ref()).is_ok() && fds[0].revents().contains(PollFlags::HUP)
    }
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

#[cfg(test)]
mod tests {
    use rustix::fs::{Mode, OFlags};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

    use super::*;

    #[tokio::test]
    async fn a_terminal_says_when_it_is_gone() {
        let host = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&host).and_then(|()| unlockpt(&host)).unwrap();
        let name = ptsname(&host, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let inner = rustix::fs::open(name, flags, Mode::empty()).unwrap();
        let screen = Arc::new(Screen::of(inner.as_fd()).unwrap());
        assert!(!screen.is_gone());
        // What is typed and not read is no end.
        rustix::io::write(&host, b"typed\n").unwrap();
        assert!(!screen.goes().await);
        let waiting = tokio::spawn({
            let screen = Arc::clone(&screen);
            async move { screen.goes().await }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(host);
        assert!(waiting.await.unwrap());
        assert!(screen.is_gone());
    }
}
