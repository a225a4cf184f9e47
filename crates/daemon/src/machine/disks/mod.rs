//! The disks of a machine as files, in one of three forms:
//!
//! | Form | What the machine writes to | A frozen layer | Where |
//! |---|---|---|---|
//! | [`layers`] | qcow2 files over frozen ones over the base | what was written until then, shared by hard link | engines that read qcow2 |
//! | [`changes`](Form::Changes) | `root.cow`, `work.cow`: the changes of device-mapper snapshots of the base | a copy of these files | system mode, any engine |
//! | [`whole`](Form::Whole) | `root.raw`, `work.raw`: copies of the base | a copy of these files | engines that read nothing else |
//!
//! Copies are made by reference where the file system shares blocks, else of data only. Both of the latter are in [`copies`].
//!
//! ```text
//!  machines/<id>/disks/            what it is                             shared with
//!    …                             what the machine writes to             nobody
//!    base.work.ext4                the empty work disk below              snapshots, copies, templates: by hard link
//!    disks.json                    the form, and the layers, topmost first
//!    freeze.json                   a layer that is being frozen
//! ```
//!
//! A file is gone when nobody links it any more; there are no counts to keep. Below the root disk is the image in the store.

mod copies;
mod layers;
mod merge;

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use banger_core::plan::{Disk, DiskRole, MachinePaths};
use banger_image::disk;
use banger_proto::error::ApiError;
use banger_vmm::FreshLayer;
use serde::{Deserialize, Serialize};

use super::handles::write_atomically;
use crate::error::{self, IntoApi};
use crate::host::Device;
pub use layers::MAX_LAYERS;

/// Size of a new work disk. Sparse: it takes what is written to it.
const WORK_DISK: u64 = 8 << 30;
/// Largest file of this module that is read.
const MAX_JSON: u64 = 64 << 10;

const LIST: &str = "disks.json";
const INTENT: &str = "freeze.json";
const WORK_BASE: &str = "base.work.ext4";
const ROLES: [DiskRole; 2] = [DiskRole::Root, DiskRole::Work];

/// How a machine's disks are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// qcow2 files over each other.
    #[default]
    Layers,
    /// Changes of device-mapper snapshots.
    Changes,
    /// Whole raw files.
    Whole,
}

impl Form {
    /// The word in files and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Layers => "layers",
            Self::Changes => "changes",
            Self::Whole => "whole",
        }
    }

    fn is_layers(&self) -> bool {
        *self == Self::Layers
    }
}

/// The form of a new machine's disks: where, for which engine, on what host.
pub fn choose(system: bool, device_mapper: bool, reads_qcow2: bool) -> Form {
    if system && device_mapper {
        Form::Changes
    } else if reads_qcow2 {
        Form::Layers
    } else {
        Form::Whole
    }
}

/// `disks.json`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Layers {
    /// The form; layers where it does not say.
    #[serde(default, skip_serializing_if = "Form::is_layers")]
    pub form: Form,
    /// Identifiers of the frozen layers, the topmost first. In the forms that copy, the last one alone.
    pub layers: Vec<String>,
}

/// `freeze.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Intent {
    layer: String,
}

/// What disks are made of.
#[derive(Debug, Clone)]
pub struct New {
    /// Their form.
    pub form: Form,
    /// The image.
    pub image: PathBuf,
    /// Size of the root disk in bytes.
    pub root_bytes: u64,
    /// A directory that may keep an empty work disk for all machines.
    pub shared: PathBuf,
}

/// Makes the disks of a new machine over an image, in a directory that is not there yet.
pub fn create(dir: &Path, new: &New) -> Result<(), ApiError> {
    match new.form {
        Form::Layers => layers::create(dir, &new.image, new.root_bytes),
        form => copies::create(dir, form, new),
    }
}

/// Makes disks over the frozen ones in `from`, in a directory that is not there yet.
pub fn create_over(dir: &Path, from: &Path) -> Result<(), ApiError> {
    let list = read_list(from)?;
    match list.form {
        Form::Layers => layers::create_over(dir, from, &list),
        _ => copies::create_over(dir, from, &list),
    }
}

/// Keeps the disks as they were frozen last in `dir`, which is not there yet, without anything to write to. Called once after each
/// freeze: where a layer is a copy it is moved, not shared.
pub fn export(from: &Path, dir: &Path) -> Result<(), ApiError> {
    let list = read_list(from)?;
    match list.form {
        Form::Layers => layers::export(from, dir, &list),
        _ => copies::export(from, dir, &list),
    }
}

/// The disks as an engine is given them. `node` names the block device of a disk, where there are block devices.
pub fn plan(
    paths: &MachinePaths,
    image: PathBuf,
    node: impl Fn(DiskRole) -> Option<PathBuf>,
) -> Result<Vec<Disk>, ApiError> {
    let dir = paths.disks();
    let list = read_list(&dir)?;
    match list.form {
        Form::Layers => Ok(layers::plan(&dir, &list, image)),
        form => copies::plan(&dir, form, node),
    }
}

/// The block devices that the disks in `dir` need, with a root disk of so many bytes.
pub fn devices(dir: &Path, image: PathBuf, root_bytes: u64) -> Result<Vec<Device>, ApiError> {
    match read_list(dir)?.form {
        Form::Changes => copies::devices(dir, image, root_bytes),
        _ => Ok(Vec::new()),
    }
}

/// Whether the disks in `dir` are block devices while the machine runs.
pub fn on_devices(dir: &Path) -> bool {
    read_list(dir).is_ok_and(|list| list.form == Form::Changes)
}

/// A root disk that nobody writes to.
#[derive(Debug, Clone)]
pub enum RootDisk {
    /// A chain that an engine can read.
    Chain(Disk),
    /// A file with all of it.
    File(PathBuf),
    /// The changes of a device-mapper snapshot.
    Changes(Device),
}

/// The root disk of a machine that no engine uses.
pub fn root(dir: &Path, image: PathBuf, root_bytes: u64) -> Result<RootDisk, ApiError> {
    let list = read_list(dir)?;
    match list.form {
        Form::Layers => match layers::plan(dir, &list, image).into_iter().next() {
            Some(disk) => Ok(RootDisk::Chain(disk)),
            None => Err(error::io(format_args!("use {}", dir.display()), no_layer())),
        },
        form => copies::root(dir, form, None, image, root_bytes),
    }
}

/// The root disk as it was frozen last in `dir`.
pub fn frozen_root(dir: &Path, image: PathBuf, root_bytes: u64) -> Result<RootDisk, ApiError> {
    let list = read_list(dir)?;
    match list.form {
        Form::Layers => layers::frozen_root(dir, &list, image).map(RootDisk::Chain),
        form => copies::root(dir, form, Some(top(dir, &list)?), image, root_bytes),
    }
}

/// Copies a root disk that needs no engine to be read to a new raw and sparse file.
pub fn flatten(disk: &RootDisk, target: &Path) -> Result<(), ApiError> {
    match disk {
        RootDisk::Chain(disk) => {
            let what = format_args!("read {}", disk.path.display()).to_string();
            Err(error::io(what, std::io::ErrorKind::Unsupported.into()))
        }
        RootDisk::File(path) => disk::clone_file(path, target).map_err(IntoApi::into_api),
        RootDisk::Changes(device) => merge::merge(device, target),
    }
}

/// Begins to freeze: after this an engine may be told to write to the fresh files, where there are fresh files.
pub fn begin_freeze(dir: &Path, layer: &str) -> Result<Vec<FreshLayer>, ApiError> {
    let list = read_list(dir)?;
    match list.form {
        Form::Layers => layers::begin_freeze(dir, &list, layer),
        form => copies::begin_freeze(dir, form, &list, layer).map(|()| Vec::new()),
    }
}

/// What is to be done between begin and end, while nothing is written: copies, where layers are copies. `nodes` are the block devices
/// through which it was written.
pub fn copy_still(dir: &Path, layer: &str, nodes: &[PathBuf]) -> Result<(), ApiError> {
    match read_list(dir)?.form {
        Form::Layers => Ok(()),
        form => copies::copy_still(dir, form, layer, nodes),
    }
}

/// Ends a freeze: the layer is one now.
pub fn end_freeze(dir: &Path, layer: &str) -> Result<(), ApiError> {
    let list = read_list(dir)?;
    match list.form {
        Form::Layers => layers::end_freeze(dir, layer),
        form => copies::end_freeze(dir, form, layer),
    }
}

/// Takes a freeze back that no engine has followed.
pub fn undo_freeze(dir: &Path, layer: &str) -> Result<(), ApiError> {
    match read_list(dir)?.form {
        Form::Layers => layers::undo_freeze(dir, layer),
        form => copies::undo_freeze(dir, form, layer),
    }
}

/// Freezes the disks of a machine that no engine uses.
pub fn freeze_at_rest(dir: &Path, layer: &str) -> Result<(), ApiError> {
    let frozen = begin_freeze(dir, layer).and_then(|_| copy_still(dir, layer, &[]));
    match frozen {
        Ok(()) => end_freeze(dir, layer),
        Err(e) => {
            let _ = undo_freeze(dir, layer);
            Err(e)
        }
    }
}

/// Brings a freeze to an end that was cut off. `written` are the files that the engine writes to, if there is one.
pub fn settle(dir: &Path, written: Option<&[PathBuf]>) -> Result<(), ApiError> {
    let Some(intent) = read_json::<Intent>(&dir.join(INTENT))? else {
        return Ok(());
    };
    match read_list(dir)?.form {
        Form::Layers => layers::settle(dir, &intent.layer, written),
        // The machine goes on in the same files, and half a copy is of no use.
        form => copies::undo_freeze(dir, form, &intent.layer),
    }
}

/// Makes the root disk larger, while no engine uses it. The guest has to grow the file system.
pub fn grow(dir: &Path, bytes: u64) -> Result<(), ApiError> {
    match read_list(dir)?.form {
        Form::Layers => disk::grow_root(&dir.join(layers::active(DiskRole::Root)), bytes).map_err(IntoApi::into_api),
        form => copies::grow(dir, form, bytes),
    }
}

/// Disks as versions before layers had them are brought into their place, while no engine uses them.
pub fn upgrade(paths: &MachinePaths) -> Result<(), ApiError> {
    layers::upgrade(paths)
}

/// Bytes on the host: of what the machine writes to, and of the frozen layers below.
pub fn allocated(dir: &Path) -> (u64, u64) {
    let form = read_list(dir).map(|list| list.form).unwrap_or_default();
    let active = ROLES.map(|role| match form {
        Form::Layers => layers::active(role),
        form => copies::active(form, role),
    });
    let (mut own, mut shared) = (0, 0);
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let bytes = entry.metadata().map_or(0, |m| m.blocks() * 512);
        if active.iter().any(|name| entry.file_name() == **name) {
            own += bytes;
        } else {
            shared += bytes;
        }
    }
    (own, shared)
}

/// The form and layers of `dir`.
pub fn read_list(dir: &Path) -> Result<Layers, ApiError> {
    let path = dir.join(LIST);
    read_json(&path)?.ok_or_else(|| {
        error::io(
            format_args!("read {}", path.display()),
            std::io::ErrorKind::NotFound.into(),
        )
    })
}

/// The layer that was frozen last.
fn top<'a>(dir: &Path, list: &'a Layers) -> Result<&'a str, ApiError> {
    let top = list.layers.first();
    top.map(String::as_str)
        .ok_or_else(|| error::io(format_args!("use {}", dir.display()), no_layer()))
}

fn begin_intent(dir: &Path, layer: &str) -> Result<(), ApiError> {
    let intent = Intent {
        layer: layer.to_owned(),
    };
    let text = serde_json::to_vec(&intent).unwrap_or_default();
    write_atomically(&dir.join(INTENT), &text).map_err(|e| error::io(format_args!("write {}", dir.display()), e))
}

/// Writes the list of disks that are new. Should the host lose power now, the machine is as new as they are, and lost with them.
fn new_list(dir: &Path, list: &Layers) -> Result<(), ApiError> {
    let path = dir.join(LIST);
    let text = serde_json::to_vec(list).unwrap_or_default();
    fs::write(&path, text).map_err(|e| error::io(format_args!("write {}", path.display()), e))
}

fn write_list(dir: &Path, list: &Layers) -> Result<(), ApiError> {
    let path = dir.join(LIST);
    let text = serde_json::to_vec(list).unwrap_or_default();
    write_atomically(&path, &text).map_err(|e| error::io(format_args!("write {}", path.display()), e))
}

fn link(from: &Path, to: &Path) -> Result<(), ApiError> {
    fs::hard_link(from, to).map_err(|e| error::io(format_args!("link {}", from.display()), e))
}

fn link_base(from: &Path, to: &Path) -> Result<(), ApiError> {
    link(&from.join(WORK_BASE), &to.join(WORK_BASE))
}

/// Reads a file of JSON; `None` where there is none.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, ApiError> {
    use std::io::Read;
    let failed = |e| error::io(format_args!("read {}", path.display()), e);
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let mut text = String::new();
    file.take(MAX_JSON).read_to_string(&mut text).map_err(failed)?;
    serde_json::from_str(&text).map(Some).map_err(|e| failed(e.into()))
}

fn no_layer() -> std::io::Error {
    std::io::Error::other("it has no frozen layer")
}

/// Makes a directory that is this user's alone.
pub fn make_dir(path: &Path) -> Result<(), ApiError> {
    fs::DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(|e| error::io(format_args!("make {}", path.display()), e))
}

fn remove(path: &Path) -> Result<(), ApiError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(error::io(format_args!("remove {}", path.display()), e))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_devices_where_there_are_any_and_copies_where_nothing_else_works() {
        assert_eq!(choose(true, true, true), Form::Changes);
        assert_eq!(choose(true, true, false), Form::Changes);
        assert_eq!(choose(true, false, true), Form::Layers);
        assert_eq!(choose(true, false, false), Form::Whole);
        assert_eq!(choose(false, true, true), Form::Layers);
        assert_eq!(choose(false, true, false), Form::Whole);
    }

    #[test]
    fn a_list_without_a_form_is_one_of_layers() {
        let old: Layers = serde_json::from_str(r#"{"layers":["a"]}"#).unwrap();
        assert_eq!(old.form, Form::Layers);
        assert_eq!(serde_json::to_string(&old).unwrap(), r#"{"layers":["a"]}"#);
        let new = Layers {
            form: Form::Changes,
            layers: Vec::new(),
        };
        assert_eq!(
            serde_json::to_string(&new).unwrap(),
            r#"{"form":"changes","layers":[]}"#
        );
    }
}
