//! The daemon API: resources and requests. Paths are listed in the generated OpenAPI document (`GET /v1/openapi.json`).

mod audit;
mod network;
mod saved;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::ApiError;

pub use audit::{Audit, AuditMissing, AuditObject};
pub use network::{Forward, ListeningPort};
pub use saved::{
    BuildTemplate, CommitMachine, CreateSnapshot, ForkAccepted, ForkMachine, PruneTemplates, Pruned, Snapshot, Template,
};

/// A point in time, RFC 3339 in UTC.
pub type Timestamp = String;

/// What a daemon is: answered to the first request of every client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VersionInfo {
    /// Release, as in `Cargo.toml`.
    pub version: String,
    /// Full commit hash, or `unknown`.
    pub commit: String,
    /// See [`crate::API_VERSION`].
    pub api_version: u32,
}

/// State of the daemon itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DaemonStatus {
    /// What it is.
    pub version: VersionInfo,
    /// Process id.
    pub pid: u32,
    /// When it started.
    pub started_at: Timestamp,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    /// Machines known, running ones among them.
    pub machines: u32,
    /// Machines running.
    pub running: u32,
    /// Directory of the state.
    pub state_dir: String,
    /// The API socket.
    pub socket: String,
    /// `user` or `system`.
    #[serde(default)]
    pub mode: String,
    /// The log file.
    pub log: String,
}

/// States of a machine. Drawn in `banger_core::state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// The row exists, disks are being made.
    Creating,
    /// The engine is coming up or the guest is booting.
    Starting,
    /// The agent answers.
    Running,
    /// Its virtual CPUs are stopped; everything else is as it was.
    Paused,
    /// It would run, but its disk can't be written on the host; `stalled` says why. It resumes by itself when the disk works.
    Stalled,
    /// Its memory is being written to disk.
    Suspending,
    /// No engine process; disks and memory are kept, and a start goes on where it was.
    Suspended,
    /// A stop is under way.
    Stopping,
    /// No engine process; the disks are kept.
    Stopped,
    /// Disks could not be made or are damaged; only delete is left.
    Error,
    /// Being removed.
    Deleting,
    /// What became of its engine is not known: the daemon has just started and still looks, or something is there that does not
    /// answer. Only shown, with what it was before in the cause; never stored.
    Unverified,
}

impl MachineState {
    /// The word used on the wire and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stalled => "stalled",
            Self::Suspending => "suspending",
            Self::Suspended => "suspended",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Error => "error",
            Self::Deleting => "deleting",
            Self::Unverified => "unverified",
        }
    }
}

/// What follows when a guest's kernel has panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnPanic {
    /// The machine is stopped.
    #[default]
    Stop,
    /// It is started again, from its disks. One that panics again and again is stopped.
    Restart,
}

impl OnPanic {
    /// The word on the wire and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Restart => "restart",
        }
    }
}

/// How far a start goes before it counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WaitFor {
    /// The agent takes commands.
    Agent,
    /// The image's init has finished its start-up (running or degraded). The same as `Agent` where there is no init.
    #[default]
    System,
}

/// A machine as the daemon knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Machine {
    /// Sixteen lower-case hexadecimal digits, never reused.
    pub id: String,
    /// Unique name, a DNS label.
    pub name: String,
    /// Where it is in its life.
    pub state: MachineState,
    /// Why it is stopped, stalled or broken, or was last started again by itself, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// What keeps it from running, while it is `stalled`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stalled: Option<Stalled>,
    /// What it is made of.
    pub spec: MachineSpec,
    /// When the row was written.
    pub created_at: Timestamp,
    /// When the engine was last started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// The engine process, while there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// What the guest says of itself, while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestInfo>,
    /// Repository that was copied in, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<Workspace>,
    /// How the last start went, stage by stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootReport>,
    /// The machine is removed when the command that created it ends.
    #[serde(default)]
    pub auto_remove: bool,
    /// It is suspended after so many milliseconds without use; 0 is never.
    #[serde(default)]
    pub idle_suspend_after_ms: u64,
    /// What follows when its guest's kernel has panicked.
    #[serde(default)]
    pub on_panic: OnPanic,
    /// Its address, with a bridge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Ports of the host that lead to it.
    #[serde(default)]
    pub forwards: Vec<Forward>,
}

/// What keeps a machine from running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stalled {
    /// What is the matter.
    pub kind: StallKind,
    /// The disk that can't be written: `root` or `work`, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

/// What is the matter with a disk that can't be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StallKind {
    /// The host's disk is full, or a quota is used up.
    NoSpace,
    /// The host's disk has failed.
    DiskFailed,
}

/// What a machine is made of, with every default resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MachineSpec {
    /// Image name at creation.
    pub image: String,
    /// Image digest, `sha256:…`.
    pub image_digest: String,
    /// Kernel name at creation.
    pub kernel: String,
    /// Kernel digest, `sha256:…`.
    pub kernel_digest: String,
    /// `qemu` or `firecracker`.
    pub engine: String,
    /// `kvm` or `tcg`.
    pub accel: String,
    /// Virtual CPUs.
    pub vcpu: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Size of the root disk in bytes.
    pub disk_bytes: u64,
    /// Network kind: `user`, `bridge` or `none`.
    pub network: String,
    /// With a bridge: it reaches what is outside, by address translation.
    #[serde(default = "yes")]
    pub nat: bool,
    /// With a bridge: machines of one group reach each other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_group: Option<String>,
}

fn yes() -> bool {
    true
}

/// What the guest says of itself. Hostile input: shown, never trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestInfo {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Kernel release.
    pub kernel: String,
    /// Agent version.
    pub agent_version: String,
    /// State of the image's init: `none`, `starting`, `running`, `degraded` or what it calls itself.
    pub system: String,
}

/// A repository that was copied into a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Workspace {
    /// Directory on the host.
    pub source: String,
    /// Directory in the guest.
    pub guest_path: String,
    /// Commit that was checked out.
    pub head: String,
    /// Branch that was checked out, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
}

/// How a start went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BootReport {
    /// `boot` for a cold start, `template` for one from a template, `wake` from suspension, `fork` for a copy of a running
    /// machine, `snapshot` for a restored snapshot.
    pub how: String,
    /// Id of the template, name of the source machine or of the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// For a fork: how long the source stood still, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_paused_ms: Option<u64>,
    /// Stages in order.
    pub stages: Vec<StageTime>,
}

/// Duration of one stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StageTime {
    /// Name of the stage.
    pub stage: String,
    /// Milliseconds it took.
    pub ms: u64,
}

/// Request to create a machine. What is absent is resolved from configuration, host and built-in defaults.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreateMachine {
    /// Name; one is made up when absent.
    pub name: Option<String>,
    /// Image reference.
    pub image: Option<String>,
    /// Kernel reference.
    pub kernel: Option<String>,
    /// Virtual CPUs.
    pub vcpu: Option<u32>,
    /// Memory in MiB.
    pub memory_mib: Option<u64>,
    /// Size of the root disk in bytes.
    pub disk_bytes: Option<u64>,
    /// Engine; `auto` when absent.
    pub engine: Option<String>,
    /// Network kind: `user`, `bridge` or `none`; `bridge` in system mode and `user` otherwise when absent.
    pub network: Option<String>,
    /// Reach what is outside; yes when absent. Only a bridge can do without.
    pub nat: Option<bool>,
    /// Reach the other machines of this group. Only with a bridge.
    pub net_group: Option<String>,
    /// Ports of the host that lead to it.
    pub forwards: Vec<Forward>,
    /// Remove the machine when the client that holds it is gone.
    pub auto_remove: bool,
    /// Start it after creation. Absent means yes.
    pub start: Option<bool>,
    /// How far the start goes.
    pub wait: WaitFor,
    /// Bound of the start in milliseconds.
    pub timeout_ms: Option<u64>,
    /// Boot, though there may be a template.
    pub cold: bool,
    /// Suspend it after so many milliseconds without use; 0 is never, absent is what the configuration says.
    pub idle_suspend_after_ms: Option<u64>,
    /// What follows when its guest's kernel has panicked; `stop` when absent.
    pub on_panic: Option<OnPanic>,
}

/// Request to change a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PatchMachine {
    /// New name.
    pub name: Option<String>,
    /// Virtual CPUs, from the next start on.
    pub vcpu: Option<u32>,
    /// Memory in MiB, from the next start on.
    pub memory_mib: Option<u64>,
    /// Size of the root disk in bytes; grows only, the machine must be stopped.
    pub disk_bytes: Option<u64>,
    /// Reach what is outside, at once.
    pub nat: Option<bool>,
    /// Ports of the host that lead to it, at once, in place of those it has.
    pub forwards: Option<Vec<Forward>>,
    /// What was copied in (recorded by the client that did it).
    pub workspace: Option<Workspace>,
    /// Suspend it after so many milliseconds without use; 0 is never.
    pub idle_suspend_after_ms: Option<u64>,
    /// What follows when its guest's kernel has panicked, at once.
    pub on_panic: Option<OnPanic>,
}

/// Request to start or restart a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StartMachine {
    /// How far the start goes.
    pub wait: WaitFor,
    /// Bound in milliseconds.
    pub timeout_ms: Option<u64>,
    /// Boot: for a machine that is suspended this drops its memory, for one that was never started it passes over its template.
    pub cold: bool,
}

/// Request to stop a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StopMachine {
    /// How long the guest may take to shut down before its engine is ended, in milliseconds.
    pub timeout_ms: Option<u64>,
    /// End an engine that does not answer, too: everything else must identify it.
    pub force: bool,
}

/// Request to end a machine's engine at once.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KillMachine {
    /// Signal name for the engine process, `KILL` when absent.
    pub signal: Option<String>,
    /// End an engine that does not answer, too, with signal `KILL`: everything else must identify it.
    pub force: bool,
}

/// A machine whose files are there and which is not in the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Recoverable {
    /// Identifier.
    pub id: String,
    /// Name that it had.
    pub name: String,
    /// Image that it was made of.
    pub image: String,
    /// When it was created.
    pub created_at: Timestamp,
}

/// Answer to a request that takes a while.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Accepted {
    /// The operation to follow.
    pub operation: Operation,
    /// The machine it is about, as it is now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
}

/// Where an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Under way.
    Running,
    /// Ended well.
    Done,
    /// Ended badly; `error` says why.
    Failed,
    /// Cancelled, and undone.
    Canceled,
}

/// A long piece of work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// `op-` and eight hexadecimal digits; the same in every log line.
    pub id: String,
    /// `machine.create`, `machine.start`, `image.build` …
    pub kind: String,
    /// Name of what it is about.
    pub target: String,
    /// Where it is.
    pub state: OperationState,
    /// What it is doing now.
    pub stage: String,
    /// How far the stage is, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ApiError>,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// There was nothing to do: what was asked for is so already.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unchanged: bool,
}

/// How far a stage is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Done so far.
    pub done: u64,
    /// In all; 0 where that is not known.
    pub total: u64,
    /// What is counted.
    pub unit: ProgressUnit,
}

/// What a progress counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProgressUnit {
    /// Bytes.
    Bytes,
    /// Packages, files, steps.
    Items,
}

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Name.
    pub name: String,
    /// Digest, `sha256:…`.
    pub digest: String,
    /// Apparent size of the file system in bytes.
    pub size_bytes: u64,
    /// Bytes really allocated on the host.
    pub allocated_bytes: u64,
    /// Path of the init system in the image, none where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// Where it came from.
    pub source: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// Names of the machines that use it.
    #[serde(default)]
    pub used_by: Vec<String>,
}

/// Request to build one of the default images.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BuildImage {
    /// Recipe: `debian` or `debian-slim`.
    pub name: String,
    /// Build again though there is one.
    pub force: bool,
}

/// A kernel in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Kernel {
    /// Name.
    pub name: String,
    /// Digest of the ELF, `sha256:…`.
    pub digest: String,
    /// Kernel release, as `uname -r` will say.
    pub release: String,
    /// Bytes on the host.
    pub size_bytes: u64,
    /// Where it came from.
    pub source: String,
    /// When it was imported.
    pub created_at: Timestamp,
    /// Names of the machines that use it.
    #[serde(default)]
    pub used_by: Vec<String>,
}

/// Request to import a kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ImportKernel {
    /// Name to store it under; `default` makes it the one machines use.
    pub name: String,
    /// A `.deb` of a kernel on this host; the distribution's own kernel package when absent.
    pub from: Option<String>,
    /// Import again though there is one.
    pub force: bool,
}

/// An exec session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// Identifier, chosen by the client.
    pub id: String,
    /// What it runs.
    pub command: Vec<String>,
    /// It has a terminal.
    pub tty: bool,
    /// It is running.
    pub running: bool,
    /// A client is attached.
    pub attached: bool,
    /// Exit status, once it ended; 128 + n for signal n.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
}

/// Figures of a running machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MachineStats {
    /// Machine id.
    pub id: String,
    /// Machine name.
    pub name: String,
    /// CPU time that the engine has used, in milliseconds.
    pub cpu_ms: u64,
    /// Share of one CPU over the last interval, in percent, where two readings exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<f64>,
    /// Resident memory of the engine in bytes.
    pub resident_bytes: u64,
    /// Bytes allocated by the machine's disks.
    pub disk_allocated_bytes: u64,
    /// Guest memory in use, as the guest says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_memory_used_bytes: Option<u64>,
    /// Guest uptime in milliseconds, as the guest says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_uptime_ms: Option<u64>,
}

/// One line of `doctor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it is.
    pub level: CheckLevel,
    /// What was found.
    pub message: String,
    /// What to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Outcome of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckLevel {
    /// Good.
    Pass,
    /// Works, with a limit worth knowing.
    Warn,
    /// Does not work.
    Fail,
}

/// What became of a file transfer into the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FilesWritten {
    /// Entries written.
    pub entries: u64,
    /// Bytes of file content written.
    pub bytes: u64,
}

/// Environment of a session, variable to value.
pub type Env = BTreeMap<String, String>;
