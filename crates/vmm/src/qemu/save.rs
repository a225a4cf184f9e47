//! Saving a machine: memory, devices and disks at one point in time.
//!
//! What can be done while the guest runs is done before: memory is copied as it is then, fresh layers are added. Then its processors
//! are stopped, the devices' state and the pages that have changed meanwhile are written, and the fresh layers take over: the last
//! step that can fail, and it does so for all disks or for none. What fails before is undone.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use banger_core::plan::Saved;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::args::{text, unsupported};
use super::layers::{self, Added, LayerFault};
use super::{ENGINE, Qemu, control_error, find, io_error, still, vcpu_state};
use crate::engine::{AfterSave, EngineError, Handles, SavePlan, SaveReport, Step, Steps, VcpuState};
use crate::identity::Mismatch;
use crate::memory::{self, Place, Target};
use crate::qmp::{Client, QmpError};
use crate::saving::{self, Done, Files, Saving, Wanted, blocking};
use crate::space;

/// How long a single step may take: stopping waits until the disks have taken what was under way.
const STEP: Duration = Duration::from_secs(60);
/// How often it is tried to let a machine go on, and how long in between.
const GO_ON: u32 = 10;
const AGAIN: Duration = Duration::from_millis(500);
/// How often it is tried to find the guest channel standing still. What moves ends by itself, so the second time is the last.
const ATTEMPTS: u32 = 5;

/// Saves a machine.
pub(super) async fn save(
    qemu: &Qemu,
    handles: &Handles,
    plan: &SavePlan,
    steps: Steps,
) -> Result<SaveReport, EngineError> {
    let wanted = Wanted::default();
    let job = Job {
        qemu: qemu.clone(),
        handles: handles.clone(),
        plan: plan.clone(),
        wanted: wanted.clone(),
    };
    saving::attended(job, wanted, steps).await
}

struct Job {
    qemu: Qemu,
    handles: Handles,
    plan: SavePlan,
    wanted: Wanted,
}

impl Saving for Job {
    fn plan(&self) -> &SavePlan {
        &self.plan
    }

    async fn run(&self, steps: Steps) -> Result<Done, EngineError> {
        self.saved(steps).await
    }

    fn explained(&self, error: EngineError) -> EngineError {
        match find::open(&self.qemu.options.roots.proc, &self.handles) {
            Err(Mismatch::Gone(why)) => EngineError::NotOurs {
                pid: self.handles.pid,
                why,
            },
            _ => error,
        }
    }

    async fn go_on(&self) {
        self.continued(None).await;
    }
}

/// Where memory goes, and where it comes from.
struct Prepared {
    saved: Saved,
    place: Place,
    target: Arc<Target>,
    /// Pages that were copied already.
    copied: Option<Vec<Range<u64>>>,
}

impl Job {
    async fn saved(&self, steps: Steps) -> Result<Done, EngineError> {
        let files = Files::absent(ENGINE, &self.plan)?;
        let mut prepared = match &self.plan.memory {
            Some(saved) => Some(self.prepare(saved).await?),
            None => None,
        };
        self.wanted.check()?;
        let mut client = find::command_client(&self.qemu, &self.handles).await?;
        client.extend(STEP);
        let status = client.status().await.map_err(|e| self.fault(e))?;
        let state = vcpu_state(&status);
        if matches!(state, VcpuState::Loading | VcpuState::Ended) {
            return Err(unsupported(&format!(
                "save a machine whose state is `{}`",
                status.status
            )));
        }
        if state == VcpuState::Stalled {
            let why = io::Error::other("a disk of it cannot be written, and it stands still");
            return Err(io_error("save the machine", why));
        }
        let ran = state == VcpuState::Running;
        let channel = match prepared {
            Some(_) => still::channel(&mut client).await.map_err(|e| self.fault(e))?,
            None => None,
        };
        let added = layers::add(&mut client, &self.plan.layers)
            .await
            .map_err(|fault| match fault {
                LayerFault::Qmp(error) => self.fault(error),
                LayerFault::Plan(error) => error,
            })?;
        let mut started = Instant::now();
        let saved = match steps.hold_still.await {
            Ok(()) => {
                started = Instant::now();
                self.standing_still(&mut client, prepared.as_mut(), channel.as_deref(), steps.while_still)
                    .await
            }
            Err(error) => Err(error),
        };
        let outcome = match saved {
            Ok(()) => self.switch(client, &added).await,
            // There is one connection at a time, and this one may be what failed.
            Err(error) => {
                drop(client);
                Err(error)
            }
        };
        let client = match outcome {
            Ok(client) => client,
            Err(error) => {
                // What was begun goes first: the space may be what the guest waits for.
                drop(prepared);
                drop(files);
                self.undo(added, ran).await;
                return Err(error);
            }
        };
        files.keep();
        if ran && self.plan.then == AfterSave::AsBefore {
            self.continued(Some(client)).await;
        }
        Ok(Done {
            report: SaveReport {
                paused: started.elapsed(),
            },
            ran,
        })
    }

    /// Finds the guest's memory and makes the file that is to be its copy. The guest goes on.
    async fn prepare(&self, saved: &Saved) -> Result<Prepared, EngineError> {
        let mut client = find::command_client(&self.qemu, &self.handles).await?;
        let place = self.place(&mut client).await?;
        drop(client);
        let proc = self.qemu.options.roots.proc.clone();
        let (base, path) = (self.plan.base.clone(), saved.memory.clone());
        let size = place.range.end - place.range.start;
        // One that is not to run again need not stand still for a short time.
        let twice = self.plan.then == AfterSave::AsBefore;
        let (there, stop) = (place.clone(), self.wanted.stop());
        let (target, copied) = blocking(move || {
            memory::check(&proc, &there, base.as_deref())?;
            let target = memory::prepare(&path, size, base.as_deref())?;
            let copied = match twice {
                true => Some(memory::copy(&proc, &there, &target, None, &stop)?),
                false => None,
            };
            Ok((target, copied))
        })
        .await
        .map_err(|e| io_error(format!("write {}", saved.memory.display()), e))?;
        Ok(Prepared {
            saved: saved.clone(),
            place,
            target: Arc::new(target),
            copied,
        })
    }

    async fn place(&self, client: &mut Client) -> Result<Place, EngineError> {
        #[derive(Deserialize)]
        struct Size {
            #[serde(rename = "base-memory")]
            base: u64,
        }
        let arguments = json!({ "command-line": "gpa2hva 0" });
        let said: String = client
            .execute("human-monitor-command", Some(arguments))
            .await
            .map_err(|e| self.fault(e))?;
        let Size { base: size } = client
            .execute("query-memory-size-summary", None)
            .await
            .map_err(|e| self.fault(e))?;
        let start = address(&said).ok_or_else(|| EngineError::Refused {
            engine: ENGINE,
            command: "gpa2hva".to_owned(),
            message: said.trim().to_owned(),
        })?;
        Ok(Place {
            pid: self.handles.pid,
            range: start..start.saturating_add(size),
        })
    }

    /// Stops the guest and saves what has to be saved then.
    async fn standing_still(
        &self,
        client: &mut Client,
        prepared: Option<&mut Prepared>,
        channel: Option<&str>,
        while_still: Step,
    ) -> Result<(), EngineError> {
        client.extend(STEP);
        client.execute::<Value>("stop", None).await.map_err(|e| self.fault(e))?;
        while_still.await?;
        if let Some(prepared) = prepared {
            self.memory(client, prepared, channel).await?;
        }
        self.wanted.check()
    }

    /// Lets the fresh layers take over. Comes back with a connection.
    async fn switch(&self, mut client: Client, added: &Added) -> Result<Client, EngineError> {
        client.extend(STEP);
        let error = match layers::switch(&mut client, added).await {
            Ok(()) => return Ok(client),
            Err(error) => error,
        };
        drop(client);
        // Where only the answer was lost, the engine knows what it did.
        if !matches!(error, QmpError::Refused { .. })
            && let Ok(mut client) = find::command_client(&self.qemu, &self.handles).await
            && layers::switched(&mut client, added).await
        {
            return Ok(client);
        }
        Err(self.fault(error))
    }

    async fn memory(
        &self,
        client: &mut Client,
        prepared: &mut Prepared,
        channel: Option<&str>,
    ) -> Result<(), EngineError> {
        let (proc, path) = (&self.qemu.options.roots.proc, &prepared.saved.memory);
        let cannot_write = |e: io::Error| io_error(format!("write {}", path.display()), e);
        let filename = text(&prepared.saved.state)?;
        let mut before = still::look(client, channel).await.map_err(|e| self.fault(e))?;
        for attempt in 1..=ATTEMPTS {
            self.wanted.check()?;
            client.extend(STEP);
            let arguments = json!({ "filename": filename, "live": false });
            let devices = client.execute::<Value>("xen-save-devices-state", Some(arguments));
            // Neither touches what the other saves.
            let (proc, place) = (proc.clone(), prepared.place.clone());
            let (target, stop, copied) = (prepared.target.clone(), self.wanted.stop(), prepared.copied.take());
            let pages = blocking(move || memory::copy(&proc, &place, &target, copied.as_deref(), &stop));
            let (devices, pages) = tokio::join!(devices, pages);
            prepared.copied = Some(pages.map_err(cannot_write)?);
            // Of a full disk QEMU has no more than words.
            let full = || prepared.saved.state.parent().is_some_and(space::is_full);
            devices.map_err(|e| match full() {
                true => cannot_write(io::Error::new(io::ErrorKind::StorageFull, self.fault(e))),
                false => self.fault(e),
            })?;
            client.extend(STEP);
            let after = still::look(client, channel).await.map_err(|e| self.fault(e))?;
            tracing::debug!(pid = self.handles.pid, attempt, "memory saved");
            if after == before {
                return Ok(());
            }
            before = after;
        }
        Err(io_error(
            "save the machine",
            io::Error::other("its guest channel does not come to rest"),
        ))
    }

    /// Takes back what was begun, and lets the guest go on.
    async fn undo(&self, added: Added, ran: bool) {
        let client = match find::command_client(&self.qemu, &self.handles).await {
            Ok(mut client) => {
                client.extend(STEP);
                layers::drop_added(&mut client, added).await;
                Some(client)
            }
            Err(_) => None,
        };
        if ran {
            self.continued(client).await;
        }
    }

    /// Lets the guest run. Over other connections, if this one has failed: a host that is short of everything must not leave a
    /// machine standing.
    async fn continued(&self, client: Option<Client>) {
        let mut fault = None;
        if let Some(mut client) = client {
            match self.cont(&mut client).await {
                Ok(()) => return,
                Err(error) => fault = Some(error),
            }
        }
        for _ in 0..GO_ON {
            match find::command_client(&self.qemu, &self.handles).await {
                Ok(mut client) => match self.cont(&mut client).await {
                    Ok(()) => return,
                    Err(error) => fault = Some(error),
                },
                Err(error) => fault = Some(error),
            }
            if matches!(
                find::open(&self.qemu.options.roots.proc, &self.handles),
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

    async fn cont(&self, client: &mut Client) -> Result<(), EngineError> {
        client.extend(STEP);
        let done = client.execute::<Value>("cont", None).await;
        done.map(drop).map_err(|e| self.fault(e))
    }

    fn fault(&self, error: QmpError) -> EngineError {
        control_error(&self.qemu, &self.handles, error)
    }
}

/// The address in `Host virtual address for 0x0 (memory) is 0x7f…`.
fn address(said: &str) -> Option<u64> {
    let (what, address) = said.trim().rsplit_once(" is 0x")?;
    what.ends_with("(memory)").then_some(())?;
    u64::from_str_radix(address, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_memory_is_said_to_be() {
        let said = "Host virtual address for 0x0 (memory) is 0x7f12ab000000\r\n";
        assert_eq!(address(said), Some(0x7f12_ab00_0000));
        for bad in [
            "",
            "No memory is mapped at address 0x0",
            "Memory at address 0x0 is not RAM",
            "Host virtual address for 0x0 (pc.bios) is 0x7f12ab000000",
            "Host virtual address for 0x0 (memory) is 0xzz",
        ] {
            assert_eq!(address(bad), None, "{bad}");
        }
    }
}
