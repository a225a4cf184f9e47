//! A machine's memory, devices and disks on disk: what suspended machines, snapshots, forks and templates have in common.
//!
//! ```text
//!   <directory>/memory, state      as the engine saved them; absent where only disks were kept
//!               manifest.json      what they belong to, and what they were when they were written
//!               disks/             the frozen layers, by hard link (not for a suspended machine: its disks are its own)
//! ```
//!
//! The manifest is written last and the directory then moved to its place, so that what is in its place is whole.

use std::path::{Path, PathBuf};
use std::time::Duration;

use banger_core::plan::Saved;
use banger_image::seal::{self, Seal};
use banger_proto::api::{MachineSpec, Timestamp};
use banger_proto::error::{ApiError, ErrorCode};
use serde::{Deserialize, Serialize};

use super::disks::read_json;
use super::handles::write_atomically;
use crate::blocking::blocking;
use crate::error::{self, chain};
use crate::services::Services;
use crate::stats;
use crate::time;

/// The form of these directories; others are not read.
const FORMAT: u32 = 1;

const MANIFEST: &str = "manifest.json";

/// What saved memory fits: it is restored by nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fits {
    /// Engine.
    pub engine: String,
    /// Its version.
    pub version: String,
    /// The form in which its driver saves.
    pub form: u32,
    /// `kvm` or `tcg`.
    pub accel: String,
    /// Model of the host's processor.
    pub cpu: String,
}

/// `manifest.json`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    format: u32,
    /// When it was saved.
    pub created_at: Timestamp,
    /// The machine whose memory this is.
    pub machine_id: String,
    /// What that was made of.
    pub spec: MachineSpec,
    /// The layers of its disks, topmost first: the memory goes with exactly these.
    pub layers: Vec<String>,
    /// Its memory; `None` where only disks were kept.
    pub memory: Option<Memory>,
    /// How long the machine stood still, in milliseconds.
    pub paused_ms: u64,
}

/// Saved memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// What it fits.
    pub fits: Fits,
    /// The memory file as it was written.
    pub memory: Seal,
    /// The state of processors and devices as it was written.
    pub state: Seal,
}

/// A whole checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Where it is.
    pub dir: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

/// The files of saved memory in a directory.
pub fn files(dir: &Path) -> Saved {
    Saved {
        memory: dir.join("memory"),
        state: dir.join("state"),
    }
}

/// What an engine saves now, and restores.
pub async fn fits(services: &Services, engine: &str) -> Result<Fits, ApiError> {
    let host = services.host().await;
    let engine = services.engine(engine).await?;
    let capabilities = engine.capabilities();
    Ok(Fits {
        engine: capabilities.engine.to_owned(),
        version: capabilities.version.clone(),
        form: capabilities.state_form,
        accel: host.accel.accel.as_str().to_owned(),
        cpu: host.cpu_model.clone().unwrap_or_default(),
    })
}

impl Checkpoint {
    /// Seals what an engine has saved in `dir`, and writes the manifest.
    pub async fn seal(
        services: &Services,
        dir: &Path,
        machine_id: &str,
        spec: MachineSpec,
        layers: Vec<String>,
        memory: bool,
        paused: Duration,
    ) -> Result<Self, ApiError> {
        let memory = if memory {
            let fits = fits(services, &spec.engine).await?;
            let boot_id = services.host().await.boot_id.clone();
            let Saved { memory, state } = files(dir);
            let (memory, state) = blocking(move || {
                Ok::<_, banger_image::Error>((seal::seal(&memory, &boot_id)?, seal::seal(&state, &boot_id)?))
            })
            .await?;
            Some(Memory { fits, memory, state })
        } else {
            None
        };
        let manifest = Manifest {
            format: FORMAT,
            created_at: time::now(),
            machine_id: machine_id.to_owned(),
            spec,
            layers,
            memory,
            paused_ms: paused.as_millis().try_into().unwrap_or(u64::MAX),
        };
        let path = dir.join(MANIFEST);
        let text = serde_json::to_vec_pretty(&manifest).unwrap_or_default();
        write_atomically(&path, &text).map_err(|e| error::io(format_args!("write {}", path.display()), e))?;
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
        })
    }

    /// The checkpoint in `dir`; `None` where there is none.
    pub fn read(dir: &Path) -> Result<Option<Self>, ApiError> {
        let manifest: Option<Manifest> = read_json(&dir.join(MANIFEST))?;
        match manifest {
            Some(manifest) if manifest.format != FORMAT => {
                let message = format!(
                    "{} was saved by another version of banger (form {}, this one reads {FORMAT})",
                    dir.display(),
                    manifest.format
                );
                Err(ApiError::new(ErrorCode::Unsupported, message))
            }
            Some(manifest) => Ok(Some(Self {
                dir: dir.to_owned(),
                manifest,
            })),
            None => Ok(None),
        }
    }

    /// Moves it to its place, where nothing is yet.
    pub fn commit(mut self, to: &Path) -> Result<Self, ApiError> {
        std::fs::rename(&self.dir, to).map_err(|e| error::io(format_args!("move {}", self.dir.display()), e))?;
        to.clone_into(&mut self.dir);
        Ok(self)
    }

    /// Files of the memory.
    pub fn saved(&self) -> Saved {
        files(&self.dir)
    }

    /// The frozen disks.
    pub fn disks(&self) -> PathBuf {
        self.dir.join("disks")
    }

    /// Bytes that its memory takes on the host.
    pub fn memory_bytes(&self) -> u64 {
        let saved = self.saved();
        stats::allocated(&saved.memory) + stats::allocated(&saved.state)
    }

    /// Bytes that its layers of disks take on the host.
    pub fn disk_bytes(&self) -> u64 {
        super::disks::allocated(&self.disks()).1
    }

    /// Checks that its memory is what was written and can be restored here. An unchanged file costs a look, any other is read.
    pub async fn check(&self, services: &Services) -> Result<(), ApiError> {
        let Some(memory) = self.manifest.memory.clone() else {
            let message = format!("{} holds no memory", self.dir.display());
            return Err(ApiError::new(ErrorCode::Unsupported, message));
        };
        let here = fits(services, &self.manifest.spec.engine).await?;
        if memory.fits != here {
            let show = |f: &Fits| format!("{} {} (form {}, {}, {})", f.engine, f.version, f.form, f.accel, f.cpu);
            let message = format!(
                "the memory was saved by {}; this host has {}, which cannot restore it",
                show(&memory.fits),
                show(&here)
            );
            return Err(ApiError::new(ErrorCode::Unsupported, message));
        }
        let boot_id = services.host().await.boot_id.clone();
        let saved = self.saved();
        blocking(move || {
            let check = || {
                seal::check(&saved.memory, &memory.memory, &boot_id)?;
                seal::check(&saved.state, &memory.state, &boot_id)
            };
            check().map_err(|e| {
                let message = format!("the saved memory cannot be used: {}", chain(&e));
                ApiError::new(ErrorCode::Conflict, message)
            })
        })
        .await
    }
}
