//! Names of host objects, and the marks by which an audit finds them. Each is a function of a machine's id.

use crate::id::MachineId;

/// Name of the nftables tables, in the families `ip` and `bridge`.
pub const NFT_TABLE: &str = "banger";
/// What an interface's alias begins with that is banger's.
pub const ALIAS_PREFIX: &str = "banger:";
/// Alias of the bridge.
pub const ALIAS_BRIDGE: &str = "banger:bridge";
/// Alias of a tap that is nobody's yet.
pub const ALIAS_POOL: &str = "banger:pool";
/// What the UUID of a device-mapper device begins with that is banger's.
pub const DM_UUID_PREFIX: &str = "BANGER-";
/// What the name of a systemd scope begins with.
pub const SCOPE_PREFIX: &str = "banger-machine-";
/// What the name of the systemd scope of a machine's shim begins with.
pub const SHIM_SCOPE_PREFIX: &str = "banger-shim-";
/// The systemd slice of all machines.
pub const SLICE: &str = "banger.slice";
/// Name of the engine's process in a jail.
pub const FIRECRACKER: &str = "firecracker";

/// Files in a jail, the same for every machine: saved state names them.
pub mod jail {
    /// API socket.
    pub const API: &str = "firecracker.socket";
    /// Process id, written by the jailer.
    pub const PID: &str = "firecracker.pid";
    /// Guest channel (vsock).
    pub const AGENT: &str = "agent.sock";
    /// Kernel.
    pub const KERNEL: &str = "kernel";
    /// Initial RAM file system.
    pub const INITRD: &str = "initrd";
    /// Memory to go on with.
    pub const MEMORY: &str = "memory";
    /// State to go on with.
    pub const STATE: &str = "state";
    /// Memory that is being saved.
    pub const NEW_MEMORY: &str = "memory.new";
    /// State that is being saved.
    pub const NEW_STATE: &str = "state.new";
    /// Metrics: a pipe that the owner reads, so that they are bounded. Without it there are none.
    pub const METRICS: &str = "metrics";

    /// The block device of a disk.
    pub fn disk(role: crate::helper::DiskRole) -> &'static str {
        role.as_str()
    }
}

/// Alias of a machine's tap.
pub fn alias(id: &MachineId) -> String {
    format!("{ALIAS_PREFIX}{id}")
}

/// The machine of an alias.
pub fn of_alias(alias: &str) -> Option<MachineId> {
    MachineId::parse(alias.strip_prefix(ALIAS_PREFIX)?).ok()
}

/// Name of a machine's device-mapper device: `fc-<id>-root`.
pub fn dm_name(id: &MachineId, role: crate::helper::DiskRole) -> String {
    format!("fc-{id}-{}", role.as_str())
}

/// Its UUID: `BANGER-<id>-root`.
pub fn dm_uuid(id: &MachineId, role: crate::helper::DiskRole) -> String {
    format!("{DM_UUID_PREFIX}{id}-{}", role.as_str())
}

/// The machine of a device-mapper UUID.
pub fn of_dm_uuid(uuid: &str) -> Option<MachineId> {
    MachineId::parse(uuid.strip_prefix(DM_UUID_PREFIX)?.split('-').next()?).ok()
}

/// Name of a machine's systemd scope.
pub fn scope(id: &MachineId) -> String {
    format!("{SCOPE_PREFIX}{id}.scope")
}

/// Name of the systemd scope of a machine's shim. It is not the engine's: the shim outlives the engine, to write down how that ended.
pub fn shim_scope(id: &MachineId) -> String {
    format!("{SHIM_SCOPE_PREFIX}{id}.scope")
}

/// The machine of a scope's name, or of a path in the cgroup file system that ends in it.
pub fn of_scope(path: &str) -> Option<MachineId> {
    let name = path.rsplit('/').next()?;
    MachineId::parse(name.strip_prefix(SCOPE_PREFIX)?.strip_suffix(".scope")?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::helper::DiskRole;

    #[test]
    fn names_lead_back_to_the_machine() {
        let id = MachineId::parse("00112233aabbccdd").unwrap();
        assert_eq!(of_alias(&alias(&id)), Some(id.clone()));
        assert_eq!(of_dm_uuid(&dm_uuid(&id, DiskRole::Work)), Some(id.clone()));
        assert_eq!(of_scope(&format!("/banger.slice/{}", scope(&id))), Some(id.clone()));
        assert_eq!(of_scope(&shim_scope(&id)), None, "a shim is no engine");
        assert_eq!(dm_name(&id, DiskRole::Root), "fc-00112233aabbccdd-root");
        for foreign in [
            "",
            "banger:pool",
            "banger:../x",
            "BANGER-x-root",
            "LVM-abc",
            "session-1.scope",
        ] {
            assert_eq!(
                of_alias(foreign).or(of_dm_uuid(foreign)).or(of_scope(foreign)),
                None,
                "{foreign}"
            );
        }
    }
}
