//! What banger has left on the host, against what its database says.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An audit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Audit {
    /// Every host object that carries banger's mark.
    pub objects: Vec<AuditObject>,
    /// How many of them nobody owns.
    pub orphans: u32,
    /// What machines that run should have on the host and have not.
    #[serde(default)]
    pub missing: Vec<AuditMissing>,
    /// What could not be looked at, and why.
    #[serde(default)]
    pub blind: Vec<String>,
}

/// A host object that is not there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditMissing {
    /// `interface`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Id of the machine whose it was.
    pub machine: String,
    /// What follows from it, in words.
    pub why: String,
    /// What to do about it.
    pub hint: String,
}

/// A host object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditObject {
    /// `process`, `interface`, `rule`, `dm`, `loop`, `mount`, `jail`, `cgroup`, `node`, `socket` or `file`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Id of the machine that it is marked with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// What is wrong with it, in words; none where all is well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orphan: Option<String>,
    /// What can be done about it where it is no orphan: a machine that can be taken back, an engine that does not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Why it could not be removed, where that was tried; absent where it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// It was removed.
    #[serde(default)]
    pub removed: bool,
}
