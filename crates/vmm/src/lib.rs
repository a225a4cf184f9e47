//! Engine drivers: start, find again, control and end the process that is a machine.
//!
//! [`Engine`] is what the daemon sees. What a driver can do is data ([`Capabilities`]), so nothing above asks which engine it
//! is. A launched engine is detached: its parent is `banger-shim`, which keeps a bounded console log and records how the
//! engine ended; nothing that happens to the daemon reaches it.

pub mod engine;

pub use engine::{Capabilities, Engine, EngineError, EngineExit, Handles, Liveness};
