//! `banger system status`.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use banger_proto::api::{Check, CheckLevel};
use banger_system::install::Layout;
use banger_system::units::{self, KVM_GROUP, Setting, Unit};
use clap::Args;

use super::{daemon_version, installed, systemd};
use crate::cli::{Context, OutputArgs};
use crate::commands::doctor;
use crate::error::Result;
use crate::paths::Installation;
use crate::system::files::look;
use crate::system::ground::PROGRAMS;
use crate::system::manager::Manager;
use crate::system::owner;

/// Show how the installation is: services, sockets, versions, units
///
/// Changes nothing and needs no root. The exit status is 3 when nothing is installed, 6 when a check fails.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger system status --json")]
pub(super) struct StatusArgs {
    #[command(flatten)]
    output: OutputArgs,
}

impl StatusArgs {
    pub(super) fn run(self, context: &Context) -> Result<u8> {
        let installation = installed(context)?;
        let checks = checks(context, &installation);
        doctor::show(context, self.output, checks)
    }
}

fn check(name: &str, level: CheckLevel, message: impl Into<String>, hint: Option<&str>) -> Check {
    Check {
        name: name.to_owned(),
        level,
        message: message.into(),
        hint: hint.map(str::to_owned),
    }
}

const INSTALL: &str = "sudo banger system install";
const RESTART: &str = "sudo banger system restart";

fn checks(context: &Context, installation: &Installation) -> Vec<Check> {
    let (layout, record) = (&installation.layout, &installation.record);
    let mut all = vec![
        check(
            "owner",
            CheckLevel::Pass,
            format!("{} (user {})", record.owner.user, record.owner.uid),
            None,
        ),
        check(
            "installed",
            CheckLevel::Pass,
            format!(
                "{} (commit {}) on {}",
                record.installed.version, record.installed.commit, record.installed.at
            ),
            None,
        ),
    ];
    all.push(check(
        "network",
        CheckLevel::Pass,
        format!("{} on {}", record.network.text(), record.network.bridge()),
        None,
    ));
    all.push(programs(layout));
    let manager = systemd(context);
    // Below another root directory no unit is systemd's.
    let real = *layout == Layout::default();
    for unit in Unit::ALL {
        all.push(text(unit, installation));
        if real && Unit::STARTED.contains(&unit) {
            all.push(service(&manager, unit));
        }
    }
    let uid = record.owner.uid;
    all.push(socket("helper socket", &layout.helper_socket(), uid));
    all.push(helper(context, &manager, uid));
    all.push(socket("daemon socket", &layout.socket(), uid));
    all.push(daemon(context, installation));
    all
}

fn programs(layout: &Layout) -> Check {
    let faults: Vec<String> = PROGRAMS
        .iter()
        .filter_map(|(name, internal)| {
            let path = if *internal { layout.libexec() } else { layout.bin() }.join(name);
            let why = match look(&path) {
                Ok(Some(found)) if !found.is_file() => "is not a file",
                Ok(Some(found)) if found.uid() != 0 && *layout == Layout::default() => "does not belong to root",
                Ok(Some(found)) if found.mode() & 0o022 != 0 => "can be written to by others than root",
                Ok(Some(_)) => return None,
                Ok(None) => "is not there",
                Err(_) => "cannot be looked at",
            };
            Some(format!("{} {why}", path.display()))
        })
        .collect();
    if faults.is_empty() {
        check("programs", CheckLevel::Pass, "all there, and root's", None)
    } else {
        check("programs", CheckLevel::Fail, faults.join("; "), Some(INSTALL))
    }
}

/// A unit's file, against what this banger would write.
fn text(unit: Unit, installation: &Installation) -> Check {
    let layout = &installation.layout;
    let groups = std::fs::read_to_string(layout.root().join("etc/group")).unwrap_or_default();
    let setting = Setting {
        layout,
        owner: &installation.record.owner,
        kvm_group: owner::has_group(&groups, KVM_GROUP),
    };
    let path = unit.path(layout);
    let name = format!("unit {}", unit.name());
    let Ok(found) = std::fs::read_to_string(&path) else {
        return check(&name, CheckLevel::Fail, format!("no {}", path.display()), Some(INSTALL));
    };
    let lacking = units::lacking(unit, &found);
    if !lacking.is_empty() {
        let message = format!("{} lacks {}", path.display(), lacking.join(", "));
        check(&name, CheckLevel::Fail, message, Some(INSTALL))
    } else if found != unit.text(&setting) {
        let message = format!("{} is not what this banger installs", path.display());
        check(&name, CheckLevel::Warn, message, Some(INSTALL))
    } else {
        check(&name, CheckLevel::Pass, path.display().to_string(), None)
    }
}

fn service(manager: &dyn Manager, unit: Unit) -> Check {
    let state = match manager.state(unit) {
        Ok(state) => state,
        Err(error) => return check(unit.name(), CheckLevel::Fail, error.message, None),
    };
    // What a drop-in says counts, not what the unit says.
    let promised = units::promised(unit);
    let weak: Vec<String> = state
        .in_force
        .iter()
        .filter(|(key, value)| promised.iter().any(|(k, v)| k == key && v != value))
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    if !weak.is_empty() {
        let message = format!("{} in force: machines may not survive its restart", weak.join(", "));
        return check(
            unit.name(),
            CheckLevel::Fail,
            message,
            Some("see `systemctl cat` for the drop-in"),
        );
    }
    match (state.active, state.enabled) {
        (true, true) => check(unit.name(), CheckLevel::Pass, state.words, None),
        (true, false) => check(
            unit.name(),
            CheckLevel::Warn,
            format!("{}, not started with the host", state.words),
            Some(INSTALL),
        ),
        _ => check(unit.name(), CheckLevel::Fail, state.words, Some(RESTART)),
    }
}

fn socket(name: &str, path: &Path, owner: u32) -> Check {
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        // The daemon's directory is closed to others than the owner.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            return check(
                name,
                CheckLevel::Pass,
                format!("{}: closed to you", path.display()),
                None,
            );
        }
        Err(_) => return check(name, CheckLevel::Fail, format!("no {}", path.display()), Some(RESTART)),
    };
    let (mode, uid) = (found.mode() & 0o777, found.uid());
    let message = format!("{} (mode {mode:04o}, user {uid})", path.display());
    if found.file_type().is_socket() && mode == 0o600 && uid == owner {
        check(name, CheckLevel::Pass, message, None)
    } else {
        let message = format!("{message}: a socket of mode 0600 of user {owner} is expected");
        check(name, CheckLevel::Fail, message, Some(RESTART))
    }
}

fn may_ask(context: &Context, owner: u32) -> bool {
    context.places.uid == owner || context.places.uid == 0
}

fn not_asked(name: &str) -> Check {
    check(name, CheckLevel::Pass, "not asked: it answers its owner and root", None)
}

fn helper(context: &Context, manager: &dyn Manager, owner: u32) -> Check {
    if !may_ask(context, owner) {
        return not_asked("helper");
    }
    match manager.version(Unit::Helper) {
        Ok(version) => versions("helper", &version),
        Err(why) => check(
            "helper",
            CheckLevel::Fail,
            format!("does not answer: {why}"),
            Some(RESTART),
        ),
    }
}

fn daemon(context: &Context, installation: &Installation) -> Check {
    if !may_ask(context, installation.record.owner.uid) {
        return not_asked("daemon");
    }
    match daemon_version(context, installation) {
        Ok(version) => versions("daemon", &version.version),
        Err(error) => check("daemon", CheckLevel::Fail, error.message, Some(RESTART)),
    }
}

fn versions(name: &str, version: &str) -> Check {
    let own = env!("CARGO_PKG_VERSION");
    if version == own {
        check(name, CheckLevel::Pass, format!("answers, version {version}"), None)
    } else {
        let message = format!("answers, version {version}; this is {own}");
        check(name, CheckLevel::Warn, message, Some(INSTALL))
    }
}
