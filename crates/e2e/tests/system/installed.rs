//! An installation for the time of a scenario, and the look at what it leaves.

use std::path::Path;

use banger_testkit::Done;

use crate::lab;

/// What installing and uninstalling touch: files with rights and owners, interfaces, addresses, rules, routes of names, units.
const LISTING: &str = "
    cd /
    find etc usr/local run/banger run/banger-root run/systemd/system var/tmp dev/banger dev/mapper \
        -not -path 'etc/resolv.conf' -printf '%p %M %u:%g\\n' 2>/dev/null | sort
    # What is in the owner's state is the daemon's to change.
    find var/lib/banger -maxdepth 1 -printf '%p %M %u:%g\\n' 2>/dev/null | sort
    echo '--- interfaces'; ip -o -br link | sed 's/ .*//' | sort; ip -o address | sed 's/ *valid_lft.*//' | cut -d' ' -f2- | sort
    echo '--- rules'; nft list ruleset
    echo '--- names'; resolvectl domain | grep -v ': *$' || true
    echo '--- block devices'; dmsetup ls | grep -v '^No devices' || true; losetup --list --noheadings
    echo '--- mounts'; findmnt --noheadings --raw --output TARGET | grep banger || true
    echo '--- control groups'; find /sys/fs/cgroup -name '*banger*' -not -name 'banger-lab*' | grep -v banger-lab || true
    echo '--- units'; systemctl list-units --all --no-legend --plain 'banger*' | grep -v banger-lab || true
    echo '--- processes'; ps -eo args | grep -E '(bangerd|banger-helper|banger-shim|qemu-system|firecracker)' | grep -v grep || true
";

/// The host as far as banger could change it.
#[track_caller]
pub(crate) fn listing() -> String {
    lab::sh(LISTING).code(0).out()
}

/// An installation that is undone, and looked at, at its end.
pub(crate) struct Installed {
    before: String,
}

impl Installed {
    /// Installs system mode as the owner does, with kernel and image in its state.
    #[track_caller]
    pub(crate) fn new() -> Self {
        Self::with("")
    }

    /// The same with further options.
    #[track_caller]
    pub(crate) fn with(options: &str) -> Self {
        // What the kernel brings up when it is first asked for is there before and after.
        lab::sh("modprobe -a dm_snapshot loop tun bridge nf_tables kvm_amd; true").code(0);
        // What a scenario before left when it failed is not this one's.
        if Path::new("/etc/banger/install.toml").exists() {
            lab::sudo_banger("system uninstall --purge --yes").deadline(240).run();
        }
        let before = listing();
        // Kernel and image first: no daemon has run in it yet.
        lab::root(["install", "-d", "-m", "711", "/var/lib/banger"]).ok();
        lab::seed_store(Path::new(lab::STATE));
        lab::sudo_banger(&format!("system install {options}"))
            .deadline(240)
            .ok();
        Self { before }
    }

    /// The host as it was before.
    pub(crate) fn before(&self) -> &str {
        &self.before
    }

    /// Uninstalls, and fails when anything is left.
    #[track_caller]
    pub(crate) fn close(self) {
        assert_clean();
        lab::sudo_banger("system uninstall --purge --yes").deadline(240).ok();
        assert_same(&self.before, &listing());
    }
}

/// Fails where two listings differ, showing only the difference.
#[track_caller]
pub(crate) fn assert_same(before: &str, after: &str) {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let (before, after) = (lines(before), lines(after));
    let gone: Vec<String> = before
        .iter()
        .filter(|l| !after.contains(l))
        .map(|l| format!("- {l}"))
        .collect();
    let new: Vec<String> = after
        .iter()
        .filter(|l| !before.contains(l))
        .map(|l| format!("+ {l}"))
        .collect();
    assert!(
        gone.is_empty() && new.is_empty(),
        "the host is not as it was:\n{}",
        [gone, new].concat().join("\n")
    );
}

/// Nothing of banger's is without its machine.
#[track_caller]
pub(crate) fn assert_clean() {
    let (status, audit) = lab::audit();
    assert_eq!((status, audit["orphans"].as_u64()), (0, Some(0)), "{audit:#}");
}

/// A machine that has to be the same all along: its engine's process and its guest's boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Same {
    name: String,
    engine: i32,
    boot: String,
}

impl Same {
    #[track_caller]
    pub(crate) fn of(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            engine: lab::engine_pid(name),
            boot: lab::boot_id(name),
        }
    }

    /// Its engine's process.
    pub(crate) fn engine(&self) -> i32 {
        self.engine
    }

    /// Fails unless the machine is the same, runs, and is reached; and unless nothing is left over.
    #[track_caller]
    pub(crate) fn check(&self, after: &str) {
        assert_eq!(Self::of(&self.name), *self, "after {after}");
        assert_clean();
    }
}

/// Rows that failed.
pub(crate) fn failures(done: &Done) -> Vec<String> {
    done.json()
        .as_array()
        .into_iter()
        .flatten()
        .filter(|c| c["level"] == "fail")
        .map(|c| format!("{}: {}", c["name"], c["message"]))
        .collect()
}

/// Installs Firecracker where only root can change it, and says with which options it is used. Where there is none, the scenario is
/// skipped.
#[track_caller]
pub(crate) fn firecracker_options() -> String {
    let (firecracker, jailer) = lab::need_firecracker();
    for (from, to) in [(firecracker, "firecracker"), (jailer, "jailer")] {
        lab::root(["install", "-o", "root", "-g", "root", "-m", "755"])
            .arg(from)
            .arg(format!("/opt/{to}"))
            .ok();
    }
    "--firecracker /opt/firecracker --jailer /opt/jailer".to_owned()
}
