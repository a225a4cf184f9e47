//! What is told to Firecracker for a plan: pure functions.
//!
//! Saved state names the files of disks and the socket of the guest channel, and a machine that goes on with it opens what it
//! names. So these names are the same for every machine: in a jail its own files, outside of one links in a directory of the
//! machine, relative to the engine's working directory.

use std::path::{Path, PathBuf};

use banger_core::host::Accel;
use banger_core::plan::{BootPlan, DiskFormat, DiskRole, MachinePaths, NetworkKind};
use banger_system::names::jail;
use serde::Serialize;
use serde_json::Value;

use super::ENGINE;
use super::api::{
    BootSource, Drive, Entropy, LoadSnapshot, Logger, MachineConfig, MemBackend, Metrics, NetworkInterface,
    NetworkOverride, Vsock,
};
use crate::engine::EngineError;
use crate::start;

/// The devices of a machine as they are saved. Raised with every change of the calls after which saved state would not fit.
pub const STATE_FORM: u32 = 1;

/// The guest's address on its vsock device.
const GUEST_CID: u32 = 3;
/// The one interface.
const INTERFACE: &str = "net0";
/// Longest kernel line, without what Firecracker adds to it.
const KERNEL_LINE: usize = 1800;
/// Most processors of a machine.
const MAX_VCPU: u32 = 32;

/// Directory of the links, in a machine's own.
pub(crate) const LINKS: &str = "engine";

/// The directory of a machine's links.
pub(crate) fn links(paths: &MachinePaths) -> PathBuf {
    paths.state.join(LINKS)
}

/// The named pipe for the metrics of an engine outside of a jail.
pub(crate) fn metrics_pipe(paths: &MachinePaths) -> PathBuf {
    links(paths).join(jail::METRICS)
}

/// The bounded file that takes the metrics.
pub(crate) fn metrics_file(paths: &MachinePaths) -> PathBuf {
    paths.state.join("metrics.log")
}

/// Files as the engine names them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// Kernel.
    pub kernel: String,
    /// Initial RAM file system.
    pub initrd: String,
    /// What disks begin with; the role follows.
    pub disks: String,
    /// Socket of the guest channel.
    pub agent: String,
    /// Memory and state to go on with.
    pub saved: Option<(String, String)>,
    /// The named pipe for metrics, if there is one.
    pub metrics: Option<String>,
}

impl Names {
    /// Outside of a jail.
    pub fn direct(plan: &BootPlan) -> Result<Self, EngineError> {
        let saved = match &plan.resume {
            Some(saved) => Some((text(&saved.memory)?, text(&saved.state)?)),
            None => None,
        };
        Ok(Self {
            kernel: text(&plan.kernel)?,
            initrd: text(&plan.initrd)?,
            disks: format!("{LINKS}/"),
            agent: format!("{LINKS}/run/agent.sock"),
            saved,
            metrics: Some(format!("{LINKS}/{}", jail::METRICS)),
        })
    }

    /// In a jail.
    pub fn jailed(plan: &BootPlan, metrics: bool) -> Self {
        let saved = plan
            .resume
            .as_ref()
            .map(|_| (jail::MEMORY.to_owned(), jail::STATE.to_owned()));
        Self {
            kernel: jail::KERNEL.to_owned(),
            initrd: jail::INITRD.to_owned(),
            disks: String::new(),
            agent: jail::AGENT.to_owned(),
            saved,
            metrics: metrics.then(|| jail::METRICS.to_owned()),
        }
    }

    fn disk(&self, role: DiskRole) -> String {
        format!("{}{}", self.disks, jail::disk(role))
    }
}

/// A `PUT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Put {
    /// Path.
    pub path: String,
    /// Body.
    pub body: Value,
}

fn put(path: impl Into<String>, body: &impl Serialize) -> Result<Put, EngineError> {
    let body = serde_json::to_value(body).map_err(|e| start::io_error("write a request", e.into()))?;
    Ok(Put {
        path: path.into(),
        body,
    })
}

/// Refuses what Firecracker cannot do.
pub fn check(plan: &BootPlan) -> Result<(), EngineError> {
    if plan.accel != Accel::Kvm {
        return Err(unsupported("run a machine without KVM"));
    }
    if !(1..=MAX_VCPU).contains(&plan.vcpu) {
        return Err(unsupported(format!(
            "run a machine with {} processors: 1 to {MAX_VCPU} are possible",
            plan.vcpu
        )));
    }
    if plan.memory_mib == 0 {
        return Err(unsupported("run a machine without memory"));
    }
    if plan.cmdline.len() > KERNEL_LINE {
        return Err(unsupported(format!(
            "pass a kernel line of {} bytes: {KERNEL_LINE} is the most",
            plan.cmdline.len()
        )));
    }
    for disk in &plan.disks {
        let alone = disk.layers.is_empty() && disk.base.is_none();
        if !alone || disk.format == DiskFormat::Qcow2 {
            let name = disk.serial.serial();
            return Err(unsupported(format!(
                "use {} as disk `{name}`: it is no raw disk that stands alone",
                disk.path.display()
            )));
        }
    }
    let Some(network) = &plan.network else { return Ok(()) };
    let octets: Vec<&str> = network.mac.split(':').collect();
    let fits = |o: &&str| o.len() == 2 && o.bytes().all(|b| b.is_ascii_hexdigit());
    if octets.len() != 6 || !octets.iter().all(fits) {
        return Err(unsupported(format!("use {:?} as MAC address", network.mac)));
    }
    match &network.kind {
        NetworkKind::User => Err(unsupported("give a machine a user-mode network")),
        NetworkKind::Tap(name) => {
            let fits = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
            if fits && (1..=15).contains(&name.len()) {
                Ok(())
            } else {
                Err(unsupported(format!("use {name:?} as a tap")))
            }
        }
    }
}

/// What comes first, whether a machine boots or goes on.
pub fn first(names: &Names) -> Result<Vec<Put>, EngineError> {
    let logger = Logger {
        // Warnings tell of every look of a guest for a device that is not there, and fill the console with them.
        level: "Error".to_owned(),
        show_level: true,
    };
    let mut puts = vec![put("/logger", &logger)?];
    if let Some(metrics_path) = names.metrics.clone() {
        puts.push(put("/metrics", &Metrics { metrics_path })?);
    }
    Ok(puts)
}

/// What describes a machine that is to boot. Disks are seen by the guest in this order.
pub fn boot(plan: &BootPlan, names: &Names) -> Result<Vec<Put>, EngineError> {
    let mut puts = vec![
        put(
            "/machine-config",
            &MachineConfig {
                vcpu_count: plan.vcpu,
                mem_size_mib: plan.memory_mib,
                smt: false,
                track_dirty_pages: false,
            },
        )?,
        put(
            "/boot-source",
            &BootSource {
                kernel_image_path: names.kernel.clone(),
                initrd_path: names.initrd.clone(),
                boot_args: plan.cmdline.clone(),
            },
        )?,
    ];
    for disk in &plan.disks {
        let name = disk.serial.serial();
        puts.push(put(
            format!("/drives/{name}"),
            &Drive {
                drive_id: name.to_owned(),
                path_on_host: names.disk(disk.serial),
                // The initramfs finds them by their order.
                is_root_device: false,
                is_read_only: false,
                cache_type: "Writeback".to_owned(),
                io_engine: "Sync".to_owned(),
            },
        )?);
    }
    if let Some(network) = &plan.network
        && let NetworkKind::Tap(tap) = &network.kind
    {
        puts.push(put(
            format!("/network-interfaces/{INTERFACE}"),
            &NetworkInterface {
                iface_id: INTERFACE.to_owned(),
                host_dev_name: tap.clone(),
                guest_mac: network.mac.clone(),
            },
        )?);
    }
    puts.push(put(
        "/vsock",
        &Vsock {
            guest_cid: GUEST_CID,
            uds_path: names.agent.clone(),
        },
    )?);
    puts.push(put("/entropy", &Entropy {})?);
    Ok(puts)
}

/// What lets a machine go on. It stays paused.
pub fn load(plan: &BootPlan, names: &Names) -> Option<LoadSnapshot> {
    let (memory, state) = names.saved.clone()?;
    let tap = plan.network.as_ref().and_then(|network| match &network.kind {
        NetworkKind::Tap(tap) => Some(tap.clone()),
        NetworkKind::User => None,
    });
    Some(LoadSnapshot {
        snapshot_path: state,
        mem_backend: MemBackend {
            backend_type: "File".to_owned(),
            backend_path: memory,
        },
        resume_vm: false,
        network_overrides: tap
            .into_iter()
            .map(|host_dev_name| NetworkOverride {
                iface_id: INTERFACE.to_owned(),
                host_dev_name,
            })
            .collect(),
    })
}

/// Arguments of an engine outside of a jail.
pub fn args(plan: &BootPlan, control: &Path) -> Result<Vec<String>, EngineError> {
    Ok([
        "--api-sock",
        &text(control)?,
        "--id",
        plan.id.as_str(),
        // Beside the guest's console, where the shim tells the two apart.
        "--log-path",
        "/dev/stderr",
        "--level",
        "Error",
    ]
    .map(str::to_owned)
    .to_vec())
}

/// A path as text: JSON has no other.
pub(crate) fn text(path: &Path) -> Result<String, EngineError> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| unsupported(format!("use {}: its name is not UTF-8", path.display())))
}

pub(crate) fn unsupported(what: impl Into<String>) -> EngineError {
    start::unsupported(ENGINE, what)
}

#[cfg(test)]
mod tests {
    use banger_core::id::MachineId;
    use banger_core::plan::{Disk, NetworkPlan, Saved};
    use serde_json::json;

    use super::*;

    fn plan() -> BootPlan {
        let disk = |serial, path: &str, format| Disk {
            serial,
            path: path.into(),
            format,
            layers: Vec::new(),
            base: None,
        };
        BootPlan {
            id: MachineId::parse("0123456789abcdef").unwrap(),
            accel: Accel::Kvm,
            vcpu: 2,
            memory_mib: 512,
            kernel: "/k/vmlinux".into(),
            initrd: "/k/initrd".into(),
            cmdline: "console=ttyS0 a=b".into(),
            disks: vec![
                disk(DiskRole::Root, "/dev/banger/0123456789abcdef/root", DiskFormat::Device),
                disk(DiskRole::Work, "/s/disks/work.raw", DiskFormat::Raw),
            ],
            network: Some(NetworkPlan {
                kind: NetworkKind::Tap("tap-fc-3".into()),
                mac: "02:fc:ac:10:00:05".into(),
            }),
            slot: Some(3),
            resume: None,
            paths: MachinePaths {
                state: "/s".into(),
                run: "/r".into(),
            },
        }
    }

    #[test]
    fn a_machine_in_calls() {
        let plan = plan();
        let names = Names::direct(&plan).unwrap();
        let puts: Vec<(String, Value)> = boot(&plan, &names)
            .unwrap()
            .into_iter()
            .map(|p| (p.path, p.body))
            .collect();
        // Whoever has to change what is saved here raises STATE_FORM.
        let drive = |name: &str| {
            json!({
                "drive_id": name, "path_on_host": format!("engine/{name}"), "is_root_device": false,
                "is_read_only": false, "cache_type": "Writeback", "io_engine": "Sync",
            })
        };
        let expected = [
            (
                "/machine-config",
                json!({ "vcpu_count": 2, "mem_size_mib": 512, "smt": false, "track_dirty_pages": false }),
            ),
            (
                "/boot-source",
                json!({
                    "kernel_image_path": "/k/vmlinux", "initrd_path": "/k/initrd", "boot_args": "console=ttyS0 a=b",
                }),
            ),
            ("/drives/root", drive("root")),
            ("/drives/work", drive("work")),
            (
                "/network-interfaces/net0",
                json!({ "iface_id": "net0", "host_dev_name": "tap-fc-3", "guest_mac": "02:fc:ac:10:00:05" }),
            ),
            ("/vsock", json!({ "guest_cid": 3, "uds_path": "engine/run/agent.sock" })),
            ("/entropy", json!({})),
        ];
        let expected: Vec<(String, Value)> = expected.into_iter().map(|(p, b)| (p.to_owned(), b)).collect();
        assert_eq!((STATE_FORM, puts), (1, expected));
    }

    #[test]
    fn no_name_that_is_saved_tells_the_machine() {
        let mut plan = plan();
        for names in [Names::direct(&plan).unwrap(), Names::jailed(&plan, true)] {
            let puts = boot(&plan, &names).unwrap();
            for put in puts
                .iter()
                .filter(|p| p.path.starts_with("/drives") || p.path == "/vsock")
            {
                let text = put.body.to_string();
                assert!(!text.contains("0123") && !text.contains("/s/"), "{text}");
            }
        }
        plan.resume = Some(Saved {
            memory: "/t/memory".into(),
            state: "/t/state".into(),
        });
        let direct = load(&plan, &Names::direct(&plan).unwrap()).unwrap();
        assert_eq!((direct.snapshot_path.as_str(), direct.resume_vm), ("/t/state", false));
        let jailed = load(&plan, &Names::jailed(&plan, false)).unwrap();
        assert_eq!(
            (jailed.snapshot_path.as_str(), jailed.mem_backend.backend_path.as_str()),
            ("state", "memory")
        );
        assert_eq!(jailed.network_overrides[0].host_dev_name, "tap-fc-3");
        plan.network = None;
        assert!(
            load(&plan, &Names::jailed(&plan, false))
                .unwrap()
                .network_overrides
                .is_empty()
        );
    }

    #[test]
    fn metrics_only_where_there_is_a_pipe() {
        let paths = |names: &Names| -> Vec<String> { first(names).unwrap().into_iter().map(|p| p.path).collect() };
        assert_eq!(paths(&Names::jailed(&plan(), true)), ["/logger", "/metrics"]);
        assert_eq!(paths(&Names::jailed(&plan(), false)), ["/logger"]);
    }

    #[test]
    fn what_firecracker_could_not_do_is_refused_before() {
        let refused = |change: &dyn Fn(&mut BootPlan)| {
            let mut plan = plan();
            change(&mut plan);
            matches!(check(&plan), Err(EngineError::Unsupported { .. }))
        };
        assert!(!refused(&|_| {}));
        assert!(!refused(&|p| p.network = None));
        assert!(refused(&|p| p.accel = Accel::Tcg));
        assert!(refused(&|p| p.vcpu = 0));
        assert!(refused(&|p| p.vcpu = 33));
        assert!(refused(&|p| p.memory_mib = 0));
        assert!(refused(&|p| p.cmdline = "x".repeat(1801)));
        assert!(refused(&|p| p.disks[0].format = DiskFormat::Qcow2));
        assert!(refused(&|p| p.disks[1].base = Some("/b".into())));
        assert!(refused(&|p| p.disks[1].layers = vec!["/b".into()]));
        let network = |p: &mut BootPlan, kind: NetworkKind, mac: &str| {
            p.network = Some(NetworkPlan {
                kind,
                mac: mac.to_owned(),
            });
        };
        assert!(refused(&|p| network(p, NetworkKind::User, "02:fc:ac:10:00:05")));
        assert!(refused(&|p| network(
            p,
            NetworkKind::Tap("a b".into()),
            "02:fc:ac:10:00:05"
        )));
        assert!(refused(&|p| network(
            p,
            NetworkKind::Tap("tap".into()),
            "02:fc:ac:10:00"
        )));
    }
}
