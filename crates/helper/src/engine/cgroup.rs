//! What an engine may use: the limits, and how they are set where no systemd runs.

use std::path::{Path, PathBuf};

use banger_system::id::MachineId;
use banger_system::names;

use super::find::{Facts, is_jail_user};
use crate::ctx::Ctx;

/// Control group above those of the machines, where there is no systemd.
pub(super) const PARENT: &str = "banger";

/// What a machine's processes may use together. Generous: they are there for the host's sake, and an engine that runs into one is a
/// machine that is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// Bytes of memory that cannot be given back.
    pub(super) memory: u64,
    /// Threads.
    pub(super) tasks: u64,
    /// Share of the processors when they are wanted by many; 100 is the usual one.
    pub(super) weight: u64,
}

const MIB: u64 = 1 << 20;

/// Which of a machine's scopes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The engine's.
    Engine,
    /// That of the shim, which keeps the engine's console and writes down its end.
    Shim,
}

impl Kind {
    /// Its unit.
    pub(super) fn unit(self, machine: &MachineId) -> String {
        match self {
            Self::Engine => names::scope(machine),
            Self::Shim => names::shim_scope(machine),
        }
    }
}

impl Limits {
    /// Of a shim: it takes some MiB, and has a few threads.
    pub(super) const SHIM: Self = Self {
        memory: 64 * MIB,
        tasks: 16,
        weight: 100,
    };

    /// Of Firecracker in a jail: it needs little beside its guest.
    pub(super) fn jailed(vcpu: u32, memory_mib: u64) -> Self {
        Self {
            memory: memory_mib
                .saturating_add(memory_mib / 8)
                .saturating_add(512)
                .saturating_mul(MIB),
            tasks: 64 + u64::from(vcpu),
            weight: (100 * u64::from(vcpu)).clamp(100, 10_000),
        }
    }

    /// Of another engine. Emulation keeps translated code, and work is done by many threads.
    pub(super) fn owners(memory_mib: u64) -> Self {
        Self {
            memory: memory_mib
                .saturating_add(memory_mib / 4)
                .saturating_add(2048)
                .saturating_mul(MIB),
            tasks: 1024,
            weight: 100,
        }
    }
}

/// Where control groups are.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Tree {
    /// One for all controllers.
    Unified(PathBuf),
    /// One for each controller.
    Split(PathBuf),
}

const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

fn tree(sys: &Path) -> Option<Tree> {
    let base = sys.join("fs/cgroup");
    if let Ok(controllers) = std::fs::read_to_string(base.join("cgroup.controllers")) {
        let there: Vec<&str> = controllers.split_whitespace().collect();
        return CONTROLLERS
            .iter()
            .all(|c| there.contains(c))
            .then_some(Tree::Unified(base));
    }
    CONTROLLERS
        .iter()
        .all(|c| base.join(c).is_dir())
        .then_some(Tree::Split(base))
}

/// Arguments of the jailer that have it make the machine's control group; none where there is nothing to make it of.
pub(super) fn arguments(ctx: &Ctx, limits: Limits) -> Vec<String> {
    let (version, settings) = match tree(&ctx.sys) {
        None => return Vec::new(),
        Some(Tree::Unified(_)) => (
            "2",
            [
                format!("memory.max={}", limits.memory),
                format!("pids.max={}", limits.tasks),
                format!("cpu.weight={}", limits.weight),
            ],
        ),
        Some(Tree::Split(_)) => (
            "1",
            [
                format!("memory.limit_in_bytes={}", limits.memory),
                format!("pids.max={}", limits.tasks),
                format!("cpu.shares={}", limits.weight.saturating_mul(1024) / 100),
            ],
        ),
    };
    let mut all = vec![
        "--cgroup-version".into(),
        version.into(),
        "--parent-cgroup".into(),
        PARENT.into(),
    ];
    for setting in settings {
        all.extend(["--cgroup".to_owned(), setting]);
    }
    all
}

/// Directories of a machine's control group, made by the jailer.
fn directories(sys: &Path, machine: &MachineId) -> Vec<PathBuf> {
    let own = |base: PathBuf| base.join(PARENT).join(machine.as_str());
    match tree(sys) {
        None => Vec::new(),
        Some(Tree::Unified(base)) => vec![own(base)],
        Some(Tree::Split(base)) => CONTROLLERS.iter().map(|c| own(base.join(c))).collect(),
    }
}

/// Removes a machine's control group. None there is fine.
pub(super) fn remove(ctx: &Ctx, machine: &MachineId) -> Result<(), String> {
    for dir in directories(&ctx.sys, machine) {
        match std::fs::remove_dir(&dir) {
            Ok(()) => {
                // Where it was the last one.
                if let Some(parent) = dir.parent() {
                    let _ = std::fs::remove_dir(parent);
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(format!("cannot remove the control group {}: {e}", dir.display())),
        }
    }
    Ok(())
}

/// The control groups of machines, with and without systemd.
pub(super) fn all(ctx: &Ctx) -> Vec<(PathBuf, MachineId)> {
    let base = ctx.sys.join("fs/cgroup");
    let mut found = Vec::new();
    let mut look = |dir: PathBuf, id: fn(&str) -> Option<MachineId>| {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let machine = entry.file_name().to_str().and_then(id);
            if let Some(machine) = machine.filter(|_| entry.path().is_dir()) {
                found.push((entry.path(), machine));
            }
        }
    };
    for tree in ["", "unified", "systemd"] {
        look(base.join(tree).join(names::SLICE), names::of_scope);
    }
    for tree in ["", "memory", "pids", "cpu"] {
        look(base.join(tree).join(PARENT), |name| MachineId::parse(name).ok());
    }
    found
}

/// The processes in one of a machine's scopes, or, for its engine, in what there is without systemd.
pub(super) fn processes(ctx: &Ctx, machine: &MachineId, kind: Kind) -> Vec<u32> {
    let dirs: Vec<PathBuf> = match kind {
        Kind::Engine => {
            let own = all(ctx).into_iter().filter(|(_, whose)| whose == machine);
            own.map(|(dir, _)| dir).collect()
        }
        Kind::Shim => {
            let base = ctx.sys.join("fs/cgroup");
            let in_slice = |tree| base.join(tree).join(names::SLICE).join(kind.unit(machine));
            ["", "unified", "systemd"].map(in_slice).into()
        }
    };
    dirs.into_iter()
        .flat_map(|dir| {
            let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<u32>>()
        })
        .collect()
}

/// Processes in a machine's scope that are neither the owner's nor those of a user of jails.
pub(super) fn foreign(ctx: &Ctx, machine: &MachineId) -> Vec<u32> {
    let owner = ctx.record.owner.uid;
    let is_foreign = |pid: &u32| {
        let facts = Facts::read(&ctx.proc, *pid);
        facts.is_some_and(|facts| {
            let user = facts.uids[0];
            facts.uids != [user; 4] || !(user == owner || is_jail_user(user))
        })
    };
    processes(ctx, machine, Kind::Engine)
        .into_iter()
        .filter(is_foreign)
        .collect()
}

/// Moves processes among the processes of their parents, where each of them once began. One that has gone is fine.
pub(super) fn give_back(ctx: &Ctx, pids: &[u32]) -> Result<(), String> {
    for pid in pids {
        let Some(parent) = parent(&ctx.proc, *pid) else {
            continue;
        };
        let groups = std::fs::read_to_string(ctx.proc.join(parent.to_string()).join("cgroup")).unwrap_or_default();
        for dir in paths(&ctx.sys.join("fs/cgroup"), &groups) {
            match std::fs::write(dir.join("cgroup.procs"), pid.to_string()) {
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => break,
                Err(e) => return Err(format!("cannot move process {pid} to {}: {e}", dir.display())),
                Ok(()) => {}
            }
        }
    }
    Ok(())
}

/// The parent of a process.
fn parent(proc: &Path, pid: u32) -> Option<u32> {
    let text = std::fs::read_to_string(proc.join(pid.to_string()).join("stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    // Field 4 of all; the state is field 3.
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// Directories of the control groups that a `/proc/PID/cgroup` names.
fn paths(base: &Path, text: &str) -> Vec<PathBuf> {
    let unified = base.join("cgroup.controllers").is_file();
    text.lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let tree = match controllers {
                "" if unified => base.to_owned(),
                "" => base.join("unified"),
                named => base.join(named.trim_start_matches("name=")),
            };
            Some(tree.join(path.trim_start_matches('/')))
        })
        .filter(|dir| dir.is_dir())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_leave_room() {
        let small = Limits::jailed(1, 128);
        assert_eq!(
            (small.memory, small.tasks, small.weight),
            ((128 + 16 + 512) * MIB, 65, 100)
        );
        assert_eq!(Limits::jailed(4, 1024).weight, 400);
        assert_eq!(
            Limits::jailed(u32::MAX, u64::MAX),
            Limits {
                memory: u64::MAX,
                tasks: 64 + u64::from(u32::MAX),
                weight: 10_000
            }
        );
        assert!(Limits::owners(1024).memory > Limits::jailed(1, 1024).memory);
    }

    #[test]
    fn the_jailer_is_told_what_the_host_has() {
        let dir = tempfile::tempdir().unwrap();
        let id = MachineId::parse("00112233aabbccdd").unwrap();
        let mut ctx = crate::engine::tests::context(dir.path());
        ctx.sys = dir.path().join("sys");
        let base = ctx.sys.join("fs/cgroup");
        let limits = Limits::jailed(2, 256);
        assert!(arguments(&ctx, limits).is_empty());
        for controller in CONTROLLERS {
            std::fs::create_dir_all(base.join(controller).join("banger").join(id.as_str())).unwrap();
        }
        let split = arguments(&ctx, limits);
        assert_eq!(split[..4], ["--cgroup-version", "1", "--parent-cgroup", "banger"]);
        assert!(split.contains(&"cpu.shares=2048".to_owned()));
        assert_eq!(all(&ctx).len(), 3);
        remove(&ctx, &id).unwrap();
        remove(&ctx, &id).unwrap();
        assert!(!base.join("memory/banger").exists() && all(&ctx).is_empty());
        std::fs::write(base.join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        assert!(arguments(&ctx, limits).contains(&format!("memory.max={}", limits.memory)));
        std::fs::write(base.join("cgroup.controllers"), "cpu\n").unwrap();
        assert!(
            arguments(&ctx, limits).is_empty(),
            "a host that does not share them out"
        );
        std::fs::create_dir_all(base.join("banger.slice/banger-machine-00112233aabbccdd.scope")).unwrap();
        assert_eq!(all(&ctx)[0].1, id);
        assert!(processes(&ctx, &id, Kind::Engine).is_empty());
        let scope = base.join("banger.slice/banger-machine-00112233aabbccdd.scope");
        std::fs::write(scope.join("cgroup.procs"), "7\n8\n").unwrap();
        assert_eq!(processes(&ctx, &id, Kind::Engine), [7, 8]);
        assert!(
            processes(&ctx, &id, Kind::Shim).is_empty(),
            "that of the shim is another"
        );
        let other = MachineId::parse("ffeeddccbbaa9988").unwrap();
        assert!(processes(&ctx, &other, Kind::Engine).is_empty());
        let shim = base.join("banger.slice/banger-shim-00112233aabbccdd.scope");
        std::fs::create_dir_all(&shim).unwrap();
        std::fs::write(shim.join("cgroup.procs"), "9\n").unwrap();
        assert_eq!(processes(&ctx, &id, Kind::Shim), [9]);
        assert_eq!(processes(&ctx, &id, Kind::Engine), [7, 8]);
    }

    /// A number that was another's by the time that systemd was told it: that process is moved out, and not ended with the scope.
    #[test]
    fn who_does_not_belong_into_a_scope_goes_back_to_its_parents() {
        let dir = tempfile::tempdir().unwrap();
        let id = MachineId::parse("00112233aabbccdd").unwrap();
        let mut ctx = crate::engine::tests::context(dir.path());
        (ctx.sys, ctx.proc) = (dir.path().join("sys"), dir.path().join("proc"));
        let base = ctx.sys.join("fs/cgroup");
        let scope = base.join("banger.slice").join(names::scope(&id));
        let (session, service) = (
            base.join("user.slice/session-1.scope"),
            base.join("system.slice/x.service"),
        );
        for dir in [&scope, &session, &service] {
            std::fs::create_dir_all(dir).unwrap();
        }
        std::fs::write(base.join("cgroup.controllers"), "memory\n").unwrap();
        std::fs::write(scope.join("cgroup.procs"), "7\n8\n9\n10\n").unwrap();
        let owner = ctx.record.owner.uid;
        let process = |pid: u32, parent: u32, uids: [u32; 4], cgroup: &str| {
            let dir = ctx.proc.join(pid.to_string());
            std::fs::create_dir_all(&dir).unwrap();
            let put = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
            put("comm", "x\n".into());
            put("stat", format!("{pid} (x) S {parent} {}4711 0\n", "1 ".repeat(17)));
            let [a, b, c, d] = uids;
            put("status", format!("Uid:\t{a}\t{b}\t{c}\t{d}\n"));
            put("cgroup", format!("0::{cgroup}\n"));
        };
        let inside = format!("/banger.slice/{}", names::scope(&id));
        process(4, 1, [0; 4], "/user.slice/session-1.scope");
        process(7, 1, [owner; 4], &inside);
        process(8, 1, [banger_system::net::jail_uid(3); 4], &inside);
        process(9, 4, [0; 4], &inside);
        process(10, 4, [owner, 0, 0, 0], &inside);
        assert_eq!(foreign(&ctx, &id), [9, 10], "root's, and one with root's rights");
        give_back(&ctx, &[9]).unwrap();
        assert_eq!(std::fs::read_to_string(session.join("cgroup.procs")).unwrap(), "9");
        give_back(&ctx, &[4711]).unwrap();
        let hybrid = dir.path().join("hybrid");
        std::fs::create_dir_all(hybrid.join("systemd/a")).unwrap();
        std::fs::create_dir_all(hybrid.join("unified/a")).unwrap();
        let text = "5:cpu,cpuacct:/a\n1:name=systemd:/a\n0::/a\nx\n";
        assert_eq!(
            paths(&hybrid, text),
            [hybrid.join("systemd/a"), hybrid.join("unified/a")]
        );
    }
}
