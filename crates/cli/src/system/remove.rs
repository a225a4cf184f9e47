//! The opposite of an installation.

use std::collections::BTreeSet;
use std::path::Path;

use banger_system::helper::{Answer, ObjectKind, Request};
use banger_system::id::MachineId;
use banger_system::net::Network;
use banger_system::units::{self, Unit};

use crate::error::{Error, Result};
use crate::system::files;
use crate::system::ground::{Ground, PROGRAMS};
use crate::system::manager::Manager;
use crate::system::plan::Words;

/// What became of it.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// What was done.
    pub(crate) done: Vec<Words>,
    /// What was left, and why.
    pub(crate) kept: Vec<String>,
    /// What did not work. Nothing but this keeps an uninstallation from being run again.
    pub(crate) failed: Vec<String>,
}

impl Outcome {
    fn did(&mut self, action: &'static str, object: impl Into<String>) {
        self.done.push(Words {
            action,
            object: object.into(),
        });
    }

    /// Notes how something went: done, or nothing to do, or failed.
    fn tried(&mut self, action: &'static str, object: impl Into<String>, result: Result<bool>) {
        match result {
            Ok(true) => self.did(action, object),
            Ok(false) => {}
            Err(error) => {
                self.failed.push(error.message);
                self.failed.extend(error.details);
            }
        }
    }
}

/// Machines whose engines run, as the helper sees them.
pub(crate) fn running(manager: &dyn Manager) -> Result<Vec<MachineId>, String> {
    match manager.helper(Request::Inventory)? {
        Answer::Inventory { objects } => {
            let processes = objects.into_iter().filter(|o| o.kind == ObjectKind::Process);
            let ids: BTreeSet<MachineId> = processes.filter_map(|o| o.machine).collect();
            Ok(ids.into_iter().collect())
        }
        other => Err(format!("it answers an inventory with {other:?}")),
    }
}

/// Takes the network and what is left of machines off the host: what only the helper can do. Until that has worked, the helper stays.
pub(crate) fn clear_host(ground: &Ground, manager: &dyn Manager, net: &Network) -> Outcome {
    let mut outcome = Outcome::default();
    let active = |unit| manager.state(unit).map(|s| s.active);
    let stopped = active(Unit::Daemon).and_then(|runs| {
        if runs {
            manager.stop(Unit::Daemon).map(|()| true)
        } else {
            Ok(false)
        }
    });
    outcome.tried("stop", Unit::Daemon.name(), stopped);
    if !Unit::Helper.path(&ground.layout).exists() {
        return outcome;
    }
    let helper = active(Unit::Helper).and_then(|runs| if runs { Ok(()) } else { manager.start(Unit::Helper) });
    if let Err(error) = helper.and_then(|()| manager.wait(Unit::Helper)) {
        outcome
            .failed
            .push(format!("the network cannot be removed without the helper: {error}"));
        return outcome;
    }
    let mut ask = |what: String, request: Request| match manager.helper(request) {
        Ok(_) => outcome.did("remove", what),
        Err(why) => outcome.failed.push(format!("cannot remove {what}: {why}")),
    };
    let left = manager.helper(Request::Inventory);
    let machines: BTreeSet<MachineId> = match left {
        Ok(Answer::Inventory { objects }) => objects.into_iter().filter_map(|o| o.machine).collect(),
        // Then it cannot be told what is left, and the removal of the network says what is in its way.
        _ => BTreeSet::new(),
    };
    for machine in machines {
        ask(
            format!("what machine {machine} left"),
            Request::MachineRemove { machine },
        );
    }
    ask("routing of names below .vm".to_owned(), Request::ResolverClear);
    ask(
        format!("network {} with its rules", net.bridge()),
        Request::NetworkRemove,
    );
    outcome
}

/// Removes what an installation made. Everything is tried.
pub(crate) fn remove(ground: &Ground, manager: &dyn Manager, purge: bool, outcome: &mut Outcome) {
    let layout = &ground.layout;
    for unit in Unit::STARTED.into_iter().rev() {
        let state = manager.state(unit).unwrap_or_default();
        if state.active {
            outcome.tried("stop", unit.name(), manager.stop(unit).map(|()| true));
        }
        if state.enabled {
            outcome.tried("disable", unit.name(), manager.disable(unit).map(|()| true));
        }
    }
    // These are there as long as somebody needs them, and fail to be stopped when they are not.
    let _ = manager.stop(Unit::Build);
    let _ = manager.stop(Unit::Slice);
    let mut reload = false;
    for unit in Unit::ALL {
        let path = unit.path(layout);
        match std::fs::read_to_string(&path) {
            Ok(text) if units::is_ours(&text) => {
                outcome.tried("remove", path.display().to_string(), files::remove(&path));
                reload = true;
            }
            Ok(_) => outcome.kept.push(format!("{}: it is not banger's", path.display())),
            Err(_) => {}
        }
        let drop_ins = layout.units().join(format!("{}.d", unit.name()));
        if drop_ins.exists() {
            outcome.kept.push(format!("{}: your own settings", drop_ins.display()));
        }
    }
    if reload {
        outcome.tried("reload", "units of systemd", manager.reload().map(|()| true));
        for unit in Unit::STARTED {
            manager.forget(unit);
        }
    }
    for (name, internal) in PROGRAMS {
        let path = if internal { layout.libexec() } else { layout.bin() }.join(name);
        outcome.tried("remove", path.display().to_string(), files::remove(&path));
    }
    let mut trees = vec![layout.run(), layout.helper_run(), layout.nodes(), layout.jails()];
    if purge {
        trees.extend([layout.state(), layout.config()]);
    }
    for path in trees {
        let result = if path.is_file() {
            files::remove(&path)
        } else {
            files::remove_tree(&path)
        };
        outcome.tried("remove", path.display().to_string(), result);
    }
    if layout.state().exists() {
        outcome.kept.push(format!(
            "{}: machines, images and kernels; --purge removes them",
            layout.state().display()
        ));
    }
    if layout.config().exists() {
        outcome.kept.push(format!(
            "{}: your configuration; --purge removes it",
            layout.config().display()
        ));
    }
    let forwarding = std::fs::read_to_string(ground.host("proc/sys/net/ipv4/ip_forward")).unwrap_or_default();
    if forwarding.trim() == "1" {
        outcome
            .kept
            .push("net.ipv4.ip_forward = 1: banger does not set it; whoever did may need it".to_owned());
    }
    // The record goes last: as long as it is there, all this can be done again.
    if outcome.failed.is_empty() {
        outcome.tried(
            "remove",
            layout.record().display().to_string(),
            files::remove(&layout.record()),
        );
    }
    for path in [layout.libexec(), layout.etc(), layout.lib()] {
        outcome.tried("remove", path.display().to_string(), files::remove_empty(&path));
        if path != layout.lib() && path.exists() && outcome.failed.is_empty() && !mentioned(outcome, &path) {
            outcome
                .kept
                .push(format!("{}: there is something else in it", path.display()));
        }
    }
}

fn mentioned(outcome: &Outcome, path: &Path) -> bool {
    let path = path.display().to_string();
    outcome.kept.iter().any(|k| k.starts_with(&path))
}

/// Makes one error of what failed.
pub(crate) fn unfinished(outcome: &Outcome) -> Option<Error> {
    (!outcome.failed.is_empty()).then(|| {
        Error::failed("not everything could be removed")
            .details(outcome.failed.clone())
            .hint("run it again when what is in the way is gone; --force goes on regardless")
    })
}
