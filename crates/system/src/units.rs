//! The systemd units of system mode: their whole text, and what must never be missing from them.
//!
//! Two services, each of which can be restarted, killed or replaced without a machine noticing ([`promised`] says by which directives),
//! and the slice of the machines, which are in scopes of their own outside of both.
//!
//! **What a machine's engine inherits.** QEMU is started by the daemon, Firecracker by the helper: scopes move them to another control
//! group, but the file systems, the seccomp filters and the capabilities they see are those of the unit that they came from. So neither
//! unit may have `PrivateDevices`, `DeviceAllow` or `ProtectClock` (no `/dev/kvm`, no `/dev/net/tun`), `PrivateTmp` (its directory goes
//! with the unit), `MemoryDenyWriteExecute` (an emulator writes code) or `RestrictNamespaces` (the jailer makes one).
//!
//! **What they cost.** `ProtectSystem` gives each unit mounts of its own, so the daemon's descriptors and the helper's paths are on
//! different mounts: `link` and `rename` between the two fail with `EXDEV`, and the helper has to open the same file by its own path
//! first. `RestrictSUIDSGID` makes `openat2` fail with `ENOSYS`, since a filter cannot look at its mode.

use std::path::PathBuf;

use crate::install::{Layout, Owner};
use crate::names::SLICE;

/// Name of the daemon's unit.
pub const DAEMON: &str = "bangerd.service";
/// Name of the helper's unit.
pub const HELPER: &str = "bangerd-root.service";
/// Name of the socket behind which images are built.
pub const BUILD_SOCKET: &str = "banger-build.socket";
/// Name of the unit that builds an image, for one connection to the socket.
pub const BUILD: &str = "banger-build@.service";
/// First line of every unit that is banger's. A unit without it is somebody else's.
pub const MARK: &str =
    "# Written by `banger system install`, which also replaces it; your own settings belong into a drop-in.";
/// Group whose members may open `/dev/kvm`, where the host has it.
pub const KVM_GROUP: &str = "kvm";

/// The only capabilities that the helper, and what it starts, can ever have.
pub const CAPABILITIES: [&str; 12] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_CHROOT",
];

/// One of the units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// `bangerd-root.service`
    Helper,
    /// `bangerd.service`
    Daemon,
    /// `banger.slice`
    Slice,
    /// `banger-build.socket`
    BuildSocket,
    /// `banger-build@.service`: bootstraps an image, which takes programs with special rights that the daemon may not start.
    Build,
}

impl Unit {
    /// All of them, in the order in which they are started.
    pub const ALL: [Self; 5] = [Self::Slice, Self::Build, Self::BuildSocket, Self::Helper, Self::Daemon];
    /// Those that are started with the host, in order.
    pub const STARTED: [Self; 3] = [Self::Helper, Self::BuildSocket, Self::Daemon];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Helper => HELPER,
            Self::Daemon => DAEMON,
            Self::Slice => SLICE,
            Self::BuildSocket => BUILD_SOCKET,
            Self::Build => BUILD,
        }
    }

    /// Its file.
    pub fn path(self, layout: &Layout) -> PathBuf {
        layout.units().join(self.name())
    }

    /// Its text.
    pub fn text(self, setting: &Setting<'_>) -> String {
        match self {
            Self::Helper => helper(setting),
            Self::Daemon => daemon(setting),
            Self::Slice => slice(),
            Self::BuildSocket => build_socket(setting),
            Self::Build => build(setting),
        }
    }
}

/// What the texts depend on.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    /// Where everything is.
    pub layout: &'a Layout,
    /// Whose daemon it is.
    pub owner: &'a Owner,
    /// The host has a group [`KVM_GROUP`].
    pub kvm_group: bool,
}

impl Setting<'_> {
    /// The owner as systemd takes it: the name, which brings the groups with it, where systemd accepts such a name.
    fn user(&self) -> String {
        let name = &self.owner.user;
        let word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
        let fits = name.len() <= 31
            && name.bytes().all(word)
            && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        if fits { name.clone() } else { self.owner.uid.to_string() }
    }

    /// Behind which root directory everything is, where it is not `/`.
    fn elsewhere(&self) -> Option<String> {
        let root = self.layout.root();
        (root != std::path::Path::new("/")).then(|| root.display().to_string())
    }
}

/// Directives that a unit must have: what keeps machines alive, and what keeps the unit to its work. A drop-in or an old text that
/// lacks one is worth a word of `banger doctor`. Those of the same name several times all have to be there.
pub fn promised(unit: Unit) -> Vec<(&'static str, String)> {
    let both = [
        ("KillMode", "process"),
        ("RuntimeDirectoryPreserve", "yes"),
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("RestrictSUIDSGID", "yes"),
        ("LockPersonality", "yes"),
    ];
    let own: Vec<(&str, String)> = match unit {
        Unit::Helper => vec![
            ("SendSIGKILL", "no".to_owned()),
            ("ProtectHome", "yes".to_owned()),
            ("CapabilityBoundingSet", CAPABILITIES.join(" ")),
        ],
        Unit::Daemon => vec![("ProtectHome", "read-only".to_owned())],
        Unit::Slice | Unit::BuildSocket | Unit::Build => return Vec::new(),
    };
    both.iter().map(|(k, v)| (*k, (*v).to_owned())).chain(own).collect()
}

/// Which of the [`promised`] directives a unit's text lacks, as `Key=value`.
pub fn lacking(unit: Unit, text: &str) -> Vec<String> {
    promised(unit)
        .into_iter()
        .map(|(key, value)| format!("{key}={value}"))
        .filter(|line| !text.lines().any(|l| l.trim() == line))
        .collect()
}

/// Whether a unit's text is banger's.
pub fn is_ours(text: &str) -> bool {
    text.lines().next() == Some(MARK)
}

fn helper(setting: &Setting<'_>) -> String {
    let layout = setting.layout;
    let root = setting.elsewhere().map(|r| format!(" --root {r}")).unwrap_or_default();
    format!(
        "{MARK}
[Unit]
Description=banger, root's part: network, disks and jails of machines
After=network.target

[Service]
Type=notify
ExecStart={program}{root}
Restart=on-failure
RestartSec=200ms
UMask=0077
# Machines are not this unit's to end.
KillMode=process
SendSIGKILL=no
OOMPolicy=continue
TimeoutStopSec=20s
TasksMax=infinity
LimitNOFILE=65536
RuntimeDirectory=banger-root
RuntimeDirectoryMode=0711
RuntimeDirectoryPreserve=yes
# What it can do, and where it can write.
CapabilityBoundingSet={capabilities}
NoNewPrivileges=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
ProtectSystem=strict
ProtectHome=yes
ReadWritePaths={lib}

[Install]
WantedBy=multi-user.target
",
        program = layout.libexec().join("banger-helper").display(),
        capabilities = CAPABILITIES.join(" "),
        lib = layout.lib().display(),
    )
}

fn daemon(setting: &Setting<'_>) -> String {
    let layout = setting.layout;
    let root = setting
        .elsewhere()
        .map(|r| format!("Environment=BANGER_ROOT={r}\n"))
        .unwrap_or_default();
    let groups = if setting.kvm_group {
        format!("SupplementaryGroups={KVM_GROUP}\n")
    } else {
        String::new()
    };
    format!(
        "{MARK}
[Unit]
Description=banger, private machines for {user}
Wants={HELPER} {BUILD_SOCKET}
After={HELPER} {BUILD_SOCKET} network.target systemd-resolved.service

[Service]
Type=notify
User={user}
{groups}{root}# What bootstraps images takes special rights.
Environment=BANGER_BUILDER={socket}
# /tmp is read-only here.
Environment=TMPDIR=/var/tmp
ExecStart={program} --system
Restart=on-failure
RestartSec=200ms
# Another start changes nothing about a wrong configuration, nor about a daemon that runs already.
RestartPreventExitStatus=2 11
UMask=0077
# Machines are not this unit's to end.
KillMode=process
OOMPolicy=continue
TimeoutStopSec=20s
TasksMax=infinity
LimitNOFILE=65536
RuntimeDirectory=banger
RuntimeDirectoryMode=0700
RuntimeDirectoryPreserve=yes
# What it can do, and where it can write.
CapabilityBoundingSet=
NoNewPrivileges=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={state} /var/tmp

[Install]
WantedBy=multi-user.target
",
        user = setting.user(),
        program = layout.bin().join("bangerd").display(),
        state = layout.state().display(),
        socket = layout.build_socket().display(),
    )
}

fn build_socket(setting: &Setting<'_>) -> String {
    format!(
        "{MARK}
[Unit]
Description=banger, images to be built

[Socket]
ListenStream={socket}
SocketUser={user}
SocketMode=0600
Accept=yes
MaxConnections=4
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
",
        socket = setting.layout.build_socket().display(),
        user = setting.user(),
    )
}

/// Not hardened like the services: the tool makes a user namespace and a whole system in it. It does only what it is asked for, and it
/// can be asked for the names of recipes only.
fn build(setting: &Setting<'_>) -> String {
    format!(
        "{MARK}
[Unit]
Description=banger, building an image
CollectMode=inactive-or-failed

[Service]
User={user}
# Not one of its own, which would stay when it has ended.
Slice=system.slice
ExecStart={program} --builder
StandardInput=socket
StandardOutput=journal
StandardError=journal
Environment=TMPDIR=/var/tmp
UMask=0077
TimeoutStopSec=15s
",
        user = setting.user(),
        program = setting.layout.bin().join("bangerd").display(),
    )
}

fn slice() -> String {
    format!(
        "{MARK}
[Unit]
Description=banger, machines
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(user: &str) -> Owner {
        Owner {
            user: user.into(),
            uid: 1000,
            gid: 1000,
            home: "/home/dev".into(),
        }
    }

    fn text(unit: Unit, root: &str, user: &str, kvm_group: bool) -> String {
        unit.text(&Setting {
            layout: &Layout::below(root),
            owner: &owner(user),
            kvm_group,
        })
    }

    /// The units as they are installed. Whoever changes one changes this, and knows that an update has to replace the units.
    #[test]
    fn the_units_are_what_they_are() {
        let kept = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/units.txt");
        let now: String = Unit::ALL
            .map(|unit| format!("==> {} <==\n{}\n", unit.name(), text(unit, "/", "dev", true)))
            .concat();
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(kept, &now).unwrap();
        }
        assert_eq!(std::fs::read_to_string(kept).unwrap_or_default(), now);
    }

    #[test]
    fn nothing_that_was_promised_is_missing() {
        for unit in Unit::ALL {
            let whole = text(unit, "/", "dev", false);
            assert!(is_ours(&whole));
            assert_eq!(lacking(unit, &whole), [""; 0], "{unit:?}");
            // A directive that stands twice would be overridden by its second.
            for (key, _) in promised(unit) {
                assert_eq!(whole.matches(&format!("\n{key}=")).count(), 1, "{key}");
            }
        }
        let helper = text(Unit::Helper, "/", "dev", false);
        for (line, changed) in [
            ("KillMode=process", "KillMode=control-group"),
            ("SendSIGKILL=no", ""),
            ("RuntimeDirectoryPreserve=yes", "RuntimeDirectoryPreserve=restart"),
            ("CAP_SYS_CHROOT", "CAP_SYS_CHROOT CAP_SYS_PTRACE"),
        ] {
            assert_eq!(
                lacking(Unit::Helper, &helper.replace(line, changed)).len(),
                1,
                "{changed}"
            );
        }
        assert_eq!(CAPABILITIES.len(), 12);
    }

    #[test]
    fn nothing_that_engines_could_not_live_with() {
        for unit in Unit::ALL {
            let whole = text(unit, "/", "dev", true);
            for word in [
                "PrivateDevices",
                "DeviceAllow",
                "DevicePolicy",
                "ProtectClock",
                "PrivateTmp",
                "PrivateNetwork",
                "PrivateUsers",
                "MemoryDenyWriteExecute",
                "RestrictNamespaces",
                "ProtectKernelTunables",
                "ProtectControlGroups",
                "KillSignal",
                "ExecStop",
                "BindsTo",
                "Requires",
                "PartOf",
                "MemoryMax",
            ] {
                assert!(!whole.contains(word), "{unit:?} {word}");
            }
        }
    }

    #[test]
    fn what_the_host_and_the_owner_decide() {
        let daemon = |user, kvm| text(Unit::Daemon, "/", user, kvm);
        assert!(daemon("dev", true).contains("\nSupplementaryGroups=kvm\n"));
        assert!(!daemon("dev", false).contains("SupplementaryGroups"));
        assert!(daemon("dev", false).contains("\nUser=dev\n"));
        for odd in ["a.b", "DOM\\user", "7up", "x\nExecStart=/bin/sh", "%h", "a b", ""] {
            assert!(daemon(odd, false).contains("\nUser=1000\n"), "{odd}");
        }
        let elsewhere = text(Unit::Helper, "/t/x", "dev", false);
        assert!(elsewhere.contains("\nExecStart=/t/x/usr/local/lib/banger/banger-helper --root /t/x\n"));
        assert!(text(Unit::Daemon, "/t/x", "dev", false).contains("\nEnvironment=BANGER_ROOT=/t/x\n"));
        assert!(!text(Unit::Helper, "/", "dev", false).contains("--root"));
    }

    #[test]
    fn units_of_others_are_told_from_ours() {
        assert!(!is_ours("[Unit]\nDescription=x\n"));
        assert!(!is_ours(""));
        assert!(!is_ours(&format!("\n{MARK}\n")));
    }
}
