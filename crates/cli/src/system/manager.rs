//! systemd and the two services, behind an interface: a test has others.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use banger_system::helper::{Answer, Request};
use banger_system::units::Unit;

use crate::error::{Error, Kind, Result, reason};

/// How long a unit may take to start or stop. A slow machine is no reason to undo an installation.
const UNIT_DEADLINE: Duration = Duration::from_secs(120);
/// How long a service that was started may take until it answers.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// How a unit is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct UnitState {
    /// It runs.
    pub(crate) active: bool,
    /// It is started with the host.
    pub(crate) enabled: bool,
    /// In systemd's words.
    pub(crate) words: String,
    /// Directives that decide whether machines survive, as they are in force.
    pub(crate) in_force: Vec<(String, String)>,
    /// Files that change it.
    pub(crate) drop_ins: Vec<String>,
}

/// What installing needs of systemd and the services.
pub(crate) trait Manager {
    /// How a unit is.
    fn state(&self, unit: Unit) -> Result<UnitState>;
    /// Has systemd read its units again.
    fn reload(&self) -> Result<()>;
    /// Has a unit started with the host.
    fn enable(&self, unit: Unit) -> Result<()>;
    /// The opposite.
    fn disable(&self, unit: Unit) -> Result<()>;
    /// Starts a unit and waits until it says that it is ready.
    fn start(&self, unit: Unit) -> Result<()>;
    /// Stops a unit.
    fn stop(&self, unit: Unit) -> Result<()>;
    /// Stops it and starts it again.
    fn restart(&self, unit: Unit) -> Result<()>;
    /// Forgets that a unit failed.
    fn forget(&self, unit: Unit);
    /// Asks the service of a unit for its version.
    fn version(&self, unit: Unit) -> Result<String, String>;
    /// Asks the helper for something.
    fn helper(&self, request: Request) -> Result<Answer, String>;
    /// The last lines of a unit's log.
    fn log(&self, unit: Unit) -> Vec<String>;

    /// Waits until the service of a unit answers, where there is one.
    fn wait(&self, unit: Unit) -> Result<()> {
        if !matches!(unit, Unit::Helper | Unit::Daemon) {
            return Ok(());
        }
        let deadline = Instant::now() + ANSWER_DEADLINE;
        loop {
            let why = match self.version(unit) {
                Ok(_) => return Ok(()),
                Err(why) => why,
            };
            if Instant::now() >= deadline {
                let message = format!(
                    "waited {} s for {} to answer: {why}",
                    ANSWER_DEADLINE.as_secs(),
                    unit.name()
                );
                return Err(Error::new(Kind::Timeout, message).details(self.log(unit)));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// How the version of the daemon is asked for.
pub(crate) type AskDaemon<'a> = Box<dyn Fn() -> Result<String, String> + 'a>;

/// The systemd of this host.
pub(crate) struct Systemd<'a> {
    /// Directory of `systemctl` and `journalctl`.
    bin: PathBuf,
    /// The helper's socket.
    pub(crate) helper: PathBuf,
    /// Asks the daemon.
    pub(crate) daemon: AskDaemon<'a>,
}

impl std::fmt::Debug for Systemd<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Systemd")
            .field("bin", &self.bin)
            .finish_non_exhaustive()
    }
}

impl<'a> Systemd<'a> {
    /// systemd, with its programs in a directory that only root can change: no variable of the environment says which.
    pub(crate) fn new(helper: PathBuf, daemon: AskDaemon<'a>) -> Self {
        let bin = ["/usr/bin", "/bin", "/run/current-system/sw/bin"]
            .into_iter()
            .find(|dir| Path::new(dir).join("systemctl").is_file())
            .unwrap_or("/usr/bin");
        Self {
            bin: bin.into(),
            helper,
            daemon,
        }
    }

    fn systemctl(&self, arguments: &[&str]) -> Result<String> {
        self.run("systemctl", arguments, UNIT_DEADLINE)
    }

    fn run(&self, program: &str, arguments: &[&str], deadline: Duration) -> Result<String> {
        let shown = format!("{program} {}", arguments.join(" "));
        let failed = |e: std::io::Error| Error::failed(format!("cannot run `{shown}`: {}", reason(&e)));
        let mut child = Command::new(self.bin.join(program))
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        // Both are read to their ends beside each other; the ends come with that of the program.
        let (send, ended) = mpsc::channel();
        let mut readers = Vec::new();
        let pipes: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|p| Box::new(p) as Box<dyn Read + Send>),
            child.stderr.take().map(|p| Box::new(p) as Box<dyn Read + Send>),
        ];
        for pipe in pipes.into_iter().flatten() {
            let send = send.clone();
            readers.push(std::thread::spawn(move || {
                let mut text = Vec::new();
                let _ = pipe.take(1 << 20).read_to_end(&mut text);
                let _ = send.send(());
                String::from_utf8_lossy(&text).into_owned()
            }));
        }
        let until = Instant::now() + deadline;
        for _ in 0..readers.len() {
            if ended
                .recv_timeout(until.saturating_duration_since(Instant::now()))
                .is_err()
            {
                let _ = child.kill();
                let _ = child.wait();
                let message = format!("waited {} s for `{shown}` to end", deadline.as_secs());
                return Err(Error::new(Kind::Timeout, message).hint(BUSY));
            }
        }
        let status = child.wait().map_err(failed)?;
        let mut said = readers.into_iter().map(|r| r.join().unwrap_or_default());
        let (out, err) = (said.next().unwrap_or_default(), said.next().unwrap_or_default());
        if status.success() {
            return Ok(out);
        }
        let lines = err.lines().map(str::to_owned).collect();
        Err(Error::failed(format!("`{shown}` failed")).details(lines))
    }

    /// A verb on a unit that is a service's; its log tells more about a failure than systemctl does.
    fn verb(&self, verb: &str, unit: Unit) -> Result<()> {
        self.systemctl(&[verb, unit.name()]).map(|_| ()).map_err(|mut error| {
            error.details.extend(self.log(unit));
            error
        })
    }
}

/// What to do when systemd does not answer.
const BUSY: &str = "see what systemd is busy with: systemctl list-jobs";

/// Directives that are looked at as they are in force.
const IN_FORCE: [&str; 3] = ["KillMode", "SendSIGKILL", "RuntimeDirectoryPreserve"];

/// Reads what `systemctl show` says.
fn parse_state(text: &str) -> UnitState {
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .unwrap_or_default()
    };
    let active = value("ActiveState");
    let words = match (value("LoadState"), value("SubState")) {
        ("not-found", _) => "not installed".to_owned(),
        (_, "") => active.to_owned(),
        (_, sub) => format!("{active} ({sub})"),
    };
    UnitState {
        active: matches!(active, "active" | "reloading"),
        enabled: value("UnitFileState") == "enabled",
        words,
        in_force: IN_FORCE
            .iter()
            .map(|key| ((*key).to_owned(), value(key).to_owned()))
            .filter(|(_, v)| !v.is_empty())
            .collect(),
        drop_ins: value("DropInPaths").split_whitespace().map(str::to_owned).collect(),
    }
}

impl Manager for Systemd<'_> {
    fn state(&self, unit: Unit) -> Result<UnitState> {
        let keys = format!(
            "LoadState,ActiveState,SubState,UnitFileState,DropInPaths,{}",
            IN_FORCE.join(",")
        );
        let text = self.systemctl(&["show", "--property", &keys, unit.name()])?;
        Ok(parse_state(&text))
    }

    fn reload(&self) -> Result<()> {
        self.systemctl(&["daemon-reload"]).map(|_| ())
    }

    fn enable(&self, unit: Unit) -> Result<()> {
        self.systemctl(&["--quiet", "--no-reload", "enable", unit.name()])
            .map(|_| ())
    }

    fn disable(&self, unit: Unit) -> Result<()> {
        self.systemctl(&["--quiet", "--no-reload", "disable", unit.name()])
            .map(|_| ())
    }

    fn start(&self, unit: Unit) -> Result<()> {
        self.verb("start", unit)
    }

    fn stop(&self, unit: Unit) -> Result<()> {
        match unit {
            // All that are at work.
            Unit::Build => self.systemctl(&["stop", "banger-build@*.service"]).map(|_| ()),
            _ => self.verb("stop", unit),
        }
    }

    fn restart(&self, unit: Unit) -> Result<()> {
        self.verb("restart", unit)
    }

    fn forget(&self, unit: Unit) {
        // It fails where there is nothing to forget.
        let _ = self.systemctl(&["reset-failed", unit.name()]);
    }

    fn version(&self, unit: Unit) -> Result<String, String> {
        match unit {
            Unit::Daemon => (self.daemon)(),
            Unit::Helper => match self.helper(Request::Ping)? {
                Answer::Pong { version, .. } => Ok(version),
                other => Err(format!("it answers a ping with {other:?}")),
            },
            _ => Err(format!("{} is no service", unit.name())),
        }
    }

    fn helper(&self, request: Request) -> Result<Answer, String> {
        super::helper::ask(&self.helper, 0, request)
    }

    fn log(&self, unit: Unit) -> Vec<String> {
        let arguments = [
            "--unit",
            unit.name(),
            "--lines=12",
            "--no-pager",
            "--output=cat",
            "--quiet",
        ];
        let said = self.run("journalctl", &arguments, Duration::from_secs(10));
        said.map(|text| text.lines().map(str::to_owned).collect())
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_read() {
        let state = parse_state(
            "LoadState=loaded\nActiveState=active\nSubState=running\nUnitFileState=enabled\nDropInPaths=/a/x.conf /b/y.conf\n\
             KillMode=process\nSendSIGKILL=no\n",
        );
        assert!(state.active && state.enabled);
        assert_eq!(state.words, "active (running)");
        assert_eq!(state.drop_ins, ["/a/x.conf", "/b/y.conf"]);
        assert_eq!(state.in_force[0], ("KillMode".to_owned(), "process".to_owned()));
        let gone = parse_state("LoadState=not-found\nActiveState=inactive\nSubState=dead\nUnitFileState=\n");
        assert!(!gone.active && !gone.enabled);
        assert_eq!(gone.words, "not installed");
        assert_eq!(parse_state("").words, "");
    }

    #[test]
    fn programs_are_run_with_a_deadline_and_quoted() {
        let systemd = Systemd {
            bin: "/bin".into(),
            helper: "/nonexistent".into(),
            daemon: Box::new(|| Err("none".to_owned())),
        };
        let second = Duration::from_secs(20);
        assert_eq!(systemd.run("echo", &["a", "b"], second).unwrap(), "a b\n");
        let error = systemd.run("sh", &["-c", "echo why >&2; exit 3"], second).unwrap_err();
        assert_eq!(error.details, ["why"]);
        let error = systemd.run("sleep", &["60"], Duration::from_millis(50)).unwrap_err();
        assert!(
            error.kind == Kind::Timeout && error.message.contains("`sleep 60`"),
            "{error}"
        );
        assert!(systemd.run("no-such-program", &[], second).is_err());
        // Nothing of the environment gets through.
        let environment = systemd.run("env", &[], second).unwrap();
        let mut lines: Vec<&str> = environment.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]);
    }
}
