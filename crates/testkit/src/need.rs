//! What a host must have for a test.
//!
//! A developer's machine may lack a part: the test says so and is skipped. Continuous integration may not lack a package,
//! since it has just installed them all: there the skip is a failure.

use std::path::{Path, PathBuf};

use crate::{base, binaries};

/// Something that a test needs of its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// banger's programs have been built.
    Programs,
    /// An engine.
    Qemu,
    /// What builds a default image.
    ImageTools,
    /// Kernel and default images, ready to be shared. Includes the three above.
    Base,
    /// The OpenSSH client.
    Ssh,
    /// git.
    Git,
    /// root.
    Root,
    /// A mount namespace of one's own with a tmpfs in it.
    MountNamespace,
    /// System mode without systemd: root, network namespaces, taps, rules. Includes the base.
    System,
}

/// What is missing, if anything. Fails where a missing package is a fault of the set-up.
pub fn missing(needs: &[Need]) -> Option<String> {
    let (need, reason) = needs.iter().find_map(|&n| Some((n, lacks(n)?)))?;
    let host_limit = matches!(need, Need::Root | Need::MountNamespace | Need::System);
    assert!(host_limit || !in_ci(), "skipping is no choice under CI=true: {reason}");
    Some(reason)
}

/// What a test ends with that finds out in the middle that it cannot run: its harness counts it as skipped, with the reason.
#[derive(Debug)]
pub struct Skip(pub String);

/// Ends the test as skipped.
pub fn skip(reason: impl Into<String>) -> ! {
    // No panic: nothing is said of where, and no hook is called.
    std::panic::resume_unwind(Box::new(Skip(reason.into())))
}

/// Ends the test as skipped where something is missing.
pub fn require(needs: &[Need]) {
    if let Some(reason) = missing(needs) {
        skip(reason);
    }
}

/// For plain `#[test]` functions: says why the test is skipped; `true` when all is there.
pub fn have(needs: &[Need]) -> bool {
    match missing(needs) {
        None => true,
        Some(reason) => {
            eprintln!("skipped: {reason}");
            false
        }
    }
}

/// Whether this is a run of continuous integration.
pub fn in_ci() -> bool {
    std::env::var_os("CI").is_some_and(|v| v == "true" || v == "1")
}

fn lacks(need: Need) -> Option<String> {
    match need {
        Need::Programs => binaries::directory().err(),
        Need::Qemu => lacks_program("qemu-system-x86_64"),
        Need::ImageTools => lacks_program("mmdebstrap"),
        Need::Base => [Need::Programs, Need::Qemu, Need::ImageTools]
            .into_iter()
            .find_map(lacks)
            .or_else(|| base::get().err()),
        Need::Ssh => lacks_program("ssh"),
        Need::Git => lacks_program("git"),
        Need::System => lacks(Need::Root)
            .or_else(|| {
                ["nft", "ip", "setpriv", "nsenter", "unshare"]
                    .into_iter()
                    .find_map(lacks_program)
            })
            .or_else(|| (!Path::new("/dev/net/tun").exists()).then(|| "this host has no /dev/net/tun".to_owned()))
            .or_else(|| {
                let rules = std::process::Command::new("unshare")
                    .args(["-n", "nft", "list", "ruleset"])
                    .stderr(std::process::Stdio::null())
                    .status()
                    .is_ok_and(|s| s.success());
                (!rules).then(|| "this host gives no network namespace with nftables in it".to_owned())
            })
            .or_else(|| lacks(Need::Base)),
        Need::Root => (!rustix::process::getuid().is_root()).then(|| "this test needs root".to_owned()),
        Need::MountNamespace => lacks_program("unshare").or_else(|| {
            let works = std::process::Command::new("unshare")
                .args(namespace_flags())
                .args(["sh", "-c", "mount -t tmpfs none /mnt"])
                .stderr(std::process::Stdio::null())
                .status()
                .is_ok_and(|s| s.success());
            (!works).then(|| "this host gives no mount namespace with a tmpfs in it".to_owned())
        }),
    }
}

/// Flags of `unshare` for a mount namespace in which a file system can be mounted.
pub fn namespace_flags() -> &'static [&'static str] {
    if rustix::process::getuid().is_root() {
        &["-m"]
    } else {
        &["-Urm"]
    }
}

fn lacks_program(name: &str) -> Option<String> {
    which(name).is_none().then(|| format!("{name} is not installed"))
}

/// The first program of a name on `PATH`.
pub fn which(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|d| d.join(name))
        .find(|p| is_executable(p))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}
