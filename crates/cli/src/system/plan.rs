//! What is to be done to have an installation as it should be: a pure function of what there is.

use std::path::PathBuf;

use banger_system::units::Unit;
use serde::Serialize;

use crate::error::{Error, Kind};
use crate::system::facts::{DirFact, Facts, FileFact, Found, NetworkFault, Role};
use crate::system::files::{Content, Rights};

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Make a directory.
    MakeDir(PathBuf, Rights),
    /// Give a directory other rights.
    FixDir(PathBuf, Rights),
    /// Put a file in its place.
    Put {
        /// Where.
        path: PathBuf,
        /// Its rights.
        rights: Rights,
        /// What it holds.
        content: Content,
        /// There is one already.
        replaces: bool,
    },
    /// Have systemd read its units.
    Reload,
    /// Have a unit started with the host.
    Enable(Unit),
    /// Start a service that does not run.
    Start(Unit),
    /// Restart a service of which something has changed.
    Restart(Unit),
}

/// A step in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Words {
    /// What is done.
    pub(crate) action: &'static str,
    /// To what.
    pub(crate) object: String,
}

impl Step {
    /// The step in words.
    pub(crate) fn words(&self) -> Words {
        let (action, object) = match self {
            Self::MakeDir(path, rights) => ("create", format!("{} (mode {:04o})", path.display(), rights.mode)),
            Self::FixDir(path, rights) => ("set rights", format!("{} (mode {:04o})", path.display(), rights.mode)),
            Self::Put {
                path, replaces: false, ..
            } => ("create", path.display().to_string()),
            Self::Put { path, .. } => ("replace", path.display().to_string()),
            Self::Reload => ("reload", "units of systemd".to_owned()),
            Self::Enable(unit) => ("enable", unit.name().to_owned()),
            Self::Start(unit) => ("start", unit.name().to_owned()),
            Self::Restart(unit) => ("restart", unit.name().to_owned()),
        };
        Words { action, object }
    }
}

/// What is in the way, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// What.
    pub(crate) what: String,
    /// What to do.
    pub(crate) hint: &'static str,
    /// Kind of error.
    pub(crate) kind: Kind,
}

/// Makes one error of all that is in the way.
pub(crate) fn refused(mut all: Vec<Refusal>) -> Error {
    if all.len() == 1 {
        let only = all.remove(0);
        return Error::new(only.kind, only.what).hint(only.hint);
    }
    let kind = all.first().map_or(Kind::Failed, |r| r.kind);
    let mut hints: Vec<&str> = all.iter().map(|r| r.hint).collect();
    hints.dedup();
    let message = format!("{} things are in the way of an installation", all.len());
    let lines = all.iter().map(|r| r.what.clone()).collect();
    Error::new(kind, message).details(lines).hint(hints.join("; "))
}

/// What is to be done; nothing where all is as it should be.
pub(crate) fn plan(facts: &Facts) -> Result<Vec<Step>, Vec<Refusal>> {
    let refusals = refusals(facts);
    if !refusals.is_empty() {
        return Err(refusals);
    }
    let mut steps: Vec<Step> = facts.dirs.iter().filter_map(dir_step).collect();
    let changed: Vec<&FileFact> = facts.files.iter().filter(|f| f.found != Found::Same).collect();
    steps.extend(changed.iter().map(|file| Step::Put {
        path: file.path.clone(),
        rights: file.rights,
        content: file.content.clone(),
        replaces: file.found != Found::Absent,
    }));
    if changed.iter().any(|f| matches!(f.role, Role::Unit(_))) {
        steps.push(Step::Reload);
    }
    let not_enabled = facts.units.iter().filter(|(_, state)| !state.enabled);
    steps.extend(not_enabled.map(|(unit, _)| Step::Enable(*unit)));
    for (unit, state) in &facts.units {
        if !state.active {
            steps.push(Step::Start(*unit));
        } else if changed.iter().any(|file| concerns(facts, file.role, *unit)) {
            steps.push(Step::Restart(*unit));
        }
    }
    Ok(steps)
}

fn dir_step(dir: &DirFact) -> Option<Step> {
    match dir.found {
        Found::Absent => Some(Step::MakeDir(dir.path.clone(), dir.rights)),
        Found::Differs(_) => Some(Step::FixDir(dir.path.clone(), dir.rights)),
        Found::Same | Found::Other(_) => None,
    }
}

/// Whether a service has to be started anew when this file has changed.
fn concerns(facts: &Facts, role: Role, unit: Unit) -> bool {
    match role {
        Role::Program("banger-helper") => unit == Unit::Helper,
        // The daemon gives the other two to every machine, and reads them when it starts.
        Role::Program("bangerd" | "banger-shim" | "banger-agent") => unit == Unit::Daemon,
        Role::Program(_) => false,
        // A build that is going on keeps its unit as it was.
        Role::Unit(which) => which == unit,
        // Both read it when they start. Which version it was is not for them.
        Role::Record => facts.record.as_ref().is_none_or(|old| {
            let wanted = &facts.wanted;
            old.owner != wanted.owner || old.network != wanted.network || old.firecracker != wanted.firecracker
        }),
    }
}

fn refusals(facts: &Facts) -> Vec<Refusal> {
    let mut all = Vec::new();
    let mut refuse = |kind: Kind, what: String, hint: &'static str| all.push(Refusal { what, hint, kind });
    if !facts.systemd {
        refuse(
            Kind::Unsupported,
            "systemd does not run this host".to_owned(),
            "system mode needs it; user mode needs no installation",
        );
    }
    if !facts.cgroup2 {
        refuse(
            Kind::Unsupported,
            "this host has no control groups of version 2 at /sys/fs/cgroup".to_owned(),
            "start it with systemd.unified_cgroup_hierarchy=1 on its kernel's command line",
        );
    }
    if let Some(why) = &facts.broken_record {
        refuse(
            Kind::Conflict,
            format!("the record of the installation, install.toml, is not usable: {why}"),
            "correct it, or move it away and install anew",
        );
    }
    if let Some(why) = &facts.broken_config {
        refuse(
            Kind::Invalid,
            format!("the configuration of the daemon is wrong: {why}"),
            "correct /etc/banger/config.toml",
        );
    }
    if let Some(old) = &facts.record
        && old.owner.uid != facts.wanted.owner.uid
    {
        refuse(
            Kind::Conflict,
            format!("banger is installed for {} already", old.owner.user),
            "one host has one owner; `sudo banger system uninstall` first",
        );
    }
    for path in &facts.packaged {
        refuse(
            Kind::Conflict,
            format!("{} is a unit of the same name", path.display()),
            "remove the package that brought it",
        );
    }
    for dir in &facts.dirs {
        if let Some(what) = dir_fault(dir) {
            refuse(
                Kind::Conflict,
                what,
                "move it away, or give it to whom it has to belong",
            );
        }
    }
    for file in &facts.files {
        let path = file.path.display();
        match file.found {
            Found::Other(kind) => refuse(
                Kind::Conflict,
                format!("{path} is {kind}, not a file"),
                "move it away; banger replaces nothing that is not its own",
            ),
            Found::Differs(_) if !file.ours => refuse(
                Kind::Conflict,
                format!("{path} is there and was not put there by `banger system install`"),
                "move it away; banger replaces nothing that is not its own",
            ),
            _ => {}
        }
    }
    if let Some(bridge) = &facts.foreign_bridge {
        refuse(
            Kind::Conflict,
            format!("there is a network interface {bridge} that is not banger's"),
            "remove it, or name another bridge in /etc/banger/config.toml: [network] bridge = \"br-fc-2\"",
        );
    }
    if let Some(fault) = &facts.network_fault {
        let (kind, what, hint) = network_refusal(fault);
        refuse(kind, what, hint);
    }
    for fault in &facts.engine_faults {
        refuse(
            Kind::Invalid,
            fault.clone(),
            "root runs it: `sudo install -o root -g root -m 0755 FILE /usr/local/bin/` puts it where only root can change it",
        );
    }
    all
}

fn network_refusal(fault: &NetworkFault) -> (Kind, String, &'static str) {
    const OTHER: &str = "name a network that this host does not use: --network 10.77.0.1/24, or under [network] in /etc/banger/config.toml";
    match fault {
        NetworkFault::Wrong(why) => (Kind::Usage, format!("--network: {why}"), OTHER),
        NetworkFault::Differs(configured) => (
            Kind::Usage,
            format!("--network is not what /etc/banger/config.toml says: {configured}"),
            "leave --network away, or change the configuration",
        ),
        NetworkFault::Overlaps(why) => (Kind::Conflict, why.clone(), OTHER),
        NetworkFault::NoneFree => (
            Kind::Conflict,
            "no network for the machines is free: all that are tried overlap addresses or routes of this host"
                .to_owned(),
            OTHER,
        ),
    }
}

fn dir_fault(dir: &DirFact) -> Option<String> {
    let path = dir.path.display();
    match dir.found {
        Found::Other(kind) => Some(format!("{path} is {kind}, not a directory")),
        Found::Differs(rights) if rights.uid != dir.rights.uid => Some(format!(
            "{path} belongs to user {}, not to user {}",
            rights.uid, dir.rights.uid
        )),
        _ => None,
    }
}
