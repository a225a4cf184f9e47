//! Machines. Each has one task that owns its state ([`task`]); the states and what may be asked in them are drawn in
//! [`banger_core::state`].
//!
//! * [`record`]: what is known of a machine, written to the database before it is shown,
//! * [`task`]: takes requests, decides, runs one piece of work at a time,
//! * [`create`], [`start`], [`stop`], [`delete`]: the pieces of work,
//! * [`adopt`]: what becomes of a machine when the daemon starts,
//! * [`live`]: a machine's engine while there is one,
//! * [`handles`] is `handles.json`.

pub mod adopt;
pub mod cause;
pub mod create;
pub mod delete;
pub mod handles;
pub mod live;
pub mod record;
pub mod stages;
pub mod start;
pub mod stop;
pub mod task;

pub use record::Machine;
pub use task::{Ask, Reply, Request};
