//! The content-addressed store: kernels, images and initramfs files by digest.
//!
//! ```text
//! <state>/kernels/<digest>/{vmlinux,modules/*.ko,package.deb,kernel.json}
//! <state>/images/<digest>/{rootfs.ext4,image.json}
//! <state>/initramfs/<kernel>-<agent>-<format>.cpio
//! <state>/staging/…                     what is being made
//! ```
//!
//! Everything is made in a directory of its own below `staging` and renamed into its place when it is complete, so that what stands
//! there is whole, and any number of writers may make the same thing at once: the first wins. A staging directory is locked by
//! whoever works in it; what a crash left behind has no lock and is swept. Names of images and kernels are not known here.

mod boot;
mod make;

pub use make::Draft;
mod staging;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, IoContext, Result};
use crate::files;

use boot::FileIdentity;
pub(crate) use staging::Staging;

/// Raised whenever what is taken out of a kernel package changes; kernels of other formats are imported again.
const KERNEL_FORMAT: u32 = 2;
/// Largest metadata file.
const MAX_JSON: u64 = 1 << 20;

/// A kernel in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelInfo {
    /// Format of the directory.
    pub format: u32,
    /// Digest of the ELF image.
    pub digest: Digest,
    /// Release, as `uname -r` says it.
    pub release: String,
    /// Bytes on the host.
    pub size_bytes: u64,
    /// Where it came from.
    pub source: String,
    /// When it was imported, in milliseconds since the epoch.
    pub created_at: u64,
    /// Modules that every machine loads at its start, in this order.
    pub modules: Vec<String>,
    /// Modules that come along in the initramfs, in the order in which they can be loaded after those.
    pub later: Vec<String>,
}

/// The part of a kernel's metadata that is read before the rest.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// Files of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFiles {
    /// The ELF image.
    pub vmlinux: PathBuf,
    /// The Debian package it came from: holds all modules.
    pub package: PathBuf,
    /// What is known of it.
    pub info: KernelInfo,
}

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Digest of the content.
    pub digest: Digest,
    /// Apparent size of the file system in bytes.
    pub size_bytes: u64,
    /// Bytes of it that are free.
    pub free_bytes: u64,
    /// Bytes on the host.
    pub allocated_bytes: u64,
    /// Files and directories in it.
    pub files: u64,
    /// Path of the init system in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// Where it came from.
    pub source: String,
    /// Version of the recipe, where it was made by one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe_version: Option<u32>,
    /// When it was made, in milliseconds since the epoch.
    pub created_at: u64,
}

/// Files of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFiles {
    /// The file system.
    pub rootfs: PathBuf,
    /// What is known of it.
    pub info: ImageInfo,
}

/// The store of one state directory. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    agents: Arc<Mutex<BTreeMap<PathBuf, (FileIdentity, Digest)>>>,
}

impl Store {
    /// Opens the store below a state directory, which is made for this user alone where it is missing.
    pub fn open(state_dir: impl Into<PathBuf>) -> Result<Self> {
        let root = state_dir.into();
        for dir in ["kernels", "images", "initramfs", "staging"] {
            files::make_dir(&root.join(dir))?;
        }
        // Paths end up in other files (a disk names its image), so they must hold from anywhere.
        let root = fs::canonicalize(&root).on("find the directory", &root)?;
        Ok(Self {
            root,
            agents: Arc::default(),
        })
    }

    fn kernel_dir(&self, digest: &Digest) -> PathBuf {
        self.root.join("kernels").join(digest.hex())
    }

    fn image_dir(&self, digest: &Digest) -> PathBuf {
        self.root.join("images").join(digest.hex())
    }

    /// A kernel, if it is in the store.
    pub fn kernel(&self, digest: &Digest) -> Result<Option<KernelFiles>> {
        let dir = self.kernel_dir(digest);
        let path = dir.join("kernel.json");
        // One that an older or newer version made in another form is as good as none: it is imported again.
        match read_json::<Format>(&path)? {
            Some(Format { format: KERNEL_FORMAT }) => {}
            _ => return Ok(None),
        }
        let Some(info) = read_json::<KernelInfo>(&path)? else {
            return Ok(None);
        };
        Ok(Some(KernelFiles {
            vmlinux: dir.join("vmlinux"),
            package: dir.join("package.deb"),
            info,
        }))
    }

    /// An image, if it is in the store.
    pub fn image(&self, digest: &Digest) -> Result<Option<ImageFiles>> {
        let dir = self.image_dir(digest);
        let info = read_json::<ImageInfo>(&dir.join("image.json"))?;
        Ok(info.map(|info| ImageFiles {
            rootfs: dir.join("rootfs.ext4"),
            info,
        }))
    }

    /// All kernels, by digest.
    pub fn kernels(&self) -> Result<Vec<KernelInfo>> {
        self.list("kernels", |digest| Ok(self.kernel(&digest)?.map(|k| k.info)))
    }

    /// All images, by digest.
    pub fn images(&self) -> Result<Vec<ImageInfo>> {
        self.list("images", |digest| Ok(self.image(&digest)?.map(|i| i.info)))
    }

    fn list<T>(&self, kind: &str, get: impl Fn(Digest) -> Result<Option<T>>) -> Result<Vec<T>> {
        let dir = self.root.join(kind);
        let mut digests = Vec::new();
        for entry in fs::read_dir(&dir).on("read the directory", &dir)? {
            let name = entry.on("read the directory", &dir)?.file_name();
            digests.extend(name.to_str().and_then(|n| Digest::from_hex(n).ok()));
        }
        digests.sort();
        let mut out = Vec::new();
        for digest in digests {
            out.extend(get(digest)?);
        }
        Ok(out)
    }

    /// Removes a kernel. That nobody uses it is the caller's to know. Not being there is no error.
    pub fn delete_kernel(&self, digest: &Digest) -> Result<()> {
        for path in self.initramfs_files(&format!("{}-", digest.short()))? {
            remove_file(&path.0)?;
        }
        self.delete(&self.kernel_dir(digest))
    }

    /// Removes an image. That nobody uses it is the caller's to know. Not being there is no error.
    pub fn delete_image(&self, digest: &Digest) -> Result<()> {
        self.delete(&self.image_dir(digest))
    }

    /// Moves a directory out of its place first, so that nobody ever sees half of it.
    fn delete(&self, dir: &Path) -> Result<()> {
        let staging = Staging::new(&self.root)?;
        match fs::rename(dir, staging.path().join("deleted")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.on("remove", dir),
        }
    }
}

/// Runs blocking work on a thread for it.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(Error::Cancelled),
    }
}

fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

fn tree_bytes(dir: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        sum += if meta.is_dir() {
            tree_bytes(&entry.path())?
        } else {
            meta.len()
        };
    }
    Ok(sum)
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.on("remove", path),
    }
}

fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    File::open(path)
        .and_then(|f| f.take(limit + 1).read_to_end(&mut out))
        .on("read", path)?;
    if out.len() as u64 > limit {
        return Err(Error::Damaged {
            path: path.to_owned(),
            why: format!("it is larger than {limit} bytes"),
        });
    }
    Ok(out)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match read_limited(path, MAX_JSON) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::Damaged {
            path: path.to_owned(),
            why: e.to_string(),
        }),
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let mut bytes =
        serde_json::to_vec_pretty(value).map_err(|e| Error::io(format!("write {}", path.display()), e.into()))?;
    bytes.push(b'\n');
    files::write(path, &bytes)
}
