//! Installing system mode, and taking it away again.
//!
//! * `ground`: where an installation stands, and which programs go into it,
//! * `facts`: what there is on this host now; `plan`: what is to be done about it, a pure function,
//! * `apply`: doing it, and undoing it when a step fails; `remove`: the opposite of an installation,
//! * `manager`: systemd and the two services behind an interface; `helper`: a few words with the root helper,
//! * `files`: putting a file in its place, whole or not at all.
//!
//! This is the only part of the command line that runs as root. What it writes to lies in directories that only root can change.

pub(crate) mod apply;
pub(crate) mod facts;
pub(crate) mod files;
pub(crate) mod ground;
pub(crate) mod helper;
pub(crate) mod manager;
pub(crate) mod owner;
pub(crate) mod plan;
pub(crate) mod remove;

#[cfg(test)]
mod tests;
