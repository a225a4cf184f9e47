//! Machines. Each has one task that owns its state ([`task`]); the states and what may be asked in them are drawn in
//! [`banger_core::state`].
//!
//! * [`record`]: what is known of a machine, written to the database before it is shown,
//! * [`task`]: takes requests ([`request`]), decides, runs one piece of [`work`] at a time,
//! * [`create`], [`start`], [`stop`], [`delete`]: the pieces of work,
//! * [`restore`]: a start from saved memory instead of a boot; [`save`]: the way there, [`checkpoint`] what lies between,
//! * [`suspend`], [`snapshot`], [`fork`]: what is made of these,
//! * [`disks`]: the files that a machine writes to and the layers that it shares,
//! * [`cause`]: how an engine ended, [`reboot`]: what follows when nobody asked for it,
//! * [`adopt`]: what becomes of a machine when the daemon starts,
//! * [`doubt`]: a machine whose engine can't be verified,
//! * [`live`]: a machine's engine while there is one; [`stall`]: one whose disk can't be written,
//! * [`description`] is `machine.json`: what a machine is, beside its disks,
//! * [`handles`] is `handles.json`, [`journal`] is `journal.json`: what a machine is in the middle of.

pub mod adopt;
pub mod cause;
pub mod checkpoint;
pub mod console;
pub mod create;
pub mod delete;
pub mod description;
pub mod disks;
pub mod doubt;
pub mod fork;
pub mod handles;
pub mod journal;
pub mod live;
pub mod reboot;
pub mod record;
pub mod request;
pub mod restore;
pub mod save;
pub mod snapshot;
pub mod stages;
pub mod stall;
pub mod start;
pub mod stop;
pub mod suspend;
pub mod task;
pub mod work;

pub use record::Machine;
pub use request::{Ask, Reply, Request};
