//! The command line of QEMU for a plan: a pure function.
//!
//! Every node of every disk is named with its driver, so that nothing is probed: neither a guest nor an image can make a file
//! be read as something else. Nothing here is secret, for everybody on the host can read it.

use std::path::{Path, PathBuf};

use banger_core::host::Accel;
use banger_core::id::MachineId;
use banger_core::plan::{BootPlan, Disk, DiskFormat, NetworkKind};

use super::block::{self, Access};
use super::{ENGINE, stall};
use crate::engine::EngineError;
use crate::start;

/// The processor under emulation. Without the "fast string" bits, kernel and C library copy with vector registers instead of
/// `rep movsb`, which TCG emulates byte by byte: reading `/dev/zero` in a guest went from 0.2 GB/s to 1.5 GB/s and more.
const EMULATED_CPU: &str = "max,-erms,-fsrm";

/// The devices of a machine as they are saved. Raised with every change of the arguments after which saved state would not fit:
/// devices, their order and properties, machine type and processor.
pub const STATE_FORM: u32 = 1;

/// Longest kernel line that x86 kernels take.
const KERNEL_LINE: usize = 2047;
/// Name of the port on which the agent listens.
const AGENT_PORT: &str = "banger.agent";
/// Size of the cache for translated code in MiB. The default of 1 GiB would be filled, over days, by every machine.
const TRANSLATION_CACHE: u32 = 512;

/// Ends a QEMU that a guest has taken over from starting programs and changing identity.
pub(super) const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// What the driver knows beyond the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    /// Start with qboot, which does less than SeaBIOS. Where it is not installed QEMU picks.
    pub qboot: bool,
}

/// Name of the guest, by which QEMU answers.
pub fn guest_name(id: &MachineId) -> String {
    format!("banger-{}", id.as_str())
}

/// Name of the process: as much of the guest's as fits.
pub fn process_name(id: &MachineId) -> String {
    format!("banger-{}", id.short())
}

/// What every process name begins with.
pub const PROCESS_PREFIX: &str = "banger-";

/// The argument of `-name`.
pub fn name_argument(id: &MachineId) -> String {
    format!("guest={},process={}", guest_name(id), process_name(id))
}

/// The argument of `-chardev` for the control socket. With [`name_argument`] it tells a machine's engine from all others.
pub fn control_argument(socket: &Path) -> Result<String, EngineError> {
    Ok(format!(
        "socket,id=control,path={},server=on,wait=off",
        escaped(socket)?
    ))
}

/// The whole command line, without the binary.
pub fn args(plan: &BootPlan, setup: &Setup) -> Result<Vec<String>, EngineError> {
    let mut line = Line::default();
    line.pair("-name", name_argument(&plan.id));
    for flag in ["-no-user-config", "-nodefaults", "-no-reboot"] {
        line.flag(flag);
    }
    line.pair("-display", "none");
    line.pair("-sandbox", SANDBOX);
    machine(&mut line, plan, setup)?;
    boot(&mut line, plan)?;
    for disk in &plan.disks {
        drive(&mut line, disk)?;
    }
    channel(&mut line, plan)?;
    network(&mut line, plan)?;
    line.pair("-object", "rng-random,id=entropy,filename=/dev/urandom");
    line.pair("-device", "virtio-rng-device,rng=entropy");
    // The shim reads standard output. Standard input is /dev/null.
    line.pair("-chardev", "stdio,id=console,signal=off");
    line.pair("-serial", "chardev:console");
    line.pair("-chardev", control_argument(&socket(plan.paths.control_socket())?)?);
    line.pair("-mon", "chardev=control,mode=control");
    let events = escaped(&stall::socket(&plan.paths.control_socket()))?;
    line.pair("-chardev", format!("socket,id=events,path={events},server=on,wait=off"));
    line.pair("-mon", "chardev=events,mode=control");
    if plan.resume.is_some() {
        // The state comes over the control socket, and nothing runs before somebody says so.
        line.flag("-S");
        line.pair("-incoming", "defer");
    }
    Ok(line.0)
}

fn machine(line: &mut Line, plan: &BootPlan, setup: &Setup) -> Result<(), EngineError> {
    let mut machine =
        "microvm,memory-backend=memory,auto-kernel-cmdline=off,dump-guest-core=off,mem-merge=off,suppress-vmdesc=on"
            .to_owned();
    if setup.qboot {
        machine.push_str(",x-option-roms=off");
        line.pair("-bios", "qboot.rom");
    }
    line.pair("-machine", machine);
    // Clock, interrupt controller and timer of old stay on: under emulation the kernel hangs without them.
    match plan.accel {
        Accel::Kvm => {
            line.pair("-accel", "kvm");
            line.pair("-cpu", "host");
        }
        Accel::Tcg => {
            line.pair("-accel", format!("tcg,thread=multi,tb-size={TRANSLATION_CACHE}"));
            line.pair("-cpu", EMULATED_CPU);
        }
    }
    if plan.vcpu == 0 || plan.memory_mib == 0 {
        return Err(unsupported("run a machine without processor or memory"));
    }
    line.pair("-smp", plan.vcpu.to_string());
    line.pair("-m", format!("{}M", plan.memory_mib));
    let size = format!("id=memory,size={}M", plan.memory_mib);
    line.pair(
        "-object",
        match &plan.resume {
            None => format!("memory-backend-ram,{size},share=off"),
            // Mapped privately: any number of machines go on from one file, and none changes it.
            Some(saved) => format!(
                "memory-backend-file,{size},mem-path={},share=off",
                escaped(&saved.memory)?
            ),
        },
    );
    line.pair("-overcommit", "mem-lock=off,cpu-pm=off");
    // Version 1 of virtio, not what was before it.
    line.pair("-global", "virtio-mmio.force-legacy=false");
    // A state that is saved without its memory has no such section, and is refused where one is expected.
    line.pair("-global", "migration.send-configuration=off");
    Ok(())
}

fn boot(line: &mut Line, plan: &BootPlan) -> Result<(), EngineError> {
    line.pair("-kernel", text(&plan.kernel)?);
    line.pair("-initrd", text(&plan.initrd)?);
    if plan.cmdline.len() > KERNEL_LINE {
        return Err(unsupported(&format!(
            "pass a kernel line of {} bytes: {KERNEL_LINE} is the most",
            plan.cmdline.len()
        )));
    }
    line.pair("-append", plan.cmdline.clone());
    Ok(())
}

/// A disk: what it consists of, and the device.
fn drive(line: &mut Line, disk: &Disk) -> Result<(), EngineError> {
    for node in block::nodes(disk, Access::Write)? {
        line.pair("-blockdev", node.to_string());
    }
    let name = disk.serial.serial();
    // What can't be written to a file may be written later. What fails on a device has failed for good, and is the guest's to know.
    let policy = match disk.format {
        DiskFormat::Device => "report",
        DiskFormat::Raw | DiskFormat::Qcow2 => "stop",
    };
    line.pair(
        "-device",
        format!("virtio-blk-device,drive={name},serial={name},werror={policy},rerror=report"),
    );
    Ok(())
}

fn channel(line: &mut Line, plan: &BootPlan) -> Result<(), EngineError> {
    let path = socket(plan.paths.agent_socket())?;
    line.pair("-device", "virtio-serial-device,max_ports=2");
    line.pair(
        "-chardev",
        format!("socket,id=agent,path={},server=on,wait=off", escaped(&path)?),
    );
    line.pair("-device", format!("virtserialport,chardev=agent,name={AGENT_PORT}"));
    Ok(())
}

fn network(line: &mut Line, plan: &BootPlan) -> Result<(), EngineError> {
    let Some(network) = &plan.network else { return Ok(()) };
    let octets: Vec<&str> = network.mac.split(':').collect();
    let fits = |o: &&str| o.len() == 2 && o.bytes().all(|b| b.is_ascii_hexdigit());
    if octets.len() != 6 || !octets.iter().all(fits) {
        return Err(unsupported(&format!("use {:?} as MAC address", network.mac)));
    }
    match &network.kind {
        // IPv4 alone: what the guest cannot name it cannot reach.
        NetworkKind::User => line.pair("-netdev", "user,id=net0,ipv4=on,ipv6=off"),
        // It is there, and this user's to open; no program is run for it.
        NetworkKind::Tap(name) => {
            let fits = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
            if !fits || !(1..=15).contains(&name.len()) {
                return Err(unsupported(&format!("use {name:?} as a tap")));
            }
            line.pair(
                "-netdev",
                format!("tap,id=net0,ifname={name},script=no,downscript=no,vhost=off"),
            );
        }
    }
    // A restored guest need not announce itself to a network that nobody else is in.
    let device = format!("virtio-net-device,netdev=net0,mac={},guest_announce=off", network.mac);
    line.pair("-device", device);
    Ok(())
}

/// A command line under construction.
#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.to_owned());
    }

    fn pair(&mut self, flag: &str, value: impl Into<String>) {
        self.flag(flag);
        self.0.push(value.into());
    }
}

/// A path as text. QEMU's options are text, so other paths cannot be told to it.
pub(super) fn text(path: &Path) -> Result<String, EngineError> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| unsupported(&format!("use {}: its name is not UTF-8", path.display())))
}

/// A path inside a comma separated option.
fn escaped(path: &Path) -> Result<String, EngineError> {
    Ok(text(path)?.replace(',', ",,"))
}

/// A path that fits a socket address.
pub(super) fn socket(path: PathBuf) -> Result<PathBuf, EngineError> {
    start::socket(ENGINE, path)
}

pub(super) fn unsupported(what: &str) -> EngineError {
    start::unsupported(ENGINE, what)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use banger_core::plan::{DiskFormat, DiskRole, MachinePaths, NetworkPlan, Saved};

    use super::*;

    fn plan() -> BootPlan {
        BootPlan {
            id: MachineId::parse("0123456789abcdef").unwrap(),
            accel: Accel::Tcg,
            vcpu: 2,
            memory_mib: 512,
            kernel: "/k/vmlinux".into(),
            initrd: "/k/initrd".into(),
            cmdline: "console=ttyS0 a=b,c".into(),
            disks: vec![
                Disk {
                    serial: DiskRole::Root,
                    path: "/s/root.qcow2".into(),
                    format: DiskFormat::Qcow2,
                    layers: Vec::new(),
                    base: Some("/i/image,\"1\".ext4".into()),
                },
                Disk {
                    serial: DiskRole::Work,
                    path: "/s/work.ext4".into(),
                    format: DiskFormat::Raw,
                    layers: Vec::new(),
                    base: None,
                },
            ],
            network: Some(NetworkPlan {
                kind: NetworkKind::User,
                mac: "02:01:23:45:67:89".into(),
            }),
            slot: None,
            resume: None,
            paths: MachinePaths {
                state: "/s".into(),
                run: "/r".into(),
            },
        }
    }

    fn setup() -> Setup {
        Setup { qboot: true }
    }

    /// Values of an option, in order.
    fn values<'a>(args: &'a [String], flag: &str) -> Vec<&'a str> {
        args.windows(2)
            .filter(|w| w[0] == flag)
            .map(|w| w[1].as_str())
            .collect()
    }

    #[test]
    fn every_disk_has_its_nodes_and_its_device() {
        let args = args(&plan(), &setup()).unwrap();
        let nodes: Vec<serde_json::Value> = values(&args, "-blockdev")
            .iter()
            .map(|n| serde_json::from_str(n).unwrap())
            .collect();
        let names: Vec<&str> = nodes.iter().map(|n| n["node-name"].as_str().unwrap()).collect();
        assert_eq!(
            names,
            ["root-base-file", "root-base", "root-file", "root", "work-file", "work"]
        );
        assert_eq!(
            values(&args, "-device")[..2],
            [
                "virtio-blk-device,drive=root,serial=root,werror=stop,rerror=report",
                "virtio-blk-device,drive=work,serial=work,werror=stop,rerror=report"
            ]
        );
    }

    #[test]
    fn acceleration_decides_the_processor() {
        let mut plan = plan();
        let line = args(&plan, &setup()).unwrap();
        assert_eq!(
            (values(&line, "-cpu"), values(&line, "-accel")),
            (vec![EMULATED_CPU], vec!["tcg,thread=multi,tb-size=512"])
        );
        plan.accel = Accel::Kvm;
        let line = args(&plan, &setup()).unwrap();
        assert_eq!(
            (values(&line, "-cpu"), values(&line, "-accel")),
            (vec!["host"], vec!["kvm"])
        );
    }

    #[test]
    fn name_and_control_socket_tell_the_machine() {
        let line = args(&plan(), &setup()).unwrap();
        assert_eq!(
            values(&line, "-name"),
            ["guest=banger-0123456789abcdef,process=banger-01234567"]
        );
        assert!(process_name(&plan().id).len() <= 15);
        assert!(values(&line, "-chardev").contains(&"socket,id=control,path=/r/control.sock,server=on,wait=off"));
        assert!(values(&line, "-chardev").contains(&"socket,id=agent,path=/r/agent.sock,server=on,wait=off"));
    }

    #[test]
    fn it_is_locked_in_and_shut_off() {
        let line = args(&plan(), &setup()).unwrap();
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            assert!(line.iter().any(|a| a == flag), "{flag}");
        }
        assert!(values(&line, "-sandbox")[0].contains("spawn=deny"));
        let netdev = values(&line, "-netdev")[0].to_owned();
        assert!(!netdev.contains("hostfwd") && !netdev.contains("smb") && !netdev.contains("tftp"));
        let mut without = plan();
        without.network = None;
        assert!(values(&args(&without, &setup()).unwrap(), "-netdev").is_empty());
    }

    #[test]
    fn what_goes_on_maps_its_memory_privately_and_waits() {
        let line = args(&plan(), &setup()).unwrap();
        assert!(values(&line, "-object").contains(&"memory-backend-ram,id=memory,size=512M,share=off"));
        assert!(values(&line, "-incoming").is_empty() && !line.iter().any(|a| a == "-S"));
        let mut resumed = plan();
        resumed.resume = Some(Saved {
            memory: "/t/a,b".into(),
            state: "/t/state".into(),
        });
        let again = args(&resumed, &setup()).unwrap();
        assert!(
            values(&again, "-object").contains(&"memory-backend-file,id=memory,size=512M,mem-path=/t/a,,b,share=off")
        );
        assert_eq!(values(&again, "-incoming"), ["defer"]);
        assert!(again.iter().any(|a| a == "-S"));
        // Nothing else differs: the devices are those that were saved.
        let rest = |line: &[String]| -> Vec<String> {
            line.iter()
                .filter(|a| !a.starts_with("memory-backend") && !["-S", "-incoming", "defer"].contains(&a.as_str()))
                .cloned()
                .collect()
        };
        assert_eq!(rest(&line), rest(&again));
        for line in [line, again] {
            assert!(values(&line, "-global").contains(&"migration.send-configuration=off"));
            assert!(values(&line, "-machine")[0].contains("suppress-vmdesc=on"));
        }
    }

    #[test]
    fn a_change_of_devices_raises_the_form() {
        let line = args(&plan(), &setup()).unwrap();
        let shape: Vec<&str> = ["-machine", "-cpu", "-global", "-device"]
            .iter()
            .flat_map(|flag| values(&line, flag))
            .collect();
        // Whoever has to change this text raises STATE_FORM.
        let form_1 = "microvm,memory-backend=memory,auto-kernel-cmdline=off,dump-guest-core=off,mem-merge=off,suppress-vmdesc=on,\
                      x-option-roms=off max,-erms,-fsrm virtio-mmio.force-legacy=false migration.send-configuration=off \
                      virtio-blk-device,drive=root,serial=root virtio-blk-device,drive=work,serial=work \
                      virtio-serial-device,max_ports=2 virtserialport,chardev=agent,name=banger.agent \
                      virtio-net-device,netdev=net0,mac=02:01:23:45:67:89,guest_announce=off virtio-rng-device,rng=entropy";
        // What is done about errors is not saved.
        let shape = shape.join(" ").replace(",werror=stop,rerror=report", "");
        assert_eq!((STATE_FORM, shape.as_str()), (1, form_1));
    }

    #[test]
    fn a_comma_in_a_path_stays_in_the_path() {
        let mut plan = plan();
        plan.paths.run = "/r,server=off".into();
        let line = args(&plan, &setup()).unwrap();
        assert!(
            values(&line, "-chardev").contains(&"socket,id=agent,path=/r,,server=off/agent.sock,server=on,wait=off")
        );
    }

    #[test]
    fn what_qemu_could_not_do_is_refused_before() {
        let refused = |change: &dyn Fn(&mut BootPlan)| {
            let mut plan = plan();
            change(&mut plan);
            matches!(args(&plan, &setup()), Err(EngineError::Unsupported { .. }))
        };
        assert!(!refused(&|_| {}));
        assert!(refused(&|p| p.paths.run = format!("/{}", "x".repeat(100)).into()));
        assert!(!refused(&|p| p.paths.run = format!("/{}", "x".repeat(93)).into()));
        assert!(refused(&|p| p.cmdline = "x".repeat(2048)));
        assert!(refused(&|p| p.kernel = std::ffi::OsStr::from_bytes(b"/k\xff").into()));
        assert!(refused(&|p| p.vcpu = 0));
        for mac in ["", "02:01:23:45:67", "02:01:23:45:67:89,x=y", "02:01:23:45:67:zz"] {
            assert!(refused(&|p| p.network.as_mut().unwrap().mac = mac.to_owned()), "{mac}");
        }
    }

    #[test]
    fn the_line_is_the_same_for_the_same_plan() {
        assert_eq!(args(&plan(), &setup()).unwrap(), args(&plan(), &setup()).unwrap());
    }
}
