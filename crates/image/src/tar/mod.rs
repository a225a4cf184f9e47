//! Tar streams: a reader with bounds, and the policy of what may enter an image.
//!
//! * [`reader`]: headers, PAX and GNU extensions; everything that is held in memory is bounded,
//! * [`policy`]: pure decisions over entries: which paths are acceptable, what of a freshly built system is left out.

pub mod policy;
pub mod reader;

pub use policy::{Scrub, Verdict};
pub use reader::{Entry, Kind, Limits, Reader};

/// What is wrong with an archive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TarError {
    /// It ended in the middle.
    #[error("it ended too early")]
    Truncated,
    /// A header is malformed.
    #[error("entry {entry} is malformed: {why}")]
    Malformed {
        /// Number of the entry, from 1.
        entry: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An entry is of a kind that is not supported.
    #[error("entry {entry} is of a kind that is not supported: {what}")]
    Unsupported {
        /// Number of the entry, from 1.
        entry: u64,
        /// Its kind.
        what: String,
    },
    /// Something is larger than allowed.
    #[error("{what} exceeds the limit of {limit}")]
    TooLarge {
        /// What.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// A path is not acceptable.
    #[error("the path `{path}` {why}")]
    Path {
        /// The path.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The archive could not be read.
    #[error("it cannot be read: {0}")]
    Read(String),
}

impl From<std::io::Error> for TarError {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::UnexpectedEof {
            Self::Truncated
        } else {
            Self::Read(error.to_string())
        }
    }
}
