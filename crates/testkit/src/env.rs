//! A hermetic environment: directories of its own, the real programs in them, and a check that nothing is left.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::command::{Cmd, Done, tail};
use crate::processes::{self, Process};
use crate::terminal::Terminal;
use crate::{base, binaries, http};

/// Variables that a program under test gets from outside.
const INHERITED: [&str; 1] = ["PATH"];

/// Sizes of machines in tests, small, and the image that starts fastest.
pub const CONFIG: &str =
    "default_image_name = \"debian-slim\"\n\n[vm_defaults]\nvcpu = 1\nmemory_mib = 512\ndisk_size = \"4G\"\n";

/// Directories of one test, in which the real programs run.
///
/// When it is dropped, machines are deleted, the daemon is stopped, and what is left of either makes the test fail.
#[derive(Debug)]
pub struct TestEnv {
    /// Everything but the sockets: below the target directory, so that images can be hard links.
    root: PathBuf,
    /// Sockets: a short path, since a socket's address holds 107 bytes.
    runtime: PathBuf,
    /// It is torn down by hand.
    closed: bool,
    /// Processes and files may stay: the environment outlives this value.
    keep: bool,
}

impl TestEnv {
    /// An environment without images.
    pub fn bare(name: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        sweep();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let root = environments().join(format!("{name}-{pid}-{number}"));
        let runtime = PathBuf::from(format!("/tmp/bt{pid}-{number}"));
        let env = Self::at(root, runtime);
        env.config(CONFIG);
        env
    }

    /// An environment with a kernel and the default images.
    pub fn new(name: &str) -> Self {
        let env = Self::bare(name);
        let base = base::get().unwrap_or_else(|e| panic!("{e}"));
        base.share_with(&env);
        env
    }

    /// An environment at given places.
    pub(crate) fn at(root: PathBuf, runtime: PathBuf) -> Self {
        use std::os::unix::fs::DirBuilderExt;
        for dir in ["home", "state", "config", "cache", "work"] {
            std::fs::create_dir_all(root.join(dir)).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        }
        let mut private = std::fs::DirBuilder::new();
        private
            .recursive(true)
            .mode(0o700)
            .create(&runtime)
            .unwrap_or_else(|e| panic!("{}: {e}", runtime.display()));
        Self {
            root,
            runtime,
            closed: false,
            keep: false,
        }
    }

    /// Leaves everything as it is when this is dropped.
    pub(crate) fn keep(mut self) -> Self {
        self.keep = true;
        self
    }

    /// The user's home.
    pub fn home(&self) -> PathBuf {
        self.root.join("home")
    }

    /// The daemon's state directory.
    pub fn state(&self) -> PathBuf {
        self.root.join("state/banger")
    }

    /// The daemon's runtime directory.
    pub fn runtime(&self) -> PathBuf {
        self.runtime.join("banger")
    }

    /// The API socket.
    pub fn socket(&self) -> PathBuf {
        self.runtime().join("bangerd.sock")
    }

    /// A directory for the test's own files.
    pub fn work(&self) -> PathBuf {
        self.root.join("work")
    }

    /// The directory that holds everything but sockets.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the configuration is read from.
    pub fn config_file(&self) -> PathBuf {
        self.root.join("config/banger/config.toml")
    }

    /// Writes the configuration.
    pub fn config(&self, text: &str) {
        let file = self.config_file();
        std::fs::create_dir_all(file.parent().expect("the file is in a directory"))
            .expect("the configuration's directory");
        std::fs::write(&file, text).expect("the configuration");
    }

    /// The daemon's log so far.
    pub fn daemon_log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_file()).unwrap_or_default()).into_owned()
    }

    fn log_file(&self) -> PathBuf {
        self.state().join("daemon.log")
    }

    /// Variables that make a program live in this environment.
    pub fn variables(&self) -> Vec<(String, String)> {
        let below = |dir: &str| self.root.join(dir).display().to_string();
        let mut variables: Vec<(String, String)> = INHERITED
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?)))
            .collect();
        variables.extend(
            [
                ("HOME", below("home")),
                ("XDG_STATE_HOME", below("state")),
                ("XDG_CONFIG_HOME", below("config")),
                ("XDG_CACHE_HOME", below("cache")),
                ("XDG_RUNTIME_DIR", self.runtime.display().to_string()),
                // Whatever is installed on this host is none of a test's.
                ("BANGER_MODE", "user".to_owned()),
                ("GIT_CONFIG_NOSYSTEM", "1".to_owned()),
                // The project's own repository is above.
                ("GIT_CEILING_DIRECTORIES", self.root.display().to_string()),
                ("LANG", "C.UTF-8".to_owned()),
                ("TERM", "xterm".to_owned()),
                ("TMPDIR", below("work")),
            ]
            .map(|(k, v)| (k.to_owned(), v)),
        );
        variables
    }

    /// Any program in this environment.
    pub fn program(&self, program: impl AsRef<Path>) -> Cmd {
        let cmd = Cmd::new(program.as_ref())
            .env_clear()
            .cwd(self.work())
            .log(self.log_file());
        self.variables().into_iter().fold(cmd, |cmd, (k, v)| cmd.env(k, v))
    }

    /// `banger` with arguments.
    pub fn banger<A: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Cmd {
        self.program(binaries::program("banger")).args(args)
    }

    /// Runs `banger` with the words of a line (no quoting).
    #[track_caller]
    pub fn run(&self, line: &str) -> Done {
        self.banger(line.split_whitespace()).run()
    }

    /// Runs `banger` with the words of a line; it has to succeed.
    #[track_caller]
    pub fn ok(&self, line: &str) -> Done {
        self.run(line).code(0)
    }

    /// Runs a script in a machine; returns how it ended.
    #[track_caller]
    pub fn sh(&self, machine: &str, script: &str) -> Done {
        self.banger(["vm", "exec", machine, "--", "sh", "-c", script]).run()
    }

    /// `banger` on a terminal of 24 by 80.
    #[track_caller]
    pub fn terminal<A: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Terminal {
        Terminal::start(&binaries::program("banger"), 24, 80, |c| {
            self.prepare(c);
            c.args(args);
        })
    }

    /// Gives a command this environment.
    pub fn prepare(&self, command: &mut Command) {
        command.env_clear().envs(self.variables()).current_dir(self.work());
    }

    /// What `banger` prints as JSON.
    #[track_caller]
    pub fn json(&self, line: &str) -> Value {
        self.ok(&format!("{line} --format json")).json()
    }

    /// A machine as `vm show` has it.
    #[track_caller]
    pub fn machine(&self, name: &str) -> Value {
        self.api("GET", &format!("/v1/machines/{name}"), None)
    }

    /// State of a machine, in a word.
    #[track_caller]
    pub fn machine_state(&self, name: &str) -> String {
        self.machine(name)["state"].as_str().unwrap_or_default().to_owned()
    }

    /// Names of all machines.
    #[track_caller]
    pub fn machine_names(&self) -> Vec<String> {
        let answer = self.api("GET", "/v1/machines", None);
        let machines = answer["machines"].as_array().expect("a list of machines");
        machines
            .iter()
            .map(|m| m["name"].as_str().unwrap_or_default().to_owned())
            .collect()
    }

    /// A request to the daemon's API that has to succeed. The daemon is started when it is not there.
    #[track_caller]
    pub fn api(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let send = || http::request(&self.socket(), method, path, body);
        let answer = send().or_else(|_| {
            self.run("daemon start").code(0);
            send()
        });
        let answer = answer.unwrap_or_else(|e| panic!("{method} {path}: {e}"));
        assert!(
            answer.status < 300,
            "{method} {path}: status {}: {}",
            answer.status,
            String::from_utf8_lossy(&answer.body)
        );
        answer.json()
    }

    /// The boot id of a guest, read inside it.
    #[track_caller]
    pub fn boot_id(&self, machine: &str) -> String {
        self.ok(&format!("vm exec {machine} -- cat /proc/sys/kernel/random/boot_id"))
            .out()
            .trim()
            .to_owned()
    }

    /// The engine process of a running machine.
    #[track_caller]
    pub fn engine(&self, machine: &str) -> Process {
        let pid = self.machine(machine)["pid"]
            .as_i64()
            .unwrap_or_else(|| panic!("machine {machine} has no engine"));
        let pid = i32::try_from(pid).expect("a process id");
        processes::read(pid).unwrap_or_else(|| panic!("the engine {pid} of machine {machine} does not run"))
    }

    /// The daemon's process, found without asking it.
    pub fn daemon(&self) -> Option<Process> {
        self.processes().into_iter().find(|p| p.name == "bangerd")
    }

    /// Ends the daemon without any chance to clean up.
    #[track_caller]
    pub fn kill_daemon(&self) {
        let daemon = self.daemon().expect("a daemon runs");
        processes::kill(&daemon);
    }

    /// The engines that run in this environment, of whatever machine.
    pub fn engines(&self) -> Vec<Process> {
        self.processes()
            .into_iter()
            .filter(|p| p.program.starts_with("qemu-system"))
            .collect()
    }

    /// What keeps machines going: engines and the shims beside them.
    pub fn machinery(&self) -> Vec<Process> {
        let machinery = |p: &Process| p.program.starts_with("qemu-system") || p.program == "banger-shim";
        self.processes().into_iter().filter(machinery).collect()
    }

    /// Everything that runs in this environment.
    pub fn processes(&self) -> Vec<Process> {
        processes::naming(&[&self.root, &self.runtime])
    }

    /// Ends this environment and fails when anything is left of it. Dropping does the same.
    pub fn close(mut self) {
        self.closed = true;
        let left = self.tear_down();
        self.remove();
        assert!(left.is_empty(), "left behind by this test:\n{}", left.join("\n"));
    }

    /// Ends an environment that is never dropped because many tests share it; says what should be gone and is not.
    pub fn finish(&self) -> Vec<String> {
        let left = self.tear_down();
        self.remove();
        left
    }

    /// Deletes machines, stops the daemon, and says what should be gone and is not.
    fn tear_down(&self) -> Vec<String> {
        let mut left = Vec::new();
        let machines = [self.state().join("machines"), self.runtime().join("m")];
        // Without a daemon a machine may be running all the same, and the next daemon must find it: `vm list` starts one.
        if self.daemon().is_some() || machines.iter().any(|d| has_entries(d)) {
            left.extend(self.delete_machines());
            left.extend(
                machines
                    .iter()
                    .filter(|d| has_entries(d))
                    .map(|d| format!("files of machines in {}", d.display())),
            );
        }
        if self.daemon().is_some() {
            let done = self.run("daemon stop");
            if done.status != 0 {
                left.push(format!("a daemon that does not stop: {}", done.err()));
            }
        }
        // A process that has been told to end needs a moment.
        if !processes::reached(Duration::from_secs(5), || self.processes().is_empty()) {
            left.extend(
                self.processes()
                    .iter()
                    .map(|p| format!("process {} ({}): {}", p.pid, p.name, p.command)),
            );
        }
        left
    }

    /// Deletes all machines; says why that did not work.
    fn delete_machines(&self) -> Option<String> {
        let mut reason = None;
        // A machine may be about to go by itself, and be gone between list and delete.
        for _ in 0..3 {
            let list = self.run("vm list --quiet");
            if list.status != 0 {
                return Some(format!("a daemon that lists no machines: {}", list.err()));
            }
            let ids = String::from_utf8_lossy(&list.stdout).into_owned();
            if ids.trim().is_empty() {
                return None;
            }
            let done = self
                .banger(["vm", "delete", "--force"])
                .args(ids.split_whitespace())
                .run();
            reason = (done.status != 0).then(|| format!("machines that could not be deleted: {}", done.err()));
        }
        reason
    }

    /// Ends every process, machines first or not, and removes the directories.
    fn remove(&self) {
        for _ in 0..3 {
            for process in self.processes() {
                processes::signal(&process, Signal::KILL);
            }
            if processes::reached(Duration::from_secs(2), || self.processes().is_empty()) {
                break;
            }
        }
        if std::env::var_os("BANGER_TEST_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.root);
            let _ = std::fs::remove_dir_all(&self.runtime);
        }
    }
}

impl Drop for TestEnv {
    fn drop(&mut self) {
        if self.closed || self.keep {
            return;
        }
        if std::thread::panicking() {
            let log = tail(self.daemon_log().as_bytes());
            eprintln!("--- end of the daemon's log in {}\n{log}", self.state().display());
            self.remove();
            return;
        }
        let left = self.tear_down();
        let log = tail(self.daemon_log().as_bytes());
        self.remove();
        assert!(
            left.is_empty(),
            "left behind by this test:\n{}\n--- end of the daemon's log\n{log}",
            left.join("\n")
        );
    }
}

fn has_entries(dir: &Path) -> bool {
    std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}

/// Directory of the environments of all tests.
fn environments() -> PathBuf {
    binaries::target().join("tests/env")
}

/// Clears, once per process, what a test run that was killed has left: the environments whose test process is gone.
fn sweep() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let Ok(entries) = std::fs::read_dir(environments()) else {
            return;
        };
        for root in entries.flatten().map(|e| e.path()) {
            let name = root.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let mut parts = name.rsplit('-');
            let (Some(number), Some(pid)) = (parts.next(), parts.next()) else {
                continue;
            };
            let (Ok(_), Ok(owner)) = (number.parse::<u32>(), pid.parse::<i32>()) else {
                continue;
            };
            if processes::read(owner).is_none() {
                let runtime = PathBuf::from(format!("/tmp/bt{pid}-{number}"));
                let stale = TestEnv {
                    root,
                    runtime,
                    closed: true,
                    keep: true,
                };
                stale.remove();
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_behind_fails_the_test_and_is_killed() {
        let env = TestEnv::bare("leak");
        let root = env.root().to_owned();
        let mut sleeper = Command::new("sleep")
            .arg("60")
            .env("HOLDS", env.root())
            .spawn()
            .unwrap();
        let pid = sleeper.id().cast_signed();
        processes::until("the sleeper", Duration::from_secs(5), || {
            env.processes().iter().any(|p| p.name == "sleep")
        });
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(env))).unwrap_err();
        let message = panic.downcast_ref::<String>().unwrap();
        assert!(message.contains(&format!("process {pid} (sleep)")), "{message}");
        sleeper.wait().unwrap();
        assert!(!root.exists());
    }

    #[test]
    fn nothing_of_the_user_gets_in() {
        let env = TestEnv::bare("hermetic");
        let done = env.program("/usr/bin/env").ok();
        for line in done.out().lines() {
            let (key, value) = line.split_once('=').unwrap();
            let own = value.contains(&*env.root().to_string_lossy()) || value.starts_with("/tmp/bt");
            assert!(
                own || ["PATH", "LANG", "TERM", "GIT_CONFIG_NOSYSTEM", "BANGER_MODE"].contains(&key),
                "{line}"
            );
        }
        env.close();
    }
}
