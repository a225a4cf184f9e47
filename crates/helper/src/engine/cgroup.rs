//! What an engine may use: the limits, and how they are set where no systemd runs.

use std::path::{Path, PathBuf};

use banger_system::id::MachineId;

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

impl Limits {
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
        look(
            base.join(tree).join(banger_system::names::SLICE),
            banger_system::names::of_scope,
        );
    }
    for tree in ["", "memory", "pids", "cpu"] {
        look(base.join(tree).join(PARENT), |name| MachineId::parse(name).ok());
    }
    found
}

/// The processes in a machine's control groups.
pub(super) fn processes(ctx: &Ctx, machine: &MachineId) -> Vec<u32> {
    let own = all(ctx).into_iter().filter(|(_, whose)| whose == machine);
    own.flat_map(|(dir, _)| {
        let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<u32>>()
    })
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
        assert!(processes(&ctx, &id).is_empty());
        let scope = base.join("banger.slice/banger-machine-00112233aabbccdd.scope");
        std::fs::write(scope.join("cgroup.procs"), "7\n8\n").unwrap();
        assert_eq!(processes(&ctx, &id), [7, 8]);
        assert!(processes(&ctx, &MachineId::parse("ffeeddccbbaa9988").unwrap()).is_empty());
    }
}
