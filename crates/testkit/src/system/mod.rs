//! An installation in system mode without systemd: a root directory and a network namespace of its own, the helper as root in it,
//! the daemon as an unprivileged user.
//!
//! ```text
//!   namespace "host": helper, daemon, engines, br-fc ── veth ── namespace "outside": whatever the test puts there
//! ```
//!
//! Nothing of this machine's own network is touched. When it is dropped, machines are deleted, both programs end, and what an audit
//! finds then makes the test fail.

mod base;

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::command::{Cmd, Done, tail};
use crate::env::CONFIG;
use crate::processes::{self, Process};
use crate::{binaries, http};

/// The owner. Nobody's on any host.
const OWNER: u32 = 64_123;
/// The host's address towards what is outside, and the address there.
pub const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// An address outside.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// What the namespace of the host needs: its own view of interfaces, a loopback, and taps that a user may open.
const HOST_SETUP: &str = "mount -t sysfs none /sys && mount -t tmpfs none /dev/net && mknod -m 666 /dev/net/tun c 10 200 \
                          && ip link set lo up && echo ready && exec sleep infinity";
const OUTSIDE_SETUP: &str = "ip link set lo up && echo ready && exec sleep infinity";

/// An installation.
#[derive(Debug)]
pub struct SystemEnv {
    root: PathBuf,
    host: Child,
    outside: Child,
    helper: Mutex<Option<Child>>,
    daemon: Mutex<Option<Child>>,
    closed: bool,
}

impl SystemEnv {
    /// An installation with kernel and default images, helper and daemon running.
    pub fn new(name: &str) -> Self {
        static BASE: OnceLock<Result<(), String>> = OnceLock::new();
        let made = BASE.get_or_init(|| {
            std::panic::catch_unwind(base::make)
                .unwrap_or_else(|_| Err("the base of system mode could not be made".to_owned()))
        });
        if let Err(e) = made {
            panic!("{e}");
        }
        let _ = name;
        let env = Self::bare(next_root());
        base::link_tree(&base::state(), &env.state());
        env.start_helper();
        env.start_daemon();
        env
    }

    fn bare(root: PathBuf) -> Self {
        let _ = std::fs::remove_dir_all(&root);
        for (dir, owner, mode) in [
            ("", 0, 0o755),
            ("etc/banger", 0, 0o755),
            ("run", 0, 0o755),
            ("run/banger", OWNER, 0o700),
            ("run/banger-root", 0, 0o711),
            ("var/lib", 0, 0o755),
            ("var/lib/banger", 0, 0o711),
            ("var/lib/banger/state", OWNER, 0o700),
            ("var/lib/banger/jail", 0, 0o711),
            ("dev/banger", 0, 0o711),
            ("home", OWNER, 0o700),
            ("work", OWNER, 0o755),
        ] {
            make_dir(&root.join(dir), owner, mode);
        }
        let record = format!(
            "version = 1\n[owner]\nuser = \"tester\"\nuid = {OWNER}\ngid = {OWNER}\nhome = \"{}\"\n\
             [installed]\nat = \"2026-11-22T10:00:00Z\"\nversion = \"0\"\ncommit = \"unknown\"\n",
            root.join("home").display()
        );
        write(&root.join("etc/banger/install.toml"), &record);
        write(&root.join("etc/banger/config.toml"), CONFIG);
        // Programs ask who their user is.
        let mut users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        users.push_str(&format!(
            "tester:x:{OWNER}:{OWNER}::{}:/bin/sh\n",
            root.join("home").display()
        ));
        write(&root.join("etc/passwd"), &users);
        let users = root.join("etc/passwd");
        let host = namespace(&format!(
            "mount --bind '{}' /etc/passwd && {HOST_SETUP}",
            users.display()
        ));
        let outside = namespace(OUTSIDE_SETUP);
        let env = Self {
            root,
            host,
            outside,
            helper: Mutex::default(),
            daemon: Mutex::default(),
            closed: false,
        };
        let (peer, far) = (env.outside.id().to_string(), format!("{OUTSIDE}/30"));
        env.root_sh(&format!(
            "ip link add up0 type veth peer name up1 netns {peer} && ip addr add {HOST}/30 dev up0 && ip link set up0 up \
             && ip route add default via {OUTSIDE}"
        ))
        .code(0);
        enter(env.outside.id())
            .args(["sh", "-c", &format!("ip addr add {far} dev up1 && ip link set up1 up")])
            .ok();
        env
    }

    /// The directory that is `/` to this installation.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The daemon's state.
    pub fn state(&self) -> PathBuf {
        self.root.join("var/lib/banger/state")
    }

    /// The API socket.
    pub fn socket(&self) -> PathBuf {
        self.root.join("run/banger/bangerd.sock")
    }

    /// Adds to the configuration; the daemon reads it at its next start.
    pub fn config(&self, more: &str) {
        write(&self.root.join("etc/banger/config.toml"), &format!("{CONFIG}\n{more}"));
    }

    /// The daemon's log so far.
    pub fn daemon_log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.state().join("daemon.log")).unwrap_or_default()).into_owned()
    }

    /// The helper's log so far.
    pub fn helper_log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.root.join("helper.log")).unwrap_or_default()).into_owned()
    }

    /// A command as root in the host's namespace.
    pub fn as_root(&self, words: &[&str]) -> Cmd {
        enter(self.host.id()).args(words)
    }

    /// A script as root in the host's namespace.
    #[track_caller]
    pub fn root_sh(&self, script: &str) -> Done {
        self.as_root(&["sh", "-c", script]).run()
    }

    /// Arguments of `nsenter` that run a program as the owner in the host's namespace.
    fn owner_words(&self) -> Vec<String> {
        let id = OWNER.to_string();
        [
            "setpriv",
            "--reuid",
            &id,
            "--regid",
            &id,
            "--clear-groups",
            "--inh-caps=-all",
            "--no-new-privs",
            "--",
        ]
        .map(str::to_owned)
        .to_vec()
    }

    fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("PATH", std::env::var("PATH").unwrap_or_default()),
            ("HOME", self.root.join("home").display().to_string()),
            ("BANGER_ROOT", self.root.display().to_string()),
            ("LANG", "C.UTF-8".to_owned()),
            ("TERM", "xterm".to_owned()),
            ("XDG_RUNTIME_DIR", self.root.join("home").display().to_string()),
        ]
    }

    /// `banger` as the owner.
    pub fn banger<A: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Cmd {
        let cmd = enter(self.host.id())
            .args(self.owner_words())
            .arg(binaries::program("banger"))
            .args(args)
            .cwd(self.root.join("work"))
            .env_clear();
        self.variables().into_iter().fold(cmd, |cmd, (k, v)| cmd.env(k, v))
    }

    /// Runs `banger` with the words of a line; it has to succeed.
    #[track_caller]
    pub fn ok(&self, line: &str) -> Done {
        self.banger(line.split_whitespace()).deadline(180).run().code(0)
    }

    /// Makes and starts a machine.
    #[track_caller]
    pub fn create(&self, name: &str, more: &[&str]) {
        let words = ["vm", "create", "--name", name, "--image", "debian-slim"];
        self.banger(words.iter().chain(more)).deadline(300).ok();
    }

    /// Runs a script in a machine.
    #[track_caller]
    pub fn sh(&self, machine: &str, script: &str) -> Done {
        self.banger(["vm", "exec", machine, "--", "sh", "-c", script]).run()
    }

    /// Runs a script of bash in a machine.
    #[track_caller]
    pub fn bash(&self, machine: &str, script: &str) -> Done {
        self.banger(["vm", "exec", machine, "--", "bash", "-c", script]).run()
    }

    /// A request to the daemon's API that has to succeed.
    #[track_caller]
    pub fn api(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let answer =
            http::request(&self.socket(), method, path, body).unwrap_or_else(|e| panic!("{method} {path}: {e}"));
        assert!(
            answer.status < 300,
            "{method} {path}: status {}: {}",
            answer.status,
            String::from_utf8_lossy(&answer.body)
        );
        answer.json()
    }

    /// A machine.
    #[track_caller]
    pub fn machine(&self, name: &str) -> Value {
        self.api("GET", &format!("/v1/machines/{name}"), None)
    }

    /// The boot id of a guest, read inside it.
    #[track_caller]
    pub fn boot_id(&self, machine: &str) -> String {
        let done = self.sh(machine, "cat /proc/sys/kernel/random/boot_id").code(0);
        done.out().trim().to_owned()
    }

    /// The engine of a running machine.
    #[track_caller]
    pub fn engine(&self, machine: &str) -> Process {
        let pid = self.machine(machine)["pid"]
            .as_i64()
            .unwrap_or_else(|| panic!("machine {machine} has no engine"));
        let pid = i32::try_from(pid).expect("a process id");
        processes::read(pid).unwrap_or_else(|| panic!("the engine {pid} of machine {machine} does not run"))
    }

    /// Objects of the host that bear the mark of a machine, and what is wrong with each.
    #[track_caller]
    pub fn audit(&self) -> Vec<(String, String, Option<String>)> {
        let audit = self.api("GET", "/v1/audit", None);
        assert_eq!(audit["blind"].as_array().map_or(0, Vec::len), 0, "{audit}");
        let objects = audit["objects"].as_array().expect("objects").iter();
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        objects
            .filter(|o| o["machine"].is_string())
            .map(|o| {
                (
                    text(&o["kind"]),
                    text(&o["name"]),
                    o["orphan"].as_str().map(str::to_owned),
                )
            })
            .collect()
    }

    /// Starts the helper and waits until it listens.
    #[track_caller]
    pub fn start_helper(&self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.root.join("helper.log"))
            .expect("the helper's log");
        let mut command = self.in_host();
        command
            .arg(binaries::program("banger-helper"))
            .arg("--root")
            .arg(&self.root);
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.stdout(Stdio::null()).stderr(log);
        *lock(&self.helper) = Some(command.spawn().expect("the helper"));
        let socket = self.root.join("run/banger-root/bangerd-root.sock");
        processes::until("the helper to listen", Duration::from_secs(10), || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
    }

    /// Starts the daemon and waits until it serves and has looked at its machines.
    #[track_caller]
    pub fn start_daemon(&self) {
        let mut command = self.in_host();
        command
            .args(self.owner_words())
            .arg(binaries::program("bangerd"))
            .arg("--system");
        command.envs(self.variables());
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.root.join("daemon.err"))
            .expect("the daemon's log");
        command.stdout(Stdio::null()).stderr(log);
        *lock(&self.daemon) = Some(command.spawn().expect("the daemon"));
        let served = processes::reached(Duration::from_secs(30), || {
            http::request(&self.socket(), "GET", "/v1/version", None).is_ok_and(|a| a.status == 200)
        });
        let said = std::fs::read_to_string(self.root.join("daemon.err")).unwrap_or_default();
        assert!(
            served,
            "the daemon does not serve: {said}\n{}",
            tail(self.daemon_log().as_bytes())
        );
        // Its machines are looked at then.
        self.api("GET", "/v1/audit", None);
    }

    fn in_host(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.host.id().to_string(), "-n", "-m", "--"]);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.current_dir("/").stdin(Stdio::null()).process_group(0);
        command
    }

    /// Ends the daemon with a signal and waits for its end. Machines run on.
    #[track_caller]
    pub fn end_daemon(&self, signal: Signal) {
        end(&self.daemon, signal);
    }

    /// The same for the helper.
    #[track_caller]
    pub fn end_helper(&self, signal: Signal) {
        end(&self.helper, signal);
    }

    /// Process of the daemon.
    pub fn daemon_pid(&self) -> i32 {
        lock(&self.daemon).as_ref().map_or(0, |c| c.id().cast_signed())
    }

    /// Process of the helper.
    pub fn helper_pid(&self) -> i32 {
        lock(&self.helper).as_ref().map_or(0, |c| c.id().cast_signed())
    }

    /// A socket that listens outside.
    pub fn listen_outside(&self) -> TcpListener {
        let pid = self.outside.id();
        let listening = std::thread::spawn(move || {
            let space = std::fs::File::open(format!("/proc/{pid}/ns/net")).expect("the namespace outside");
            let kind = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&space), kind).expect("to go there");
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket outside")
        });
        listening.join().expect("a socket outside")
    }

    /// Ends the installation and fails when anything is left of its machines.
    #[track_caller]
    pub fn close(mut self) {
        self.closed = true;
        let left = self.tear_down();
        let logs = format!(
            "{}\n--- helper\n{}",
            tail(self.daemon_log().as_bytes()),
            tail(self.helper_log().as_bytes())
        );
        self.remove();
        assert!(
            left.is_empty(),
            "left behind by this test:\n{}\n--- daemon\n{logs}",
            left.join("\n")
        );
    }

    fn tear_down(&self) -> Vec<String> {
        let mut left = Vec::new();
        if lock(&self.helper).is_none() {
            self.start_helper();
        }
        if lock(&self.daemon).is_none() {
            self.start_daemon();
        }
        let machines = self.api("GET", "/v1/machines", None);
        for machine in machines["machines"].as_array().into_iter().flatten() {
            let name = machine["name"].as_str().unwrap_or_default();
            let done = self.banger(["vm", "delete", "--force", name]).run();
            if done.status != 0 {
                left.push(format!("machine {name} could not be deleted: {}", done.err()));
            }
        }
        left.extend(
            self.audit()
                .into_iter()
                .map(|(kind, name, why)| format!("{kind} {name}: {why:?}")),
        );
        left.extend(
            self.engines()
                .iter()
                .map(|p| format!("process {} ({})", p.pid, p.command)),
        );
        self.end_daemon(Signal::TERM);
        self.end_helper(Signal::TERM);
        left
    }

    /// The engines of this installation.
    pub fn engines(&self) -> Vec<Process> {
        let mut all = processes::naming(&[&self.root]);
        all.retain(|p| p.program.starts_with("qemu-system") || p.program == "firecracker");
        all
    }

    fn remove(&mut self) {
        for _ in 0..3 {
            for process in processes::naming(&[&self.root]) {
                processes::signal(&process, Signal::KILL);
            }
            if processes::reached(Duration::from_secs(2), || processes::naming(&[&self.root]).is_empty()) {
                break;
            }
        }
        for child in [&self.helper, &self.daemon] {
            if let Some(mut child) = lock(child).take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        for child in [&mut self.host, &mut self.outside] {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::env::var_os("BANGER_TEST_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.root);
        }
    }
}

impl Drop for SystemEnv {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        if std::thread::panicking() {
            eprintln!("--- end of the daemon's log\n{}", tail(self.daemon_log().as_bytes()));
            eprintln!("--- end of the helper's log\n{}", tail(self.helper_log().as_bytes()));
            self.remove();
            return;
        }
        let left = self.tear_down();
        self.remove();
        assert!(left.is_empty(), "left behind by this test:\n{}", left.join("\n"));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[track_caller]
fn end(child: &Mutex<Option<Child>>, signal: Signal) {
    let Some(mut child) = lock(child).take() else { return };
    if let Some(process) = processes::read(child.id().cast_signed()) {
        processes::signal(&process, signal);
    }
    let ended = processes::reached(Duration::from_secs(15), || matches!(child.try_wait(), Ok(Some(_))));
    if !ended {
        let _ = child.kill();
        let _ = child.wait();
        panic!("a program did not end within 15 s after {signal:?}");
    }
}

/// A process that holds a network and a mount namespace.
fn namespace(setup: &str) -> Child {
    use std::io::BufRead;
    let mut child = Command::new("unshare")
        .args(["-n", "-m", "--propagation", "private", "sh", "-c", setup])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .expect("a network namespace");
    let mut line = String::new();
    let stdout = child.stdout.take().expect("its output");
    let _ = std::io::BufReader::new(stdout).read_line(&mut line);
    assert_eq!(line.trim(), "ready", "the namespace could not be set up");
    child
}

fn enter(pid: u32) -> Cmd {
    Cmd::new("nsenter").args(["-t", &pid.to_string(), "-n", "-m", "--"])
}

fn make_dir(path: &Path, owner: u32, mode: u32) {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("a mode");
    chown(path, Some(owner), Some(owner)).expect("an owner");
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).expect("a mode");
}

fn next_root() -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    roots().join(format!("{}-{number}", std::process::id()))
}

/// Beside the base, so that its files can be links; short, since sockets are below.
fn roots() -> PathBuf {
    let roots = binaries::target().join("tests/s");
    sweep(&roots);
    roots
}

/// Clears, once per process, what a test run that was killed has left.
fn sweep(roots: &Path) {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        for entry in std::fs::read_dir(roots).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|n| n.split('-').next()?.parse().ok());
            if pid.is_none_or(|pid: i32| processes::read(pid).is_none()) {
                for process in processes::naming(&[&entry.path()]) {
                    processes::signal(&process, Signal::KILL);
                }
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
    });
}

impl SystemEnv {
    /// Ends the namespaces and leaves the files.
    fn leave(mut self) {
        self.closed = true;
        for child in [&mut self.host, &mut self.outside] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
