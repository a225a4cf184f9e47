//! Identifiers: those of `banger-system`, for they also name what the root helper makes.

pub use banger_system::id::*;
