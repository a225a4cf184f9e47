//! The content-addressed store, as far as the daemon uses it: digests as text, errors as clients see them, stages as an
//! operation shows them.

use std::path::{Path, PathBuf};

use banger_image::recipe::Recipe;
use banger_image::{Digest, Draft, Progress, Stage, Store, Unit};
use banger_proto::api::{Progress as ApiProgress, ProgressUnit};
use banger_proto::error::{ApiError, ErrorCode};

use crate::blocking::blocking;
use crate::error::{IntoApi, chain};
use crate::ops::Op;

/// What an engine is given to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// ELF image of the kernel.
    pub kernel: PathBuf,
    /// Initial RAM file system with the agent.
    pub initrd: PathBuf,
}

/// What is known of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFacts {
    /// Digest, `sha256:…`.
    pub digest: String,
    /// Apparent size of the file system.
    pub size_bytes: u64,
    /// Bytes on the host.
    pub allocated_bytes: u64,
    /// Path of the init system, where there is one.
    pub init: Option<String>,
    /// Where it came from.
    pub source: String,
}

/// What is known of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFacts {
    /// Digest, `sha256:…`.
    pub digest: String,
    /// Bytes on the host.
    pub size_bytes: u64,
    /// Release.
    pub release: String,
    /// Where it came from.
    pub source: String,
}

/// The store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shelf {
    store: Store,
    agent: PathBuf,
}

impl Shelf {
    /// Opens the store, and clears in the background what a crash left half made.
    pub fn open(dir: &Path, libexec: &Path) -> std::io::Result<Self> {
        let store = Store::open(dir).map_err(|e| std::io::Error::other(chain(&e)))?;
        let sweeping = store.clone();
        tokio::task::spawn_blocking(move || match sweeping.sweep_staging() {
            Ok(0) => {}
            Ok(swept) => tracing::info!(swept, "half-made images and kernels removed"),
            Err(e) => tracing::warn!(error = %chain(&e), "half-made images and kernels not removed"),
        });
        Ok(Self {
            store,
            agent: libexec.join("banger-agent"),
        })
    }

    /// An image.
    pub async fn image(&self, digest: &str) -> Result<ImageFacts, ApiError> {
        let (store, digest) = (self.store.clone(), parse(digest)?);
        let found = blocking(move || store.image(&digest)?.ok_or(banger_image::Error::NoImage(digest))).await?;
        Ok(image_facts(found.info))
    }

    /// A kernel.
    pub async fn kernel(&self, digest: &str) -> Result<KernelFacts, ApiError> {
        let (store, digest) = (self.store.clone(), parse(digest)?);
        let found = blocking(move || store.kernel(&digest)?.ok_or(banger_image::Error::NoKernel(digest))).await?;
        Ok(kernel_facts(found.info))
    }

    /// The file system of an image.
    pub async fn image_file(&self, digest: &str) -> Result<PathBuf, ApiError> {
        let (store, digest) = (self.store.clone(), parse(digest)?);
        let found = blocking(move || store.image(&digest)?.ok_or(banger_image::Error::NoImage(digest))).await?;
        Ok(found.rootfs)
    }

    /// Kernel and initramfs.
    pub async fn boot(&self, kernel: &str) -> Result<Boot, ApiError> {
        let digest = parse(kernel)?;
        let (store, wanted) = (self.store.clone(), digest);
        let files = blocking(move || store.kernel(&wanted)?.ok_or(banger_image::Error::NoKernel(wanted))).await?;
        if !self.agent.is_file() {
            let message = format!("the guest agent {} is not there", self.agent.display());
            let hint = "install banger anew, or set BANGER_LIBEXEC to the directory that has it";
            return Err(ApiError::new(ErrorCode::Unsupported, message).hint(hint));
        }
        let initrd = self
            .store
            .initramfs(&digest, &self.agent)
            .await
            .map_err(IntoApi::into_api)?;
        Ok(Boot {
            kernel: files.vmlinux,
            initrd,
        })
    }

    /// Builds an image.
    pub async fn build(&self, recipe: &'static Recipe, op: &Op) -> Result<ImageFacts, ApiError> {
        self.store
            .build_image(recipe, &told(op))
            .await
            .map(image_facts)
            .map_err(IntoApi::into_api)
    }

    /// Imports a kernel from a package, or the distribution's own.
    pub async fn import(&self, from: Option<PathBuf>, op: &Op) -> Result<KernelFacts, ApiError> {
        let progress = told(op);
        let imported = match from {
            Some(package) => self.store.import_kernel_deb(&package, None, &progress).await,
            None => self.store.fetch_distribution_kernel(&progress).await,
        };
        imported.map(kernel_facts).map_err(IntoApi::into_api)
    }

    /// Begins an image that somebody else writes.
    pub fn draft(&self) -> Result<Draft, ApiError> {
        self.store.draft().map_err(IntoApi::into_api)
    }

    /// Keeps a disk as an image.
    pub async fn keep_disk(
        &self,
        draft: Draft,
        init: Option<String>,
        source: String,
        op: &Op,
    ) -> Result<ImageFacts, ApiError> {
        let kept = self.store.keep_disk(draft, init, source, &told(op)).await;
        kept.map(image_facts).map_err(IntoApi::into_api)
    }

    /// Removes an image's files.
    pub async fn delete_image(&self, digest: &str) -> Result<(), ApiError> {
        let (store, digest) = (self.store.clone(), parse(digest)?);
        blocking(move || store.delete_image(&digest)).await
    }

    /// Removes a kernel's files.
    pub async fn delete_kernel(&self, digest: &str) -> Result<(), ApiError> {
        let (store, digest) = (self.store.clone(), parse(digest)?);
        blocking(move || store.delete_kernel(&digest)).await
    }
}

fn parse(digest: &str) -> Result<Digest, ApiError> {
    digest
        .parse()
        .map_err(|e| ApiError::new(ErrorCode::Internal, format!("digest `{digest}`: {e}")))
}

fn image_facts(info: banger_image::ImageInfo) -> ImageFacts {
    ImageFacts {
        digest: info.digest.to_string(),
        size_bytes: info.size_bytes,
        allocated_bytes: info.allocated_bytes,
        init: info.init,
        source: info.source,
    }
}

fn kernel_facts(info: banger_image::KernelInfo) -> KernelFacts {
    KernelFacts {
        digest: info.digest.to_string(),
        size_bytes: info.size_bytes,
        release: info.release,
        source: info.source,
    }
}

/// Shows an operation's watchers where the work is.
fn told(op: &Op) -> Progress {
    let op = op.clone();
    Progress::new(move |stage: Stage| {
        let unit = match stage.unit {
            Unit::Bytes => ProgressUnit::Bytes,
            Unit::Items => ProgressUnit::Items,
        };
        let known = stage.done > 0 || stage.total > 0;
        let progress = known.then_some(ApiProgress {
            done: stage.done,
            total: stage.total,
            unit,
        });
        op.mirror(stage.step.label(), progress);
    })
}
