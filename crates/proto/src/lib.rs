//! Wire types of banger.
//!
//! Everything that crosses a process boundary is defined here, so that both ends agree by construction:
//!
//! * [`api`]: the daemon's HTTP + JSON API over its Unix socket,
//! * [`agent`]: requests and answers of the guest agent (HTTP/2 over the guest channel),
//! * [`hello`]: the handshake that brings the guest channel into a known state,
//! * [`frame`]: the frames of an exec session, the same on the guest channel and on the daemon's WebSocket,
//! * [`arguments`]: how much a program can be given when it is started,
//! * [`error`]: the error body and its codes,
//! * [`shim`]: the job that the daemon gives `banger-shim`, and its reports.
//!
//! No I/O happens in this crate. Changes are additive: fields may be added with a default, nothing is renamed or removed
//! within one [`API_VERSION`].
#![forbid(unsafe_code)]

pub mod agent;
pub mod api;
pub mod arguments;
pub mod error;
pub mod frame;
pub mod hello;
pub mod shim;

/// Version of the daemon API. Raised only for a change that an older client could not survive.
pub const API_VERSION: u32 = 2;

/// Version of the schema of the command line's JSON output (`--format json`). Additive changes do not raise it.
pub const OUTPUT_SCHEMA_VERSION: u32 = 1;
