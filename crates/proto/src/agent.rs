//! The guest agent: what it is asked and what it answers.
//!
//! HTTP/2 with prior knowledge over the guest channel, after the handshake of [`crate::hello`]. The host is the client. All
//! bodies are JSON but for tar streams and the frames of [`crate::frame`].
//!
//! | Request | Body | Answer |
//! |---|---|---|
//! | `GET /v1/health` | | [`Health`] |
//! | `POST /v1/personalize` | [`Personalize`] | [`Health`]; the image's init is started by the first one |
//! | `POST /v1/freeze` | [`Freeze`] | [`Health`], once nothing but the agent runs any more |
//! | `POST /v1/renew` | [`Renew`] | [`Health`]; what was frozen runs again |
//! | `GET /v1/system` | | [`Health`], once the image's init has finished its start-up |
//! | `GET /v1/sessions` | | list of [`crate::api::Session`] |
//! | `POST /v1/sessions/{id}` | frames, starting with `Open` | frames; see [`crate::frame`] |
//! | `GET /v1/files?path=P` | | tar stream of `P` (its base name is the root entry) |
//! | `PUT /v1/files?path=P` | tar stream | [`crate::api::FilesWritten`]; unpacked below directory `P`, which is made |
//! | `GET /v1/stat?path=P` | | [`Stat`] |
//! | `POST /v1/connect?target=T` | raw bytes | raw bytes; `T` is `tcp:PORT` (guest loopback) or `sshd` (`sshd -i`) |
//! | `GET /v1/stats` | | [`GuestStats`] |
//! | `GET /v1/clock` | | [`Clock`] |
//! | `POST /v1/clock` | [`AdjustClock`] | [`Clock`], with the change made or under way |
//! | `GET /v1/ports` | | list of [`Port`]: what listens for TCP |
//! | `POST /v1/shutdown` | [`Shutdown`] | 202, then the guest goes down |
//!
//! Errors are [`crate::error::ErrorBody`] with a fitting status.

use serde::{Deserialize, Serialize};

/// Version of this protocol, sent in the handshake. The daemon talks to any agent whose major part is its own.
pub const AGENT_PROTOCOL: u16 = 1;

/// Name of the virtio-serial port of the guest channel.
pub const CHANNEL_NAME: &str = "banger.agent";

/// Port of the guest channel where that is a vsock device.
pub const VSOCK_PORT: u32 = 1024;

/// What the agent says on the console before it ends a machine by a restart that is meant to power it off: where the board has no power to
/// cut. What follows this is no reboot.
pub const POWERS_OFF: &str = "powering off by a restart";

/// Largest JSON body that either side accepts, in bytes.
pub const MAX_JSON: usize = 256 * 1024;

/// What the guest is and how it does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Agent release.
    pub agent_version: String,
    /// Machine id as given by [`Personalize`]; empty before it.
    pub machine_id: String,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// `uname -r`.
    pub kernel: String,
    /// Milliseconds since the guest's kernel started.
    pub uptime_ms: u64,
    /// `none` without an init system, else what it says of its start-up: `starting`, `running`, `degraded`, …
    pub system: String,
    /// Everything but the agent is frozen, and waits for [`Renew`].
    #[serde(default)]
    pub frozen: bool,
}

/// Everything that makes a machine itself. Sent once per start, before anything of the image runs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Personalize {
    /// Machine id: sixteen hexadecimal digits.
    pub machine_id: String,
    /// Host name.
    pub hostname: String,
    /// Wall clock in nanoseconds since the epoch.
    pub time_ns: u64,
    /// 64 fresh random bytes in hexadecimal, for the kernel's pool.
    pub entropy: String,
    /// Network to configure; none leaves only loopback.
    #[serde(default)]
    pub network: Option<GuestNetwork>,
    /// Public keys for root's `authorized_keys`, one a line.
    #[serde(default)]
    pub authorized_keys: Vec<String>,
    /// SSH host key of the machine: private part in OpenSSH format. Never logged.
    #[serde(default)]
    pub ssh_host_key: Option<String>,
    /// What becomes the image's init.
    #[serde(default)]
    pub init: Init,
    /// What to mask for this boot only (in `/run`): units by their full names, generators (`…-generator`), and single wishes
    /// (`multi-user.target.wants/ssh.service`: not started at boot, but on demand).
    #[serde(default)]
    pub mask_units: Vec<String>,
}

impl std::fmt::Debug for Personalize {
    /// Leaves out the private key and the entropy.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Personalize")
            .field("machine_id", &self.machine_id)
            .field("hostname", &self.hostname)
            .field("network", &self.network)
            .field("init", &self.init)
            .finish_non_exhaustive()
    }
}

/// Static network configuration of the guest's first interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    /// IPv4 address.
    pub address: String,
    /// Prefix length.
    pub prefix: u8,
    /// Default gateway.
    pub gateway: String,
    /// Name servers.
    pub dns: Vec<String>,
    /// MAC address that the interface is to have, `02:…`. A copy of another machine finds the other one's there. Absent: it stays.
    #[serde(default)]
    pub mac: Option<String>,
}

/// Request to let nothing run but the agent, so that memory and disks can be saved and nothing of the guest runs in a copy before
/// the copy is itself. There is no way out of it but [`Renew`]: no timer, no lost connection. A copy whose host forgets it stays
/// frozen.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Freeze {
    /// What is saved becomes a template: services that keep something of the machine's identity are put away first, and nothing
    /// of this machine's sessions is kept.
    #[serde(default)]
    pub template: bool,
    /// Disks are saved without memory: what the guest holds back is written out first.
    #[serde(default)]
    pub sync: bool,
}

/// What a guest is told when it runs again: after a restore, as a copy of another machine, or because it was only saved.
///
/// In this order: the kernel's generator takes up the entropy, the clock is set, the identity is taken on, and then what was
/// frozen runs again. A step that fails before the last one leaves the guest frozen, and the answer is an error.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renew {
    /// Whose memory this is. Another machine's is refused.
    pub machine_id: String,
    /// Wall clock in nanoseconds since the epoch.
    pub time_ns: u64,
    /// 64 fresh random bytes in hexadecimal.
    pub entropy: String,
    /// Who it is from now on; absent where it stays who it was. A copy has no session of its source.
    #[serde(default)]
    pub identity: Option<Personalize>,
}

impl std::fmt::Debug for Renew {
    /// Leaves out the entropy.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Renew")
            .field("machine_id", &self.machine_id)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// What becomes the image's init.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// `/sbin/init` or systemd where the image has one, else the agent itself.
    #[default]
    Auto,
    /// The agent stays process 1 and reaps.
    Agent,
    /// This program.
    Path(String),
}

/// What stands at a path in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// `file`, `dir`, `symlink`, `other`, or `missing`.
    pub kind: String,
    /// Size in bytes for a file.
    pub size: u64,
    /// For a link: what it leads to. Absent where it leads nowhere.
    #[serde(default)]
    pub target: Option<Target>,
}

/// What a link in the guest leads to, all links followed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// `file`, `dir` or `other`.
    pub kind: String,
    /// Where it is: an absolute path without links.
    pub path: String,
}

/// Figures from inside the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    /// Memory in use (total less available), in bytes.
    pub memory_used_bytes: u64,
    /// Memory in all, in bytes.
    pub memory_total_bytes: u64,
    /// Milliseconds since the guest's kernel started.
    pub uptime_ms: u64,
    /// Load average over a minute, times 100.
    pub load1_centi: u64,
}

/// The guest's wall clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// Nanoseconds since the epoch.
    pub time_ns: u64,
    /// Something in the guest keeps it right, and the kernel knows: a service that asks time servers.
    pub synchronised: bool,
}

/// Request to change the guest's wall clock. A small difference is made good slowly, so that no time comes twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdjustClock {
    /// By how much, in nanoseconds; positive where the guest is behind.
    pub by_ns: i64,
}

/// A TCP port that something in the guest listens on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Port.
    pub port: u16,
    /// Address it listens on.
    pub address: std::net::IpAddr,
    /// Name of the process, where that was found.
    #[serde(default)]
    pub process: Option<String>,
}

/// Most ports that are told.
pub const MAX_PORTS: usize = 1024;

/// Request to go down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shutdown {
    /// `true`: through the image's init; `false`: sync, unmount what can be, power off.
    pub graceful: bool,
}
