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

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::build::{self, SCRATCH_PREFIX, Scratch};
use crate::cancel::Cancel;
use crate::digest::{Digest, Hasher};
use crate::error::{Error, IoContext, Result};
use crate::files;
use crate::initramfs;
use crate::kernel::{extract, fetch};
use crate::progress::{Progress, Step};
use crate::recipe::Recipe;
use crate::tar::Scrub;

/// Raised whenever what is taken out of a kernel package changes; kernels of other formats are imported again.
const KERNEL_FORMAT: u32 = 2;
/// Initramfs files of one kernel that are kept: those of the agents that were used last.
const INITRAMFS_KEPT: usize = 4;
/// Largest metadata file.
const MAX_JSON: u64 = 1 << 20;
/// Largest agent binary.
const MAX_AGENT: u64 = 256 << 20;

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

/// What changes when a file is replaced or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileIdentity {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl FileIdentity {
    fn of(meta: &fs::Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
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

    /// Imports the kernel of a Debian kernel package. `source` says where it came from; the file's name if none.
    pub async fn import_kernel_deb(
        &self,
        package: &Path,
        source: Option<&str>,
        progress: &Progress,
    ) -> Result<KernelInfo> {
        let source = source.map_or_else(
            || package.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            str::to_owned,
        );
        let staging = Staging::new(&self.root)?;
        self.import(staging, package.to_owned(), source, progress).await
    }

    /// Downloads the distribution's own kernel package and imports it.
    pub async fn fetch_distribution_kernel(&self, progress: &Progress) -> Result<KernelInfo> {
        let staging = Staging::new(&self.root)?;
        let download = staging.path().join("download");
        files::make_dir(&download)?;
        let found = fetch::download(&download, progress).await?;
        self.import(staging, found.path, found.source, progress).await
    }

    async fn import(
        &self,
        staging: Staging,
        package: PathBuf,
        source: String,
        progress: &Progress,
    ) -> Result<KernelInfo> {
        let store = self.clone();
        let progress = progress.clone();
        let (cancel, _guard) = Cancel::new();
        blocking(move || {
            let dir = staging.path().join("kernel");
            files::make_dir(&dir)?;
            let found = extract::extract(&package, &dir, &progress, &cancel)?;
            if cancel.is_set() {
                return Err(Error::Cancelled);
            }
            progress.begin(Step::Store);
            // The package is kept: it is the most compact form of all the modules that machines do not load by default.
            let kept = dir.join("package.deb");
            fs::copy(&package, &kept).on("copy", &package)?;
            File::open(&kept).and_then(|f| f.sync_data()).on("write", &kept)?;
            let info = KernelInfo {
                format: KERNEL_FORMAT,
                digest: found.digest,
                release: found.release,
                size_bytes: tree_bytes(&dir).on("read the directory", &dir)?,
                source,
                created_at: now_ms(),
                modules: found.order,
                later: found.later,
            };
            write_json(&dir.join("kernel.json"), &info)?;
            let target = store.kernel_dir(&info.digest);
            store.settle(
                &staging,
                &dir,
                &target,
                || Ok(store.kernel(&info.digest)?.map(|k| k.info)),
                info.clone(),
            )
        })
        .await
    }

    /// Moves what is complete into its place. If another was faster, its is as good.
    fn settle<T>(
        &self,
        staging: &Staging,
        made: &Path,
        target: &Path,
        present: impl Fn() -> Result<Option<T>>,
        ours: T,
    ) -> Result<T> {
        files::sync_dir(made)?;
        let mut attempts = 0;
        loop {
            match fs::rename(made, target) {
                Ok(()) => {
                    if let Some(parent) = target.parent() {
                        files::sync_dir(parent)?;
                    }
                    return Ok(ours);
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
                    ) => {}
                Err(error) => return Err(Error::io(format!("move {} into the store", target.display()), error)),
            }
            // A damaged or outdated one gives way; it is removed with the staging directory.
            if let Ok(Some(theirs)) = present() {
                return Ok(theirs);
            }
            attempts += 1;
            if attempts > 10 {
                return Err(Error::Damaged {
                    path: target.to_owned(),
                    why: "it cannot be replaced".to_owned(),
                });
            }
            match fs::rename(target, staging.path().join(format!("replaced-{attempts}"))) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("replace {}", target.display()), error));
                }
                _ => {}
            }
        }
    }

    /// The initramfs of a kernel with an agent, made where it is missing.
    pub async fn initramfs(&self, kernel: &Digest, agent: &Path) -> Result<PathBuf> {
        let store = self.clone();
        let kernel = *kernel;
        let agent = agent.to_owned();
        blocking(move || store.initramfs_blocking(&kernel, &agent)).await
    }

    fn initramfs_blocking(&self, kernel: &Digest, agent: &Path) -> Result<PathBuf> {
        let agent_digest = self.agent_digest(agent)?;
        let name = format!(
            "{}-{}-{}.{KERNEL_FORMAT}.cpio",
            kernel.short(),
            agent_digest.short(),
            initramfs::FORMAT
        );
        let path = self.root.join("initramfs").join(name);
        if path.exists() {
            return Ok(path);
        }
        let dir = self.kernel_dir(kernel);
        let info = self.kernel(kernel)?.ok_or(Error::NoKernel(*kernel))?.info;
        let mut modules = BTreeMap::new();
        for name in info.modules.iter().chain(&info.later) {
            let file = format!("{name}.ko");
            let bytes = read_limited(&dir.join("modules").join(&file), MAX_AGENT)?;
            modules.insert(file, bytes);
        }
        let agent_bytes = read_limited(agent, MAX_AGENT)?;
        // Replaced between the two looks: the name must fit the content.
        if Digest::of(&agent_bytes) != agent_digest {
            return Err(Error::Damaged {
                path: agent.to_owned(),
                why: "it changed while it was read".to_owned(),
            });
        }
        let (order, later) = (initramfs::list(&info.modules), initramfs::list(&info.later));
        let archive = initramfs::archive(&initramfs::nodes(
            &agent_bytes,
            &modules,
            &[order.as_bytes(), later.as_bytes()],
        ));
        let staging = Staging::new(&self.root)?;
        let made = staging.path().join("initramfs");
        files::write(&made, &archive)?;
        fs::rename(&made, &path).on("make", &path)?;
        self.forget_initramfs(kernel, &path)?;
        Ok(path)
    }

    /// Digest of an agent binary; computed again only when the file changes.
    fn agent_digest(&self, agent: &Path) -> Result<Digest> {
        let mut file = File::open(agent).on("open the agent", agent)?;
        let identity = FileIdentity::of(&file.metadata().on("read the agent", agent)?);
        if let Ok(known) = self.agents.lock()
            && let Some((of, digest)) = known.get(agent)
            && *of == identity
        {
            return Ok(*digest);
        }
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; 1 << 18];
        loop {
            match file.read(&mut buffer).on("read the agent", agent)? {
                0 => break,
                n => hasher.update(buffer.get(..n).unwrap_or_default()),
            }
        }
        let digest = hasher.finish();
        if let Ok(mut known) = self.agents.lock() {
            known.insert(agent.to_owned(), (identity, digest));
        }
        Ok(digest)
    }

    /// Initramfs files whose names begin so, with their times.
    fn initramfs_files(&self, prefix: &str) -> Result<Vec<(PathBuf, SystemTime)>> {
        let dir = self.root.join("initramfs");
        let mut out = Vec::new();
        for entry in fs::read_dir(&dir).on("read the directory", &dir)? {
            let entry = entry.on("read the directory", &dir)?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                let made = entry.metadata().and_then(|m| m.modified()).unwrap_or(UNIX_EPOCH);
                out.push((entry.path(), made));
            }
        }
        Ok(out)
    }

    /// Removes the oldest initramfs files of a kernel. Running machines have read theirs long ago.
    fn forget_initramfs(&self, kernel: &Digest, but: &Path) -> Result<()> {
        let mut files = self.initramfs_files(&format!("{}-", kernel.short()))?;
        files.sort_by_key(|(_, made)| std::cmp::Reverse(*made));
        for (path, _) in files.iter().filter(|(path, _)| path != but).skip(INITRAMFS_KEPT - 1) {
            remove_file(path)?;
        }
        Ok(())
    }

    /// Builds the image of a recipe.
    pub async fn build_image(&self, recipe: &'static Recipe, progress: &Progress) -> Result<ImageInfo> {
        let staging = Arc::new(Staging::new(&self.root)?);
        let dir = staging.path().join("image");
        files::make_dir(&dir)?;
        let scratch = if rustix::process::geteuid().is_root() {
            Scratch::inside(staging.path())?
        } else {
            let scratch = Scratch::outside()?;
            // For the sweep, should we not live to remove it.
            files::write(
                &staging.path().join("outside"),
                scratch.path().as_os_str().as_encoded_bytes(),
            )?;
            scratch
        };
        let made = build::bootstrap(recipe, scratch, staging.clone(), dir.join("rootfs.ext4"), progress).await?;
        let source = format!("recipe {} {}", recipe.name, recipe.version);
        self.settle_image(staging, dir, made, source, Some(recipe.version), progress)
            .await
    }

    /// Makes an image of a tar file as it is.
    pub async fn import_tar(&self, tar: &Path, source: Option<&str>, progress: &Progress) -> Result<ImageInfo> {
        let source = source.map_or_else(
            || tar.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            str::to_owned,
        );
        let staging = Arc::new(Staging::new(&self.root)?);
        let dir = staging.path().join("image");
        files::make_dir(&dir)?;
        let (cancel, _guard) = Cancel::new();
        let (path, name, told, target) = (
            tar.to_owned(),
            source.clone(),
            progress.clone(),
            dir.join("rootfs.ext4"),
        );
        let held = staging.clone();
        let made = blocking(move || {
            let _held = held;
            let file = File::open(&path).on("open", &path)?;
            build::ingest(
                cancel.reader(io::BufReader::with_capacity(1 << 18, file)),
                &name,
                Scrub::Nothing,
                &target,
                &told,
            )
        })
        .await?;
        self.settle_image(staging, dir, made, source, None, progress).await
    }

    async fn settle_image(
        &self,
        staging: Arc<Staging>,
        dir: PathBuf,
        made: build::Ingested,
        source: String,
        recipe_version: Option<u32>,
        progress: &Progress,
    ) -> Result<ImageInfo> {
        let store = self.clone();
        progress.begin(Step::Store);
        blocking(move || {
            let rootfs = dir.join("rootfs.ext4");
            let allocated_bytes = files::allocated(&fs::metadata(&rootfs).on("read", &rootfs)?);
            // Overlays name it; nobody ever writes to it again.
            fs::set_permissions(&rootfs, std::os::unix::fs::PermissionsExt::from_mode(0o400)).on("protect", &rootfs)?;
            let info = ImageInfo {
                digest: made.digest,
                size_bytes: made.summary.size_bytes,
                free_bytes: made.summary.free_bytes,
                allocated_bytes,
                files: made.summary.files,
                init: made.init,
                source,
                recipe_version,
                created_at: now_ms(),
            };
            write_json(&dir.join("image.json"), &info)?;
            let target = store.image_dir(&info.digest);
            store.settle(
                &staging,
                &dir,
                &target,
                || Ok(store.image(&info.digest)?.map(|i| i.info)),
                info.clone(),
            )
        })
        .await
    }

    /// Removes what crashed work left behind. What somebody works in is left alone. Returns how many were removed.
    pub fn sweep_staging(&self) -> Result<usize> {
        let dir = self.root.join("staging");
        let mut removed = 0;
        for entry in fs::read_dir(&dir).on("read the directory", &dir)? {
            let path = entry.on("read the directory", &dir)?.path();
            let Ok(lock) = File::open(&path) else { continue };
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            sweep_outside(&path);
            match files::remove_tree(&path) {
                Ok(()) => removed += 1,
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "cannot remove what unfinished work left behind")
                }
            }
        }
        Ok(removed)
    }
}

/// Removes the scratch directory outside of the store that a build noted in its staging directory.
fn sweep_outside(staging: &Path) {
    let Ok(bytes) = read_limited(&staging.join("outside"), 4096) else {
        return;
    };
    let Ok(text) = String::from_utf8(bytes) else { return };
    let path = Path::new(&text);
    // Only what was made for this purpose, and by this user.
    let named = path.is_absolute()
        && path
            .file_name()
            .and_then(|n| n.to_str())
            .is_some_and(|n| n.starts_with(SCRATCH_PREFIX));
    let owned = fs::symlink_metadata(path).is_ok_and(|m| m.is_dir() && m.uid() == rustix::process::getuid().as_raw());
    if named
        && owned
        && let Err(error) = files::remove_tree(path)
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove what an unfinished build left behind");
    }
}

/// A directory in which something is made. Locked while it is in use, removed afterwards.
#[derive(Debug)]
pub(crate) struct Staging {
    path: PathBuf,
    _lock: File,
}

impl Staging {
    fn new(root: &Path) -> Result<Self> {
        let base = root.join("staging");
        loop {
            let path = tempfile::Builder::new()
                .prefix("work-")
                .tempdir_in(&base)
                .on("make a directory in", &base)?
                .keep();
            let lock = match File::open(&path) {
                Ok(lock) => lock,
                // A sweep was faster than the lock.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io(format!("open {}", path.display()), error)),
            };
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() && path.exists() {
                return Ok(Self { path, _lock: lock });
            }
        }
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What cannot be removed now (a tool is still cleaning up in it) is swept later.
        let _ = files::remove_tree(&self.path);
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
