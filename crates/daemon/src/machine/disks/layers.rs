//! Disks in layers: qcow2 files over frozen qcow2 files over a base.
//!
//! ```text
//!  machines/<id>/disks/            what it is                             shared with
//!    root.qcow2, work.qcow2        written by the engine                  nobody
//!    <layer>.root.qcow2, …         frozen, read-only                      snapshots, copies, templates: by hard link
//! ```
//!
//! **Freezing** makes what was written until now a layer and goes on in fresh files:
//!
//! ```text
//!   freeze.json ─▶ root.qcow2 also called <layer>.root.qcow2 ─▶ fresh root.<layer>.next, work.<layer>.next
//!     ─▶ the engine writes to them from now on ─▶ renamed to root.qcow2, work.qcow2 ─▶ disks.json ─▶ no freeze.json
//! ```
//!
//! Cut off anywhere, it is gone on with or undone ([`settle`]) by what the files and the engine say. Fresh files are empty, so that
//! going on is right also where no engine ever wrote to them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use banger_core::plan::{Disk, DiskFormat, DiskRole, MachinePaths};
use banger_image::disk;
use banger_proto::error::ApiError;
use banger_vmm::FreshLayer;

use super::{
    INTENT, Layers, ROLES, WORK_BASE, WORK_DISK, begin_intent, link, link_base, make_dir, new_list, no_layer,
    read_list, remove, write_list,
};
use crate::error::{self, IntoApi};

/// Most layers of a machine. Each one costs a look more at a block that was never written.
pub const MAX_LAYERS: usize = 48;

pub(super) fn active(role: DiskRole) -> String {
    format!("{}.qcow2", role.serial())
}

fn frozen(layer: &str, role: DiskRole) -> String {
    format!("{layer}.{}.qcow2", role.serial())
}

fn next(layer: &str, role: DiskRole) -> String {
    format!("{}.{layer}.next", role.serial())
}

/// Makes the disks of a new machine over an image, in a directory that is not there yet.
pub(super) fn create(dir: &Path, image: &Path, root_bytes: u64) -> Result<(), ApiError> {
    make_dir(dir)?;
    disk::create_root(image, &dir.join(active(DiskRole::Root)), root_bytes).map_err(IntoApi::into_api)?;
    let base = dir.join(WORK_BASE);
    disk::create_work(&base, WORK_DISK, "work").map_err(IntoApi::into_api)?;
    disk::create_layer(&base, DiskFormat::Raw, &dir.join(active(DiskRole::Work))).map_err(IntoApi::into_api)?;
    new_list(dir, &Layers::default())
}

/// Makes disks over the frozen ones in `from`, in a directory that is not there yet.
pub(super) fn create_over(dir: &Path, from: &Path, list: &Layers) -> Result<(), ApiError> {
    let top = list
        .layers
        .first()
        .ok_or_else(|| error::io(format_args!("use {}", from.display()), no_layer()))?;
    make_dir(dir)?;
    link_frozen(from, dir, list)?;
    for role in ROLES {
        let below = dir.join(frozen(top, role));
        disk::create_layer(&below, DiskFormat::Qcow2, &dir.join(active(role))).map_err(IntoApi::into_api)?;
    }
    new_list(dir, list)
}

/// Keeps the frozen layers of `from` in `dir`, which is not there yet, without anything to write to.
pub(super) fn export(from: &Path, dir: &Path, list: &Layers) -> Result<(), ApiError> {
    make_dir(dir)?;
    link_frozen(from, dir, list)?;
    write_list(dir, list)
}

/// The disks as an engine is given them.
pub(super) fn plan(dir: &Path, list: &Layers, image: PathBuf) -> Vec<Disk> {
    chains(dir, list, image)
        .map(|(role, layers, base)| Disk {
            serial: role,
            path: dir.join(active(role)),
            format: DiskFormat::Qcow2,
            layers,
            base: Some(base),
        })
        .collect()
}

/// The root disk as it was frozen last in `dir`.
pub(super) fn frozen_root(dir: &Path, list: &Layers, image: PathBuf) -> Result<Disk, ApiError> {
    let (_, mut layers, base) = chains(dir, list, image)
        .next()
        .ok_or_else(|| error::io(format_args!("use {}", dir.display()), no_layer()))?;
    if layers.is_empty() {
        return Err(error::io(format_args!("use {}", dir.display()), no_layer()));
    }
    Ok(Disk {
        serial: DiskRole::Root,
        path: layers.remove(0),
        format: DiskFormat::Qcow2,
        layers,
        base: Some(base),
    })
}

fn chains<'a>(
    dir: &'a Path,
    list: &'a Layers,
    image: PathBuf,
) -> impl Iterator<Item = (DiskRole, Vec<PathBuf>, PathBuf)> + 'a {
    let bases = [image, dir.join(WORK_BASE)];
    ROLES.into_iter().zip(bases).map(move |(role, base)| {
        let layers = list.layers.iter().map(|layer| dir.join(frozen(layer, role))).collect();
        (role, layers, base)
    })
}

/// Begins to freeze: after this an engine may be told to write to the fresh files.
pub(super) fn begin_freeze(dir: &Path, list: &Layers, layer: &str) -> Result<Vec<FreshLayer>, ApiError> {
    if list.layers.len() >= MAX_LAYERS {
        let message = format!("the machine has {MAX_LAYERS} layers of disks already");
        return Err(ApiError::new(banger_proto::error::ErrorCode::Conflict, message)
            .hint("make an image of it and go on from that: banger vm commit"));
    }
    begin_intent(dir, layer)?;
    let mut fresh = Vec::new();
    for role in ROLES {
        let (now, kept) = (dir.join(active(role)), dir.join(frozen(layer, role)));
        fs::hard_link(&now, &kept).map_err(|e| error::io(format_args!("keep {}", kept.display()), e))?;
    }
    for role in ROLES {
        let path = dir.join(next(layer, role));
        disk::create_layer(&dir.join(frozen(layer, role)), DiskFormat::Qcow2, &path).map_err(IntoApi::into_api)?;
        fresh.push(FreshLayer { serial: role, path });
    }
    Ok(fresh)
}

/// Ends a freeze: the fresh files are the disks now.
pub(super) fn end_freeze(dir: &Path, layer: &str) -> Result<(), ApiError> {
    for role in ROLES {
        let from = dir.join(next(layer, role));
        match fs::rename(&from, dir.join(active(role))) {
            // Done before it was cut off.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            other => other.map_err(|e| error::io(format_args!("move {}", from.display()), e))?,
        }
    }
    let mut list = read_list(dir)?;
    if list.layers.first().map(String::as_str) != Some(layer) {
        list.layers.insert(0, layer.to_owned());
        write_list(dir, &list)?;
    }
    remove(&dir.join(INTENT))
}

/// Takes a freeze back that no engine has followed.
pub(super) fn undo_freeze(dir: &Path, layer: &str) -> Result<(), ApiError> {
    for role in ROLES {
        remove(&dir.join(next(layer, role)))?;
        remove(&dir.join(frozen(layer, role)))?;
    }
    remove(&dir.join(INTENT))
}

/// How far a freeze has come that was cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// For root and work: the fresh file is there under its first name.
    pub(super) fresh: [bool; 2],
    /// The root disk is another file than its frozen layer.
    pub(super) moved: bool,
    /// Whether the engine writes to the fresh files; `None` without an engine.
    pub(super) followed: Option<bool>,
}

/// Whether a freeze that was cut off is gone on with (`true`) or undone.
///
/// It may be undone only while the engine has not followed. Without an engine nobody can say whether it had; then it is gone on
/// with as soon as an engine could have been told, which is when both fresh files were there.
pub(super) fn goes_on(found: Found) -> bool {
    found.moved || found.followed.unwrap_or(found.fresh == [true, true])
}

/// Brings a freeze to an end that was cut off. `written` are the files that the engine writes to, if there is one.
pub(super) fn settle(dir: &Path, layer: &str, written: Option<&[PathBuf]>) -> Result<(), ApiError> {
    let inode = |path: PathBuf| fs::metadata(path).map(|m| m.ino()).ok();
    let (now, kept) = (
        inode(dir.join(active(DiskRole::Root))),
        inode(dir.join(frozen(layer, DiskRole::Root))),
    );
    let ours = |path: &PathBuf| ROLES.iter().any(|role| path.ends_with(next(layer, *role)));
    let found = Found {
        fresh: ROLES.map(|role| dir.join(next(layer, role)).exists()),
        moved: kept.is_some() && now != kept,
        followed: written.map(|files| files.iter().any(ours)),
    };
    let on = goes_on(found);
    tracing::info!(dir = %dir.display(), layer, ?found, on, "a freeze of disks was cut off");
    if on {
        end_freeze(dir, layer)
    } else {
        undo_freeze(dir, layer)
    }
}

/// Disks as versions before layers had them are brought into their place, while no engine uses them.
pub(super) fn upgrade(paths: &MachinePaths) -> Result<(), ApiError> {
    let dir = paths.disks();
    let (old_root, old_work) = (paths.state.join("root.qcow2"), paths.state.join("work.ext4"));
    if dir.exists() || !old_root.exists() {
        return Ok(());
    }
    let staging = paths.state.join("disks.new");
    crate::machine::start::remove_dir(&staging)?;
    make_dir(&staging)?;
    link(&old_root, &staging.join(active(DiskRole::Root)))?;
    link(&old_work, &staging.join(WORK_BASE))?;
    let work = staging.join(active(DiskRole::Work));
    disk::create_layer(&staging.join(WORK_BASE), DiskFormat::Raw, &work).map_err(IntoApi::into_api)?;
    write_list(&staging, &Layers::default())?;
    fs::rename(&staging, &dir).map_err(|e| error::io(format_args!("move {}", staging.display()), e))?;
    remove(&old_root)?;
    remove(&old_work)
}

fn link_frozen(from: &Path, to: &Path, list: &Layers) -> Result<(), ApiError> {
    for layer in &list.layers {
        for role in ROLES {
            let name = frozen(layer, role);
            link(&from.join(&name), &to.join(&name))?;
        }
    }
    link_base(from, to)
}

#[cfg(test)]
mod tests {
    use super::super::{begin_freeze, create_over, freeze_at_rest, plan, settle, undo_freeze};
    use super::*;

    const LAYER: &str = "00112233aabbccdd";

    fn machine() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let tmp = tempfile::tempdir().unwrap();
        let image = tmp.path().join("image.ext4");
        disk::create_work(&image, 128 << 20, "root").unwrap();
        let dir = tmp.path().join("disks");
        create(&dir, &image, 256 << 20).unwrap();
        (tmp, dir, image)
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_freeze_shares_what_was_and_goes_on_in_fresh_files() {
        let (tmp, dir, image) = machine();
        let before = fs::metadata(dir.join("root.qcow2")).unwrap().ino();
        freeze_at_rest(&dir, LAYER).unwrap();
        assert_eq!(
            fs::metadata(dir.join(format!("{LAYER}.root.qcow2"))).unwrap().ino(),
            before
        );
        assert_ne!(fs::metadata(dir.join("root.qcow2")).unwrap().ino(), before);
        assert_eq!(read_list(&dir).unwrap().layers, [LAYER]);

        let copy = tmp.path().join("copy");
        create_over(&copy, &dir).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        let paths = MachinePaths {
            state: tmp.path().join("m"),
            run: tmp.path().join("r"),
        };
        fs::create_dir(&paths.state).unwrap();
        fs::rename(&copy, paths.disks()).unwrap();
        let plan = plan(&paths, image.clone(), |_| None).unwrap();
        assert_eq!(plan[0].base.as_deref(), Some(image.as_path()));
        for disk in &plan {
            assert_eq!(disk.layers.len(), 1);
            for file in disk.layers.iter().chain([&disk.path]).chain(&disk.base) {
                assert!(file.exists(), "{} outlives its first owner", file.display());
            }
        }
    }

    #[test]
    fn an_undone_freeze_leaves_nothing() {
        let (_tmp, dir, _) = machine();
        let before = names(&dir);
        begin_freeze(&dir, LAYER).unwrap();
        undo_freeze(&dir, LAYER).unwrap();
        assert_eq!(names(&dir), before);
    }

    #[test]
    fn a_freeze_that_was_cut_off_anywhere_is_settled() {
        // Every prefix of the steps, without an engine, with one that followed and one that did not.
        for followed in [None, Some(false), Some(true)] {
            for steps in 0..=7 {
                let (_tmp, dir, _) = machine();
                let root = fs::metadata(dir.join("root.qcow2")).unwrap().ino();
                let fresh = begin_freeze(&dir, LAYER).unwrap();
                // An engine can follow only where both fresh files are.
                if followed == Some(true) && steps < 4 {
                    continue;
                }
                // And the renames come only when it has.
                if followed == Some(false) && steps > 4 {
                    continue;
                }
                for (at, role) in ROLES.iter().enumerate() {
                    if steps < 1 + at {
                        let _ = fs::remove_file(dir.join(frozen(LAYER, *role)));
                    }
                    if steps < 3 + at {
                        let _ = fs::remove_file(dir.join(next(LAYER, *role)));
                    }
                    if steps >= 5 + at {
                        fs::rename(dir.join(next(LAYER, *role)), dir.join(active(*role))).unwrap();
                    }
                }
                if steps >= 7 {
                    write_list(
                        &dir,
                        &Layers {
                            layers: vec![LAYER.to_owned()],
                            ..Layers::default()
                        },
                    )
                    .unwrap();
                }
                let written: Vec<PathBuf> = match followed {
                    Some(true) => fresh.iter().map(|f| f.path.clone()).collect(),
                    _ => vec![dir.join("root.qcow2"), dir.join("work.qcow2")],
                };
                settle(&dir, followed.map(|_| written.as_slice())).unwrap();
                let list = read_list(&dir).unwrap();
                let on = !list.layers.is_empty();
                let now = fs::metadata(dir.join("root.qcow2")).unwrap().ino();
                assert_eq!(on, now != root, "{followed:?} {steps}");
                let expected = if on { 6 } else { 4 };
                assert_eq!(names(&dir).len(), expected, "{followed:?} {steps}: {:?}", names(&dir));
                assert!(followed != Some(true) || on);
                assert!(followed != Some(false) || !on);
            }
        }
    }

    #[test]
    fn disks_of_before_come_into_their_place() {
        let tmp = tempfile::tempdir().unwrap();
        let paths = MachinePaths {
            state: tmp.path().join("m"),
            run: tmp.path().join("r"),
        };
        fs::create_dir(&paths.state).unwrap();
        let image = tmp.path().join("image.ext4");
        disk::create_work(&image, 128 << 20, "root").unwrap();
        disk::create_root(&image, &paths.state.join("root.qcow2"), 256 << 20).unwrap();
        disk::create_work(&paths.state.join("work.ext4"), 64 << 20, "work").unwrap();
        upgrade(&paths).unwrap();
        upgrade(&paths).unwrap();
        assert_eq!(names(&paths.state), ["disks"]);
        assert!(plan(&paths, image, |_| None).unwrap().iter().all(|d| d.path.exists()));
    }
}
