//! How programs are run: with a clean environment, in a process group of their own (a terminal's Ctrl-C is not theirs), with a
//! deadline, with the end of what they say kept for the error, and never outliving the future that waits for them.

use std::any::Any;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use banger_child::End;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

use crate::error::{Error, Result};

/// Lines of standard error that are kept.
const TAIL_LINES: usize = 20;
/// Bytes of one line that are kept.
const LINE_BYTES: usize = 400;
/// How long a program gets to clean up after itself when it is cancelled.
const GRACE: Duration = Duration::from_secs(10);

/// What programs say when there is no room.
const FULL_DISK: &[&str] = &[
    "No space left on device",
    "Disk quota exceeded",
    "You don't have enough free space",
];

/// Variables that are handed on: where programs and the user's files are, and how to reach the network.
const KEPT_ENV: &[&str] = &[
    "HOME",
    "USER",
    "LOGNAME",
    "APT_CONFIG",
    "http_proxy",
    "https_proxy",
    "ftp_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "FTP_PROXY",
    "NO_PROXY",
    "all_proxy",
    "ALL_PROXY",
];

/// Where programs are looked for: the user's path, and the places of system programs that a user's path often lacks.
fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    for dir in [
        "/usr/local/sbin",
        "/usr/local/bin",
        "/usr/sbin",
        "/usr/bin",
        "/sbin",
        "/bin",
    ] {
        if !std::env::split_paths(&path).any(|p| p == Path::new(dir)) {
            if !path.is_empty() {
                path.push(":");
            }
            path.push(dir);
        }
    }
    path
}

/// Finds a program.
pub fn find_program(name: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    std::env::split_paths(&search_path())
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(name))
        .find(|path| {
            path.metadata()
                .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        })
}

/// A program that is needed.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// Its name.
    pub name: &'static str,
    /// Package that holds it on Debian and its derivatives.
    pub package: &'static str,
    /// What it is needed for.
    pub purpose: &'static str,
}

impl Program {
    /// Where it is.
    pub fn find(&self) -> Result<PathBuf> {
        find_program(self.name).ok_or(Error::ProgramMissing {
            program: self.name.to_owned(),
            purpose: self.purpose,
            package: self.package,
        })
    }
}

/// A program to run.
#[derive(Debug)]
pub struct Run {
    shown: String,
    command: Command,
    deadline: Duration,
    held: Held,
}

/// What must not go before the program has ended.
type Held = Vec<Box<dyn Any + Send>>;

impl Run {
    /// A run of `program` that is ended after `deadline`.
    pub fn new(program: Program, deadline: Duration) -> Result<Self> {
        Ok(Self::of(&program.find()?, deadline).shown(program.name))
    }

    /// The same of a program whose path is known.
    pub(crate) fn of(program: &Path, deadline: Duration) -> Self {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", search_path())
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        for name in KEPT_ENV {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        // The group is killed on drop (see `Group`); this is for the moment between fork and the group's guard.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        // It cleans up after itself when the daemon ends without having cancelled it.
        banger_child::bind(command.as_std_mut(), End::Asked);
        Self {
            shown: program.display().to_string(),
            command,
            deadline,
            held: Vec::new(),
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Sets the directory it runs in.
    #[must_use]
    pub fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Drops `what` only when the program has ended, also when it is ended because nobody waits for it any more.
    #[must_use]
    pub fn hold(mut self, what: impl Any + Send) -> Self {
        self.held.push(Box::new(what));
        self
    }

    /// Shows the program with its most telling argument in errors.
    #[must_use]
    pub fn shown(mut self, as_text: impl Into<String>) -> Self {
        self.shown = as_text.into();
        self
    }

    /// Runs it to its end and returns what it wrote to standard output. More than `limit` bytes is a failure.
    pub async fn output(self, limit: usize) -> Result<Vec<u8>> {
        self.output_with(limit, |_| {}).await
    }

    /// As [`Run::output`]; `on_line` sees each line of standard error.
    pub async fn output_with(self, limit: usize, on_line: impl FnMut(&str) + Send) -> Result<Vec<u8>> {
        let shown = self.shown.clone();
        self.run(on_line, async move |stdout: Option<ChildStdout>| {
            let mut out = Vec::new();
            if let Some(stdout) = stdout {
                let cap = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
                stdout
                    .take(cap)
                    .read_to_end(&mut out)
                    .await
                    .map_err(|source| Error::io(format!("read the output of `{shown}`"), source))?;
            }
            if out.len() > limit {
                return Err(Error::io(
                    format!("read the output of `{shown}`"),
                    io::Error::other(format!("it is longer than {limit} bytes")),
                ));
            }
            Ok(out)
        })
        .await
    }

    /// Runs it to its end while `consume` reads its standard output on a thread of its own. When the program fails and its
    /// output only ends too early, the error is the program's.
    pub async fn stream<T: Send + 'static>(
        self,
        on_line: impl FnMut(&str) + Send,
        consume: impl FnOnce(std::fs::File) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let shown = self.shown.clone();
        self.run(on_line, async move |stdout: Option<ChildStdout>| {
            let context = || format!("read the output of `{shown}`");
            let stdout = stdout.ok_or_else(|| Error::io(context(), io::ErrorKind::BrokenPipe.into()))?;
            let file = std::fs::File::from(stdout.into_owned_fd().map_err(|source| Error::io(context(), source))?);
            match tokio::task::spawn_blocking(move || consume(file)).await {
                Ok(result) => result,
                Err(_) => Err(Error::Cancelled),
            }
        })
        .await
    }

    async fn run<T>(
        mut self,
        on_line: impl FnMut(&str) + Send,
        consume: impl AsyncFnOnce(Option<ChildStdout>) -> Result<T>,
    ) -> Result<T> {
        let mut child = self
            .command
            .spawn()
            .map_err(|source| Error::io(format!("start `{}`", self.shown), source))?;
        let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();
        let mut group = Group {
            child: Some(child),
            pid,
            held: std::mem::take(&mut self.held),
        };
        let mut tail = Tail::default();

        let work = async {
            let (result, heard) = tokio::join!(consume(stdout), pump(stderr, &mut tail, on_line));
            (result, heard)
        };
        let outcome = tokio::time::timeout(self.deadline, async {
            // A consumer that gives up closes the pipe; the program then ends by itself or at the deadline.
            let (result, heard) = work.await;
            heard.map_err(|source| Error::io(format!("read the messages of `{}`", self.shown), source))?;
            let status = group
                .wait()
                .await
                .map_err(|source| Error::io(format!("wait for `{}`", self.shown), source))?;
            Ok::<_, Error>((result, status))
        })
        .await;
        match outcome {
            Err(_) => Err(Error::ProgramTimeout {
                program: self.shown,
                after: self.deadline,
                last_words: tail.into_lines(),
            }),
            Ok(Err(error)) => Err(error),
            Ok(Ok((Ok(value), status))) if status.success() => Ok(value),
            Ok(Ok((Err(error), _))) if !error.is_truncated() => Err(error),
            Ok(Ok((Err(error), status))) if status.success() => Err(error),
            Ok(Ok((_, status))) => Err(failed(self.shown, status, tail.into_lines())),
        }
    }
}

/// The error of a program that ended badly. A full disk is recognised by what the program says.
fn failed(program: String, status: ExitStatus, last_words: Vec<String>) -> Error {
    use std::os::unix::process::ExitStatusExt;
    if last_words
        .iter()
        .any(|line| FULL_DISK.iter().any(|words| line.contains(words)))
    {
        return Error::NoSpace {
            what: format!("run `{program}`"),
        };
    }
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown status".to_owned(),
    };
    Error::ProgramFailed {
        program,
        how,
        last_words,
    }
}

/// A process group that ends when it is dropped: asked first, so that it can clean up after itself, then killed.
#[derive(Debug)]
struct Group {
    child: Option<Child>,
    pid: Option<Pid>,
    held: Held,
}

impl Group {
    async fn wait(&mut self) -> io::Result<ExitStatus> {
        match self.child.as_mut() {
            Some(child) => {
                let status = child.wait().await?;
                self.child = None;
                Ok(status)
            }
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let (Some(mut child), Some(pid)) = (self.child.take(), self.pid) else {
            return;
        };
        let held = std::mem::take(&mut self.held);
        // The leader is not reaped yet, so its pid still names this group and no other.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                let _ = kill_process_group(pid, Signal::TERM);
                runtime.spawn(async move {
                    if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
                        let _ = kill_process_group(pid, Signal::KILL);
                        let _ = child.wait().await;
                    }
                    drop(held);
                });
            }
            Err(_) => {
                let _ = kill_process_group(pid, Signal::KILL);
            }
        }
    }
}

/// The last lines heard.
#[derive(Debug, Default)]
struct Tail(VecDeque<String>);

impl Tail {
    fn push(&mut self, line: String) {
        if self.0.len() == TAIL_LINES {
            self.0.pop_front();
        }
        self.0.push_back(line);
    }

    fn into_lines(self) -> Vec<String> {
        self.0.into()
    }
}

/// Reads lines (ended by `\n` or, as progress bars do, `\r`), bounded in length, until the end.
async fn pump(stderr: Option<ChildStderr>, tail: &mut Tail, mut on_line: impl FnMut(&str)) -> io::Result<()> {
    let Some(mut stderr) = stderr else { return Ok(()) };
    let mut splitter = LineSplitter::default();
    let mut buf = vec![0; 8192];
    loop {
        let n = stderr.read(&mut buf).await?;
        let mut emit = |line: String| {
            on_line(&line);
            tail.push(line);
        };
        if n == 0 {
            splitter.finish(&mut emit);
            return Ok(());
        }
        splitter.feed(buf.get(..n).unwrap_or_default(), &mut emit);
    }
}

/// Cuts bytes into lines; what goes beyond the bound of a line is dropped.
#[derive(Debug, Default)]
struct LineSplitter {
    line: Vec<u8>,
}

impl LineSplitter {
    fn feed(&mut self, bytes: &[u8], emit: &mut impl FnMut(String)) {
        for &byte in bytes {
            if byte == b'\n' || byte == b'\r' {
                self.finish(emit);
            } else if self.line.len() < LINE_BYTES {
                self.line.push(byte);
            }
        }
    }

    fn finish(&mut self, emit: &mut impl FnMut(String)) {
        let line = String::from_utf8_lossy(&self.line);
        let line: String = line
            .trim_end()
            .chars()
            .map(|c| if c.is_control() && c != '\t' { '?' } else { c })
            .collect();
        if !line.is_empty() {
            emit(line);
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests;
