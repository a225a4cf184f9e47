//! Firecracker's API, typed: as much of it as a machine needs. Every refusal is final and is told in Firecracker's own words.

use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::http::{Answer, Connection, HttpError};

/// The most of a refusal that is told.
const WORDS: usize = 2000;

/// What went wrong with a call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// There was no answer.
    #[error("`{call}`: {source}")]
    Http {
        /// Method and path.
        call: String,
        /// Why.
        #[source]
        source: HttpError,
    },
    /// It was refused.
    #[error("`{call}` was refused: {message}")]
    Refused {
        /// Method and path.
        call: String,
        /// What Firecracker said.
        message: String,
    },
    /// The answer is not one to this call.
    #[error("`{call}` was answered with {what}")]
    Answer {
        /// Method and path.
        call: String,
        /// What is wrong.
        what: String,
    },
}

impl ApiError {
    /// Nobody listens: not yet, or not any more.
    pub fn is_unreachable(&self) -> bool {
        matches!(
            self,
            Self::Http {
                source: HttpError::Unreachable(_),
                ..
            }
        )
    }

    /// The engine may have carried the call out all the same.
    pub fn is_lost(&self) -> bool {
        !matches!(self, Self::Refused { .. }) && !self.is_unreachable()
    }
}

/// Whether an instance runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// It was not started.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its processors run.
    Running,
    /// They are stopped.
    Paused,
}

/// `GET /`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// The id that the engine was started with.
    pub id: String,
    /// Whether it runs.
    pub state: State,
    /// Its version.
    pub vmm_version: String,
    /// `Firecracker`
    pub app_name: String,
}

/// `PUT /boot-source`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSource {
    /// ELF image of the kernel.
    pub kernel_image_path: String,
    /// Initial RAM file system.
    pub initrd_path: String,
    /// Kernel line.
    pub boot_args: String,
}

/// `PUT /drives/ID`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// The same as in the path.
    pub drive_id: String,
    /// File or device.
    pub path_on_host: String,
    /// It becomes `/dev/vda`, and `root=` is added to the kernel line.
    pub is_root_device: bool,
    /// It is opened for reading only.
    pub is_read_only: bool,
    /// `Writeback`: what the guest flushes is on the disk. Without it a guest's flush does nothing.
    pub cache_type: String,
    /// `Sync`
    pub io_engine: String,
}

/// `PUT /network-interfaces/ID`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkInterface {
    /// The same as in the path.
    pub iface_id: String,
    /// The tap.
    pub host_dev_name: String,
    /// MAC address of the guest.
    pub guest_mac: String,
}

/// `PUT /machine-config`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Processors.
    pub vcpu_count: u32,
    /// Memory in MiB.
    pub mem_size_mib: u64,
    /// Two processors to a core.
    pub smt: bool,
    /// The kernel keeps account of what is written: it costs time, and saves without it are complete as well.
    pub track_dirty_pages: bool,
}

/// `PUT /vsock`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// The guest's address.
    pub guest_cid: u32,
    /// Socket on the host.
    pub uds_path: String,
}

/// `PUT /metrics`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// A file or named pipe.
    pub metrics_path: String,
}

/// `PUT /logger`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logger {
    /// What is worth a line.
    pub level: String,
    /// Lines say so.
    pub show_level: bool,
}

/// `PUT /entropy`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entropy {}

/// `PUT /actions`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action_type")]
pub enum Action {
    /// Starts the machine.
    InstanceStart,
    /// Presses the keys. The guest does with it what it likes.
    SendCtrlAltDel,
    /// Writes metrics.
    FlushMetrics,
}

/// `PATCH /vm`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state")]
pub enum Vm {
    /// Stops the processors.
    Paused,
    /// Lets them run.
    Resumed,
}

/// What is saved of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// All of it.
    Full,
    /// What is in memory, written over what the file has.
    Diff,
}

/// `PUT /snapshot/create`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateSnapshot {
    /// What is saved.
    pub snapshot_type: SnapshotType,
    /// File for processors and devices.
    pub snapshot_path: String,
    /// File for memory.
    pub mem_file_path: String,
}

/// Memory to go on with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemBackend {
    /// `File`
    pub backend_type: String,
    /// The file.
    pub backend_path: String,
}

/// A tap in place of the one that was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkOverride {
    /// The interface.
    pub iface_id: String,
    /// The tap.
    pub host_dev_name: String,
}

/// `PUT /snapshot/load`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadSnapshot {
    /// File with processors and devices.
    pub snapshot_path: String,
    /// Memory.
    pub mem_backend: MemBackend,
    /// It runs at once.
    pub resume_vm: bool,
    /// Other taps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_overrides: Vec<NetworkOverride>,
}

/// `GET /vm/config`, as far as it is used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Its drives.
    #[serde(default)]
    pub drives: Vec<DriveInfo>,
}

/// A drive in [`VmConfig`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveInfo {
    /// Which.
    pub drive_id: String,
    /// Its file as the engine was told.
    pub path_on_host: Option<String>,
}

/// A connection to one engine's API.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
    deadline: Instant,
}

impl Client {
    /// Connects. Every call has to be answered within this time, counted from now.
    pub async fn connect(path: &Path, limit: Duration) -> Result<Self, ApiError> {
        let deadline = Instant::now() + limit;
        let connection = Connection::open(path, deadline)
            .await
            .map_err(|source| ApiError::Http {
                call: "connect".to_owned(),
                source,
            })?;
        Ok(Self { connection, deadline })
    }

    /// Gives the next calls this much time from now.
    pub fn extend(&mut self, limit: Duration) {
        self.deadline = Instant::now() + limit;
    }

    /// The process behind the socket.
    pub fn peer(&self) -> Option<u32> {
        self.connection.peer()
    }

    /// `GET /`
    pub async fn info(&mut self) -> Result<InstanceInfo, ApiError> {
        self.get("/").await
    }

    /// `GET /vm/config`
    pub async fn config(&mut self) -> Result<VmConfig, ApiError> {
        self.get("/vm/config").await
    }

    /// `PUT /actions`
    pub async fn action(&mut self, action: Action) -> Result<(), ApiError> {
        self.put("/actions", &action).await
    }

    /// `PATCH /vm`
    pub async fn vm(&mut self, vm: Vm) -> Result<(), ApiError> {
        self.change("PATCH", "/vm", &vm).await
    }

    /// `PUT /snapshot/create`
    pub async fn create_snapshot(&mut self, what: &CreateSnapshot) -> Result<(), ApiError> {
        self.put("/snapshot/create", what).await
    }

    /// `PUT /snapshot/load`
    pub async fn load_snapshot(&mut self, what: &LoadSnapshot) -> Result<(), ApiError> {
        self.put("/snapshot/load", what).await
    }

    /// Any other `PUT`: see [`super::config`].
    pub async fn put(&mut self, path: &str, body: &impl Serialize) -> Result<(), ApiError> {
        self.change("PUT", path, body).await
    }

    async fn change(&mut self, method: &str, path: &str, body: &impl Serialize) -> Result<(), ApiError> {
        let call = format!("{method} {path}");
        let body = serde_json::to_vec(body).map_err(|e| ApiError::Answer {
            call: call.clone(),
            what: e.to_string(),
        })?;
        let answer = self.call(method, path, Some(&body)).await?;
        match answer.status {
            200..=299 => Ok(()),
            _ => Err(refused(call, &answer)),
        }
    }

    async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, ApiError> {
        let call = format!("GET {path}");
        let answer = self.call("GET", path, None).await?;
        match answer.status {
            200..=299 => serde_json::from_slice(&answer.body).map_err(|e| ApiError::Answer {
                call,
                what: format!("something else: {e}"),
            }),
            _ => Err(refused(call, &answer)),
        }
    }

    async fn call(&mut self, method: &str, path: &str, body: Option<&[u8]>) -> Result<Answer, ApiError> {
        self.connection
            .send(method, path, body, self.deadline)
            .await
            .map_err(|source| ApiError::Http {
                call: format!("{method} {path}"),
                source,
            })
    }
}

/// A refusal in Firecracker's words, bounded and harmless for terminals.
fn refused(call: String, answer: &Answer) -> ApiError {
    #[derive(Deserialize)]
    struct Fault {
        fault_message: String,
    }
    let words = match serde_json::from_slice::<Fault>(&answer.body) {
        Ok(fault) => fault.fault_message,
        Err(_) => String::from_utf8_lossy(&answer.body).into_owned(),
    };
    let words: String = words
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(WORDS)
        .collect();
    let message = match words.trim() {
        "" => format!("status {}", answer.status),
        words => words.to_owned(),
    };
    ApiError::Refused { call, message }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn json_of(value: &impl Serialize) -> Value {
        serde_json::to_value(value).unwrap()
    }

    #[test]
    fn bodies_are_those_of_the_documentation() {
        assert_eq!(
            json_of(&Action::InstanceStart),
            json!({ "action_type": "InstanceStart" })
        );
        assert_eq!(json_of(&Vm::Paused), json!({ "state": "Paused" }));
        assert_eq!(json_of(&Entropy {}), json!({}));
        let load = LoadSnapshot {
            snapshot_path: "/s".to_owned(),
            mem_backend: MemBackend {
                backend_type: "File".to_owned(),
                backend_path: "/m".to_owned(),
            },
            resume_vm: false,
            network_overrides: Vec::new(),
        };
        assert_eq!(
            json_of(&load),
            json!({
                "snapshot_path": "/s",
                "mem_backend": { "backend_type": "File", "backend_path": "/m" },
                "resume_vm": false,
            })
        );
        let info = r#"{"app_name":"Firecracker","id":"x","state":"Not started","vmm_version":"1.16.1","new":1}"#;
        let info: InstanceInfo = serde_json::from_str(info).unwrap();
        assert_eq!((info.state, info.id.as_str()), (State::NotStarted, "x"));
    }

    #[test]
    fn a_refusal_is_quoted_and_bounded() {
        let message = |body: &[u8]| {
            let answer = Answer {
                status: 400,
                body: body.to_vec(),
            };
            match refused("PUT /x".to_owned(), &answer) {
                ApiError::Refused { message, .. } => message,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(message(br#"{"fault_message":"no such\n thing"}"#), "no such  thing");
        assert_eq!(message(b"plain"), "plain");
        assert_eq!(message(b""), "status 400");
        assert_eq!(message(b"\x1b[31mred"), "[31mred");
        assert_eq!(message(&[b'x'; 9000]).len(), WORDS);
    }
}
