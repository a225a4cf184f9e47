//! `podman run --rm IMAGE true`, of the same root: what a user would start instead of a machine.
//!
//! A shell in namespaces of its own (mounts, network, processes) runs the commands one after the other, so that podman's bridge,
//! its rules, its mounts and whatever it leaves in `/run` are nowhere else and end with the shell. The network is podman's default
//! one. Images stay in `target/bench/podman` from one run to the next.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use banger_testkit::{Running, TestEnv, binaries, need};

/// Programs that have to be there, and the packages they come in.
const PROGRAMS: [(&str, &str); 4] = [
    ("podman", "podman"),
    ("crun", "crun"),
    ("iptables", "iptables"),
    ("ip", "iproute2"),
];
/// How long an import may take.
const IMPORT: Duration = Duration::from_secs(300);
/// How long a container may take.
const RUN: Duration = Duration::from_secs(60);
/// Prepares the namespaces: `/run`, `/dev/shm` and `/var/lib` are podman's to write to. A second hierarchy of control groups
/// beside the first confuses it.
const PREPARE: &str = "umount /sys/fs/cgroup/unified 2>/dev/null; \
    for d in /run /dev/shm /var/lib; do mount -t tmpfs tmpfs $d || exit 1; done; ip link set lo up || exit 1";
/// Limits that any host has, and no control groups, which not every host lets podman have.
const FLAGS: &str = "--rm --ulimit=nofile=1024:1024 --ulimit=nproc=4096:4096 --cgroups=disabled";

/// Why podman is not measured here, if it is not.
pub(super) fn missing() -> Option<String> {
    for (program, package) in PROGRAMS {
        let there = ["/usr/sbin", "/sbin"]
            .iter()
            .any(|dir| Path::new(dir).join(program).is_file());
        if !there && need::which(program).is_none() {
            return Some(format!("{package} is not installed (scripts/setup.sh --bench)"));
        }
    }
    (!rustix::process::getuid().is_root()).then(|| "podman is measured as root only".to_owned())
}

/// The shell that runs podman.
pub(super) struct Podman {
    shell: Running,
    dir: PathBuf,
    errors: PathBuf,
    commands: usize,
}

impl Podman {
    /// Prepares the namespaces.
    pub(super) fn start(env: &TestEnv) -> Result<Self, String> {
        let dir = directory();
        for stale in ["run", "tmp"] {
            let _ = std::fs::remove_dir_all(dir.join(stale));
        }
        std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        let flags = ["-m", "-n", "-p", "-f", "--mount-proc", "--kill-child", "sh"];
        let path = std::env::var("PATH").unwrap_or_default();
        let shell = env
            .program("unshare")
            .args(flags)
            .env("PATH", format!("{path}:/usr/sbin:/sbin"))
            .stdin_held()
            .deadline(24 * 3600)
            .spawn();
        let mut podman = Self {
            shell,
            dir,
            errors: env.work().join("podman.err"),
            commands: 0,
        };
        podman.sh(PREPARE, RUN)?;
        // Containers of a run that was ended in the middle.
        podman.sh(&podman.command("rm -fa"), RUN)?;
        Ok(podman)
    }

    fn command(&self, arguments: &str) -> String {
        let dir = self.dir.display();
        format!(
            "podman --root '{dir}/root' --runroot '{dir}/run' --tmpdir '{dir}/tmp' --runtime crun \
             --cgroup-manager cgroupfs {arguments}"
        )
    }

    /// Runs a command; says how long it took.
    fn sh(&mut self, command: &str, within: Duration) -> Result<Duration, String> {
        self.commands += 1;
        let begun = Instant::now();
        let mark = format!("@{} ", self.commands);
        let errors = self.errors.display();
        self.shell.write(format!(
            "({command}) </dev/null >/dev/null 2>'{errors}'; echo \"{mark}$?\"\n"
        ));
        let mut status = None;
        self.shell.stdout.until(within, |out| {
            let text = String::from_utf8_lossy(out);
            status = text
                .rsplit_once(&mark)
                .and_then(|(_, rest)| rest.strip_suffix('\n')?.parse::<i32>().ok());
            status.is_some()
        });
        let took = begun.elapsed();
        match status {
            Some(0) => Ok(took),
            other => {
                let words = std::fs::read_to_string(&self.errors).unwrap_or_default();
                let words = words.lines().last().unwrap_or("no reason given");
                Err(match other {
                    Some(status) => format!("podman failed with status {status}: {words}"),
                    None => format!("podman did not end within {} s: {words}", within.as_secs()),
                })
            }
        }
    }

    /// Makes an image of a running machine's root, if it is not there from an earlier run. Returns its name.
    pub(super) fn image_of(&mut self, env: &TestEnv, machine: &str) -> Result<String, String> {
        let spec = &env.machine(machine)["spec"];
        let digest = spec["image_digest"].as_str().unwrap_or_default();
        let digest = digest.strip_prefix("sha256:").unwrap_or(digest);
        let name = format!("localhost/bench:{}", digest.get(..16).unwrap_or("unknown"));
        let there = self.sh(&self.command(&format!("image exists {name}")), RUN);
        if there.is_ok() {
            return Ok(name);
        }
        let tar = env.work().join("root.tar");
        let file = File::create(&tar).map_err(|e| format!("{}: {e}", tar.display()))?;
        let done = env
            .banger(["vm", "exec", machine, "--"])
            .args(["tar", "-C", "/", "--one-file-system", "-cf", "-", "."])
            .stdout_file(file)
            .deadline(300)
            .run();
        // Status 1: a file changed while it was read.
        if !(0..=1).contains(&done.status) {
            return Err(format!("no tar of the root: {}", done.err()));
        }
        let import = self.command(&format!("import -q '{}' {name}", tar.display()));
        let imported = self.sh(&import, IMPORT);
        let _ = std::fs::remove_file(&tar);
        imported.map(|_| name)
    }

    /// Starts a container of an image, runs `true` in it and removes it.
    pub(super) fn run(&mut self, image: &str) -> Result<Duration, String> {
        self.sh(&self.command(&format!("run {FLAGS} {image} true")), RUN)
    }
}

fn directory() -> PathBuf {
    binaries::target().join("bench/podman")
}
