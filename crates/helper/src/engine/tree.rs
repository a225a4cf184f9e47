//! Removes a directory with everything in it that nobody but root should have been able to fill, as if everybody had.
//!
//! From descriptor to descriptor, without following a link, without leaving the mount that it began on. What cannot be removed is
//! told, and does not keep the rest from going.
//!
//! Every directory becomes root's before anything in it is removed, so that a process of the jail's user that is left cannot exchange
//! names meanwhile; every device node is made worthless before its name goes ([`Dir::retire`]).

use std::ffi::OsStr;

use banger_system::helper::HelperError;
use rustix::fs::FileType;

use super::dir::Dir;

/// How deep it goes. Whoever nests deeper has it brought up (renamed) to the top first, so depth takes neither stack nor descriptors.
const DEEP: usize = 16;
/// So many names are read at once.
const BATCH: usize = 1024;
/// So many errors are told.
const ERRORS: usize = 16;

/// One removal.
struct Removal<'a> {
    /// Where deep directories are brought.
    top: &'a Dir,
    mount: u64,
    brought: usize,
    errors: Vec<String>,
}

/// Removes `name` in `parent`, a directory of root's. Nothing there is fine.
pub(super) fn remove(parent: &Dir, name: &str) -> Result<(), Vec<String>> {
    let text = |e: HelperError| vec![e.message];
    let Some(stat) = parent.stat_of(name).map_err(text)? else {
        return Ok(());
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return parent.retire(name).map_err(text);
    }
    let Some(top) = parent.find(name).map_err(text)? else {
        return Ok(());
    };
    let mut removal = Removal {
        top: &top,
        mount: parent.mount_id().map_err(text)?,
        brought: 0,
        errors: Vec::new(),
    };
    removal.empty(&top, 0);
    if removal.errors.is_empty()
        && let Err(e) = parent.rmdir(name)
    {
        removal.errors.push(e.message);
    }
    if removal.errors.is_empty() {
        Ok(())
    } else {
        Err(removal.errors)
    }
}

impl Removal<'_> {
    fn note(&mut self, result: Result<(), HelperError>) -> bool {
        match result {
            Ok(()) => true,
            Err(e) => {
                if self.errors.len() < ERRORS {
                    self.errors.push(e.message);
                }
                false
            }
        }
    }

    /// Empties a directory.
    fn empty(&mut self, dir: &Dir, depth: usize) {
        match dir.mount_id() {
            Ok(id) if id == self.mount => {}
            Ok(_) => {
                self.errors
                    .push(format!("{} is a mount, which is left alone", dir.path().display()));
                return;
            }
            Err(e) => {
                self.note(Err(e));
                return;
            }
        }
        if !self.note(dir.seize()) {
            return;
        }
        loop {
            let names = match dir.some_names(BATCH) {
                Ok(names) => names,
                Err(e) => {
                    self.note(Err(e));
                    return;
                }
            };
            let mut gone = false;
            for name in &names {
                gone |= self.one(dir, name, depth);
            }
            // Nothing there, or nothing that could be removed.
            if !gone {
                return;
            }
        }
    }

    /// Removes one entry; whether something went.
    fn one(&mut self, dir: &Dir, name: &OsStr, depth: usize) -> bool {
        let stat = match dir.stat_of(name) {
            Ok(Some(stat)) => stat,
            Ok(None) => return true,
            Err(e) => return self.note(Err(e)),
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return self.note(dir.retire(name));
        }
        if depth >= DEEP {
            return self.bring_up(dir, name);
        }
        match dir.find(name) {
            Ok(Some(sub)) => self.empty(&sub, depth + 1),
            Ok(None) => return true,
            Err(e) => return self.note(Err(e)),
        }
        self.note(dir.rmdir(name))
    }

    fn bring_up(&mut self, dir: &Dir, name: &OsStr) -> bool {
        self.brought += 1;
        let to = format!(".deep-{}", self.brought);
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(dir.fd(), name, self.top.fd(), &to, flags) {
            Ok(()) => true,
            Err(e) => self.note(Err(crate::ctx::failed(
                format!("remove {}", dir.path().join(name).display()),
                e,
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;

    fn opened(path: &Path) -> Dir {
        Dir::find_path(path).unwrap().unwrap()
    }

    #[test]
    fn links_go_and_what_they_lead_to_stays() {
        let base = tempfile::tempdir().unwrap();
        let kept = base.path().join("kept");
        std::fs::create_dir(&kept).unwrap();
        std::fs::write(kept.join("file"), "x").unwrap();
        let jail = base.path().join("jail");
        std::fs::create_dir_all(jail.join("m/root/dev")).unwrap();
        symlink(&kept, jail.join("m/root/link")).unwrap();
        symlink(kept.join("file"), jail.join("m/root/dev/link")).unwrap();
        std::fs::hard_link(kept.join("file"), jail.join("m/root/hard")).unwrap();
        let dir = opened(&jail);
        remove(&dir, "m").unwrap();
        remove(&dir, "m").unwrap();
        assert_eq!(std::fs::read_dir(&jail).unwrap().count(), 0);
        assert_eq!(std::fs::read(kept.join("file")).unwrap(), b"x");
        // A link in place of the whole is a name like any other.
        symlink(&kept, jail.join("m")).unwrap();
        remove(&dir, "m").unwrap();
        assert!(kept.join("file").exists() && !jail.join("m").is_symlink());
        assert!(remove(&dir, "../kept").is_err() && kept.exists());
    }

    #[test]
    fn depth_and_number_do_not_matter() {
        let base = tempfile::tempdir().unwrap();
        let jail = base.path().join("jail");
        let mut deep = jail.join("m");
        std::fs::create_dir_all(&deep).unwrap();
        for _ in 0..300 {
            deep.push("d");
        }
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("f"), "x").unwrap();
        for n in 0..3000 {
            std::fs::write(jail.join(format!("m/f{n}")), "").unwrap();
        }
        remove(&opened(&jail), "m").unwrap();
        assert_eq!(std::fs::read_dir(&jail).unwrap().count(), 0);
    }

    /// Somebody swaps directories for links while they are being emptied.
    #[test]
    fn a_race_touches_nothing_outside() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let base = tempfile::tempdir().unwrap();
        let kept = base.path().join("kept");
        std::fs::create_dir(&kept).unwrap();
        for n in 0..50 {
            std::fs::write(kept.join(format!("f{n}")), "x").unwrap();
        }
        let jail = base.path().join("jail");
        std::fs::create_dir(&jail).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let hostile = scope.spawn(|| {
                let (dir, aside) = (jail.join("m/root/dir"), jail.join("m/root/aside"));
                let mut rounds = 0u32;
                while !stop.load(Ordering::Relaxed) {
                    let _ = std::fs::create_dir_all(&dir);
                    let _ = std::fs::write(dir.join("f1"), "");
                    let _ = std::fs::rename(&dir, &aside);
                    let _ = symlink(&kept, &dir);
                    let _ = std::fs::remove_file(&dir);
                    let _ = std::fs::remove_dir_all(&aside);
                    rounds += 1;
                }
                rounds
            });
            let dir = opened(&jail);
            for _ in 0..400 {
                let _ = std::fs::create_dir_all(jail.join("m/root"));
                let _ = remove(&dir, "m");
            }
            stop.store(true, Ordering::Relaxed);
            assert!(hostile.join().unwrap() > 10);
        });
        assert_eq!(std::fs::read_dir(&kept).unwrap().count(), 50);
    }
}
