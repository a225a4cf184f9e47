//! Disks that stand alone over their base: `changes` and `whole`. A frozen layer is a copy of the file that the machine writes to.
//!
//! ```text
//!    root.cow, work.cow             changes of a device-mapper snapshot     or root.raw, work.raw: everything
//!    <layer>.root.cow, …            a copy that was just frozen, until it is moved to where it was frozen for
//! ```
//!
//! The copy is made while the machine stands still. It goes on in the same files, so a freeze that was cut off is always undone.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use banger_core::plan::{Disk, DiskFormat, DiskRole};
use banger_image::disk;
use banger_proto::error::ApiError;

use super::{
    Form, INTENT, Layers, New, ROLES, RootDisk, WORK_BASE, WORK_DISK, begin_intent, link, link_base, make_dir,
    new_list, read_list, remove, top, write_list,
};
use crate::error::{self, IntoApi};
use crate::host::Device;

fn suffix(form: Form) -> &'static str {
    match form {
        Form::Changes => "cow",
        Form::Layers | Form::Whole => "raw",
    }
}

/// Name of the file that takes the writes.
pub(super) fn active(form: Form, role: DiskRole) -> String {
    format!("{}.{}", role.serial(), suffix(form))
}

fn frozen(form: Form, layer: &str, role: DiskRole) -> String {
    format!("{layer}.{}.{}", role.serial(), suffix(form))
}

/// Most that the changes of a disk can take: every chunk of it, what lists them (16 bytes for each of at least 4 KiB), and the header.
fn changes_bytes(disk: u64) -> u64 {
    (disk + disk / 128 + (1 << 20)).next_multiple_of(1 << 20)
}

fn sized(path: &Path, bytes: u64) -> Result<(), ApiError> {
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    made.and_then(|file| file.set_len(bytes))
        .map_err(|e| error::io(format_args!("make {}", path.display()), e))
}

/// An empty work disk that all machines read: made once, and linked.
fn shared_base(shared: &Path) -> Result<PathBuf, ApiError> {
    let place = shared.join(WORK_BASE);
    if place.exists() {
        return Ok(place);
    }
    let staging = shared.join(format!("{WORK_BASE}.{}", super::super::save::layer_name()?));
    let made = disk::create_work(&staging, WORK_DISK, "work").map_err(IntoApi::into_api);
    // Whoever was faster has made the same.
    let placed = made.and_then(|()| match fs::hard_link(&staging, &place) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(error::io(format_args!("make {}", place.display()), e))
        }
        _ => Ok(()),
    });
    let removed = remove(&staging);
    placed.and(removed).map(|()| place)
}

pub(super) fn create(dir: &Path, form: Form, new: &New) -> Result<(), ApiError> {
    let base = shared_base(&new.shared)?;
    make_dir(dir)?;
    link(&base, &dir.join(WORK_BASE))?;
    let [root, work] = ROLES.map(|role| dir.join(active(form, role)));
    if form == Form::Changes {
        sized(&root, changes_bytes(new.root_bytes))?;
        sized(&work, changes_bytes(WORK_DISK))?;
    } else {
        disk::create_whole(&new.image, &root, new.root_bytes).map_err(IntoApi::into_api)?;
        disk::clone_file(&base, &work).map_err(IntoApi::into_api)?;
    }
    let list = Layers {
        form,
        layers: Vec::new(),
    };
    new_list(dir, &list)
}

pub(super) fn create_over(dir: &Path, from: &Path, list: &Layers) -> Result<(), ApiError> {
    let top = top(from, list)?;
    make_dir(dir)?;
    link_base(from, dir)?;
    for role in ROLES {
        let frozen = from.join(frozen(list.form, top, role));
        disk::clone_file(&frozen, &dir.join(active(list.form, role))).map_err(IntoApi::into_api)?;
    }
    new_list(dir, list)
}

pub(super) fn export(from: &Path, dir: &Path, list: &Layers) -> Result<(), ApiError> {
    let top = top(from, list)?;
    make_dir(dir)?;
    link_base(from, dir)?;
    for role in ROLES {
        let name = frozen(list.form, top, role);
        fs::rename(from.join(&name), dir.join(&name))
            .map_err(|e| error::io(format_args!("move {}", from.join(&name).display()), e))?;
    }
    write_list(dir, list)
}

pub(super) fn plan(dir: &Path, form: Form, node: impl Fn(DiskRole) -> Option<PathBuf>) -> Result<Vec<Disk>, ApiError> {
    let disk = |role: DiskRole| {
        let (path, format) = if form == Form::Changes {
            let node = node(role).ok_or_else(|| {
                let what = format!("use {} without the root helper", dir.display());
                error::io(what, io::ErrorKind::Unsupported.into())
            })?;
            (node, DiskFormat::Device)
        } else {
            (dir.join(active(form, role)), DiskFormat::Raw)
        };
        Ok(Disk {
            serial: role,
            path,
            format,
            layers: Vec::new(),
            base: None,
        })
    };
    ROLES.into_iter().map(disk).collect()
}

fn length(path: &Path) -> Result<u64, ApiError> {
    let meta = fs::metadata(path).map_err(|e| error::io(format_args!("look at {}", path.display()), e))?;
    Ok(meta.len().next_multiple_of(512))
}

pub(super) fn devices(dir: &Path, image: PathBuf, root_bytes: u64) -> Result<Vec<Device>, ApiError> {
    let device = |(role, base): (DiskRole, PathBuf)| {
        let smallest = length(&base)?;
        let bytes = match role {
            DiskRole::Root => (root_bytes / 512 * 512).max(smallest),
            DiskRole::Work => smallest,
        };
        Ok(Device {
            role,
            base,
            changes: dir.join(active(Form::Changes, role)),
            bytes,
        })
    };
    [(DiskRole::Root, image), (DiskRole::Work, dir.join(WORK_BASE))]
        .into_iter()
        .map(device)
        .collect()
}

pub(super) fn root(
    dir: &Path,
    form: Form,
    layer: Option<&str>,
    image: PathBuf,
    root_bytes: u64,
) -> Result<RootDisk, ApiError> {
    let name = match layer {
        Some(layer) => frozen(form, layer, DiskRole::Root),
        None => active(form, DiskRole::Root),
    };
    let path = dir.join(name);
    if form != Form::Changes {
        return Ok(RootDisk::File(path));
    }
    Ok(RootDisk::Changes(Device {
        role: DiskRole::Root,
        bytes: (root_bytes / 512 * 512).max(length(&image)?),
        base: image,
        changes: path,
    }))
}

pub(super) fn begin_freeze(dir: &Path, form: Form, list: &Layers, layer: &str) -> Result<(), ApiError> {
    // One that nobody has come to fetch.
    for old in &list.layers {
        for role in ROLES {
            remove(&dir.join(frozen(form, old, role)))?;
        }
    }
    begin_intent(dir, layer)
}

pub(super) fn copy_still(dir: &Path, form: Form, layer: &str, nodes: &[PathBuf]) -> Result<(), ApiError> {
    if form == Form::Changes && !nodes.is_empty() {
        written_out(nodes);
    }
    for role in ROLES {
        let from = dir.join(active(form, role));
        disk::clone_file(&from, &dir.join(frozen(form, layer, role))).map_err(IntoApi::into_api)?;
    }
    Ok(())
}

/// What an engine wrote to a block device may still be in the device's cache, above the changes.
fn written_out(nodes: &[PathBuf]) {
    let synced = nodes
        .iter()
        .all(|node| File::open(node).and_then(|file| file.sync_all()).is_ok());
    if !synced {
        // A jailed engine's nodes are its own.
        rustix::fs::sync();
    }
}

pub(super) fn end_freeze(dir: &Path, form: Form, layer: &str) -> Result<(), ApiError> {
    let list = Layers {
        form,
        layers: vec![layer.to_owned()],
    };
    if read_list(dir)? != list {
        write_list(dir, &list)?;
    }
    remove(&dir.join(INTENT))
}

pub(super) fn undo_freeze(dir: &Path, form: Form, layer: &str) -> Result<(), ApiError> {
    for role in ROLES {
        remove(&dir.join(frozen(form, layer, role)))?;
    }
    remove(&dir.join(INTENT))
}

pub(super) fn grow(dir: &Path, form: Form, bytes: u64) -> Result<(), ApiError> {
    let path = dir.join(active(form, DiskRole::Root));
    let wanted = match form {
        Form::Changes => changes_bytes(bytes),
        _ => bytes / 512 * 512,
    };
    let grown = OpenOptions::new().write(true).open(&path).and_then(|file| {
        if file.metadata()?.len() < wanted {
            file.set_len(wanted)?;
        }
        file.sync_data()
    });
    grown.map_err(|e| error::io(format_args!("grow {}", path.display()), e))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::super::{allocated, create, create_over, devices, export, freeze_at_rest, grow, plan, settle};
    use super::*;

    fn machine(form: Form) -> (tempfile::TempDir, banger_core::plan::MachinePaths, PathBuf) {
        let tmp = tempfile::tempdir().unwrap();
        let image = tmp.path().join("image.ext4");
        disk::create_work(&image, 64 << 20, "root").unwrap();
        let paths = banger_core::plan::MachinePaths {
            state: tmp.path().join("m"),
            run: tmp.path().join("r"),
        };
        fs::create_dir(&paths.state).unwrap();
        let new = New {
            form,
            image: image.clone(),
            root_bytes: 128 << 20,
            shared: tmp.path().to_owned(),
        };
        create(&paths.disks(), &new).unwrap();
        (tmp, paths, image)
    }

    fn names(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }

    fn write(path: &Path, text: &[u8]) {
        OpenOptions::new()
            .write(true)
            .open(path)
            .unwrap()
            .write_all_at(text, 1 << 20)
            .unwrap();
    }

    fn read(path: &Path) -> [u8; 3] {
        let mut text = [0; 3];
        File::open(path).unwrap().read_exact_at(&mut text, 1 << 20).unwrap();
        text
    }

    #[test]
    fn a_frozen_copy_is_independent_of_what_follows() {
        for form in [Form::Changes, Form::Whole] {
            let (tmp, paths, _) = machine(form);
            let dir = paths.disks();
            let root = dir.join(active(form, DiskRole::Root));
            write(&root, b"one");
            freeze_at_rest(&dir, "aa").unwrap();
            let kept = tmp.path().join("kept");
            export(&dir, &kept).unwrap();
            write(&root, b"two");
            let copy = tmp.path().join("copy");
            create_over(&copy, &kept).unwrap();
            assert_eq!(read(&copy.join(active(form, DiskRole::Root))), *b"one");
            assert_eq!(read(&root), *b"two");
            assert_eq!(read_list(&copy).unwrap(), read_list(&kept).unwrap());
            // Nothing of the copy stays with the machine.
            assert!(!names(&dir).iter().any(|n| n.starts_with("aa")), "{:?}", names(&dir));
            // And it outlives whom it was taken of.
            fs::remove_dir_all(&dir).unwrap();
            create_over(&tmp.path().join("again"), &kept).unwrap();
        }
    }

    #[test]
    fn a_freeze_that_was_cut_off_is_undone() {
        for form in [Form::Changes, Form::Whole] {
            for steps in 0..=2 {
                let (_tmp, paths, _) = machine(form);
                let dir = paths.disks();
                let before = names(&dir);
                let list = read_list(&dir).unwrap();
                begin_freeze(&dir, form, &list, "bb").unwrap();
                for role in ROLES.iter().take(steps) {
                    let from = dir.join(active(form, *role));
                    disk::clone_file(&from, &dir.join(frozen(form, "bb", *role))).unwrap();
                }
                settle(&dir, None).unwrap();
                assert_eq!(names(&dir), before);
                assert_eq!(read_list(&dir).unwrap(), list);
            }
        }
    }

    #[test]
    fn empty_work_disks_are_shared_and_changes_take_no_space() {
        let (tmp, paths, image) = machine(Form::Changes);
        let dir = paths.disks();
        let shared = fs::metadata(tmp.path().join(WORK_BASE)).unwrap();
        assert_eq!(fs::metadata(dir.join(WORK_BASE)).unwrap().ino(), shared.ino());
        assert_eq!(allocated(&dir).0, 0);
        let devices = devices(&dir, image.clone(), 128 << 20).unwrap();
        assert_eq!(devices[0].bytes, 128 << 20);
        assert_eq!((devices[1].bytes, devices[1].role), (WORK_DISK, DiskRole::Work));
        let node = |role: DiskRole| Some(PathBuf::from(format!("/dev/banger/x/{}", role.serial())));
        let disks = plan(&paths, image.clone(), node).unwrap();
        assert_eq!(
            (disks[0].format, disks[0].path.as_path()),
            (DiskFormat::Device, Path::new("/dev/banger/x/root"))
        );
        assert!(
            plan(&paths, image, |_| None).is_err(),
            "without a helper there is no device"
        );
    }

    #[test]
    fn both_grow() {
        for form in [Form::Changes, Form::Whole] {
            let (_tmp, paths, image) = machine(form);
            let dir = paths.disks();
            grow(&dir, 256 << 20).unwrap();
            let length = fs::metadata(dir.join(active(form, DiskRole::Root))).unwrap().len();
            assert!(length >= 256 << 20);
            if form == Form::Changes {
                assert_eq!(devices(&dir, image, 256 << 20).unwrap()[0].bytes, 256 << 20);
                assert!(length > 256 << 20, "there is room for the list of changes");
            } else {
                assert!(devices(&dir, image, 256 << 20).unwrap().is_empty());
            }
        }
    }
}
