//! Why a machine is stalled: a disk of it could not be written on the host.
//!
//! QEMU stops the processors then (`werror=stop`), says so with an event, and keeps what is to be written until it is told to go on. The
//! events come on a monitor of their own, since the control socket serves one connection at a time. What is true is asked, never made up
//! from events: these only say when to ask.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tokio::time::{sleep, timeout};

use super::{Qemu, control_error, find, layers};
use crate::engine::{EngineError, Handles, Stall, StallKind};
use crate::qmp::{Client, QmpError};
use crate::space;

/// Name of the socket beside the control socket.
const SOCKET: &str = "events.sock";
/// How often an engine is asked that has no such socket: one that an older banger has started.
const POLL: Duration = Duration::from_secs(2);
/// For how long a machine has to run again so that this counts: what is tried again may fail again at once.
const GOING: Duration = Duration::from_millis(250);
/// Events that say when to ask.
const EVENTS: [&str; 3] = ["STOP", "RESUME", "BLOCK_IO_ERROR"];

/// The socket on which an engine says what happens.
pub(super) fn socket(control: &Path) -> PathBuf {
    control.with_file_name(SOCKET)
}

/// Waits until what holds the machine up is something else than `known`.
pub(super) async fn changed(
    qemu: &Qemu,
    handles: &Handles,
    known: Option<&Stall>,
) -> Result<Option<Stall>, EngineError> {
    find::open_or_refuse(&qemu.options.roots.proc, handles)?;
    let fault = |e: QmpError| control_error(qemu, handles, e);
    match Client::connect(&socket(&handles.control), qemu.options.answer_timeout).await {
        Ok(client) if client.peer().is_some_and(|peer| peer != handles.pid) => Err(EngineError::NotOurs {
            pid: handles.pid,
            why: "its events come from another process".to_owned(),
        }),
        Ok(client) => watched(qemu, client, known).await.map_err(fault),
        Err(QmpError::Unreachable(_)) => polled(qemu, handles, known).await,
        Err(e) => Err(fault(e)),
    }
}

async fn watched(qemu: &Qemu, mut client: Client, known: Option<&Stall>) -> Result<Option<Stall>, QmpError> {
    let limit = qemu.options.answer_timeout;
    loop {
        client.extend(limit);
        let mut now = look(&mut client).await?;
        if known.is_some() && now.is_none() && timeout(GOING, event(&mut client)).await.is_ok() {
            client.extend(limit);
            now = look(&mut client).await?;
        }
        if now.as_ref() != known {
            return Ok(now);
        }
        event(&mut client).await?;
    }
}

/// Waits for an event after which to ask.
async fn event(client: &mut Client) -> Result<(), QmpError> {
    loop {
        if EVENTS.contains(&client.event().await?.as_str()) {
            return Ok(());
        }
    }
}

async fn polled(qemu: &Qemu, handles: &Handles, known: Option<&Stall>) -> Result<Option<Stall>, EngineError> {
    loop {
        // The connection is somebody else's meanwhile, while the machine is saved.
        if let Ok(mut client) = find::command_client(qemu, handles).await {
            let now = look(&mut client).await.map_err(|e| control_error(qemu, handles, e))?;
            if now.as_ref() != known {
                return Ok(now);
            }
        }
        sleep(POLL).await;
        find::open_or_refuse(&qemu.options.roots.proc, handles)?;
    }
}

/// A device of `query-block`.
#[derive(Debug, Deserialize)]
struct Device {
    #[serde(rename = "io-status")]
    status: Option<String>,
    inserted: Option<Inserted>,
}

#[derive(Debug, Deserialize)]
struct Inserted {
    #[serde(rename = "node-name")]
    node: Option<String>,
}

/// Asks what holds the machine up.
async fn look(client: &mut Client) -> Result<Option<Stall>, QmpError> {
    if client.status().await?.status != "io-error" {
        return Ok(None);
    }
    let devices: Vec<Device> = client.execute("query-block", None).await?;
    let files = layers::active(client).await?.files();
    // Of a quota QEMU says no more than that writing failed.
    let full = || files.iter().filter_map(|file| file.parent()).any(space::is_full);
    Ok(judge(devices, full))
}

/// `None` where it runs again since the first question.
fn judge(devices: Vec<Device>, full: impl FnOnce() -> bool) -> Option<Stall> {
    let failed = |device: &Device| device.status.as_deref().is_some_and(|status| status != "ok");
    let device = devices.into_iter().find(failed)?;
    let kind = match device.status.as_deref() == Some("nospace") || full() {
        true => StallKind::NoSpace,
        false => StallKind::Failed,
    };
    let node = device.inserted.and_then(|inserted| inserted.node);
    let disk = node.as_deref().and_then(layers::role);
    Some(Stall { kind, disk })
}

/// Lets the machine try again what could not be written.
pub(super) async fn try_again(qemu: &Qemu, handles: &Handles) -> Result<(), EngineError> {
    let mut client = find::command_client(qemu, handles).await?;
    let fault = |e: QmpError| control_error(qemu, handles, e);
    // One that somebody has paused stays so.
    if client.status().await.map_err(fault)?.status != "io-error" {
        return Ok(());
    }
    client.execute::<Value>("cont", None).await.map(drop).map_err(fault)
}

#[cfg(test)]
mod tests {
    use banger_core::plan::DiskRole;
    use serde_json::json;

    use super::*;
    use crate::qmp::fake;

    fn devices(root: &str, work: &str) -> Value {
        json!([
            { "io-status": root, "device": "", "inserted": { "node-name": "root" } },
            { "io-status": work, "device": "", "inserted": { "node-name": "work-s3" } },
            { "device": "floppy" },
        ])
    }

    #[test]
    fn what_failed_and_why() {
        let of = |root, work, full| {
            let devices = serde_json::from_value(devices(root, work)).unwrap();
            judge(devices, || full)
        };
        let stall = |kind, disk| Some(Stall { kind, disk: Some(disk) });
        assert_eq!(of("nospace", "ok", false), stall(StallKind::NoSpace, DiskRole::Root));
        assert_eq!(of("ok", "failed", false), stall(StallKind::Failed, DiskRole::Work));
        // A quota.
        assert_eq!(of("failed", "ok", true), stall(StallKind::NoSpace, DiskRole::Root));
        assert_eq!(of("ok", "ok", true), None);
    }

    #[tokio::test]
    async fn a_machine_that_was_paused_is_not_held_up() {
        for status in ["running", "paused", "postmigrate"] {
            let script = vec![("query-status", Ok(json!({ "status": status, "running": false })))];
            let (mut client, other) = fake::client(script).await;
            assert_eq!(look(&mut client).await.unwrap(), None);
            other.await.unwrap();
        }
    }
}
