//! Letting a paused machine run again.
//!
//! Some versions keep everything from the guest after a resume until it has acknowledged a reset of its channel, and send that reset
//! only when the machine is saved (`detect::resume_cuts_channel`). So one that was paused for anything but a save is asked for a save
//! first: into files without a name, which cannot be opened. The engine resets the channel before it opens them, and that is all that
//! comes of it: no memory is written and no file is left ([decision 86](../../../../docs/decisions/0086-a-reset-before-a-resume.md)).

use super::api::{ApiError, Client, CreateSnapshot, SnapshotType, State, Vm};
use super::{Firecracker, detect, find};
use crate::engine::{EngineError, Handles, Still};

/// Resumes a machine, unless it runs.
pub(super) async fn resume(firecracker: &Firecracker, handles: &Handles, still: Still) -> Result<(), EngineError> {
    let mut client = find::command_client(firecracker, handles).await?;
    let resumed = run(&mut client, still == Still::Paused).await;
    resumed.map_err(|e| firecracker.fault(handles, e))
}

/// Resumes over a connection. `unsaved`: nothing was saved since it was paused.
pub(super) async fn run(client: &mut Client, unsaved: bool) -> Result<(), ApiError> {
    let info = client.info().await?;
    if info.state == State::Running {
        return Ok(());
    }
    if unsaved && detect::resume_cuts_channel(&info.vmm_version) {
        reset_channel(client).await?;
    }
    client.vm(Vm::Resumed).await
}

/// Has the engine tell the guest that all connections are gone.
async fn reset_channel(client: &mut Client) -> Result<(), ApiError> {
    let nowhere = CreateSnapshot {
        snapshot_type: SnapshotType::Diff,
        snapshot_path: String::new(),
        mem_file_path: String::new(),
    };
    match client.create_snapshot(&nowhere).await {
        Ok(()) | Err(ApiError::Refused { .. }) => Ok(()),
        Err(e) => Err(e),
    }
}
