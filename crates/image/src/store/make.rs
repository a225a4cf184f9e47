//! Putting kernels and images into the store.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{ImageInfo, KERNEL_FORMAT, KernelInfo, Staging, Store, blocking, now_ms, tree_bytes, write_json};
use crate::build::{self, Scratch};
use crate::cancel::Cancel;
use crate::error::{Error, IoContext, Result};
use crate::ext4::{self, writer::Summary};
use crate::files;
use crate::ingest::{Ingested, ingest};
use crate::kernel::{extract, fetch};
use crate::progress::{Progress, Step};
use crate::recipe::Recipe;
use crate::seal;
use crate::tar::Scrub;

/// An image that somebody else writes. Dropped without [`Store::keep_disk`] it leaves nothing.
#[derive(Debug)]
pub struct Draft {
    staging: Arc<Staging>,
    dir: PathBuf,
}

impl Draft {
    /// Where its file system goes: a raw file that is not there yet.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs.ext4")
    }
}

impl Store {
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

    /// Builds the image of a recipe.
    pub async fn build_image(&self, recipe: &'static Recipe, progress: &Progress) -> Result<ImageInfo> {
        let staging = Arc::new(Staging::new(&self.root)?);
        let dir = staging.path().join("image");
        files::make_dir(&dir)?;
        // Whoever else bootstraps has one of its own.
        let scratch = if rustix::process::geteuid().is_root() || crate::builder::socket().is_some() {
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
            ingest(
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

    /// Begins an image that somebody else writes.
    pub fn draft(&self) -> Result<Draft> {
        let staging = Arc::new(Staging::new(&self.root)?);
        let dir = staging.path().join("image");
        files::make_dir(&dir)?;
        Ok(Draft { staging, dir })
    }

    /// Keeps a whole disk as an image. `init` is the init system in it; the digest is taken over all of its bytes.
    pub async fn keep_disk(
        &self,
        draft: Draft,
        init: Option<String>,
        source: String,
        progress: &Progress,
    ) -> Result<ImageInfo> {
        let (rootfs, held) = (draft.rootfs(), draft.staging.clone());
        progress.begin(Step::Store);
        let made = blocking(move || {
            let _held = held;
            let file = File::open(&rootfs).on("open", &rootfs)?;
            file.sync_data().on("write", &rootfs)?;
            let usage = ext4::usage(&file).on("read", &rootfs)?;
            Ok(Ingested {
                digest: seal::digest(&file).on("read", &rootfs)?,
                init,
                summary: Summary {
                    size_bytes: file.metadata().on("read", &rootfs)?.len(),
                    free_bytes: usage.free_bytes,
                    files: usage.files,
                },
            })
        })
        .await?;
        self.settle_image(draft.staging, draft.dir, made, source, None, progress)
            .await
    }

    async fn settle_image(
        &self,
        staging: Arc<Staging>,
        dir: PathBuf,
        made: Ingested,
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
}
