//! The decisions of banger as functions over data. No I/O happens here: whatever a decision needs to know of the world is a
//! parameter, so that each can be tested without a machine.
//!
//! * [`name`], [`id`], [`size`], [`reference`](mod@reference), [`argument`]: what users type,
//! * [`forward`]: ports of the host that lead to a machine,
//! * [`config`]: the configuration file,
//! * [`host`]: which engine and acceleration a host gets,
//! * [`spec`]: defaults, limits and the `spec:` line,
//! * [`state`]: the life of a machine and what may be asked of it when,
//! * [`plan`]: everything an engine needs to know to start a machine.
#![forbid(unsafe_code)]

pub mod argument;
pub mod config;
pub mod forward;
pub mod host;
pub mod id;
pub mod name;
pub mod plan;
pub mod reference;
pub mod signal;
pub mod size;
pub mod spec;
pub mod state;
