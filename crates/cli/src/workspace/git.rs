//! Calling git on a repository that may be hostile.
//!
//! Git never sees the repository's own configuration: it works in a git directory of ours ([`mirror`](super::mirror)), in which
//! every setting is ours, with the user's configuration and the system's switched off. So no key can name a program: no filter,
//! no monitor, no hook, no transport. Only commands that read objects, references and the index are called, none that compares
//! contents or checks out.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use crate::error::{Error, Kind, Result, reason};

/// Variables for every call.
const VARIABLES: &[(&str, &str)] = &[
    ("GIT_ALLOW_PROTOCOL", "none"),
    ("GIT_ATTR_NOSYSTEM", "1"),
    ("GIT_NO_LAZY_FETCH", "1"),
    ("GIT_NO_REPLACE_OBJECTS", "1"),
    ("GIT_OPTIONAL_LOCKS", "0"),
    ("GIT_TERMINAL_PROMPT", "0"),
    ("LC_ALL", "C"),
];

/// The user's environment, as far as git reads it.
#[derive(Debug, Clone)]
pub(crate) struct User {
    variables: Vec<(OsString, OsString)>,
}

impl User {
    /// Of this process.
    pub(crate) fn of_process() -> Self {
        Self {
            variables: std::env::vars_os().collect(),
        }
    }

    /// One with these variables.
    #[cfg(test)]
    pub(crate) fn with(variables: impl IntoIterator<Item = (&'static str, OsString)>) -> Self {
        Self {
            variables: variables
                .into_iter()
                .map(|(name, value)| (name.into(), value))
                .collect(),
        }
    }

    /// A variable.
    pub(crate) fn get(&self, name: &str) -> Option<&OsStr> {
        self.variables.iter().find(|v| v.0 == name).map(|v| v.1.as_os_str())
    }

    /// Directories of `PATH`. One that is relative would be a directory of the repository.
    fn path(&self) -> Vec<PathBuf> {
        std::env::split_paths(self.get("PATH").unwrap_or_default())
            .filter(|dir| dir.is_absolute())
            .collect()
    }
}

/// A git directory of ours. The last copy of this value removes it.
#[derive(Debug, Clone)]
pub(crate) struct Git {
    /// Removed with the last copy.
    _kept: Arc<tempfile::TempDir>,
    home: PathBuf,
    program: PathBuf,
    user: User,
    /// Below the home directory.
    git_dir: PathBuf,
    /// Files of the repository that git reads where they are.
    work_tree: Option<(PathBuf, PathBuf)>,
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
    /// In a new temporary directory, in which a git directory has yet to be made.
    pub(crate) fn new(user: &User) -> Result<Self> {
        let home = tempfile::Builder::new()
            .prefix("banger-workspace-")
            .tempdir()
            .map_err(|e| Error::failed(format!("cannot make a temporary directory: {}", reason(&e))))?;
        let program = user
            .path()
            .into_iter()
            .map(|dir| dir.join("git"))
            .find(|file| file.is_file())
            .ok_or_else(|| {
                Error::new(Kind::Unsupported, "git is not installed, and a workspace needs it")
                    .hint("install git: `apt-get install git`")
            })?;
        let path = home.path();
        let path = path.canonicalize().map_err(|e| Error::io("find", path, e))?;
        let git_dir = path.join(".git");
        Ok(Self {
            _kept: Arc::new(home),
            home: path,
            program,
            user: user.clone(),
            git_dir,
            work_tree: None,
        })
    }

    /// The directory that holds objects, references and configuration.
    pub(crate) fn top(&self) -> PathBuf {
        self.home.join(".git")
    }

    /// With another git directory than [`Self::top`], which is that of a linked work tree.
    pub(crate) fn linked(mut self, git_dir: PathBuf) -> Self {
        self.git_dir = git_dir;
        self
    }

    /// With the files of a work tree and its index.
    pub(crate) fn with_work_tree(mut self, root: &Path, index: &Path) -> Self {
        self.work_tree = Some((root.to_owned(), index.to_owned()));
        self
    }

    /// A command that reads no configuration but ours.
    pub(crate) fn command(&self) -> Command {
        let mut command = self.bare_command();
        command
            .env("HOME", &self.home)
            .env("XDG_CONFIG_HOME", self.home.join("none"))
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_SYSTEM", "/dev/null")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_DIR", &self.git_dir)
            .current_dir(&self.home);
        if let Some((root, index)) = &self.work_tree {
            command
                .env("GIT_WORK_TREE", root)
                .env("GIT_INDEX_FILE", index)
                .current_dir(root);
        }
        command
    }

    /// A command that reads the user's and the system's configuration as well, for `git config` alone. It sees `git_dir` as git's
    /// directory, so that conditions on it hold (`includeIf`), and takes the repository's configuration from ours.
    pub(crate) fn user_command(&self, git_dir: Option<&Path>) -> Command {
        let mut command = self.bare_command();
        for name in ["GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM"] {
            if let Some(value) = self.user.get(name) {
                command.env(name, value);
            }
        }
        command
            .env("GIT_DIR", git_dir.unwrap_or(&self.git_dir))
            .env("GIT_COMMON_DIR", self.top())
            .current_dir(&self.home);
        command
    }

    fn bare_command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env_clear();
        for (name, value) in &self.user.variables {
            if !name.as_encoded_bytes().starts_with(b"GIT_") {
                command.env(name, value);
            }
        }
        if let Ok(path) = std::env::join_paths(self.user.path()) {
            command.env("PATH", path);
        }
        command
            .envs(VARIABLES.iter().copied())
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
        finish(command, input)
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
        let line = output.stdout.strip_suffix(b"\n").unwrap_or(&output.stdout);
        if !output.success || line.is_empty() {
            return Ok(None);
        }
        let line = std::str::from_utf8(line).map_err(|_| {
            let line = String::from_utf8_lossy(line).escape_debug().to_string();
            Error::failed(format!("the name `{line}` is not UTF-8"))
                .hint("give the branch another name: `git branch -m`")
        })?;
        Ok(Some(line.to_owned()))
    }

    /// The error of a failed call.
    pub(crate) fn failed<A: AsRef<OsStr>>(&self, arguments: &[A], stderr: &str) -> Error {
        let verb = arguments
            .first()
            .map(|a| a.as_ref().display().to_string())
            .unwrap_or_default();
        let place = self.work_tree.as_ref().map_or(self.home.as_path(), |w| w.0.as_path());
        let lines: Vec<String> = stderr.lines().take(10).map(str::to_owned).collect();
        Error::failed(format!("git {verb} failed in {}", place.display())).details(lines)
    }
}

/// Runs a command to its end.
pub(crate) fn finish(mut command: Command, input: &[u8]) -> Result<Output> {
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
    let success = wait(&mut child)?;
    Ok(Output {
        success,
        stdout,
        stderr,
    })
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
