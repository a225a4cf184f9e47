//! What every installation begins with: kernel and images of the common base, as the owner's, and a template. Made once.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use rustix::process::Signal;

use super::{OWNER, SystemEnv};
use crate::binaries;

pub(super) fn state() -> PathBuf {
    binaries::target().join("tests/base-system/var/lib/banger/state")
}

/// The state that every installation begins with: kernel and images of the common base, as the owner's, and a template.
pub(super) fn make() -> Result<(), String> {
    let common = crate::base::get()?;
    let tests = binaries::target().join("tests");
    let lock = std::fs::File::create(tests.join("base-system.lock")).map_err(|e| format!("base-system.lock: {e}"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|e| format!("base-system.lock: {e}"))?;
    let root = tests.join("base-system");
    let made_of = common.made_of();
    let marker = tests.join("base-system.made-of");
    let place = state();
    let kept = tests.join("base-system.state");
    let current = place.is_dir() && std::fs::read_to_string(&marker).is_ok_and(|k| k == made_of);
    let _ = std::fs::remove_dir_all(&kept);
    if current {
        std::fs::rename(&place, &kept).map_err(|e| format!("{}: {e}", kept.display()))?;
    }
    let env = SystemEnv::bare(root);
    let _ = std::fs::remove_dir(env.state());
    if current {
        std::fs::rename(&kept, env.state()).map_err(|e| format!("{}: {e}", kept.display()))?;
    } else {
        common.copy_to(&env.state(), OWNER);
    }
    env.start_helper();
    env.start_daemon();
    env.banger(["template", "build", "debian-slim"]).deadline(300).ok();
    env.banger(["template", "prune"]).ok();
    env.end_daemon(Signal::TERM);
    env.end_helper(Signal::TERM);
    std::fs::write(&marker, &made_of).map_err(|e| format!("{}: {e}", marker.display()))?;
    env.leave();
    Ok(())
}

/// The same tree, its files being hard links but for what is written in place.
pub(super) fn link_tree(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from)
        .unwrap_or_else(|e| panic!("{}: {e}", from.display()))
        .flatten()
    {
        let (name, target) = (entry.file_name(), to.join(entry.file_name()));
        let name = name.to_string_lossy();
        let meta = std::fs::symlink_metadata(entry.path()).expect("a file of the base");
        let own = |target: &Path| chown(target, Some(OWNER), Some(OWNER)).expect("an owner");
        if meta.is_dir() {
            if name == "machines" || name == "ssh" {
                continue;
            }
            std::fs::create_dir_all(&target).unwrap_or_else(|e| panic!("{}: {e}", target.display()));
            std::fs::set_permissions(&target, meta.permissions()).expect("a mode");
            own(&target);
            link_tree(&entry.path(), &target);
        } else if name.ends_with(".log") || name.ends_with(".lock") {
        } else if name.contains(".db") {
            std::fs::copy(entry.path(), &target).expect("a copy of the database");
            own(&target);
        } else {
            std::fs::hard_link(entry.path(), &target).unwrap_or_else(|e| panic!("{}: {e}", target.display()));
        }
    }
}
