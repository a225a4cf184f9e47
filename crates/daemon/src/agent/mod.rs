//! The client of the guest agent. What comes from there is hostile: bounded, checked, sanitised before anything else sees it.
//!
//! * [`gate`]: where requests wait while the guest is frozen,
//! * [`handshake`]: brings the guest channel into a known state,
//! * [`link`]: one HTTP/2 connection per machine, made on demand and made again when it breaks,
//! * [`call`]: the table of all requests, and how long they may take,
//! * [`calls`]: those with JSON answers, and transfers,
//! * [`relay`]: sessions and raw connections between a WebSocket and the agent,
//! * [`transfer`]: bodies of files, which end when the agent makes no progress,
//! * [`warm`]: a first command in a guest that becomes a template,
//! * [`sanitize`]: makes guest text fit to be stored and shown.

pub mod call;
pub mod calls;
pub mod gate;
pub mod handshake;
pub mod link;
pub mod relay;
pub mod sanitize;
pub mod transfer;
pub mod warm;

#[cfg(test)]
mod deadlines;
#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

pub use link::{Link, LinkError};
