//! Running programs with a deadline.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::processes;

/// What a program gets on its standard input.
#[derive(Debug)]
enum Input {
    Null,
    Bytes(Vec<u8>),
    File(std::fs::File),
    /// Kept open, written by the test.
    Held,
}

/// A program to run.
#[derive(Debug)]
pub struct Cmd {
    command: Command,
    label: String,
    input: Input,
    output: Option<std::fs::File>,
    deadline: Duration,
    /// A file whose end is shown when the command hangs.
    log: Option<PathBuf>,
}

impl Cmd {
    /// A program, without arguments, with the environment of this process.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let program = program.as_ref();
        let label = Path::new(program)
            .file_name()
            .unwrap_or(program)
            .to_string_lossy()
            .into_owned();
        let mut command = Command::new(program);
        // A group of its own, so that a hung program goes down with its children.
        command.process_group(0);
        Self {
            command,
            label,
            input: Input::Null,
            output: None,
            deadline: Duration::from_secs(60),
            log: None,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.label.push(' ');
        self.label.push_str(&arg.as_ref().to_string_lossy());
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(self, args: impl IntoIterator<Item = A>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Drops every variable set so far and those of this process.
    #[must_use]
    pub fn env_clear(mut self) -> Self {
        self.command.env_clear();
        self
    }

    /// Runs it in a directory.
    #[must_use]
    pub fn cwd(mut self, dir: impl AsRef<Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Gives it bytes to read, then end of file.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Input::Bytes(bytes.into());
        self
    }

    /// Gives it a file to read.
    #[must_use]
    pub fn stdin_file(mut self, file: std::fs::File) -> Self {
        self.input = Input::File(file);
        self
    }

    /// Keeps its standard input open, for [`Running::write`].
    #[must_use]
    pub fn stdin_held(mut self) -> Self {
        self.input = Input::Held;
        self
    }

    /// Sends its standard output to a file instead of to the test.
    #[must_use]
    pub fn stdout_file(mut self, file: std::fs::File) -> Self {
        self.output = Some(file);
        self
    }

    /// Time until it is killed and the test fails; 60 s if nothing is said.
    #[must_use]
    pub fn deadline(mut self, seconds: u64) -> Self {
        self.deadline = Duration::from_secs(seconds);
        self
    }

    /// A file whose end is shown when it hangs.
    #[must_use]
    pub fn log(mut self, path: impl Into<PathBuf>) -> Self {
        self.log = Some(path.into());
        self
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn run(self) -> Done {
        self.spawn().wait()
    }

    /// Runs it to its end and fails unless it ends with status 0.
    #[track_caller]
    pub fn ok(self) -> Done {
        self.run().code(0)
    }

    /// Starts it.
    #[track_caller]
    pub fn spawn(mut self) -> Running {
        let stdin = match &self.input {
            Input::Null => Stdio::null(),
            Input::Bytes(_) | Input::Held => Stdio::piped(),
            Input::File(file) => Stdio::from(file.try_clone().expect("a file can be shared")),
        };
        let stdout = match self.output.take() {
            Some(file) => Stdio::from(file),
            None => Stdio::piped(),
        };
        self.command.stdin(stdin).stdout(stdout).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = self
            .command
            .spawn()
            .unwrap_or_else(|e| panic!("cannot run `{}`: {e}", self.label));
        let stdout = child.stdout.take().map_or_else(Stream::closed, Stream::read);
        let stderr = child.stderr.take().map_or_else(Stream::closed, Stream::read);
        let mut held = child.stdin.take();
        if let Input::Bytes(bytes) = self.input {
            let mut pipe = held.take().expect("standard input is a pipe");
            // A program that ends without reading everything is no fault of the test.
            std::thread::spawn(move || pipe.write_all(&bytes));
        }
        Running {
            child,
            stdout,
            stderr,
            held,
            label: self.label,
            started,
            deadline: self.deadline,
            log: self.log,
            ended: false,
        }
    }
}

/// Bytes that a thread collects from a pipe or a terminal.
#[derive(Debug, Clone)]
pub struct Stream(Arc<(Mutex<Collected>, Condvar)>);

#[derive(Debug, Default)]
struct Collected {
    bytes: Vec<u8>,
    eof: bool,
}

impl Stream {
    fn closed() -> Self {
        Self(Arc::new((
            Mutex::new(Collected {
                bytes: Vec::new(),
                eof: true,
            }),
            Condvar::new(),
        )))
    }

    /// Collects what a reader gives, to its end.
    pub fn read(mut from: impl Read + Send + 'static) -> Self {
        let stream = Self(Arc::default());
        let shared = stream.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            loop {
                let read = from.read(&mut buffer);
                let (lock, changed) = &*shared.0;
                let mut collected = lock.lock().unwrap_or_else(PoisonError::into_inner);
                match read {
                    Ok(n) if n > 0 => collected.bytes.extend_from_slice(&buffer[..n]),
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    // A terminal whose other side is gone reads as an error.
                    _ => collected.eof = true,
                }
                changed.notify_all();
                if collected.eof {
                    return;
                }
            }
        });
        stream
    }

    /// What has arrived so far.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).bytes.clone()
    }

    /// What has arrived so far, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    /// Waits until the condition holds for what has arrived, or the end of the stream; says whether it does.
    pub fn until(&self, time: Duration, mut condition: impl FnMut(&[u8]) -> bool) -> bool {
        let end = Instant::now() + time;
        let (lock, changed) = &*self.0;
        let mut collected = lock.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if condition(&collected.bytes) {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if collected.eof || left.is_zero() {
                return false;
            }
            collected = changed
                .wait_timeout(collected, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for the end of the stream; says whether it came.
    pub fn ended(&self, time: Duration) -> bool {
        self.until(time, |_| false);
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).eof
    }
}

/// A program that runs. It is killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    /// What it has written to standard output.
    pub stdout: Stream,
    /// What it has written to standard error.
    pub stderr: Stream,
    held: Option<ChildStdin>,
    label: String,
    started: Instant,
    deadline: Duration,
    log: Option<PathBuf>,
    ended: bool,
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Writes to its standard input.
    #[track_caller]
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let pipe = self.held.as_mut().expect("standard input is held open");
        pipe.write_all(bytes.as_ref())
            .and_then(|()| pipe.flush())
            .unwrap_or_else(|e| panic!("writing to `{}`: {e}", self.label));
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.held = None;
    }

    /// Waits until its standard output holds a text.
    #[track_caller]
    pub fn expect(&self, text: &str) {
        let found = self
            .stdout
            .until(self.left(), |b| processes::contains(b, text.as_bytes()));
        assert!(found, "`{}` did not print {text:?}\n{}", self.label, self.words());
    }

    /// Waits until its standard error holds a text.
    #[track_caller]
    pub fn expect_err(&self, text: &str) {
        let found = self
            .stderr
            .until(self.left(), |b| processes::contains(b, text.as_bytes()));
        assert!(
            found,
            "`{}` did not print {text:?} to standard error\n{}",
            self.label,
            self.words()
        );
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.pid()) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    fn left(&self) -> Duration {
        self.deadline.saturating_sub(self.started.elapsed())
    }

    fn words(&self) -> String {
        let mut text = format!(
            "--- standard output\n{}\n--- standard error\n{}",
            tail(&self.stdout.bytes()),
            tail(&self.stderr.bytes())
        );
        if let Some(log) = &self.log {
            let log = std::fs::read(log).unwrap_or_default();
            text.push_str(&format!("\n--- log\n{}", tail(&log)));
        }
        text
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(mut self) -> Done {
        drop(self.held.take());
        let left = self.left();
        let Some(status) = wait_for(&mut self.child, left) else {
            let words = self.words();
            let label = self.label.clone();
            let deadline = self.deadline.as_secs();
            drop(self);
            panic!("`{label}` hung: killed after {deadline} s\n{words}");
        };
        self.ended = true;
        let took = self.started.elapsed();
        // What outlives the program must not hold its pipes: whoever pipes banger somewhere would wait for the daemon.
        let grace = Duration::from_secs(5);
        let closed = self.stdout.ended(grace) && self.stderr.ended(grace);
        assert!(
            closed,
            "`{}` ended, but something it started still holds its output open\n{}",
            self.label,
            self.words()
        );
        Done {
            status: code_of(status),
            signal: status.signal(),
            stdout: self.stdout.bytes(),
            stderr: self.stderr.bytes(),
            took,
            label: self.label.clone(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if let Some(group) = Pid::from_raw(self.pid()) {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// Waits for a child for some time.
pub(crate) fn wait_for(child: &mut Child, time: Duration) -> Option<ExitStatus> {
    use rustix::event::{PollFd, PollFlags, poll};
    let end = Instant::now() + time;
    let pid = Pid::from_raw(child.id().cast_signed())?;
    // The child is not reaped yet, so the id is still its own.
    let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok();
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        match &fd {
            Some(fd) => {
                let timeout = rustix::event::Timespec::try_from(left).ok();
                let _ = poll(&mut [PollFd::new(fd, PollFlags::IN)], timeout.as_ref());
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn code_of(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// The last lines of something long.
pub(crate) fn tail(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(4000)..]).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

/// How a program ended.
#[derive(Debug, Clone)]
pub struct Done {
    /// Exit status; 128 + n for signal n.
    pub status: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// How long it ran.
    pub took: Duration,
    label: String,
}

impl Done {
    /// Fails unless it ended with this status.
    #[track_caller]
    pub fn code(self, code: i32) -> Self {
        assert_eq!(self.status, code, "status of `{}`\n{}", self.label, self.words());
        self
    }

    /// Fails if it ended with status 0.
    #[track_caller]
    pub fn fails(self) -> Self {
        assert_ne!(self.status, 0, "`{}` was to fail\n{}", self.label, self.words());
        assert!(
            self.signal.is_none(),
            "`{}` was ended by signal {:?}\n{}",
            self.label,
            self.signal,
            self.words()
        );
        self
    }

    /// Standard output as text.
    #[track_caller]
    pub fn out(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap_or_else(|_| panic!("`{}` printed what is not UTF-8", self.label))
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|e| panic!("`{}` printed no JSON: {e}\n{}", self.label, self.words()))
    }

    /// Fails unless standard output is exactly this.
    #[track_caller]
    pub fn prints(self, text: &str) -> Self {
        assert_eq!(
            self.out(),
            text,
            "standard output of `{}`\n{}",
            self.label,
            self.words()
        );
        self
    }

    /// Fails unless standard error holds each of these, letter case aside.
    #[track_caller]
    pub fn says(self, parts: &[&str]) -> Self {
        let err = self.err().to_lowercase();
        for part in parts {
            assert!(
                err.contains(&part.to_lowercase()),
                "`{}` does not say {part:?}\n{}",
                self.label,
                self.words()
            );
        }
        self
    }

    /// Fails if standard error holds this.
    #[track_caller]
    pub fn says_not(self, part: &str) -> Self {
        assert!(
            !self.err().contains(part),
            "`{}` says {part:?}\n{}",
            self.label,
            self.words()
        );
        self
    }

    fn words(&self) -> String {
        format!(
            "--- standard output\n{}\n--- standard error\n{}",
            tail(&self.stdout),
            tail(&self.stderr)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Cmd {
        Cmd::new("sh").args(["-c", script])
    }

    #[test]
    fn status_and_streams_are_kept_apart() {
        let done = sh("cat; echo e >&2; exit 3")
            .stdin("in")
            .run()
            .code(3)
            .prints("in")
            .says(&["E"]);
        assert_eq!(done.err(), "e\n");
        assert_eq!(sh("kill -9 $$").run().status, 137);
    }

    #[test]
    fn much_input_and_output_do_not_block_each_other() {
        let bytes = vec![7; 4 << 20];
        assert_eq!(sh("cat").stdin(bytes.clone()).ok().stdout, bytes);
    }

    #[test]
    fn what_hangs_is_killed_and_named() {
        let cmd = sh("echo begun; sleep 60").deadline(1);
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| cmd.run())).unwrap_err();
        let message = panic.downcast_ref::<String>().unwrap();
        assert!(
            message.contains("sleep 60") && message.contains("hung") && message.contains("begun"),
            "{message}"
        );
    }

    #[test]
    fn held_input_makes_a_conversation() {
        let mut running = sh("while read line; do echo got $line; done; echo end")
            .stdin_held()
            .spawn();
        running.write("a\n");
        running.expect("got a");
        running.write("b\n");
        running.expect("got b");
        running.close_stdin();
        assert!(running.wait().code(0).out().ends_with("end\n"));
    }
}
