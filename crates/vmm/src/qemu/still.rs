//! Whether the guest channel stands still.
//!
//! A guest whose processors are stopped writes nothing, its disks are drained and its network waits. Of the serial port that is the
//! channel nothing of the kind is promised: its host side stays connected, and goes on sending and reading. Should anything pass,
//! device state and memory that were saved on either side of it would not fit each other, and a copy would refuse to start or have a
//! dead channel. So whoever saves looks at the port's queues before and after, and saves again when something has moved. A stopped
//! guest provides no further buffers, so that ends by itself. QEMU 7.2 was not seen to move anything.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::qmp::{Client, QmpError};

/// Queues of the channel's device: in and out of each port, and of its control.
const QUEUES: u16 = 6;

#[derive(Deserialize)]
struct Device {
    name: String,
    path: String,
}

/// How far the channel's queues have come.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Moved(Vec<Value>);

/// The channel's device, if the engine can be asked about it.
pub(super) async fn channel(client: &mut Client) -> Result<Option<String>, QmpError> {
    match client.execute::<Vec<Device>>("x-query-virtio", None).await {
        Ok(devices) => Ok(devices.into_iter().find(|d| d.name == "virtio-serial").map(|d| d.path)),
        // Versions before 7.2.
        Err(QmpError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Looks at the queues.
pub(super) async fn look(client: &mut Client, channel: Option<&str>) -> Result<Moved, QmpError> {
    let mut found = Vec::new();
    for queue in 0..QUEUES {
        let Some(path) = channel else { break };
        let arguments = json!({ "path": path, "queue": queue });
        match client
            .execute::<Value>("x-query-virtio-queue-status", Some(arguments))
            .await
        {
            Ok(status) => found.push(status),
            // There are fewer.
            Err(QmpError::Refused { .. }) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(Moved(found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::fake;

    #[tokio::test]
    async fn the_channel_is_found_and_looked_at() {
        let devices = json!([
            { "name": "virtio-rng", "path": "/machine/a" },
            { "name": "virtio-serial", "path": "/machine/b" },
        ]);
        let queue = |used: u64| json!({ "used-idx": used, "inuse": 0 });
        let mut script = vec![("x-query-virtio", Ok(devices))];
        let look_at = "x-query-virtio-queue-status";
        for used in [1, 1, 2] {
            script.extend([
                (look_at, Ok(queue(0))),
                (look_at, Ok(queue(used))),
                (look_at, Err("no such queue")),
            ]);
        }
        let (mut client, other) = fake::client(script).await;
        let path = channel(&mut client).await.unwrap();
        assert_eq!(path.as_deref(), Some("/machine/b"));
        let mut seen = Vec::new();
        for _ in 0..3 {
            seen.push(look(&mut client, path.as_deref()).await.unwrap());
        }
        assert!(seen[0] == seen[1] && seen[1] != seen[2]);
        let heard = other.await.unwrap();
        assert_eq!(heard[2], json!({ "path": "/machine/b", "queue": 0 }));
    }

    #[tokio::test]
    async fn an_engine_that_cannot_tell_is_not_asked() {
        let (mut client, other) = fake::client(vec![("x-query-virtio", Err("unknown command"))]).await;
        let path = channel(&mut client).await.unwrap();
        assert_eq!(path, None);
        assert_eq!(look(&mut client, None).await.unwrap(), Moved(Vec::new()));
        other.await.unwrap();
    }
}
