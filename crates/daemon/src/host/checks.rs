//! What `doctor` says of system mode. Looks only.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use banger_proto::api::{Check, CheckLevel};
use banger_system::net::{DNS_PORT, FIRST_OPEN_PORT};
use banger_system::units::{self, Unit};

use super::System;
use crate::doctor::check;
use crate::engines::{self, FIRECRACKER};
use crate::services::Services;

/// How long the helper may take to answer.
const PING: Duration = Duration::from_secs(2);
/// How long the first look at the network is waited for, right after the daemon's start.
const SETTLED: Duration = Duration::from_secs(10);
/// Descriptors that a daemon with many machines needs.
const DESCRIPTORS: u64 = 4096;
/// Modules that machines need, the place that shows that one is there, and what for.
const MODULES: [(&str, &str, &str); 3] = [
    ("tun", "/dev/net/tun", "taps"),
    (
        "dm-snapshot",
        "/dev/mapper/control",
        "disks that share their image (else whole copies or qcow2)",
    ),
    ("loop", "/dev/loop-control", "the same"),
];

/// All checks of the mode.
pub async fn run(services: &Services) -> Vec<Check> {
    let Some(system) = services.hosting.get() else {
        let text = "user: network, disks and engine without root";
        let hint = "for a bridge, NAT, names and Firecracker's jail: sudo banger system install";
        return vec![
            check("mode", CheckLevel::Pass, text, Some(hint.to_owned())),
            kvm(),
            storage(services).await,
        ];
    };
    let owner = &system.record.owner;
    let text = format!("system: {} (uid {})", owner.user, owner.uid);
    let mut checks = vec![check("mode", CheckLevel::Pass, text, None)];
    checks.push(helper(system).await);
    checks.extend(unit_files(system));
    checks.extend(firecracker(services, system).await);
    checks.push(kvm());
    checks.extend(MODULES.map(module));
    checks.push(storage(services).await);
    checks.push(limits());
    checks.extend(network(system).await);
    checks.extend(taps(services, Path::new("/sys")));
    checks.push(names(services, system));
    checks
}

async fn helper(system: &Arc<System>) -> Check {
    let socket = system.client.socket();
    let hint = || Some("look at it: systemctl status bangerd-root".to_owned());
    let looked = match std::fs::symlink_metadata(socket) {
        Ok(meta) => meta,
        Err(e) => {
            let text = format!("{}: {e}", socket.display());
            return check("helper", CheckLevel::Fail, text, hint());
        }
    };
    let owner = system.record.owner.uid;
    if !looked.file_type().is_socket() || looked.mode() & 0o777 != 0o600 || looked.uid() != owner {
        let text = format!(
            "{} has mode {:03o} and belongs to uid {}; a socket of uid {owner} with mode 600 is expected",
            socket.display(),
            looked.mode() & 0o777,
            looked.uid()
        );
        return check(
            "helper",
            CheckLevel::Fail,
            text,
            Some("sudo banger system restart".to_owned()),
        );
    }
    match system.ping(PING).await {
        Ok((version, pid)) if version == crate::version::VERSION => {
            check("helper", CheckLevel::Pass, format!("{version}, process {pid}"), None)
        }
        Ok((version, _)) => {
            let text = format!("it is {version}, the daemon is {}", crate::version::VERSION);
            check(
                "helper",
                CheckLevel::Warn,
                text,
                Some("sudo banger system restart".to_owned()),
            )
        }
        Err(e) => check("helper", CheckLevel::Fail, e.message, e.hint),
    }
}

/// The units as they are installed, against what they have to say.
fn unit_files(system: &System) -> Vec<Check> {
    let one = |unit: Unit| {
        let path = unit.path(&system.layout);
        let hint = || Some("sudo banger system install".to_owned());
        let Ok(text) = std::fs::read_to_string(&path) else {
            return check(
                unit.name(),
                CheckLevel::Fail,
                format!("{} is not there", path.display()),
                hint(),
            );
        };
        let lacking = units::lacking(unit, &text);
        if lacking.is_empty() {
            return check(unit.name(), CheckLevel::Pass, path.display().to_string(), None);
        }
        let text = format!("{} lacks {}", path.display(), lacking.join(", "));
        check(unit.name(), CheckLevel::Warn, text, hint())
    };
    Unit::ALL.into_iter().map(one).collect()
}

async fn firecracker(services: &Services, system: &System) -> Vec<Check> {
    let programs = &system.record.firecracker;
    let mut checks: Vec<Check> = [("firecracker", &programs.firecracker), ("jailer", &programs.jailer)]
        .into_iter()
        .map(|(name, path)| program(name, path))
        .collect();
    if checks.iter().all(|c| c.level == CheckLevel::Pass) {
        checks.push(match services.engine(FIRECRACKER).await {
            Ok(engine) => {
                let version = &engine.capabilities().version;
                match services.engines.warning() {
                    Some(warning) => check("firecracker version", CheckLevel::Warn, warning, None),
                    None => check("firecracker version", CheckLevel::Pass, version.clone(), None),
                }
            }
            Err(e) => check("firecracker version", CheckLevel::Warn, e.message, e.hint),
        });
    }
    let choice = engines::auto(services, "bridge").await;
    checks.push(check(
        "auto",
        CheckLevel::Pass,
        format!("{} for new machines: {}", choice.engine, choice.why),
        None,
    ));
    checks
}

/// A program that root starts must be one that only root can change.
fn program(name: &str, path: &Path) -> Check {
    let fail = |why: String| {
        let hint = format!(
            "install it as root, mode 755, or name another in install.toml ({})",
            path.display()
        );
        check(name, CheckLevel::Warn, why, Some(hint))
    };
    match std::fs::symlink_metadata(path) {
        Err(e) => fail(format!("{}: {e}", path.display())),
        Ok(meta) if !meta.is_file() => fail(format!("{} is not a regular file", path.display())),
        Ok(meta) if meta.uid() != 0 || meta.mode() & 0o022 != 0 => fail(format!(
            "{} belongs to uid {} with mode {:03o}: others than root can change it",
            path.display(),
            meta.uid(),
            meta.mode() & 0o777
        )),
        Ok(meta) if meta.mode() & 0o111 == 0 => fail(format!("{} is not executable", path.display())),
        Ok(_) => check(name, CheckLevel::Pass, path.display().to_string(), None),
    }
}

fn kvm() -> Check {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => check("/dev/kvm", CheckLevel::Pass, "it opens", None),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => check(
            "/dev/kvm",
            CheckLevel::Warn,
            "it is not there: machines are emulated",
            None,
        ),
        Err(e) => {
            let hint = format!("put this user into the group {}", units::KVM_GROUP);
            check(
                "/dev/kvm",
                CheckLevel::Warn,
                format!("it does not open: {e}"),
                Some(hint),
            )
        }
    }
}

fn module((name, place, purpose): (&str, &str, &str)) -> Check {
    if Path::new(place).exists() {
        return check(name, CheckLevel::Pass, format!("{place} is there"), None);
    }
    let text = format!("{place} is not there; it is needed for {purpose}");
    check(name, CheckLevel::Warn, text, Some(format!("modprobe {name}")))
}

async fn storage(services: &Services) -> Check {
    let network = if services.hosting.get().is_some() {
        "bridge"
    } else {
        "user"
    };
    let engine = engines::auto(services, network).await.engine;
    match services.form(engine).await {
        Ok(form) => {
            let shares = shares_blocks(&services.paths.state);
            let copies = if shares {
                "copies share blocks (reflink)"
            } else {
                "copies are sparse"
            };
            let text = format!("{} with {engine}; {copies}", form.as_str());
            check("storage", CheckLevel::Pass, text, None)
        }
        Err(e) => check("storage", CheckLevel::Warn, e.message, e.hint),
    }
}

/// Whether a file system copies by reference: by its kind, since nothing is written here.
fn shares_blocks(dir: &Path) -> bool {
    const BTRFS: i64 = 0x9123_683e;
    const XFS: i64 = 0x5846_5342;
    const BCACHEFS: i64 = 0xca45_1a4e;
    rustix::fs::statfs(dir).is_ok_and(|fs| [BTRFS, XFS, BCACHEFS].contains(&fs.f_type))
}

fn limits() -> Check {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    match limit.current {
        Some(open) if open < DESCRIPTORS => {
            let text = format!("{open} open files; many machines need {DESCRIPTORS}");
            check(
                "limits",
                CheckLevel::Warn,
                text,
                Some("LimitNOFILE= in bangerd.service".to_owned()),
            )
        }
        Some(open) => check("limits", CheckLevel::Pass, format!("{open} open files"), None),
        None => check("limits", CheckLevel::Pass, "any number of open files", None),
    }
}

async fn network(system: &System) -> Vec<Check> {
    let bridge = system.net.bridge();
    let place = PathBuf::from("/sys/class/net").join(bridge);
    let mut checks = Vec::new();
    let text = format!("{bridge}, {} in {}", system.net.gateway(), system.net.cidr());
    // A daemon that has just been started is about to make it.
    let settled = system.settled(SETTLED).await;
    checks.push(if place.join("bridge").is_dir() {
        check("bridge", CheckLevel::Pass, text, None)
    } else {
        let hint = "the daemon makes it again within seconds; look at its log: banger daemon logs";
        check(
            "bridge",
            CheckLevel::Fail,
            match settled {
                Some(Err(why)) => format!("{text}: it is not there: {why}"),
                _ => format!("{text}: it is not there"),
            },
            Some(hint.to_owned()),
        )
    });
    if let Some(asked) = &system.asked {
        let text = format!(
            "the configuration asks for {} on {}, the installation has {} on {bridge}",
            asked.text(),
            asked.bridge(),
            system.net.text()
        );
        let hint = "stop the machines, then: sudo banger system install";
        checks.push(check("network", CheckLevel::Warn, text, Some(hint.to_owned())));
    }
    checks.push(forwarding(Path::new("/proc"), bridge));
    let dns = system.dns();
    checks.push(if dns.is_empty() {
        let hint = "name some: dns = [\"…\"] under [network] in the configuration";
        check(
            "name servers",
            CheckLevel::Warn,
            "the host has none that a guest could reach",
            Some(hint.to_owned()),
        )
    } else {
        let dns: Vec<String> = dns.iter().map(ToString::to_string).collect();
        check(
            "name servers",
            CheckLevel::Pass,
            format!("guests ask {}", dns.join(", ")),
            None,
        )
    });
    checks
}

/// Machines that run without the tap that they were given.
fn taps(services: &Services, sys: &Path) -> Option<Check> {
    let missing = crate::audit::missing(services, sys);
    let names: Vec<&str> = missing.iter().map(|m| m.name.as_str()).collect();
    let first = missing.first()?;
    let text = format!("{} not there: {}", names.join(", "), first.why);
    Some(check("taps", CheckLevel::Fail, text, Some(first.hint.clone())))
}

/// Whether bridge and uplinks forward. Uplinks as the main table of routes has them; the helper looks at the others too.
fn forwarding(proc: &Path, bridge: &str) -> Check {
    let forwards = |name: &str| {
        let file = proc.join("sys/net/ipv4/conf").join(name).join("forwarding");
        std::fs::read_to_string(file).is_ok_and(|text| text.trim() != "0")
    };
    let uplinks = uplinks(&std::fs::read_to_string(proc.join("net/route")).unwrap_or_default());
    if uplinks.is_empty() {
        let hint = "machines reach what is outside by interfaces with a default route; docs/network.md";
        let text = "the host has no default route: machines reach nothing outside";
        return check("forwarding", CheckLevel::Warn, text, Some(hint.to_owned()));
    }
    let all = || std::iter::once(bridge).chain(uplinks.iter().map(String::as_str));
    let not: Vec<&str> = all().filter(|name| !forwards(name)).collect();
    if !not.is_empty() {
        let text = format!("{} does not forward: machines reach nothing outside", not.join(", "));
        let hint = "the daemon has it do so within seconds, unless the whole host forwards (net.ipv4.ip_forward): then it is a setting of yours";
        return check("forwarding", CheckLevel::Fail, text, Some(hint.to_owned()));
    }
    let text = format!("between {bridge} and {}", uplinks.join(", "));
    check("forwarding", CheckLevel::Pass, text, None)
}

/// Interfaces of default routes in `/proc/net/route`: name, destination, gateway, flags, three more, mask.
fn uplinks(routes: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for line in routes.lines().skip(1) {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        if let [name, destination, .., mask, _, _, _] = words[..]
            && (destination, mask) == ("00000000", "00000000")
            && name != "*"
            && !found.iter().any(|known| known == name)
        {
            found.push(name.to_owned());
        }
    }
    found
}

/// The first port that everybody may bind.
fn first_open_port(proc: &Path) -> u16 {
    let text = std::fs::read_to_string(proc.join("sys/net/ipv4/ip_unprivileged_port_start")).unwrap_or_default();
    text.trim().parse().unwrap_or(FIRST_OPEN_PORT)
}

/// Whether names below `.vm` are answered, and by whom they are asked for.
fn names(services: &Services, system: &System) -> Check {
    let port = services.config.network.dns_port;
    if let crate::dns::State::Failed { address, why } = services.dns.state() {
        let hint =
            "end whoever has that port, or give banger another one: dns_port = … under [network] in the configuration";
        let text = format!("names below .vm are not served at {address}: {why}");
        return check("names", CheckLevel::Fail, text, Some(hint.to_owned()));
    }
    let first = first_open_port(Path::new("/proc"));
    if port >= first {
        let text = format!("*.vm at 127.0.0.1:{port}: while the daemon is away any user of this host can answer there");
        let hint = if port == DNS_PORT {
            format!(
                "let only root bind it: net.ipv4.ip_unprivileged_port_start is {first}, above {DNS_PORT} it is held"
            )
        } else {
            format!("take the port that is held for it: no dns_port in the configuration, or {DNS_PORT}")
        };
        return check("names", CheckLevel::Warn, text, Some(hint));
    }
    let resolved = system.layout.root().join("run/systemd/resolve").is_dir();
    let text = format!("*.vm at 127.0.0.1:{port}");
    if resolved {
        return check("names", CheckLevel::Pass, format!("{text}, by systemd-resolved"), None);
    }
    let hint = format!(
        "have the host's resolver ask 127.0.0.1, port {port}, for names that end in .vm; dnsmasq: server=/vm/127.0.0.1#{port}"
    );
    check(
        "names",
        CheckLevel::Warn,
        format!("{text}; systemd-resolved does not run"),
        Some(hint),
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn bridge_and_uplinks_have_to_forward() {
        let tmp = tempfile::tempdir().unwrap();
        let looked = || forwarding(tmp.path(), "br-fc");
        assert_eq!(looked().level, CheckLevel::Warn);
        std::fs::create_dir_all(tmp.path().join("net")).unwrap();
        let routes = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                      eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                      eth0\t00000000\t020200C0\t0003\t0\t0\t9\t00000000\t0\t0\t0\n\
                      docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        std::fs::write(tmp.path().join("net/route"), routes).unwrap();
        for (name, value) in [("br-fc", "1\n"), ("eth0", "0\n")] {
            let dir = tmp.path().join("sys/net/ipv4/conf").join(name);
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join("forwarding"), value).unwrap();
        }
        assert!(looked().level == CheckLevel::Fail && looked().message.starts_with("eth0 does not"));
        std::fs::write(tmp.path().join("sys/net/ipv4/conf/eth0/forwarding"), "1\n").unwrap();
        assert!(looked().level == CheckLevel::Pass && looked().message.ends_with("and eth0"));
    }

    #[test]
    fn a_program_of_roots_is_roots_alone() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("firecracker");
        assert_eq!(program("f", &path).level, CheckLevel::Warn);
        std::fs::write(&path, "x").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o757)).unwrap();
        assert!(program("f", &path).message.contains("757"));
        let link = tmp.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(program("f", &link).message.contains("regular"));
    }
}
