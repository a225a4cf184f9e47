//! A program on a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::command::{Stream, tail, wait_for};
use crate::processes;

/// A program whose three streams are one terminal, which is its controlling one.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    /// The window's side; until [`Terminal::hang_up`].
    host: Option<File>,
    /// While this is open the screen is read.
    watch: Option<OwnedFd>,
    /// Kept open, so that the terminal's settings can be read when the program has gone; until [`Terminal::wait`].
    inner: Option<OwnedFd>,
    /// The settings as the program left them.
    left_raw: bool,
    /// What the program has written.
    pub screen: Stream,
    /// How far [`Terminal::expect`] has read.
    seen: usize,
    label: String,
    deadline: Duration,
}

impl Terminal {
    /// Starts a program on a terminal of a size. `prepare` sets arguments, environment and directory.
    #[track_caller]
    pub fn start(program: &Path, rows: u16, cols: u16, prepare: impl FnOnce(&mut Command)) -> Self {
        let host = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
        grantpt(&host)
            .and_then(|()| unlockpt(&host))
            .expect("the terminal's other side");
        let name = ptsname(&host, Vec::new()).expect("the terminal's name");
        let name = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes())).to_owned();
        let inner = rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
            .expect("the terminal");
        let size = Winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&inner, size).expect("the terminal takes a size");
        let side = || Stdio::from(inner.try_clone().expect("a descriptor can be shared"));
        // `setsid --ctty` makes the terminal the controlling one and becomes the program: the process id stays.
        let mut command = Command::new("setsid");
        command
            .arg("--ctty")
            .arg(program)
            .stdin(side())
            .stdout(side())
            .stderr(side());
        prepare(&mut command);
        let label = format!("{command:?}");
        let child = command.spawn().unwrap_or_else(|e| panic!("cannot run {label}: {e}"));
        let host = File::from(host);
        let (closed, watch) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let screen = Stream::read(Window {
            host: host.try_clone().expect("a descriptor can be shared"),
            closed,
        });
        Self {
            child,
            host: Some(host),
            watch: Some(watch),
            inner: Some(inner),
            left_raw: false,
            screen,
            seen: 0,
            label,
            deadline: Duration::from_secs(60),
        }
    }

    /// Time that every wait may take; 60 s if nothing is said.
    #[must_use]
    pub fn deadline(mut self, seconds: u64) -> Self {
        self.deadline = Duration::from_secs(seconds);
        self
    }

    /// The program's process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Types.
    #[track_caller]
    pub fn send(&mut self, keys: impl AsRef<[u8]>) {
        let host = self.host.as_mut().expect("the window is open");
        host.write_all(keys.as_ref())
            .unwrap_or_else(|e| panic!("typing to {}: {e}", self.label));
    }

    /// Waits until a text appears behind what the last call found, and returns what stood before it.
    #[track_caller]
    pub fn expect(&mut self, text: &str) -> String {
        let from = self.seen;
        let find = |bytes: &[u8]| {
            bytes
                .get(from..)?
                .windows(text.len())
                .position(|w| w == text.as_bytes())
        };
        let found = self.screen.until(self.deadline, |b| find(b).is_some());
        let bytes = self.screen.bytes();
        assert!(
            found,
            "{} did not show {text:?}; the screen:\n{}",
            self.label,
            tail(&bytes)
        );
        let at = find(&bytes).expect("it was found");
        self.seen = from + at + text.len();
        String::from_utf8_lossy(&bytes[from..from + at]).into_owned()
    }

    /// Changes the size, as a window manager does: the kernel tells the program by SIGWINCH.
    pub fn resize(&self, rows: u16, cols: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let host = self.host.as_ref().expect("the window is open");
        tcsetwinsize(host, size).expect("the terminal takes a size");
    }

    /// Closes the window: the kernel hangs the terminal up.
    pub fn hang_up(&mut self) {
        self.host = None;
        self.watch = None;
        assert!(self.screen.ended(self.deadline), "the screen is still read");
        self.inner = None;
    }

    /// Whether the terminal is in raw mode: what is typed is neither echoed nor looked at.
    pub fn is_raw(&self) -> bool {
        let Some(inner) = &self.inner else { return self.left_raw };
        let modes = tcgetattr(inner).expect("the terminal's settings").local_modes;
        !modes.intersects(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
    }

    /// Waits until the program has taken over the terminal.
    #[track_caller]
    pub fn until_raw(&self) {
        processes::until(
            &format!("{} to take over the terminal", self.label),
            self.deadline,
            || self.is_raw(),
        );
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.pid()) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Waits for the program's end and returns its status, 128 + n for signal n.
    #[track_caller]
    pub fn wait(&mut self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        let begun = Instant::now();
        let status = wait_for(&mut self.child, self.deadline);
        let Some(status) = status else {
            panic!(
                "{} did not end in {:?}; the screen:\n{}",
                self.label,
                begun.elapsed(),
                tail(&self.screen.bytes())
            )
        };
        self.left_raw = self.is_raw();
        // With the last descriptor of its side the stream ends, so that nothing of the screen is missed.
        self.inner = None;
        self.screen.ended(Duration::from_secs(5));
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
    }
}

/// The window's side as it is read, until the other end of `closed` is.
struct Window {
    host: File,
    closed: OwnedFd,
}

impl Read for Window {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            let mut fds = [
                PollFd::new(&self.closed, PollFlags::empty()),
                PollFd::new(&self.host, PollFlags::IN),
            ];
            poll(&mut fds, None)?;
            if !fds[0].revents().is_empty() {
                return Ok(0);
            }
            if !fds[1].revents().is_empty() {
                return self.host.read(buffer);
            }
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_on_a_terminal() {
        let mut terminal = Terminal::start(Path::new("/bin/sh"), 33, 99, |c| {
            c.env("PS1", "prompt> ");
        })
        .deadline(10);
        terminal.expect("prompt> ");
        terminal.send("stty size; tty >/dev/null && echo is-a-tty\n");
        terminal.expect("33 99");
        terminal.expect("is-a-tty");
        terminal.resize(20, 40);
        terminal.send("stty size; exit 7\n");
        terminal.expect("20 40");
        assert_eq!(terminal.wait(), 7);
        assert!(!terminal.is_raw());
    }

    #[test]
    fn typed_control_c_reaches_the_program() {
        let mut terminal = Terminal::start(Path::new("/bin/sleep"), 24, 80, |c| {
            c.arg("60");
        })
        .deadline(10);
        let pid = terminal.pid();
        processes::until("sleep to run", Duration::from_secs(5), || {
            processes::read(pid).is_some_and(|p| p.name == "sleep")
        });
        terminal.send([3]);
        assert_eq!(terminal.wait(), 130);
    }

    #[test]
    fn a_window_that_is_closed_hangs_up() {
        let mut terminal = Terminal::start(Path::new("/bin/sh"), 24, 80, |c| {
            c.args(["-c", "echo re''ady; exec sleep 60"]);
        })
        .deadline(10);
        terminal.expect("ready");
        terminal.hang_up();
        assert_eq!(terminal.wait(), 129);
    }
}
