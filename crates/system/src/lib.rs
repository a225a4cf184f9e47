//! What the daemon and the root helper agree on, and nothing else, so that the helper's list of dependencies stays short:
//!
//! * [`id`]: identifiers of machines,
//! * [`disk`]: the sizes of a disk's changes,
//! * [`net`]: a machine's place in the network, and everything that follows from it: address, MAC, tap, user id of its jail,
//! * [`overlap`]: whether a network overlaps what the host has,
//! * [`names`]: names of host objects and the marks by which an audit finds them,
//! * [`install`]: the layout of an installation and its record, `install.toml`,
//! * [`units`]: the text of the systemd units,
//! * [`helper`]: what the daemon may ask of the helper, and what it answers.
//!
//! No I/O happens here.
#![forbid(unsafe_code)]

pub mod disk;
pub mod helper;
pub mod id;
pub mod install;
pub mod names;
pub mod net;
pub mod overlap;
pub mod units;
