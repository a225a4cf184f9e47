//! Saving a machine: Firecracker writes processors, devices and memory of a machine that is paused.
//!
//! Memory is written in one of two ways. *All of it* is always right, and slow: every page is touched and written, also those that
//! the guest never used. *What is in memory* (`Diff` without tracking of changes) leaves out what the guest never touched, and, for
//! a machine that goes on from a file, what only the file has; it is written over a copy of that file, made before the guest is
//! paused. Firecracker finds it by asking the kernel what is in core, so on a host with swap space it would miss what was swapped out:
//! there, all of it is written. Either way what is zero becomes a hole, when the guest runs again.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use banger_core::plan::Saved;
use banger_system::names::jail;
use tokio::time::{Instant, sleep};

use super::api::{ApiError, Client, CreateSnapshot, SnapshotType, State, Vm};
use super::config::{text, unsupported};
use super::{ENGINE, Firecracker, find, resume};
use crate::engine::{AfterSave, EngineError, Handles, SavePlan, SaveReport, Step, Steps};
use crate::identity::Mismatch;
use crate::memory;
use crate::saving::{self, Done, Files, Saving, Wanted, blocking};
use crate::start::io_error;

/// How long a step may take that writes all memory to a slow disk.
const WRITE: Duration = Duration::from_secs(600);
/// How long another step may take.
const STEP: Duration = Duration::from_secs(60);
/// How often it is tried to let a machine go on, and how long in between.
const GO_ON: u32 = 10;
const AGAIN: Duration = Duration::from_millis(500);

/// Saves a machine.
pub(super) async fn save(
    firecracker: &Firecracker,
    handles: &Handles,
    plan: &SavePlan,
    steps: Steps,
) -> Result<SaveReport, EngineError> {
    let wanted = Wanted::default();
    let job = Job {
        firecracker: firecracker.clone(),
        handles: handles.clone(),
        plan: plan.clone(),
        wanted: wanted.clone(),
    };
    saving::attended(job, wanted, steps).await
}

struct Job {
    firecracker: Firecracker,
    handles: Handles,
    plan: SavePlan,
    wanted: Wanted,
}

/// How memory is saved.
struct Prepared {
    saved: Saved,
    /// What the engine is told.
    create: CreateSnapshot,
    /// Whoever moves it out of the jail.
    jail: Option<find::Key>,
}

impl Saving for Job {
    fn plan(&self) -> &SavePlan {
        &self.plan
    }

    async fn run(&self, steps: Steps) -> Result<Done, EngineError> {
        if !self.plan.layers.is_empty() {
            return Err(unsupported("let a disk go on in a fresh file"));
        }
        let files = Files::absent(ENGINE, &self.plan)?;
        let mut client = find::command_client(&self.firecracker, &self.handles).await?;
        client.extend(STEP);
        let info = client.info().await.map_err(|e| self.fault(e))?;
        if info.state == State::NotStarted {
            return Err(unsupported("save a machine that was not started"));
        }
        let ran = info.state == State::Running;
        let prepared = match &self.plan.memory {
            Some(saved) => Some(self.prepare(saved).await?),
            None => None,
        };
        self.wanted.check()?;
        let mut started = Instant::now();
        let written = match steps.hold_still.await {
            Ok(()) => {
                started = Instant::now();
                self.standing_still(client, prepared.as_ref(), steps.while_still).await
            }
            Err(error) => Err(error),
        };
        let client = match written {
            Ok(client) => client,
            Err(error) => {
                // What was begun goes first: the space may be what the guest waits for.
                drop(files);
                if ran {
                    self.continued(None, true).await;
                }
                return Err(error);
            }
        };
        // What was saved has reset the guest channel.
        let unsaved = prepared.is_none();
        let goes_on = ran && self.plan.then == AfterSave::AsBefore;
        if goes_on {
            self.continued(Some(client), unsaved).await;
        }
        let mut paused = started.elapsed();
        let finished = match &prepared {
            Some(prepared) => self.finish(prepared).await,
            None => Ok(()),
        };
        if let Err(error) = finished {
            drop(files);
            if ran && !goes_on {
                self.continued(None, unsaved).await;
            }
            return Err(error);
        }
        files.keep();
        if !goes_on {
            paused = started.elapsed();
        }
        Ok(Done {
            report: SaveReport { paused },
            ran,
        })
    }

    fn explained(&self, error: EngineError) -> EngineError {
        match find::open(self.firecracker.proc(), &self.handles) {
            Err(Mismatch::Gone(why)) => EngineError::NotOurs {
                pid: self.handles.pid,
                why,
            },
            _ => error,
        }
    }

    async fn go_on(&self) {
        self.continued(None, true).await;
    }
}

impl Job {
    /// Decides how memory is saved, and makes the file that is written over. The guest goes on.
    async fn prepare(&self, saved: &Saved) -> Result<Prepared, EngineError> {
        let proc = self.firecracker.proc();
        let booted = !find::goes_on(&self.firecracker, &self.handles)?;
        if booted != self.plan.base.is_none() {
            let why = match booted {
                true => "the machine was not started with a memory file",
                false => "the machine was started with a memory file",
            };
            return Err(io_error(
                format!("write {}", saved.memory.display()),
                io::Error::new(io::ErrorKind::InvalidData, why),
            ));
        }
        let in_core = !swaps(proc);
        let (kind, names, jail) = match find::jail_of(&self.firecracker, &self.handles)? {
            Some((jail, id)) => {
                let fits = saved.memory.parent() == saved.state.parent()
                    && saved.memory.file_name() == Some(jail::MEMORY.as_ref())
                    && saved.state.file_name() == Some(jail::STATE.as_ref());
                if !fits {
                    return Err(unsupported(format!(
                        "save to {} and {}: they must be `{}` and `{}` in one directory",
                        saved.memory.display(),
                        saved.state.display(),
                        jail::MEMORY,
                        jail::STATE
                    )));
                }
                // What it goes on with is not in its jail to be written over.
                let kind = match booted && in_core && !find::leftover(&jail.chroot(&id)) {
                    true => SnapshotType::Diff,
                    false => SnapshotType::Full,
                };
                let names = (jail::NEW_MEMORY.to_owned(), jail::NEW_STATE.to_owned());
                (kind, names, Some((jail, id)))
            }
            None => {
                if let Some(base) = self.plan.base.clone() {
                    self.copy_base(saved.memory.clone(), base, in_core).await?;
                }
                let kind = match in_core {
                    true => SnapshotType::Diff,
                    false => SnapshotType::Full,
                };
                (kind, (text(&saved.memory)?, text(&saved.state)?), None)
            }
        };
        Ok(Prepared {
            saved: saved.clone(),
            create: CreateSnapshot {
                snapshot_type: kind,
                mem_file_path: names.0,
                snapshot_path: names.1,
            },
            jail,
        })
    }

    /// Copies what the machine was started with, if that is what it was started with.
    async fn copy_base(&self, target: PathBuf, base: PathBuf, wanted: bool) -> Result<(), EngineError> {
        let (proc, pid) = (self.firecracker.proc().to_owned(), self.handles.pid);
        let shown = target.display().to_string();
        blocking(move || {
            memory::check_maps(&proc, pid, &base)?;
            if wanted {
                let size = fs::metadata(&base)?.len();
                memory::prepare(&target, size, Some(&base))?;
            }
            Ok(())
        })
        .await
        .map_err(|e| io_error(format!("write {shown}"), e))
    }

    /// Stops the guest and saves what has to be saved then. Comes back with the connection.
    async fn standing_still(
        &self,
        mut client: Client,
        prepared: Option<&Prepared>,
        while_still: Step,
    ) -> Result<Client, EngineError> {
        client.extend(STEP);
        client.vm(Vm::Paused).await.map_err(|e| self.fault(e))?;
        if let Some(prepared) = prepared {
            self.wanted.check()?;
            client.extend(WRITE);
            let created = client.create_snapshot(&prepared.create).await;
            created.map_err(|e| self.fault(e))?;
        }
        // Only now: requests that the guest had made before it stopped are done, and on the disks, once its devices were saved.
        while_still.await?;
        self.wanted.check()?;
        Ok(client)
    }

    /// What can be done when the guest runs again.
    async fn finish(&self, prepared: &Prepared) -> Result<(), EngineError> {
        let Saved { memory, state } = &prepared.saved;
        if let (Some((jail, id)), Some(dir)) = (&prepared.jail, memory.parent()) {
            let into = File::open(dir).map_err(|e| io_error(format!("open {}", dir.display()), e))?;
            jail.collect(id, into).await?;
        }
        let (memory, state) = (memory.clone(), state.clone());
        let shown = memory.display().to_string();
        blocking(move || {
            if fs::metadata(&state)?.len() == 0 {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the state is empty"));
            }
            memory::punch_zeros(&memory)
        })
        .await
        .map_err(|e| io_error(format!("make {shown} sparse"), e))
    }

    /// Lets the guest run. Over other connections, if this one has failed: a host that is short of everything must not leave a
    /// machine standing. `unsaved`: as for [`resume::run`]; one reset too many does no harm.
    async fn continued(&self, client: Option<Client>, unsaved: bool) {
        let mut fault = None;
        if let Some(client) = client {
            match self.resume(client, unsaved).await {
                Ok(()) => return,
                Err(error) => fault = Some(error),
            }
        }
        for attempt in 0..GO_ON {
            // An engine that does not take this is let go on all the same.
            let unsaved = unsaved && attempt == 0;
            match find::command_client(&self.firecracker, &self.handles).await {
                // Nothing is done where only the answer was lost, or where it never stopped.
                Ok(client) => match self.resume(client, unsaved).await {
                    Ok(()) => return,
                    Err(error) => fault = Some(error),
                },
                Err(error) => fault = Some(error),
            }
            if matches!(
                find::open(self.firecracker.proc(), &self.handles),
                Err(Mismatch::Gone(_))
            ) {
                return;
            }
            sleep(AGAIN).await;
        }
        if let Some(error) = fault {
            tracing::error!(pid = self.handles.pid, %error, "cannot let a machine go on after it was saved");
        }
    }

    async fn resume(&self, mut client: Client, unsaved: bool) -> Result<(), EngineError> {
        client.extend(STEP);
        resume::run(&mut client, unsaved).await.map_err(|e| self.fault(e))
    }

    fn fault(&self, error: ApiError) -> EngineError {
        self.firecracker.fault(&self.handles, error)
    }
}

/// Whether this host has swap space. Where that cannot be told it may have.
fn swaps(proc: &Path) -> bool {
    fs::read_to_string(proc.join("swaps")).map_or(true, |text| text.lines().skip(1).any(|l| !l.trim().is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_space_is_told_from_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(swaps(dir.path()));
        let header = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        fs::write(dir.path().join("swaps"), header).unwrap();
        assert!(!swaps(dir.path()));
        fs::write(
            dir.path().join("swaps"),
            format!("{header}/dev/dm-1 partition 1 0 -2\n"),
        )
        .unwrap();
        assert!(swaps(dir.path()));
    }
}
