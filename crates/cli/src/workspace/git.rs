//! Calling git in a repository that nobody vouches for: nothing in its configuration may run a program.
//!
//! What could: the file system monitor, hooks, filters of attributes (when git compares contents), transports (when it fetches
//! what a partial clone lacks), the command for alternates' references. All are switched off by settings that win over
//! the repository's; commands that would show differences or check files out are not used at all.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::error::{Error, Kind, Result, reason};

/// Settings that win over those of the repository.
const SETTINGS: &[(&str, &str)] = &[
    ("core.fsmonitor", "false"),
    ("core.hooksPath", "/dev/null"),
    ("core.untrackedCache", "false"),
    ("core.alternateRefsCommand", "false"),
    ("core.sshCommand", "false"),
    ("core.gitProxy", "false"),
    ("core.askPass", "false"),
    ("core.editor", "false"),
    ("core.pager", "cat"),
    ("core.quotePath", "false"),
    ("credential.helper", ""),
    ("protocol.allow", "never"),
    ("maintenance.auto", "false"),
    ("gc.auto", "0"),
    ("pack.compression", "1"),
    ("pack.threads", "2"),
];

/// Variables of git that say where its configuration is; everything else that begins with `GIT_` points at some repository or
/// runs something.
const KEPT: &[&str] = &[
    "GIT_CONFIG_GLOBAL",
    "GIT_CONFIG_SYSTEM",
    "GIT_CONFIG_NOSYSTEM",
    "GIT_CEILING_DIRECTORIES",
];

/// A directory to call git in.
#[derive(Debug, Clone)]
pub(crate) struct Git {
    dir: PathBuf,
    extra: Vec<(String, String)>,
}

/// What a call came to.
pub(crate) struct Output {
    /// It succeeded.
    pub(crate) success: bool,
    /// What it wrote.
    pub(crate) stdout: Vec<u8>,
    /// What it complained about.
    pub(crate) stderr: String,
}

impl Git {
    /// In this directory.
    pub(crate) fn at(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            extra: Vec::new(),
        }
    }

    /// Switches off these filters of attributes, given the names of all that are configured.
    pub(crate) fn without_filters(mut self, names: impl IntoIterator<Item = String>) -> Self {
        for name in names {
            for (part, value) in [("clean", ""), ("smudge", ""), ("process", ""), ("required", "false")] {
                self.extra.push((format!("filter.{name}.{part}"), value.to_owned()));
            }
        }
        self
    }

    /// A command that can't be led astray.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new("git");
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"GIT_") && !KEPT.iter().any(|kept| name == *kept) {
                command.env_remove(name);
            }
        }
        let settings = SETTINGS
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .chain(self.extra.iter().cloned());
        let mut count = 0;
        for (key, value) in settings {
            command
                .env(format!("GIT_CONFIG_KEY_{count}"), key)
                .env(format!("GIT_CONFIG_VALUE_{count}"), value);
            count += 1;
        }
        command
            .env("GIT_CONFIG_COUNT", count.to_string())
            .env("GIT_ALLOW_PROTOCOL", "none")
            .env("GIT_NO_LAZY_FETCH", "1")
            .env("GIT_NO_REPLACE_OBJECTS", "1")
            .env("GIT_OPTIONAL_LOCKS", "0")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("LC_ALL", "C")
            .arg("-C")
            .arg(&self.dir)
            .arg("--no-pager")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs git to its end.
    pub(crate) fn call<A: AsRef<OsStr>>(&self, arguments: &[A], input: &[u8]) -> Result<Output> {
        let mut command = self.command();
        command.args(arguments);
        if !input.is_empty() {
            command.stdin(Stdio::piped());
        }
        let mut child = spawn(&mut command)?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (stdout, stderr) = std::thread::scope(|scope| {
            if let Some(mut stdin) = stdin {
                // Git may end before it has read everything.
                scope.spawn(move || drop(stdin.write_all(input)));
            }
            let stderr = scope.spawn(move || words(stderr));
            let mut bytes = Vec::new();
            let read = stdout.map_or(Ok(0), |mut s| s.read_to_end(&mut bytes)).map(|_| bytes);
            (read, stderr.join().unwrap_or_default())
        });
        let stdout = stdout.map_err(|e| Error::failed(format!("cannot read from git: {}", reason(&e))))?;
        let status = wait(&mut child)?;
        Ok(Output {
            success: status,
            stdout,
            stderr,
        })
    }

    /// Runs git, which has to succeed.
    pub(crate) fn output<A: AsRef<OsStr>>(&self, arguments: &[A], input: &[u8]) -> Result<Vec<u8>> {
        let output = self.call(arguments, input)?;
        if output.success {
            Ok(output.stdout)
        } else {
            Err(self.failed(arguments, &output.stderr))
        }
    }

    /// One line of output, nothing when git says no.
    pub(crate) fn line<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<Option<String>> {
        let output = self.call(arguments, b"")?;
        let line = String::from_utf8_lossy(&output.stdout)
            .trim_end_matches('\n')
            .to_owned();
        Ok((output.success && !line.is_empty()).then_some(line))
    }

    /// The error of a failed call.
    pub(crate) fn failed<A: AsRef<OsStr>>(&self, arguments: &[A], stderr: &str) -> Error {
        let verb = arguments
            .first()
            .map(|a| a.as_ref().display().to_string())
            .unwrap_or_default();
        let lines: Vec<String> = stderr.lines().take(10).map(str::to_owned).collect();
        let error = Error::failed(format!("git {verb} failed in {}", self.dir.display())).details(lines);
        if stderr.contains("dubious ownership") {
            return error.hint("the repository belongs to another user; see safe.directory in git-config(1)");
        }
        error
    }
}

/// Starts git.
pub(crate) fn spawn(command: &mut Command) -> Result<Child> {
    command
        .spawn()
        .map_err(|e| Error::new(Kind::Unsupported, format!("cannot run git: {}", reason(&e))).hint("install git"))
}

/// Waits for git and says whether it succeeded.
pub(crate) fn wait(child: &mut Child) -> Result<bool> {
    child
        .wait()
        .map(|s| s.success())
        .map_err(|e| Error::failed(format!("cannot wait for git: {}", reason(&e))))
}

/// The beginning of what a program complains about; the rest is read and dropped.
pub(crate) fn words(stderr: Option<impl Read>) -> String {
    let Some(mut stderr) = stderr else { return String::new() };
    let mut words = Vec::new();
    let _ = (&mut stderr).take(16 * 1024).read_to_end(&mut words);
    let _ = std::io::copy(&mut stderr, &mut std::io::sink());
    String::from_utf8_lossy(&words).into_owned()
}
