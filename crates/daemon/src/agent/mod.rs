//! The client of the guest agent. What comes from there is hostile: bounded, checked, sanitised before anything else sees it.
//!
//! * [`handshake`]: brings the guest channel into a known state,
//! * [`link`]: one HTTP/2 connection per machine, made on demand and made again when it breaks,
//! * [`calls`]: requests with JSON answers,
//! * [`relay`]: sessions and raw connections between a WebSocket and the agent,
//! * [`warm`]: a first command in a guest that becomes a template,
//! * [`sanitize`]: makes guest text fit to be stored and shown.

pub mod calls;
pub mod handshake;
pub mod link;
pub mod relay;
pub mod sanitize;
pub mod warm;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

pub use link::{Link, LinkError};
