//! What a machine is made of: limits, defaults, and the line that shows it.

use banger_proto::api::{CreateMachine, MachineSpec};

use crate::config::Config;
use crate::size::{self, GIB, MIB};

/// Image of a machine when neither request nor configuration names one.
pub const DEFAULT_IMAGE: &str = "debian";
/// Name of the kernel that machines use when none is named.
pub const DEFAULT_KERNEL: &str = "default";
/// Most virtual CPUs of a machine.
pub const MAX_VCPU: u32 = 64;
/// Least memory of a machine in MiB: Debian's kernel, the initramfs and the agent do not start below.
pub const MIN_MEMORY_MIB: u64 = 128;
/// Most memory of a machine in MiB.
pub const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Least size of a root disk in bytes.
pub const MIN_DISK: u64 = 256 * MIB;
/// Most size of a root disk in bytes.
pub const MAX_DISK: u64 = 16 * size::TIB;
/// Root disk when nothing says otherwise.
const DEFAULT_DISK: u64 = 8 * GIB;
/// What a small host's machines get at least.
const FLOOR: Shape = Shape {
    cpus: 2,
    memory_mib: 512,
};
/// What a large host's machines get at most.
const CEILING: Shape = Shape {
    cpus: 4,
    memory_mib: 8 * 1024,
};

/// Size of a host, as far as defaults depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// Why a spec is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Virtual CPUs.
    #[error("{0} virtual CPUs are not possible; 1 to {MAX_VCPU} are")]
    Vcpu(u32),
    /// More virtual CPUs than the host has.
    #[error("{wanted} virtual CPUs are more than the {available} CPUs of this host")]
    HostCpus {
        /// Asked for.
        wanted: u32,
        /// CPUs of the host.
        available: u32,
    },
    /// Memory.
    #[error("{0} MiB of memory are not possible; {MIN_MEMORY_MIB} MiB to {MAX_MEMORY_MIB} MiB are")]
    Memory(u64),
    /// More memory than the host has.
    #[error("{wanted} MiB of memory are more than the {available} MiB of this host")]
    HostMemory {
        /// Asked for.
        wanted: u64,
        /// Memory of the host.
        available: u64,
    },
    /// Root disk.
    #[error("a root disk of {} is not possible; {} to {} are", size::format(*.0), size::format(MIN_DISK), size::format(MAX_DISK))]
    Disk(u64),
    /// Root disk smaller than its image.
    #[error("a root disk of {} is smaller than its image ({})", size::format(*.wanted), size::format(*.image))]
    DiskBelowImage {
        /// Asked for.
        wanted: u64,
        /// Size of the image.
        image: u64,
    },
    /// Engine.
    #[error("unknown engine `{0}`; `auto`, `qemu` and `firecracker` are known")]
    Engine(String),
    /// Network.
    #[error("unknown network `{0}`; `user`, `bridge` and `none` are known")]
    Network(String),
    /// A bridge without an installation.
    #[error("the network `bridge` needs system mode")]
    NoBridge,
    /// What only a bridge can do.
    #[error("{what} needs the network `bridge`, not `{network}`")]
    OnlyBridge {
        /// What was asked for.
        what: &'static str,
        /// The network.
        network: String,
    },
    /// The name of a group.
    #[error("`{0}` cannot be the name of a group of machines: 1 to 63 of a-z, 0-9 and -")]
    NetGroup(String),
}

impl SpecError {
    /// What the user can do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NoBridge => Some("install it: sudo banger system install"),
            Self::OnlyBridge { .. } => Some("leave it out, or use --network bridge"),
            _ => None,
        }
    }
}

/// Where machines are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Size of the host.
    pub host: Shape,
    /// There is a bridge: this is system mode.
    pub bridge: bool,
}

/// Checks a number of virtual CPUs.
pub fn check_vcpu(vcpu: u32) -> Result<(), SpecError> {
    if (1..=MAX_VCPU).contains(&vcpu) {
        Ok(())
    } else {
        Err(SpecError::Vcpu(vcpu))
    }
}

/// Checks an amount of memory in MiB.
pub fn check_memory(mib: u64) -> Result<(), SpecError> {
    if (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&mib) {
        Ok(())
    } else {
        Err(SpecError::Memory(mib))
    }
}

/// Checks the size of a root disk in bytes.
pub fn check_disk(bytes: u64) -> Result<(), SpecError> {
    if (MIN_DISK..=MAX_DISK).contains(&bytes) {
        Ok(())
    } else {
        Err(SpecError::Disk(bytes))
    }
}

/// Checks the name of an engine.
pub fn check_engine(engine: &str) -> Result<(), SpecError> {
    if matches!(engine, "auto" | "qemu" | "firecracker") {
        Ok(())
    } else {
        Err(SpecError::Engine(engine.escape_default().to_string()))
    }
}

/// Checks the kind of a network.
pub fn check_network(network: &str) -> Result<(), SpecError> {
    if matches!(network, "user" | "bridge" | "none") {
        Ok(())
    } else {
        Err(SpecError::Network(network.escape_default().to_string()))
    }
}

/// Numbers and names of a machine with every default resolved, before image and kernel are looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// Image reference.
    pub image: String,
    /// Kernel reference.
    pub kernel: String,
    /// Engine: `auto` or a name.
    pub engine: String,
    /// Network kind.
    pub network: String,
    /// Virtual CPUs.
    pub vcpu: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Root disk in bytes.
    pub disk_bytes: u64,
    /// That size was asked for. A default grows to the size of the image.
    pub disk_asked: bool,
    /// It reaches what is outside.
    pub nat: bool,
    /// Its group.
    pub net_group: Option<String>,
}

/// Checks what a network is asked to do.
pub fn check_reach(network: &str, nat: Option<bool>, group: Option<&str>) -> Result<(), SpecError> {
    let only = |what| SpecError::OnlyBridge {
        what,
        network: network.to_owned(),
    };
    if let Some(group) = group {
        let fits = group.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        if !fits || !(1..=63).contains(&group.len()) {
            return Err(SpecError::NetGroup(
                group.chars().take(80).flat_map(char::escape_default).collect(),
            ));
        }
        if network != "bridge" {
            return Err(only("a group of machines"));
        }
    }
    if nat == Some(false) && network != "bridge" {
        return Err(only("a machine that does not reach what is outside"));
    }
    Ok(())
}

/// Resolves a request: what it says, else the configuration, else what fits the host. Everything is checked, also against the
/// host, before anything is made.
pub fn resolve(request: &CreateMachine, config: &Config, place: Place) -> Result<Resolved, SpecError> {
    let defaults = &config.vm_defaults;
    let host = place.host;
    let fitting = fitting(host);
    let network = if place.bridge { "bridge" } else { "user" };
    let resolved = Resolved {
        image: request
            .image
            .clone()
            .or_else(|| config.default_image_name.clone())
            .unwrap_or_else(|| DEFAULT_IMAGE.to_owned()),
        kernel: request.kernel.clone().unwrap_or_else(|| DEFAULT_KERNEL.to_owned()),
        engine: request
            .engine
            .clone()
            .or_else(|| config.engine.clone())
            .unwrap_or_else(|| "auto".to_owned()),
        network: request.network.clone().unwrap_or_else(|| network.to_owned()),
        vcpu: request.vcpu.or(defaults.vcpu).unwrap_or(fitting.cpus),
        memory_mib: request.memory_mib.or(defaults.memory_mib).unwrap_or(fitting.memory_mib),
        disk_bytes: request
            .disk_bytes
            .or(defaults.disk_size.map(|s| s.0))
            .unwrap_or(DEFAULT_DISK),
        disk_asked: request.disk_bytes.is_some(),
        nat: request.nat.unwrap_or(true),
        net_group: request.net_group.clone(),
    };
    check_engine(&resolved.engine)?;
    check_network(&resolved.network)?;
    if resolved.network == "bridge" && !place.bridge {
        return Err(SpecError::NoBridge);
    }
    check_reach(&resolved.network, request.nat, resolved.net_group.as_deref())?;
    check_sizes(resolved.vcpu, resolved.memory_mib, host)?;
    check_disk(resolved.disk_bytes)?;
    Ok(resolved)
}

/// The size of a root disk for an image of `image` bytes: the larger one, unless the disk's size was asked for.
pub fn disk_for(disk_bytes: u64, asked: bool, image: u64) -> Result<u64, SpecError> {
    if disk_bytes >= image {
        return Ok(disk_bytes);
    }
    if asked {
        return Err(SpecError::DiskBelowImage {
            wanted: disk_bytes,
            image,
        });
    }
    check_disk(image)?;
    Ok(image)
}

/// Checks virtual CPUs and memory, also against the host.
pub fn check_sizes(vcpu: u32, memory_mib: u64, host: Shape) -> Result<(), SpecError> {
    check_vcpu(vcpu)?;
    check_memory(memory_mib)?;
    if vcpu > host.cpus {
        return Err(SpecError::HostCpus {
            wanted: vcpu,
            available: host.cpus,
        });
    }
    if memory_mib > host.memory_mib {
        return Err(SpecError::HostMemory {
            wanted: memory_mib,
            available: host.memory_mib,
        });
    }
    Ok(())
}

/// Default sizes on a host: a quarter of its CPUs and an eighth of its memory, within floor and ceiling and never more than
/// it has.
pub fn fitting(host: Shape) -> Shape {
    let cpus = (host.cpus / 4).clamp(FLOOR.cpus, CEILING.cpus).min(host.cpus.max(1));
    let memory_mib = (host.memory_mib / 8)
        .clamp(FLOOR.memory_mib, CEILING.memory_mib)
        .min(host.memory_mib.max(MIN_MEMORY_MIB));
    Shape { cpus, memory_mib }
}

/// The line that `vm run` shows: `2 vcpu · 1024 MiB · 8G disk · debian · qemu/tcg`.
pub fn line(spec: &MachineSpec) -> String {
    format!(
        "{} vcpu · {} MiB · {} disk · {} · {}/{}",
        spec.vcpu,
        spec.memory_mib,
        size::format(spec.disk_bytes),
        spec.image,
        spec.engine,
        spec.accel
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOST: Shape = Shape {
        cpus: 16,
        memory_mib: 64 * 1024,
    };

    fn place(host: Shape, bridge: bool) -> Place {
        Place { host, bridge }
    }

    #[test]
    fn the_network_is_that_of_the_place() {
        let with = |bridge: bool, change: fn(&mut CreateMachine)| {
            let mut request = CreateMachine::default();
            change(&mut request);
            resolve(&request, &Config::default(), place(HOST, bridge))
        };
        assert_eq!(with(true, |_| {}).unwrap().network, "bridge");
        assert_eq!(with(false, |_| {}).unwrap().network, "user");
        assert_eq!(
            with(false, |r| r.network = Some("bridge".into())),
            Err(SpecError::NoBridge)
        );
        assert!(!with(true, |r| r.nat = Some(false)).unwrap().nat);
        assert!(with(true, |r| r.net_group = Some("a-1".into())).is_ok());
        assert!(matches!(
            with(false, |r| r.nat = Some(false)),
            Err(SpecError::OnlyBridge { .. })
        ));
        assert!(matches!(
            with(false, |r| r.net_group = Some("a".into())),
            Err(SpecError::OnlyBridge { .. })
        ));
        assert!(matches!(
            with(true, |r| r.net_group = Some("a/b".into())),
            Err(SpecError::NetGroup(_))
        ));
    }

    #[test]
    fn request_wins_over_configuration_over_host() {
        let config =
            Config::parse("default_image_name = 'debian-slim'\n[vm_defaults]\nvcpu = 3\nmemory_mib = 777\n").unwrap();
        let request = CreateMachine {
            vcpu: Some(5),
            ..CreateMachine::default()
        };
        let resolved = resolve(&request, &config, place(HOST, false)).unwrap();
        assert_eq!(
            (resolved.vcpu, resolved.memory_mib, resolved.disk_bytes),
            (5, 777, 8 * GIB)
        );
        assert_eq!(
            (resolved.image.as_str(), resolved.kernel.as_str()),
            ("debian-slim", "default")
        );
        let plain = resolve(&CreateMachine::default(), &Config::default(), place(HOST, false)).unwrap();
        assert_eq!(
            (plain.vcpu, plain.memory_mib, plain.image.as_str()),
            (4, 8192, "debian")
        );
    }

    #[test]
    fn a_default_disk_is_as_large_as_its_image() {
        assert_eq!(disk_for(8 * GIB, false, 2 * GIB), Ok(8 * GIB));
        assert_eq!(disk_for(8 * GIB, false, 9 * GIB), Ok(9 * GIB));
        assert_eq!(disk_for(9 * GIB, true, 9 * GIB), Ok(9 * GIB));
        assert_eq!(
            disk_for(8 * GIB, true, 9 * GIB),
            Err(SpecError::DiskBelowImage {
                wanted: 8 * GIB,
                image: 9 * GIB
            })
        );
        assert_eq!(disk_for(8 * GIB, false, u64::MAX), Err(SpecError::Disk(u64::MAX)));
        let config = Config::parse("[vm_defaults]\ndisk_size = '4G'\n").unwrap();
        let resolved = resolve(&CreateMachine::default(), &config, place(HOST, false)).unwrap();
        assert_eq!((resolved.disk_bytes, resolved.disk_asked), (4 * GIB, false));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let with = |change: fn(&mut CreateMachine)| {
            let mut request = CreateMachine::default();
            change(&mut request);
            resolve(&request, &Config::default(), place(HOST, false)).unwrap_err()
        };
        assert_eq!(with(|r| r.vcpu = Some(0)), SpecError::Vcpu(0));
        assert_eq!(
            with(|r| r.vcpu = Some(17)),
            SpecError::HostCpus {
                wanted: 17,
                available: 16
            }
        );
        assert_eq!(with(|r| r.memory_mib = Some(1)), SpecError::Memory(1));
        assert_eq!(
            with(|r| r.memory_mib = Some(65 * 1024)),
            SpecError::HostMemory {
                wanted: 66560,
                available: 65536
            }
        );
        assert_eq!(with(|r| r.disk_bytes = Some(1)), SpecError::Disk(1));
        assert_eq!(with(|r| r.engine = Some("xen".into())), SpecError::Engine("xen".into()));
        assert_eq!(
            with(|r| r.network = Some("wifi".into())),
            SpecError::Network("wifi".into())
        );
    }

    proptest! {
        #[test]
        fn defaults_are_always_acceptable(cpus in 1u32..512, memory_mib in MIN_MEMORY_MIB..MAX_MEMORY_MIB) {
            let host = Shape { cpus, memory_mib };
            prop_assert!(resolve(&CreateMachine::default(), &Config::default(), place(host, true)).is_ok());
        }
    }
}
