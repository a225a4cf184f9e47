//! Carrying a plan out, and taking it back when a step fails.

use std::path::PathBuf;

use banger_system::install::Layout;
use banger_system::units::Unit;

use crate::error::{Error, Result};
use crate::system::files::{self, Rights, look};
use crate::system::manager::Manager;
use crate::system::plan::Step;

/// What has been done so far, as far as it has to be undone.
#[derive(Debug, Default)]
struct Done {
    /// What was changed on disk.
    files: Vec<Undo>,
    /// Systemd knows other units than before.
    reloaded: bool,
    enabled: Vec<Unit>,
    started: Vec<Unit>,
    restarted: Vec<Unit>,
}

#[derive(Debug)]
enum Undo {
    /// A directory that was made.
    Made(PathBuf),
    /// A directory's rights before.
    Rights(PathBuf, Rights),
    /// A file that is new.
    New(PathBuf),
    /// A file, and where the one before is kept.
    Replaced(PathBuf, PathBuf),
}

/// Carries a plan out. `before` is told each step before it is done, and may refuse. When a step fails, what has been done is taken
/// back, and the error says what could not be.
pub(crate) fn carry_out(
    layout: &Layout,
    steps: &[Step],
    manager: &dyn Manager,
    mut before: impl FnMut(&Step) -> Result<()>,
) -> Result<()> {
    let mut done = Done::default();
    for step in steps {
        if let Err(error) = before(step).and_then(|()| carry_out_one(step, manager, &mut done)) {
            return Err(take_back(layout, done, manager, error));
        }
    }
    for undo in &done.files {
        if let Undo::Replaced(_, kept) = undo {
            // It only takes space, and the next installation removes it.
            let _ = files::remove(kept);
        }
    }
    Ok(())
}

fn carry_out_one(step: &Step, manager: &dyn Manager, done: &mut Done) -> Result<()> {
    match step {
        Step::MakeDir(path, rights) => {
            files::make_dir(path, *rights)?;
            done.files.push(Undo::Made(path.clone()));
        }
        Step::FixDir(path, rights) => {
            if let Some(found) = look(path)? {
                done.files.push(Undo::Rights(path.clone(), Rights::of(&found)));
            }
            files::fix_dir(path, *rights)?;
        }
        Step::Put {
            path, content, rights, ..
        } => {
            let kept = files::put(path, content, *rights)?;
            done.files.push(match kept {
                Some(kept) => Undo::Replaced(path.clone(), kept),
                None => Undo::New(path.clone()),
            });
        }
        Step::Reload => {
            done.reloaded = true;
            manager.reload()?;
        }
        Step::Enable(unit) => {
            done.enabled.push(*unit);
            manager.enable(*unit)?;
        }
        Step::Start(unit) => {
            done.started.push(*unit);
            manager.start(*unit)?;
            manager.wait(*unit)?;
        }
        Step::Restart(unit) => {
            done.restarted.push(*unit);
            manager.restart(*unit)?;
            manager.wait(*unit)?;
        }
    }
    Ok(())
}

/// Everything is tried. Services run again as they did: with their old programs, which have to be back first.
fn take_back(layout: &Layout, done: Done, manager: &dyn Manager, mut error: Error) -> Error {
    let mut failed = Vec::new();
    let mut tried = |result: Result<()>| {
        if let Err(error) = result {
            failed.push(format!("and could not take back: {error}"));
        }
    };
    for unit in done.started.iter().rev() {
        tried(manager.stop(*unit));
        manager.forget(*unit);
        // Preserved for the next start, of which there is none.
        let run = match unit {
            Unit::Helper => layout.helper_run(),
            Unit::Daemon => layout.run(),
            Unit::Slice | Unit::BuildSocket | Unit::Build => continue,
        };
        tried(files::remove_tree(&run).map(|_| ()));
    }
    for unit in done.enabled.iter().rev() {
        tried(manager.disable(*unit));
    }
    let nothing = done.files.is_empty() && done.started.is_empty() && done.restarted.is_empty();
    for undo in done.files.into_iter().rev() {
        tried(match undo {
            // Made a moment ago: what is in it is a service's that was started meanwhile.
            Undo::Made(path) => files::remove_tree(&path).map(|_| ()),
            Undo::Rights(path, rights) => files::fix_dir(&path, rights),
            Undo::New(path) => files::remove(&path).map(|_| ()),
            Undo::Replaced(path, kept) => std::fs::rename(&kept, &path).map_err(|e| Error::io("put back", &path, e)),
        });
    }
    if done.reloaded {
        tried(manager.reload());
    }
    for unit in &done.restarted {
        manager.forget(*unit);
        tried(manager.restart(*unit));
    }
    if !nothing && failed.is_empty() {
        error.details.push("what had been done was taken back".to_owned());
    }
    error.details.extend(failed);
    if error.hint.is_none() {
        error.hint = Some(format!(
            "correct it and install again; what the services say: journalctl -u {} -u {}",
            Unit::Helper.name(),
            Unit::Daemon.name()
        ));
    }
    error
}
