//! Network of a machine: what of it is reached from outside, and what it reaches.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A port of the host that leads to a port of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// Address of the host, `127.0.0.1` unless something else was asked for.
    pub host_ip: String,
    /// Port of the host; 0 in a request is any that is free.
    pub host_port: u16,
    /// Port of the guest.
    pub guest_port: u16,
}

/// A port on which something in the guest listens. Told by the guest: shown, never trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ListeningPort {
    /// Machine id.
    pub id: String,
    /// Machine name.
    pub machine: String,
    /// Port.
    pub port: u16,
    /// Address it listens on in the guest.
    pub address: String,
    /// Name of the process, where the guest can tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// Where it is reached from the host: `NAME.vm:PORT` in system mode, `127.0.0.1:PORT` for a forward; none where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// A link, where it answered to HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
}
