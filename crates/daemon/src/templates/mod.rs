//! Templates: freshly started machines, saved, from which new ones are restored in a tenth of the time that a boot takes.
//!
//! ```text
//!   templates/<id>/          a checkpoint; the id is a digest of everything that it has to fit
//!   templates/.new-<id>-<machine>/   one that is being made, and the machine that boots for it ([`build`])
//! ```
//!
//! What a machine is made of decides its template: digests of image and kernel, processors, memory, disk, network, kernel line,
//! initramfs (and with it the agent), engine, version and processor of the host. Whatever changes, the id is another, and the old
//! template is used by nobody. How often each was used stands in the database; beyond the budget the least recently used go.

pub mod build;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use banger_core::host::Accel;
use banger_core::id::MachineId;
use banger_core::plan;
use banger_core::reference::{EXACT_HINT, EXACT_ID};
use banger_image::Digest;
use banger_proto::api::{MachineSpec, Pruned, Template};
use banger_proto::error::{ApiError, ErrorCode};
use serde::Serialize;

use crate::blocking::blocking;
use crate::db::TemplateRow;
use crate::error::IntoApi;
use crate::machine::checkpoint::{self, Checkpoint, Fits};
use crate::machine::disks::Form;
use crate::machine::start::remove_dir;
use crate::ops::{Op, Ops};
use crate::services::Services;
use crate::stock::flight::Flights;

/// The way templates are made. Another one makes other templates.
const FORM: u32 = 2;
/// How long no template is made of what could not be made one of.
const REFUSED: Duration = Duration::from_secs(600);
/// Begins the name of one that is being made.
const STAGING: &str = ".new-";

/// Templates of a daemon.
pub struct Templates {
    dir: PathBuf,
    flights: Arc<Flights<Arc<Checkpoint>>>,
    known: Mutex<HashMap<String, Arc<Checkpoint>>>,
    refused: Mutex<HashMap<String, Instant>>,
    building: Mutex<BTreeSet<MachineId>>,
}

impl std::fmt::Debug for Templates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Templates")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

/// Everything that a template has to fit. Its form is its identity: fields are never reordered without a new [`FORM`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Key {
    form: u32,
    fits: Fits,
    image: String,
    kernel: String,
    initramfs: String,
    line: String,
    vcpu: u32,
    memory_mib: u64,
    disk_bytes: u64,
    network: String,
    disks: Form,
}

impl Key {
    fn id(&self) -> String {
        Digest::of(&serde_json::to_vec(self).unwrap_or_default()).short()
    }
}

/// The id of the template that fits a machine with this spec, whose digests are known.
pub async fn id(services: &Services, spec: &MachineSpec) -> Result<String, ApiError> {
    let boot = services.stock.boot_files(spec).await?;
    let accel = if spec.accel == Accel::Kvm.as_str() {
        Accel::Kvm
    } else {
        Accel::Tcg
    };
    let key = Key {
        form: FORM,
        fits: checkpoint::fits(services, &spec.engine).await?,
        image: spec.image_digest.clone(),
        kernel: spec.kernel_digest.clone(),
        initramfs: boot
            .initrd
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        line: plan::cmdline(plan::Board::of(&spec.engine), accel, services.host().await.tsc_khz()),
        vcpu: spec.vcpu,
        memory_mib: spec.memory_mib,
        disk_bytes: spec.disk_bytes,
        network: spec.network.clone(),
        disks: services.form(&spec.engine).await?,
    };
    Ok(key.id())
}

impl Templates {
    /// Templates in `dir`.
    pub fn new(dir: PathBuf, ops: Arc<Ops>) -> Self {
        Self {
            dir,
            flights: Arc::new(Flights::new(ops)),
            known: Mutex::default(),
            refused: Mutex::default(),
            building: Mutex::default(),
        }
    }

    /// Whether a template is being made of this machine, which has no row.
    pub fn is_building(&self, machine: &MachineId) -> bool {
        lock(&self.building).contains(machine)
    }

    fn place(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    /// The template of this id, if there is one.
    fn find(&self, id: &str) -> Result<Option<Arc<Checkpoint>>, ApiError> {
        if let Some(known) = lock(&self.known).get(id) {
            return Ok(Some(known.clone()));
        }
        let found = Checkpoint::read(&self.place(id))?.map(Arc::new);
        if let Some(found) = &found {
            lock(&self.known).insert(id.to_owned(), found.clone());
        }
        Ok(found)
    }

    /// The template for a spec, made if there is none. `op` shows the stages of the making. Whoever wants one that is being made
    /// waits for the same.
    pub async fn obtain(
        &self,
        services: &Arc<Services>,
        spec: &MachineSpec,
        op: &Op,
    ) -> Result<(String, Arc<Checkpoint>), ApiError> {
        let id = id(services, spec).await?;
        match self.find(&id) {
            Ok(Some(found)) => return Ok((id, found)),
            Ok(None) => {}
            // It cannot even be read: made anew, as if there were none.
            Err(e) => self.drop_failed(services, &id, &e).await,
        }
        if lock(&self.refused)
            .get(&id)
            .is_some_and(|since| since.elapsed() < REFUSED)
        {
            let message = format!("template {id} could not be made a while ago");
            return Err(ApiError::new(ErrorCode::Unavailable, message));
        }
        let made = self.make(services, &id, spec, op).await?;
        Ok((id, made))
    }

    async fn make(
        &self,
        services: &Arc<Services>,
        id: &str,
        spec: &MachineSpec,
        op: &Op,
    ) -> Result<Arc<Checkpoint>, ApiError> {
        let (own, name, spec) = (services.clone(), id.to_owned(), spec.clone());
        let make = move |op: Op| async move {
            let made = build::build(&own, &name, &spec, &op).await;
            let templates = &own.templates;
            match made {
                Ok(made) => {
                    let made = Arc::new(made);
                    lock(&templates.refused).remove(&name);
                    lock(&templates.known).insert(name.clone(), made.clone());
                    templates.tidy(&own, &name).await;
                    Ok(made)
                }
                Err(e) => {
                    if e.code != ErrorCode::Canceled {
                        lock(&templates.refused).insert(name.clone(), Instant::now());
                    }
                    Err(e)
                }
            }
        };
        self.flights.join(id, op, make).await
    }

    /// Makes the template for a spec, anew if `force`.
    pub async fn build(
        &self,
        services: &Arc<Services>,
        spec: &MachineSpec,
        force: bool,
        op: &Op,
    ) -> Result<String, ApiError> {
        let id = id(services, spec).await?;
        if force {
            self.remove(services, &id).await?;
        } else if let Ok(Some(_)) = self.find(&id) {
            return Ok(id);
        }
        self.make(services, &id, spec, op).await?;
        Ok(id)
    }

    /// Counts a use.
    pub async fn used(&self, services: &Services, id: &str) {
        if let Err(e) = services.db.template_used(id.to_owned(), crate::time::now()).await {
            tracing::warn!(template = id, error = %e, "its use is not counted");
        }
    }

    /// Removes a template that failed: the next start makes it anew.
    pub async fn drop_failed(&self, services: &Services, id: &str, why: &ApiError) {
        tracing::warn!(template = id, error = %why.message, details = ?why.details, "a template failed and is dropped");
        if let Err(e) = self.remove(services, id).await {
            tracing::error!(template = id, error = %e.message, "a failed template is not removed");
            lock(&self.refused).insert(id.to_owned(), Instant::now());
        }
    }

    /// Removes a template. Machines that were started from it keep what they share with it.
    async fn remove(&self, services: &Services, id: &str) -> Result<u64, ApiError> {
        lock(&self.known).remove(id);
        let freed = self.find(id).ok().flatten().map_or(0, |t| size(&t));
        lock(&self.known).remove(id);
        // What is half removed is no template any more, and goes with the next start of the daemon.
        let place = self.place(id);
        let away = self.dir.join(format!("{STAGING}{id}-removed"));
        remove_dir(&away)?;
        match std::fs::rename(&place, &away) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(crate::error::io(format_args!("remove {}", place.display()), e));
            }
            _ => {}
        }
        blocking(move || remove_dir(&away)).await?;
        services
            .db
            .delete_template(id.to_owned())
            .await
            .map_err(IntoApi::into_api)?;
        Ok(freed)
    }

    /// All templates, the most recently used first.
    pub async fn list(&self, services: &Services) -> Result<Vec<Template>, ApiError> {
        let rows: BTreeMap<String, TemplateRow> = services.db.templates().await.map_err(IntoApi::into_api)?;
        let mut list = Vec::new();
        for (id, row) in rows {
            let Ok(Some(template)) = self.find(&id) else { continue };
            let manifest = &template.manifest;
            let now = services.stock.as_of_now(&manifest.spec).await;
            let current = match &now {
                Some(spec) => self::id(services, spec).await.is_ok_and(|now| now == id),
                None => false,
            };
            list.push(Template {
                image: manifest.spec.image.clone(),
                spec: manifest.spec.clone(),
                engine_version: manifest
                    .memory
                    .as_ref()
                    .map(|m| m.fits.version.clone())
                    .unwrap_or_default(),
                ready: true,
                current,
                memory_bytes: template.memory_bytes(),
                disk_bytes: template.disk_bytes(),
                uses: row.uses,
                created_at: row.created_at,
                last_used_at: row.last_used_at,
                id,
            });
        }
        list.sort_by(|a, b| used_at(b).cmp(used_at(a)));
        Ok(list)
    }

    /// The template that a prefix of an id means.
    pub async fn show(&self, services: &Services, reference: &str) -> Result<Template, ApiError> {
        let mut fitting: Vec<Template> = self.list(services).await?;
        let known: Vec<String> = fitting.iter().map(|t| t.id.clone()).collect();
        fitting.retain(|t| !reference.is_empty() && t.id.starts_with(reference));
        match fitting.len() {
            1 => Ok(fitting.remove(0)),
            0 => {
                let known: Vec<&str> = known.iter().map(String::as_str).collect();
                Err(crate::stock::unknown("template", reference, &known))
            }
            n => Err(
                ApiError::new(ErrorCode::Ambiguous, format!("`{reference}` begins {n} templates"))
                    .hint("give more of its id"),
            ),
        }
    }

    /// Removes one.
    pub async fn delete(&self, services: &Services, reference: &str) -> Result<(), ApiError> {
        if reference.len() < EXACT_ID {
            return Err(ApiError::new(
                ErrorCode::NotFound,
                format!("`{}` is too short for an id", reference.escape_default()),
            )
            .hint(EXACT_HINT));
        }
        let template = self.show(services, reference).await?;
        self.remove(services, &template.id).await.map(drop)
    }

    /// Removes all templates, or those that fit nothing any more and those beyond the budget.
    pub async fn prune(&self, services: &Services, all: bool) -> Result<Pruned, ApiError> {
        let mut pruned = Pruned::default();
        let mut kept: u64 = 0;
        for template in self.list(services).await? {
            let bytes = template.memory_bytes + template.disk_bytes;
            kept += bytes;
            if all || !template.current || kept > services.config.templates.budget.0 {
                kept -= bytes;
                pruned.freed_bytes += self.remove(services, &template.id).await?;
                pruned.removed.push(template.id);
            }
        }
        Ok(pruned)
    }

    /// After a new one: what it replaces goes, and what is beyond the budget.
    async fn tidy(&self, services: &Services, newest: &str) {
        let row = services.db.add_template(newest.to_owned(), crate::time::now()).await;
        if let Err(e) = row {
            tracing::warn!(template = newest, error = %e, "not counted");
        }
        match self.prune(services, false).await {
            Ok(pruned) if pruned.removed.is_empty() => {}
            Ok(pruned) => tracing::info!(removed = ?pruned.removed, freed = pruned.freed_bytes, "templates removed"),
            Err(e) => tracing::warn!(error = %e.message, "old templates are not removed"),
        }
    }

    /// Clears what an earlier daemon left half made, and settles files and rows with each other. Comes before any machine starts.
    pub async fn sweep(&self, services: &Arc<Services>) {
        if let Err(e) = crate::machine::disks::make_dir(&self.dir)
            && !self.dir.is_dir()
        {
            tracing::error!(error = %e.message, "no directory for templates");
            return;
        }
        let rows = services.db.templates().await.unwrap_or_default();
        for name in names(&self.dir) {
            if let Some(rest) = name.strip_prefix(STAGING) {
                build::sweep(services, &self.dir.join(&name), rest).await;
            } else if !matches!(self.find(&name), Ok(Some(_))) {
                tracing::warn!(template = name, "it is not whole and is removed");
                if let Err(e) = remove_dir(&self.place(&name)) {
                    tracing::warn!(template = name, error = %e.message, "not removed");
                }
            } else if !rows.contains_key(&name) {
                let _ = services.db.add_template(name, crate::time::now()).await;
            }
        }
        for id in rows.keys().filter(|id| !self.place(id).is_dir()) {
            let _ = services.db.delete_template(id.clone()).await;
        }
    }
}

fn used_at(template: &Template) -> &str {
    template.last_used_at.as_deref().unwrap_or(&template.created_at)
}

fn size(template: &Checkpoint) -> u64 {
    template.memory_bytes() + template.disk_bytes()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Key {
        Key {
            form: FORM,
            fits: Fits {
                engine: "qemu".to_owned(),
                version: "7.2".to_owned(),
                form: 1,
                accel: "tcg".to_owned(),
                cpu: "x".to_owned(),
            },
            image: "sha256:1".to_owned(),
            kernel: "sha256:2".to_owned(),
            initramfs: "a.cpio".to_owned(),
            line: "quiet".to_owned(),
            vcpu: 2,
            memory_mib: 512,
            disk_bytes: 8 << 30,
            network: "user".to_owned(),
            disks: Form::Layers,
        }
    }

    #[test]
    fn whatever_changes_makes_another_template() {
        let id = key().id();
        assert_eq!(id, key().id());
        assert_eq!(id.len(), 16);
        let changes: [fn(&mut Key); 13] = [
            |k| k.form += 1,
            |k| k.fits.engine.push('x'),
            |k| k.fits.version.push('x'),
            |k| k.fits.form += 1,
            |k| k.fits.accel.push('x'),
            |k| k.fits.cpu.push('x'),
            |k| k.image.push('x'),
            |k| k.kernel.push('x'),
            |k| k.initramfs.push('x'),
            |k| k.line.push('x'),
            |k| k.vcpu += 1,
            |k| k.memory_mib += 1,
            |k| k.disk_bytes += 1,
        ];
        for (at, change) in changes.iter().enumerate() {
            let mut other = key();
            change(&mut other);
            assert_ne!(other.id(), id, "change {at}");
        }
        let mut other = key();
        "none".clone_into(&mut other.network);
        assert_ne!(other.id(), id);
    }
}
