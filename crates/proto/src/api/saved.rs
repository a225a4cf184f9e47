//! What is saved of machines: snapshots, copies, images of disks, templates.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Machine, MachineSpec, Operation, Timestamp};

/// A machine's disks, and its memory if it was running, at one point in time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Name, unique within the machine; a DNS label.
    pub name: String,
    /// Name of the machine.
    pub machine: String,
    /// When it was taken.
    pub created_at: Timestamp,
    /// It holds memory: a restore goes on where the machine was. Without, the machine is stopped after a restore.
    pub memory: bool,
    /// Bytes that its memory takes on the host.
    pub memory_bytes: u64,
    /// Bytes that its disks take on the host; shared with what came after it.
    pub disk_bytes: u64,
    /// How long the machine stood still for it, in milliseconds.
    pub paused_ms: u64,
    /// Why it cannot be restored: its manifest cannot be read. Such a snapshot can only be removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
}

/// Request to take a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreateSnapshot {
    /// Name.
    pub name: String,
    /// Disks only, after the guest has written out what it held back.
    pub disk_only: bool,
}

/// Request for running copies of a running machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ForkMachine {
    /// How many.
    pub count: u32,
    /// Name of the copy; for several, `NAME-1` to `NAME-N`. Made up when absent.
    pub name: Option<String>,
    /// Bound of each copy's start in milliseconds.
    pub timeout_ms: Option<u64>,
}

impl Default for ForkMachine {
    fn default() -> Self {
        Self {
            count: 1,
            name: None,
            timeout_ms: None,
        }
    }
}

/// Answer to a request for copies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ForkAccepted {
    /// The operation to follow. It fails as a whole: either all copies run or none is left.
    pub operation: Operation,
    /// The copies, as they are now.
    pub machines: Vec<Machine>,
}

/// Request to make an image of a machine's root disk.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CommitMachine {
    /// Name of the image.
    pub image: String,
    /// Snapshot to take it from; the stopped machine itself when absent.
    pub snapshot: Option<String>,
    /// Replace an image of that name.
    pub force: bool,
}

/// The saved memory and disks of a freshly started machine, from which new ones start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Sixteen hexadecimal digits: what it is made of decides them.
    pub id: String,
    /// Name of the image it was made for.
    pub image: String,
    /// What its machines are made of.
    pub spec: MachineSpec,
    /// Engine version that saved it, and the only one that restores it.
    pub engine_version: String,
    /// It is complete; else it is being made.
    pub ready: bool,
    /// A machine that is made now would use it. Not so after an update of engine, kernel, agent or image.
    pub current: bool,
    /// Bytes that its memory takes on the host.
    pub memory_bytes: u64,
    /// Bytes that its disks take on the host.
    pub disk_bytes: u64,
    /// Machines that were started from it.
    pub uses: u64,
    /// When it was made.
    pub created_at: Timestamp,
    /// When the last machine was started from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
}

/// Request to make a template. What is absent is resolved as for a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BuildTemplate {
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
    /// Network kind.
    pub network: Option<String>,
    /// Make it anew though there is one.
    pub force: bool,
}

/// Request to remove templates.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PruneTemplates {
    /// All of them; else those that fit nothing any more and those beyond the budget.
    pub all: bool,
}

/// What a prune removed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Pruned {
    /// Ids.
    pub removed: Vec<String>,
    /// Bytes that were freed on the host.
    pub freed_bytes: u64,
}
