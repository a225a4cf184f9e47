//! What the daemon may ask of the root helper, and what it answers.
//!
//! **Rule: it derives, it does not accept.** A request carries identifiers and numbers; names, paths, rules and arguments are computed
//! again by the helper, as root; the network is the one in the record of the installation. Files come as open descriptors. No method takes a path, an argument vector or rule text.
//!
//! **Framing.** A Unix stream socket. A frame is its length (four bytes, big-endian, at most [`MAX_REQUEST`] or [`MAX_REPLY`]) and so much
//! JSON. The daemon sends a [`Call`], with its descriptors (`SCM_RIGHTS`) on the frame's first byte; the helper answers with a
//! [`Reply`], with descriptors in the same way where the answer has some. Calls on one connection are answered one by one; any number may follow each other, and connections are independent.

use serde::{Deserialize, Serialize};

use crate::id::MachineId;

/// Version of this protocol.
pub const VERSION: u32 = 2;
/// Longest call in bytes.
pub const MAX_REQUEST: u32 = 64 << 10;
/// Longest reply in bytes.
pub const MAX_REPLY: u32 = 4 << 20;
/// Most descriptors of a call.
pub const MAX_DESCRIPTORS: usize = 6;
/// Most slots or peers in one call.
pub const MAX_SLOTS: usize = 1024;

/// One call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// See [`VERSION`].
    pub version: u32,
    /// The daemon's operation, for the log: `op-` and eight hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub op: Option<String>,
    /// What is asked.
    pub request: Request,
}

/// The closed list of what can be asked. `docs/privileges.md` has a row for each: its gate, and why it needs root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", content = "params", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Nothing: whether the helper answers, and which it is. Answers [`Answer::Pong`].
    Ping,
    /// Bridge, address, forwarding and the tables of rules, as they have to be; what is there and right is left alone. Also after a
    /// foreign flush of all rules.
    NetworkSetup {
        /// Every tap that has to have rules, so that they can be made again: all machines that run.
        taps: Vec<TapRules>,
    },
    /// The opposite. Refused while a machine's tap is there.
    NetworkRemove,
    /// Makes idle taps ahead, with their rules.
    TapsWarm {
        /// Their slots: those that the daemon would give out next. Taps that are there are left alone.
        slots: Vec<u32>,
    },
    /// Makes a slot's tap a machine's, taking an idle one where there is one. Answers [`Answer::Tap`].
    TapTake {
        /// The machine.
        machine: MachineId,
        /// Who opens it.
        user: EngineUser,
        /// Its slot and rules.
        rules: TapRules,
    },
    /// Changes the rules of a machine's tap while it runs.
    TapChange {
        /// The machine.
        machine: MachineId,
        /// Its slot and rules.
        rules: TapRules,
    },
    /// Removes a machine's tap and its rules. One that is not there is fine.
    TapDrop {
        /// The machine.
        machine: MachineId,
        /// Its slot.
        slot: u32,
    },
    /// The sockets of the daemon's name server, at [`crate::net::DNS_PORT`] of 127.0.0.1. Answers [`Answer::NameSockets`].
    NameSockets,
    /// Has the host's resolver ask the daemon for names below `.vm`. Answers [`Answer::Resolver`].
    ResolverSet {
        /// Port of the daemon's name server on 127.0.0.1.
        port: u16,
    },
    /// The opposite.
    ResolverClear,
    /// Makes the block device of a machine's disk: a device-mapper snapshot of a read-only loop over the base, whose changes go to
    /// the machine's own file. Descriptors: base (read-only), changes (read and write); regular files of the owner's. Answers
    /// [`Answer::Disk`].
    DiskAttach {
        /// The machine.
        machine: MachineId,
        /// Which disk.
        role: DiskRole,
        /// Its size in bytes, a multiple of 512, not smaller than the base (what is behind the base's end reads as zeros).
        bytes: u64,
        /// Who opens it.
        user: EngineUser,
    },
    /// Removes the block devices of a machine. None there is fine.
    DisksDetach {
        /// The machine.
        machine: MachineId,
    },
    /// How the block devices of a machine are. Answers [`Answer::Disks`].
    DisksStatus {
        /// The machine.
        machine: MachineId,
    },
    /// Starts Firecracker in a jail of its own, with the machine's disks ([`Request::DiskAttach`]) in it. Descriptors: where its
    /// output goes (a pipe), then one file for each of `files`. Comes back when the API socket is there and open to the owner.
    /// Answers [`Answer::Engine`].
    EngineLaunch {
        /// The machine.
        machine: MachineId,
        /// Its slot, from which user and group of the jail follow.
        slot: u32,
        /// Virtual CPUs, for the limits of its control group.
        vcpu: u32,
        /// Memory in MiB, for the same.
        memory_mib: u64,
        /// What the descriptors are.
        files: Vec<JailFile>,
        /// The disks that it is given.
        disks: Vec<DiskRole>,
    },
    /// Sends a signal to the machine's jailed engine. Answers [`Answer::Done`] also where it has gone.
    EngineSignal {
        /// The machine.
        machine: MachineId,
        /// Which.
        signal: Signal,
    },
    /// How the machine's jailed engine ended. Answers [`Answer::Ended`].
    EngineEnded {
        /// The machine.
        machine: MachineId,
    },
    /// Opens the sockets of a machine's jail to the owner: the API's, and the guest channel's once the engine has made it.
    EngineOpen {
        /// The machine.
        machine: MachineId,
    },
    /// Moves what the jailed engine has saved (`memory.new`, `state.new`) out of the jail, as the owner's, to `memory` and `state` in the
    /// directory of the one descriptor, which is the owner's and on the same file system.
    EngineCollect {
        /// The machine.
        machine: MachineId,
    },
    /// Gives an engine that the daemon started itself a systemd scope of its own, with limits, outside the daemon's unit. Without
    /// systemd it does nothing. Answers [`Answer::Scope`].
    EngineScope {
        /// The machine.
        machine: MachineId,
        /// The engine's process; the owner's.
        pid: u32,
        /// Its start time, field 22 of `/proc/PID/stat`.
        start_time: u64,
        /// Memory in MiB, for the limit.
        memory_mib: u64,
    },
    /// Gives the shim of a machine's engine a systemd scope of its own, outside the daemon's unit: a restart of that unit finds nothing
    /// left over, and what is sent to all of the unit's processes does not end the machine's console. Without systemd it does nothing.
    /// Answers [`Answer::Scope`].
    ShimScope {
        /// The machine.
        machine: MachineId,
        /// The shim's process; the owner's.
        pid: u32,
        /// Its start time, field 22 of `/proc/PID/stat`.
        start_time: u64,
    },
    /// Removes everything of a machine: jailed engine, scope, tap and rules, block devices, jail. All steps are tried; what failed is
    /// told in the details of the error. Nothing there is fine.
    MachineRemove {
        /// The machine.
        machine: MachineId,
    },
    /// Every host object that carries banger's mark. Answers [`Answer::Inventory`].
    Inventory,
}

impl Request {
    /// The method's name, for logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ping => "ping",
            Self::NetworkSetup { .. } => "network_setup",
            Self::NetworkRemove => "network_remove",
            Self::TapsWarm { .. } => "taps_warm",
            Self::TapTake { .. } => "tap_take",
            Self::TapChange { .. } => "tap_change",
            Self::TapDrop { .. } => "tap_drop",
            Self::NameSockets => "name_sockets",
            Self::ResolverSet { .. } => "resolver_set",
            Self::ResolverClear => "resolver_clear",
            Self::DiskAttach { .. } => "disk_attach",
            Self::DisksDetach { .. } => "disks_detach",
            Self::DisksStatus { .. } => "disks_status",
            Self::EngineLaunch { .. } => "engine_launch",
            Self::EngineSignal { .. } => "engine_signal",
            Self::EngineEnded { .. } => "engine_ended",
            Self::EngineOpen { .. } => "engine_open",
            Self::EngineCollect { .. } => "engine_collect",
            Self::EngineScope { .. } => "engine_scope",
            Self::ShimScope { .. } => "shim_scope",
            Self::MachineRemove { .. } => "machine_remove",
            Self::Inventory => "inventory",
        }
    }
}

/// A slot's tap and what passes it. Its MAC and address always hold: nothing else leaves the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TapRules {
    /// The slot.
    pub slot: u32,
    /// It reaches what is outside, by address translation.
    pub nat: bool,
    /// Slots of the machines that it reaches and that reach it.
    #[serde(default)]
    pub peers: Vec<u32>,
}

/// Who opens a tap or a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineUser {
    /// An engine that the daemon starts, as the owner.
    Owner,
    /// A jailed engine, as the user of its slot.
    Jail(u32),
}

/// What a disk is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskRole {
    /// The root file system.
    Root,
    /// `/root`.
    Work,
}

impl DiskRole {
    /// `root` or `work`: in names, paths, and as virtio-blk serial.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Work => "work",
        }
    }

    /// The virtio-blk serial.
    pub fn serial(self) -> &'static str {
        self.as_str()
    }
}

/// A file for a jail. It is linked, not copied: it must be the owner's, regular, readable by all (mode 0444; the directories above
/// it are what keeps it private), opened for reading, and on the jails' file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JailFile {
    /// ELF image of the kernel.
    Kernel,
    /// Initial RAM file system.
    Initrd,
    /// Memory to go on with.
    Memory,
    /// State to go on with.
    State,
}

/// The signals that an engine may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Signal {
    /// SIGTERM
    Term,
    /// SIGKILL
    Kill,
    /// SIGINT
    Int,
    /// SIGHUP
    Hup,
    /// SIGQUIT
    Quit,
    /// SIGUSR1
    Usr1,
    /// SIGUSR2
    Usr2,
    /// SIGABRT
    Abrt,
}

/// The answer to a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It was done.
    Ok(Answer),
    /// It was not, or not all of it.
    Error(HelperError),
}

/// What a call brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Answer {
    /// Nothing more to say.
    Done,
    /// The helper.
    Pong {
        /// Release.
        version: String,
        /// Its process.
        pid: u32,
    },
    /// A tap.
    Tap {
        /// Its name.
        name: String,
        /// It had been made ahead.
        pooled: bool,
    },
    /// A block device.
    Disk {
        /// Its node for the owner's engines; none for a jail, which has its own.
        node: Option<std::path::PathBuf>,
    },
    /// The block devices of a machine.
    Disks {
        /// One for each that is there.
        disks: Vec<DiskStatus>,
    },
    /// An engine.
    Engine {
        /// Its process.
        pid: u32,
        /// Its start time, field 22 of `/proc/PID/stat`.
        start_time: u64,
    },
    /// How an engine ended.
    Ended {
        /// Absent for one that runs, and for one that was started by a helper before this one.
        end: Option<EngineEnd>,
    },
    /// A scope.
    Scope {
        /// Its unit; none without systemd.
        unit: Option<String>,
    },
    /// The name server's sockets. Two descriptors come with it: a datagram socket that is bound, a stream socket that listens.
    NameSockets,
    /// The host's resolver.
    Resolver {
        /// It asks the daemon now. False: there is no systemd-resolved here.
        routed: bool,
    },
    /// Host objects.
    Inventory {
        /// All that carry banger's mark.
        objects: Vec<HostObject>,
    },
}

/// How a jailed engine ended: one of the two is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineEnd {
    /// Its exit status, if it exited.
    pub code: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
}

/// How a block device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Which disk.
    pub role: DiskRole,
    /// Bytes of the changes that are used, metadata included.
    pub used: u64,
    /// Bytes that there are for changes.
    pub total: u64,
    /// Its changes could not be written at some time: reads and writes fail until it is made anew.
    pub invalid: bool,
}

/// A host object that carries banger's mark.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostObject {
    /// What it is.
    pub kind: ObjectKind,
    /// Its name, for people.
    pub name: String,
    /// Whose it is; none for what is the installation's: bridge, idle taps, tables.
    pub machine: Option<MachineId>,
}

/// Kinds of host objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ObjectKind {
    /// An engine's process.
    Process,
    /// A network interface.
    Interface,
    /// An element of a table of rules.
    Rule,
    /// A device-mapper device.
    Dm,
    /// A loop device.
    Loop,
    /// A mount.
    Mount,
    /// A jail's directory.
    Jail,
    /// A control group or scope.
    Cgroup,
    /// A device node.
    Node,
}

impl ObjectKind {
    /// The word on the wire and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Interface => "interface",
            Self::Rule => "rule",
            Self::Dm => "dm",
            Self::Loop => "loop",
            Self::Mount => "mount",
            Self::Jail => "jail",
            Self::Cgroup => "cgroup",
            Self::Node => "node",
        }
    }
}

/// Why a call was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct HelperError {
    /// Kind of error.
    pub code: HelperCode,
    /// What failed, with its object.
    pub message: String,
    /// For what consists of several steps: each that failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}

/// Kinds of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HelperCode {
    /// The daemon speaks another version.
    BadVersion,
    /// The call cannot be read, or its numbers or descriptors are wrong.
    BadRequest,
    /// A gate: what was asked for is not banger's.
    Denied,
    /// It is not there.
    NotFound,
    /// It is there already, as something else, or in use.
    Conflict,
    /// There is no room.
    NoSpace,
    /// This host cannot do it.
    Unsupported,
    /// The kernel or a program said no.
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_form() {
        let call = Call {
            version: VERSION,
            op: None,
            request: Request::EngineSignal {
                machine: MachineId::parse("00112233aabbccdd").unwrap(),
                signal: Signal::Usr1,
            },
        };
        let text = serde_json::to_string(&call).unwrap();
        assert_eq!(
            text,
            r#"{"version":2,"request":{"method":"engine_signal","params":{"machine":"00112233aabbccdd","signal":"USR1"}}}"#
        );
        assert_eq!(serde_json::from_str::<Call>(&text).unwrap(), call);
        for bad in [
            r#"{"version":1,"request":{"method":"engine_signal","params":{"machine":"../../etc","signal":"USR1"}}}"#,
            r#"{"version":1,"request":{"method":"engine_signal","params":{"machine":"00112233aabbccdd","signal":"STOP"}}}"#,
            r#"{"version":1,"request":{"method":"run","params":{"argv":["sh"]}}}"#,
        ] {
            assert!(serde_json::from_str::<Call>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_unknown_parameter_is_refused() {
        let text = r#"{"version":1,"request":{"method":"disks_detach","params":{"machine":"00112233aabbccdd","path":"/etc"}}}"#;
        assert!(serde_json::from_str::<Call>(text).is_err());
    }
}
