//! The boot plan: one value that says everything an engine needs to start a machine.
//!
//! The plan is made by pure code from spec, host facts and allocations, and carried out by an engine driver without further
//! decisions.

use std::path::PathBuf;

pub use banger_system::helper::DiskRole;

use crate::host::Accel;
use crate::id::MachineId;

/// What costs a short-lived machine seconds at boot and gives it nothing. Masked for the boot, in the guest's `/run`, never in
/// the image. Three kinds of names: units; generators (programs that systemd runs before anything else, one process each);
/// and single wishes (`TARGET.wants/UNIT`), where the unit is not started at boot but still can be, by name or on demand.
///
/// Nothing here may stand between `/root` and its disk: that is mounted before systemd starts, and no mount unit, device unit
/// or `local-fs.target` is masked.
pub const MASKED_UNITS: &[&str] = &[
    // Housekeeping for machines that live for weeks.
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "man-db.timer",
    // Nobody logs in at the console, and the serial line is the kernel's log.
    "getty@tty1.service",
    "serial-getty@ttyS0.service",
    // The agent has mounted the disks, configured the network and filled the entropy pool.
    "systemd-networkd-wait-online.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    // Records of who logged in when.
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
    // The image holds no modules of banger's kernel: each of these is a process that finds that out.
    "kmod-static-nodes.service",
    "modprobe@configfs.service",
    "modprobe@dm_mod.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "modprobe@loop.service",
    "systemd-modules-load.service",
    // For partitions, encrypted disks, hibernation and kernel arguments that a machine of banger's does not have.
    "systemd-cryptsetup-generator",
    "systemd-debug-generator",
    "systemd-getty-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-integritysetup-generator",
    "systemd-run-generator",
    "systemd-system-update-generator",
    "systemd-veritysetup-generator",
    // Useful, but not at boot: the bus starts on its socket, the login manager on the bus; `vm ssh` brings a server of its own.
    "multi-user.target.wants/dbus.service",
    "multi-user.target.wants/ssh.service",
    "multi-user.target.wants/sshd.service",
    "multi-user.target.wants/systemd-logind.service",
    "sysinit.target.wants/systemd-sysusers.service",
];

/// Everything an engine needs to start a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootPlan {
    /// The machine.
    pub id: MachineId,
    /// How the guest's processor is run.
    pub accel: Accel,
    /// Virtual CPUs.
    pub vcpu: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// ELF image of the kernel.
    pub kernel: PathBuf,
    /// Initial RAM file system with the agent.
    pub initrd: PathBuf,
    /// Kernel command line.
    pub cmdline: String,
    /// Disks in the order the guest sees them.
    pub disks: Vec<Disk>,
    /// Network of the first interface, if it has one.
    pub network: Option<NetworkPlan>,
    /// Its place in system mode (`banger_system::net`), where there is one.
    pub slot: Option<u32>,
    /// Memory and devices to go on with; none boots.
    pub resume: Option<Saved>,
    /// Where the machine's sockets, logs and handles live.
    pub paths: MachinePaths,
}

/// A machine's memory and devices on disk. They fit a plan with the same processors, memory and devices, and the engine that
/// saved them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// The guest's memory: exactly its size, sparse. Mapped privately: it is never written to.
    pub memory: PathBuf,
    /// State of processors and devices, in the engine's own format.
    pub state: PathBuf,
}

/// A disk of a machine: a file that it writes to, over layers that it only reads. All are named to the engine with their
/// formats: neither a guest nor a file's header chooses what is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Serial by which the agent finds it: `root` or `work`.
    pub serial: DiskRole,
    /// File on the host that takes the writes.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// Read-only qcow2 layers below it, the topmost first.
    pub layers: Vec<PathBuf>,
    /// The raw file below all of them, read-only. None for a disk that stands alone.
    pub base: Option<PathBuf>,
}

/// Format of a disk file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// Bytes as they are.
    Raw,
    /// QEMU copy-on-write over a read-only raw image.
    Qcow2,
    /// A block device.
    Device,
}

/// Network of the first interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkPlan {
    /// Kind of back end.
    pub kind: NetworkKind,
    /// MAC address, `02:…`.
    pub mac: String,
}

/// Kind of network back end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkKind {
    /// The engine's own user-mode network.
    User,
    /// A tap that is there and that the engine's user may open, by its name.
    Tap(String),
}

/// Files of one machine. All are derived from two directories and the id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachinePaths {
    /// Lasting files: disks, console log, handles. `…/state/machines/<id>`.
    pub state: PathBuf,
    /// Sockets. `…/run/m/<id>`, short enough for the 108 bytes of a socket address.
    pub run: PathBuf,
}

impl MachinePaths {
    /// Directory of the disks and the layers below them.
    pub fn disks(&self) -> PathBuf {
        self.state.join("disks")
    }

    /// Root disk.
    pub fn root_disk(&self) -> PathBuf {
        self.disks().join("root.qcow2")
    }

    /// Work disk.
    pub fn work_disk(&self) -> PathBuf {
        self.disks().join("work.qcow2")
    }

    /// The memory that the running engine was started with: a hard link, so that the file stays for as long as it is mapped.
    pub fn memory(&self) -> PathBuf {
        self.state.join("memory")
    }

    /// Directory with memory and devices of a suspended machine.
    pub fn suspended(&self) -> PathBuf {
        self.state.join("suspended")
    }

    /// Directory of the machine's snapshots, one directory each.
    pub fn snapshots(&self) -> PathBuf {
        self.state.join("snapshots")
    }

    /// Console of the guest and last words of the engine, bounded (see `banger-shim`).
    pub fn console_log(&self) -> PathBuf {
        self.state.join("console.log")
    }

    /// What is true now: pid, start time, sockets.
    pub fn handles(&self) -> PathBuf {
        self.state.join("handles.json")
    }

    /// How the engine ended, written by `banger-shim`.
    pub fn exit_record(&self) -> PathBuf {
        self.state.join("exit.json")
    }

    /// Control socket of the engine (QMP, or Firecracker's API).
    pub fn control_socket(&self) -> PathBuf {
        self.run.join("control.sock")
    }

    /// The guest channel.
    pub fn agent_socket(&self) -> PathBuf {
        self.run.join("agent.sock")
    }
}

/// What a guest's kernel finds itself on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Board {
    /// QEMU's `microvm`.
    Microvm,
    /// Firecracker's: no PCI, and a keyboard controller whose reset line is all that ends a machine.
    Firecracker,
}

impl Board {
    /// The board of an engine, by its name.
    pub fn of(engine: &str) -> Self {
        match engine {
            "firecracker" => Self::Firecracker,
            _ => Self::Microvm,
        }
    }
}

/// The kernel command line.
///
/// `tsc_khz` is the host's TSC frequency; under TCG the guest's calibration against the PIT fails at random and hangs the
/// boot, so there it is always given where it is known. What an emulated guest reads is the host's counter, so it is also told to
/// keep it: with several processors it would else fall back to the timer tick, for the ticks by which it judges the counter
/// come late.
///
/// The self-tests of the kernel's cryptography are left out: under emulation they take a fifth of the boot.
///
/// Emulated guests keep no account of stalls (`psi`), and leave out the security modules that do nothing without a policy of their own
/// (TOMOYO, BPF, integrity): both are in the path of every program's start.
///
/// Emulated guests do not randomise addresses: QEMU keys translated code by its virtual address, so with randomisation every
/// process translates its loader and C library anew, which is four fifths of what starting a program costs.
pub fn cmdline(board: Board, accel: Accel, tsc_khz: Option<u64>) -> String {
    let mut words = vec![
        "console=ttyS0",
        "loglevel=4",
        "panic=-1",
        "rdinit=/init",
        "random.trust_cpu=on",
        "i8042.noaux",
        "cryptomgr.notests",
        "systemd.show_status=false",
    ];
    match board {
        Board::Microvm => words.push("reboot=t"),
        // What Firecracker does not have is not looked for: it logs every look.
        Board::Firecracker => words.extend(["reboot=k", "pci=off", "i8042.nomux", "i8042.dumbkbd", "8250.nr_uarts=1"]),
    }
    let early;
    match accel {
        Accel::Kvm => words.push("mitigations=auto"),
        Accel::Tcg => {
            words.extend(["mitigations=off", "norandmaps", "psi=0", "lsm=landlock,yama,apparmor"]);
            if let Some(khz) = tsc_khz {
                early = format!("tsc_early_khz={khz}");
                words.extend([early.as_str(), "tsc=reliable"]);
            }
        }
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulated_guest_is_told_the_clock_and_a_virtual_one_finds_it() {
        let words = |line: String| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let line = |accel, khz| words(cmdline(Board::Microvm, accel, khz));
        let has = |line: &[String], word: &str| line.iter().any(|w| w == word);
        let tcg = line(Accel::Tcg, Some(2_700_000));
        assert!(has(&tcg, "tsc_early_khz=2700000") && has(&tcg, "tsc=reliable"));
        assert!(has(&tcg, "mitigations=off") && has(&tcg, "norandmaps"));
        assert!(!line(Accel::Tcg, None).iter().any(|w| w.starts_with("tsc")));
        let kvm = line(Accel::Kvm, Some(2_700_000));
        assert!(!kvm.iter().any(|w| w.starts_with("tsc")) && has(&kvm, "mitigations=auto"));
        assert!(!has(&kvm, "mitigations=off") && !has(&kvm, "norandmaps"));
    }

    #[test]
    fn a_guest_is_told_how_to_end_its_machine() {
        let line = |engine| cmdline(Board::of(engine), Accel::Kvm, None);
        assert!(line("qemu").contains("reboot=t") && !line("qemu").contains("pci=off"));
        let firecracker = line("firecracker");
        assert!(firecracker.contains("reboot=k") && firecracker.contains("pci=off"));
        assert!(!firecracker.contains("reboot=t") && !firecracker.contains("acpi"));
    }
}
