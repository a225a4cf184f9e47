//! The daemon of banger: state, machines, API.
//!
//! One process per user. It serves [`api`] on a Unix socket ([`server`]), keeps what lasts in [`db`], runs one task per machine
//! ([`machine`]), talks to guests through [`agent`], and brings rows and world together when it starts ([`provision`]). Nothing
//! that happens to it reaches a machine.
//!
//! * [`run`]: from the process's start to its end; [`paths`], [`log`], [`ready`], [`failpoint`],
//! * [`services`]: what all parts share; [`engines`]: the drivers by name; [`host`]: what machines need of root,
//! * [`ops`]: operations with stages, progress and cancel,
//! * [`stock`]: images and kernels by name, made on demand,
//! * [`ssh`]: keys and known hosts,
//! * [`reach`]: the way to a guest; [`forwards`]: ports of the host that lead there,
//! * [`dns`]: names of machines on the bridge,
//! * [`doctor`], [`stats`]: looking only; [`audit`]: what is left on the host that nobody owns,
//! * [`space`]: what waits for space on the host's disk,
//! * [`memory`]: keeps the process small; [`tsc`]: the host's counter for guests' clocks,
//! * [`error`]: from the errors below to what clients see.

pub mod agent;
pub mod api;
pub mod audit;
pub mod blocking;
pub mod clock;
pub mod commit;
pub mod db;
pub mod dns;
pub mod doctor;
pub mod engines;
pub mod error;
pub mod failpoint;
pub mod forwards;
pub mod host;
pub mod idle;
pub mod log;
pub mod machine;
pub mod memory;
pub mod ops;
pub mod paths;
pub mod provision;
pub mod reach;
pub mod ready;
pub mod recover;
pub mod run;
pub mod server;
pub mod services;
pub mod space;
pub mod ssh;
pub mod stats;
pub mod stock;
pub mod templates;
pub mod time;
pub mod tsc;
pub mod version;
