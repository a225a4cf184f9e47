//! What both ends of a file copy do alike, the client on the host and the agent in the guest.
//!
//! * [`sparse`]: the map of a sparse file in a tar stream, in the format 1.0 of GNU tar.
//! * [`send`]: an open file as an entry of a tar stream, and notes on what was left out.
//! * [`receive`]: an entry of a tar stream as a file. The file gets its name in one step, when it is complete.

pub mod receive;
pub mod send;
pub mod sparse;
