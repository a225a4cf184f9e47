//! Images and kernels by name. The objects are in the content-addressed store ([`shelf`]); here are the names, what may be made
//! on demand, who uses what, and that nothing is made twice at once ([`flight`]).

pub mod flight;
pub mod shelf;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use banger_core::plan::MachinePaths;
use banger_core::reference::similar;
use banger_core::spec::DEFAULT_KERNEL;
use banger_image::{Draft, recipe};
use banger_proto::api::{Check, CheckLevel, Image, Kernel, MachineSpec};
use banger_proto::error::{ApiError, ErrorCode};

use crate::blocking::blocking;
use crate::db::{Db, NameTable, NamedObject};
use crate::error::IntoApi;
use crate::machine::disks;
use crate::ops::{Op, Ops};
use crate::paths::Paths;
use crate::recover;
use crate::services::Services;
use crate::time;
use flight::Flights;
pub use shelf::Boot;
use shelf::Shelf;

/// An image or kernel that a machine is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Digest, `sha256:…`.
    pub digest: String,
    /// Size of an image's file system, of a kernel's ELF.
    pub size_bytes: u64,
}

/// Images and kernels of a daemon.
pub struct Stock {
    db: Db,
    shelf: Shelf,
    flights: Arc<Flights<Object>>,
}

impl std::fmt::Debug for Stock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stock").finish_non_exhaustive()
    }
}

impl Stock {
    /// Opens the store.
    pub fn open(paths: &Paths, db: Db, ops: Arc<Ops>, libexec: &Path) -> std::io::Result<Self> {
        let shelf = Shelf::open(&paths.store(), libexec)?;
        Ok(Self {
            db,
            shelf,
            flights: Arc::new(Flights::new(ops)),
        })
    }

    async fn named(&self, table: NameTable, name: &str) -> Result<Option<NamedObject>, ApiError> {
        let names = self.db.names(table).await.map_err(IntoApi::into_api)?;
        Ok(names.into_iter().find(|n| n.name == name))
    }

    /// Whether there is, or can be made, an image of this name; its size if it is there.
    pub async fn check_image(&self, name: &str) -> Result<Option<u64>, ApiError> {
        if let Some(named) = self.named(NameTable::Images, name).await? {
            return Ok(self.shelf.image(&named.digest).await.ok().map(|i| i.size_bytes));
        }
        if recipe::find(name).is_some() {
            return Ok(None);
        }
        let names = self.db.names(NameTable::Images).await.map_err(IntoApi::into_api)?;
        let known: Vec<&str> = names.iter().map(|n| n.name.as_str()).chain(recipe::names()).collect();
        Err(unknown("image", name, &known))
    }

    /// Whether there is, or can be made, a kernel of this name.
    pub async fn check_kernel(&self, name: &str) -> Result<(), ApiError> {
        if name == DEFAULT_KERNEL || self.named(NameTable::Kernels, name).await?.is_some() {
            return Ok(());
        }
        let names = self.db.names(NameTable::Kernels).await.map_err(IntoApi::into_api)?;
        let known: Vec<&str> = names.iter().map(|n| n.name.as_str()).chain([DEFAULT_KERNEL]).collect();
        Err(unknown("kernel", name, &known))
    }

    /// The image of this name, built if it is one of the defaults and not there.
    pub async fn image(&self, name: &str, op: &Op) -> Result<Object, ApiError> {
        if let Some(named) = self.named(NameTable::Images, name).await?
            && let Ok(facts) = self.shelf.image(&named.digest).await
        {
            return Ok(Object {
                digest: named.digest,
                size_bytes: facts.size_bytes,
            });
        }
        self.build_image(name, op).await
    }

    /// Builds an image by its recipe.
    pub async fn build_image(&self, name: &str, op: &Op) -> Result<Object, ApiError> {
        let Some(recipe) = recipe::find(name) else {
            return Err(unknown("image recipe", name, &recipe::names()));
        };
        let (shelf, db, name) = (self.shelf.clone(), self.db.clone(), name.to_owned());
        let make = move |op: Op| async move {
            let facts = shelf.build(recipe, &op).await?;
            let named = NamedObject {
                name,
                digest: facts.digest.clone(),
                created_at: time::now(),
            };
            db.put_name(NameTable::Images, named).await.map_err(IntoApi::into_api)?;
            Ok(Object {
                digest: facts.digest,
                size_bytes: facts.size_bytes,
            })
        };
        self.flights.join(&format!("image {}", recipe.name), op, make).await
    }

    /// The kernel of this name, imported if it is the default and not there.
    pub async fn kernel(&self, name: &str, op: &Op) -> Result<Object, ApiError> {
        if let Some(named) = self.named(NameTable::Kernels, name).await?
            && let Ok(facts) = self.shelf.kernel(&named.digest).await
        {
            return Ok(Object {
                digest: named.digest,
                size_bytes: facts.size_bytes,
            });
        }
        if name != DEFAULT_KERNEL {
            return Err(unknown("kernel", name, &[DEFAULT_KERNEL]));
        }
        self.import_kernel(name, None, op).await
    }

    /// Imports a kernel from a package file, or the distribution's own.
    pub async fn import_kernel(&self, name: &str, from: Option<PathBuf>, op: &Op) -> Result<Object, ApiError> {
        let source = from.as_ref().map_or_else(String::new, |f| f.display().to_string());
        let key = format!("kernel {name} {source}");
        let (shelf, db, name) = (self.shelf.clone(), self.db.clone(), name.to_owned());
        let make = move |op: Op| async move {
            let facts = shelf.import(from, &op).await?;
            let named = NamedObject {
                name,
                digest: facts.digest.clone(),
                created_at: time::now(),
            };
            db.put_name(NameTable::Kernels, named)
                .await
                .map_err(IntoApi::into_api)?;
            Ok(Object {
                digest: facts.digest,
                size_bytes: facts.size_bytes,
            })
        };
        self.flights.join(&key, op, make).await
    }

    /// What a machine's engine is given to boot.
    pub async fn boot_files(&self, spec: &MachineSpec) -> Result<Boot, ApiError> {
        self.shelf.boot(&spec.kernel_digest).await
    }

    /// The file system of a machine's image.
    pub async fn image_file(&self, spec: &MachineSpec) -> Result<PathBuf, ApiError> {
        self.shelf.image_file(&spec.image_digest).await
    }

    /// Makes a machine's disks.
    pub async fn make_disks(
        &self,
        services: &Services,
        paths: &MachinePaths,
        spec: &MachineSpec,
    ) -> Result<(), ApiError> {
        let new = disks::New {
            form: services.form(&spec.engine).await?,
            image: self.shelf.image_file(&spec.image_digest).await?,
            root_bytes: spec.disk_bytes,
            shared: services.paths.state.clone(),
        };
        let dir = paths.disks();
        blocking(move || disks::create(&dir, &new)).await
    }

    /// Checks that an image may be stored under this name.
    pub async fn check_new_image(&self, name: &str, force: bool) -> Result<(), ApiError> {
        banger_core::name::MachineName::parse(name).map_err(|e| {
            let mut error = e.into_api();
            error.message = error.message.replace("machine name", "image name");
            error
        })?;
        if recipe::find(name).is_some() {
            let message = format!("`{name}` is the name of a default image");
            return Err(ApiError::new(ErrorCode::Conflict, message).hint("choose another name"));
        }
        if !force && self.named(NameTable::Images, name).await?.is_some() {
            return Err(
                ApiError::new(ErrorCode::Conflict, format!("there is an image `{name}` already"))
                    .hint("choose another name, or replace it with --force"),
            );
        }
        Ok(())
    }

    /// Begins an image that an engine writes.
    pub fn draft(&self) -> Result<Draft, ApiError> {
        self.shelf.draft()
    }

    /// Keeps a disk as an image of this name. It has the init system of the image that it began as.
    pub async fn keep_disk(
        &self,
        draft: Draft,
        spec: &MachineSpec,
        source: String,
        name: &str,
        op: &Op,
    ) -> Result<(), ApiError> {
        let init = self.shelf.image(&spec.image_digest).await?.init;
        let facts = self.shelf.keep_disk(draft, init, source, op).await?;
        let named = NamedObject {
            name: name.to_owned(),
            digest: facts.digest,
            created_at: time::now(),
        };
        self.db
            .put_name(NameTable::Images, named)
            .await
            .map_err(IntoApi::into_api)
    }

    /// The spec with the digests that its names of image and kernel stand for now; `None` where one is not there.
    pub async fn as_of_now(&self, spec: &MachineSpec) -> Option<MachineSpec> {
        let digest = |named: Option<NamedObject>| named.map(|n| n.digest);
        let image = self.named(NameTable::Images, &spec.image).await.ok().and_then(digest)?;
        let kernel = self
            .named(NameTable::Kernels, &spec.kernel)
            .await
            .ok()
            .and_then(digest)?;
        Some(MachineSpec {
            image_digest: image,
            kernel_digest: kernel,
            ..spec.clone()
        })
    }

    /// All images.
    pub async fn images(&self, services: &Services) -> Result<Vec<Image>, ApiError> {
        let mut images = Vec::new();
        for named in self.db.names(NameTable::Images).await.map_err(IntoApi::into_api)? {
            match self.shelf.image(&named.digest).await {
                Ok(facts) => images.push(Image {
                    used_by: users(services, |s| uses(&s.image_digest, &s.image, &named)),
                    name: named.name,
                    digest: named.digest,
                    size_bytes: facts.size_bytes,
                    allocated_bytes: facts.allocated_bytes,
                    init: facts.init,
                    source: facts.source,
                    created_at: named.created_at,
                }),
                Err(e) => tracing::warn!(image = named.name, error = %e.message, "not listed"),
            }
        }
        Ok(images)
    }

    /// All kernels.
    pub async fn kernels(&self, services: &Services) -> Result<Vec<Kernel>, ApiError> {
        let mut kernels = Vec::new();
        for named in self.db.names(NameTable::Kernels).await.map_err(IntoApi::into_api)? {
            match self.shelf.kernel(&named.digest).await {
                Ok(facts) => kernels.push(Kernel {
                    used_by: users(services, |s| uses(&s.kernel_digest, &s.kernel, &named)),
                    name: named.name,
                    digest: named.digest,
                    release: facts.release,
                    size_bytes: facts.size_bytes,
                    source: facts.source,
                    created_at: named.created_at,
                }),
                Err(e) => tracing::warn!(kernel = named.name, error = %e.message, "not listed"),
            }
        }
        Ok(kernels)
    }

    /// Removes an image that no machine uses.
    pub async fn delete_image(&self, services: &Services, name: &str) -> Result<(), ApiError> {
        let images = self.images(services).await?;
        let known: Vec<&str> = images.iter().map(|i| i.name.as_str()).collect();
        let image = images
            .iter()
            .find(|i| i.name == name)
            .ok_or_else(|| unknown("image", name, &known))?;
        in_use("image", name, &image.used_by)?;
        self.db
            .delete_name(NameTable::Images, image.name.clone())
            .await
            .map_err(IntoApi::into_api)?;
        let shared = images.iter().any(|i| i.name != name && i.digest == image.digest);
        if shared {
            Ok(())
        } else {
            self.shelf.delete_image(&image.digest).await
        }
    }

    /// Removes a kernel that no machine uses.
    pub async fn delete_kernel(&self, services: &Services, name: &str) -> Result<(), ApiError> {
        let kernels = self.kernels(services).await?;
        let known: Vec<&str> = kernels.iter().map(|k| k.name.as_str()).collect();
        let kernel = kernels
            .iter()
            .find(|k| k.name == name)
            .ok_or_else(|| unknown("kernel", name, &known))?;
        in_use("kernel", name, &kernel.used_by)?;
        self.db
            .delete_name(NameTable::Kernels, kernel.name.clone())
            .await
            .map_err(IntoApi::into_api)?;
        let shared = kernels.iter().any(|k| k.name != name && k.digest == kernel.digest);
        if shared {
            Ok(())
        } else {
            self.shelf.delete_kernel(&kernel.digest).await
        }
    }
}

fn users(services: &Services, uses: impl Fn(&MachineSpec) -> bool) -> Vec<String> {
    services
        .machines()
        .iter()
        .map(|m| m.row())
        .map(|row| (row.spec, row.name))
        // What can be taken back needs its image as well.
        .chain(recover::specs(services))
        .filter(|(spec, _)| uses(spec))
        .map(|(_, name)| name)
        .collect()
}

/// A machine that is being made may have a name only, not yet what it stands for.
fn uses(digest: &str, name: &str, object: &NamedObject) -> bool {
    digest == object.digest || (digest.is_empty() && name == object.name)
}

fn in_use(kind: &str, name: &str, users: &[String]) -> Result<(), ApiError> {
    if users.is_empty() {
        return Ok(());
    }
    let message = format!("{kind} `{name}` is used by {}", users.join(", "));
    Err(ApiError::new(ErrorCode::Conflict, message).hint("delete these machines first"))
}

/// The error of a name that is not known, with what was probably meant.
pub fn unknown(kind: &str, name: &str, known: &[&str]) -> ApiError {
    let shown: String = name.chars().take(100).flat_map(char::escape_default).collect();
    let error = ApiError::new(ErrorCode::NotFound, format!("no {kind} `{shown}`"));
    match similar(name, known.iter().copied()) {
        Some(close) => error.hint(format!("did you mean `{close}`?")),
        None if known.is_empty() => error,
        None => {
            let mut known: Vec<&str> = known.to_vec();
            known.sort_unstable();
            known.dedup();
            error.hint(format!("there are: {}", known.join(", ")))
        }
    }
}

/// What `doctor` says of images and kernels.
pub async fn checks(services: &Services) -> Vec<Check> {
    let check = |name: &str, level, message: String, hint: Option<&str>| Check {
        name: name.to_owned(),
        level,
        message,
        hint: hint.map(str::to_owned),
    };
    let mut checks = Vec::new();
    let default = services
        .config
        .default_image_name
        .as_deref()
        .unwrap_or(banger_core::spec::DEFAULT_IMAGE);
    let images = services.stock.images(services).await.unwrap_or_default();
    let kernels = services.stock.kernels(services).await.unwrap_or_default();
    match images.iter().find(|i| i.name == default) {
        Some(_) => checks.push(check(
            "default image",
            CheckLevel::Pass,
            format!("`{default}` is there"),
            None,
        )),
        None if recipe::find(default).is_some() => {
            checks.push(check(
                "default image",
                CheckLevel::Pass,
                format!("`{default}` will be built when it is needed"),
                None,
            ));
            checks.extend(banger_image::needs::of_images().into_iter().map(need));
        }
        None => {
            let hint = "set default_image_name to an image that is there, or to a recipe";
            checks.push(check(
                "default image",
                CheckLevel::Fail,
                format!("there is no image and no recipe `{default}`"),
                Some(hint),
            ));
        }
    }
    match kernels.iter().find(|k| k.name == DEFAULT_KERNEL) {
        Some(kernel) => checks.push(check("default kernel", CheckLevel::Pass, kernel.release.clone(), None)),
        None => {
            checks.push(check(
                "default kernel",
                CheckLevel::Pass,
                "will be imported when it is needed".to_owned(),
                None,
            ));
            checks.extend(banger_image::needs::of_kernels().await.into_iter().map(need));
        }
    }
    checks
}

/// The row of something that the first machine needs: without it that one fails.
fn need(need: banger_image::needs::Need) -> Check {
    let (level, message, hint) = match need.found {
        Ok(found) => (CheckLevel::Pass, found, None),
        Err(e) => (CheckLevel::Fail, e.to_string(), e.hint()),
    };
    Check {
        name: need.name.to_owned(),
        level,
        message,
        hint,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_name_gets_a_hint() {
        let error = unknown("image", "debain", &["debian", "debian-slim"]);
        assert_eq!(error.code, ErrorCode::NotFound);
        assert_eq!(error.hint.as_deref(), Some("did you mean `debian`?"));
        assert!(unknown("image", "zzz", &["b", "a"]).hint.unwrap().ends_with("a, b"));
    }
}
