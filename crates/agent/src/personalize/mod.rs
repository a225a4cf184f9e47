//! Making the machine itself: name, addresses, keys, clock, randomness. Done at each start, before anything of the image runs.
//!
//! The image may be odd (no `/etc`, links where files are expected). A step that fails is told on the console and the others
//! are done: a machine without its name in `/etc/hosts` is better than none.

use std::io;
use std::path::Path;

use banger_proto::agent::{GuestNetwork, POWERS_OFF, Personalize};
use banger_proto::error::{ApiError, ErrorCode};
use rustix::time::{ClockId, Timespec};

use crate::{console, power};

pub mod edit;
pub mod net;
pub mod place;

use place::Place;

/// Where the machine's SSH host key lies, below `/run/banger`.
pub const HOST_KEY: &str = "ssh_host_ed25519_key";

/// Checks what can be checked without touching anything.
pub fn check(wanted: &Personalize) -> Result<(), ApiError> {
    let refuse = |message: String| Err(ApiError::new(ErrorCode::InvalidSpec, message));
    if edit::machine_id(&wanted.machine_id).is_none() {
        return refuse(format!(
            "machine id `{}` is not sixteen hexadecimal digits",
            wanted.machine_id
        ));
    }
    if !edit::is_host_name(&wanted.hostname) {
        return refuse(format!("`{}` is not a host name", wanted.hostname));
    }
    check_entropy(&wanted.entropy)?;
    if let Some(network) = &wanted.network
        && net::Addresses::of(network).is_none()
    {
        return refuse(format!(
            "`{}/{}` via `{}` (MAC `{}`) is not an IPv4 configuration",
            network.address,
            network.prefix,
            network.gateway,
            network.mac.as_deref().unwrap_or("unchanged")
        ));
    }
    let known = |u: &&String| edit::is_unit(u) || edit::is_generator(u) || edit::wish(u).is_some();
    if let Some(unit) = wanted.mask_units.iter().find(|u| !known(u)) {
        return refuse(format!("`{unit}` is not the name of a unit, a generator or a wish"));
    }
    Ok(())
}

/// Checks what is to be added to the kernel's pool.
pub fn check_entropy(hex: &str) -> Result<(), ApiError> {
    match edit::entropy(hex) {
        Some(_) => Ok(()),
        None => Err(ApiError::new(
            ErrorCode::InvalidSpec,
            "the entropy is not 64 bytes in hexadecimal",
        )),
    }
}

/// Randomness and time of a machine that goes on after it was saved.
pub(crate) fn wake(time_ns: u64, entropy: &str) -> Result<(), ApiError> {
    must("add entropy", add_entropy(entropy))?;
    must("set the clock", set_clock(time_ns))
}

/// Makes a copy of a machine the machine that `wanted` says. Unlike at a first start, what makes it another one must not fail:
/// it would go on as somebody else.
pub(crate) fn take_on(root: &Path, wanted: &Personalize, network: Option<&GuestNetwork>) -> Result<(), ApiError> {
    must(
        "set the host name",
        rustix::system::sethostname(wanted.hostname.as_bytes()).map_err(io::Error::from),
    )?;
    let old = network.and_then(net::Addresses::of);
    let new = wanted.network.as_ref().and_then(net::Addresses::of);
    must("configure eth0", net::change("eth0", old.as_ref(), new.as_ref()))?;
    let root = must("open /", Place::open(root))?;
    must("write /etc", write_etc(&root, wanted))?;
    must("write the SSH host key", write_host_key(&root, wanted))?;
    step("write /root/.ssh/authorized_keys", write_keys(&root, wanted));
    Ok(())
}

/// Writes the files that a copy will write, as they are. What the kernel has to set up for that it sets up now.
pub(crate) fn rehearse(root: &Path) {
    let Ok(root) = Place::open(root) else { return };
    for (directory, name) in [
        ("etc", "hostname"),
        ("etc", "hosts"),
        ("etc", "machine-id"),
        ("run/banger", HOST_KEY),
        ("root/.ssh", "authorized_keys"),
    ] {
        if let Ok(place) = root.below(directory) {
            // A copy does without it too.
            let _ = place.rewrite(name);
        }
    }
}

fn must<T>(what: &str, result: io::Result<T>) -> Result<T, ApiError> {
    result.map_err(|e| ApiError::new(ErrorCode::Guest, format!("can't {what}: {e}")))
}

/// What the kernel is told.
pub fn tell_kernel(wanted: &Personalize) {
    step("set the clock", set_clock(wanted.time_ns));
    step("add entropy", add_entropy(&wanted.entropy));
    step(
        "set the host name",
        rustix::system::sethostname(wanted.hostname.as_bytes()).map_err(io::Error::from),
    );
    step("bring loopback up", net::loopback_up());
    if let Some(addresses) = wanted.network.as_ref().and_then(net::Addresses::of) {
        step("configure eth0", net::configure("eth0", &addresses));
    }
}

/// What is written into the file system whose root is `root`.
pub fn write_files(root: &Path, wanted: &Personalize) {
    let root = match Place::open(root) {
        Ok(root) => root,
        Err(e) => return step("open the root file system", Err(e)),
    };
    step("write /etc", write_etc(&root, wanted));
    step("write /root/.ssh/authorized_keys", write_keys(&root, wanted));
    step("write the SSH host key", write_host_key(&root, wanted));
    step("mask units", mask_units(&root, wanted));
    if power::ends_by_restart() {
        step("change how systemd powers off", power_off_by_restart(&root));
    }
}

fn step(what: &str, result: io::Result<()>) {
    if let Err(e) = result {
        console::say(&format!("can't {what}: {e}"));
    }
}

fn set_clock(ns: u64) -> io::Result<()> {
    let tv_sec = i64::try_from(ns / 1_000_000_000).map_err(io::Error::other)?;
    let tv_nsec = i64::try_from(ns % 1_000_000_000).map_err(io::Error::other)?;
    Ok(rustix::time::clock_settime(
        ClockId::Realtime,
        Timespec { tv_sec, tv_nsec },
    )?)
}

fn add_entropy(hex: &str) -> io::Result<()> {
    let Some(bytes) = edit::entropy(hex) else { return Ok(()) };
    crate::sys::add_entropy(std::fs::File::open("/dev/urandom")?, bytes)
}

fn write_etc(root: &Place, wanted: &Personalize) -> io::Result<()> {
    let etc = root.make("etc", 0o755)?;
    etc.edit("hostname", 0o644, |_| format!("{}\n", wanted.hostname))?;
    etc.edit("hosts", 0o644, |old| edit::hosts(old, &wanted.hostname))?;
    if let Some(id) = edit::machine_id(&wanted.machine_id) {
        etc.edit("machine-id", 0o444, |_| format!("{id}\n"))?;
    }
    if let Some(network) = &wanted.network {
        etc.edit("resolv.conf", 0o644, |_| edit::resolv_conf(&network.dns))?;
    }
    Ok(())
}

fn write_keys(root: &Place, wanted: &Personalize) -> io::Result<()> {
    if wanted.authorized_keys.is_empty() {
        return Ok(());
    }
    ssh_directory(root)?.edit("authorized_keys", 0o600, |old| {
        edit::authorized_keys(old, &wanted.authorized_keys)
    })
}

fn ssh_directory(root: &Place) -> io::Result<Place> {
    if let Ok(ssh) = root.below("root/.ssh")
        && ssh.mode()? == 0o700
    {
        return Ok(ssh);
    }
    let ssh = root.make("root", 0o700)?.make(".ssh", 0o700)?;
    ssh.set(0o700, None)?;
    Ok(ssh)
}

/// Makes the files that every copy of a template fills in, so that a copy has only to write them.
pub(crate) fn lay_out(root: &Path) -> io::Result<()> {
    let root = Place::open(root)?;
    ssh_directory(&root)?.edit("authorized_keys", 0o600, str::to_owned)?;
    host_key(&root, "")
}

fn write_host_key(root: &Place, wanted: &Personalize) -> io::Result<()> {
    let Some(key) = &wanted.ssh_host_key else {
        // Another machine's must not stay.
        return match root.below("run/banger") {
            Ok(run) => run.remove(HOST_KEY),
            Err(_) => Ok(()),
        };
    };
    host_key(root, &format!("{}\n", key.trim_end()))
}

fn host_key(root: &Place, key: &str) -> io::Result<()> {
    let run = match root.below("run/banger") {
        Err(_) => root.make("run/banger", 0o700)?,
        Ok(run) => run,
    };
    run.edit(HOST_KEY, 0o600, |_| key.to_owned())?;
    // An sshd that the user starts finds the same key, unless there is one already. The disk itself holds none, so a copy of it
    // gives no identity away.
    match root.below("etc/ssh") {
        Ok(etc) if etc.read(HOST_KEY).is_empty() => etc.link(HOST_KEY, &format!("/run/banger/{HOST_KEY}")),
        _ => Ok(()),
    }
}

/// Has systemd restart the machine where it is told to power it off, and say so to the host: a board without power to cut would halt
/// instead, and its engine stay for ever.
fn power_off_by_restart(root: &Place) -> io::Result<()> {
    let text = format!(
        "[Unit]\nSuccessAction=reboot-force\n[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo \"<0>banger-agent: {POWERS_OFF}\" >/dev/kmsg'\n"
    );
    let control = root.make("run/systemd/system.control", 0o755)?;
    for service in ["systemd-poweroff.service.d", "systemd-halt.service.d"] {
        control.make(service, 0o755)?.write("banger.conf", 0o644, &text)?;
    }
    Ok(())
}

fn mask_units(root: &Place, wanted: &Personalize) -> io::Result<()> {
    if wanted.mask_units.is_empty() {
        return Ok(());
    }
    // Of the directories in /run this is the one that systemd reads before /etc.
    let control = root.make("run/systemd/system.control", 0o755)?;
    let generators = root.make("run/systemd/system-generators", 0o755)?;
    for name in &wanted.mask_units {
        if let Some((directory, unit)) = edit::wish(name) {
            control.make(directory, 0o755)?.link(unit, "/dev/null")?;
        } else if edit::is_generator(name) {
            generators.link(name, "/dev/null")?;
        } else if edit::is_unit(name) {
            control.link(name, "/dev/null")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_restarts_what_has_no_power_to_cut_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        power_off_by_restart(&Place::open(dir.path()).unwrap()).unwrap();
        let file = dir
            .path()
            .join("run/systemd/system.control/systemd-poweroff.service.d/banger.conf");
        let text = std::fs::read_to_string(file).unwrap();
        assert!(text.contains("SuccessAction=reboot-force\n"), "{text}");
        assert!(
            text.contains(&format!("banger-agent: {POWERS_OFF}\" >/dev/kmsg'\n")),
            "{text}"
        );
    }
}
