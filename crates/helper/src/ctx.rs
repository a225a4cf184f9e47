//! The installation that the helper serves, and where the kernel's file systems are.
//!
//! **What its unit takes away** (`banger_system::units`): it has mounts of its own, so `link` and `rename` between one of its paths and a
//! descriptor of the daemon's fail with `EXDEV`, even on one file system; the same file has to be opened by a path of the helper's first.
//! `openat2` fails with `ENOSYS`. It can write below `/var/lib/banger`, `/run/banger-root`, `/dev`, `/sys` and `/proc`, nowhere else,
//! and nobody else sees what it mounts.

use std::path::PathBuf;

use banger_system::helper::{HelperCode, HelperError};
use banger_system::install::{Layout, Record};

/// What every method needs to know. Roots are parameters, so that a test hands over a tree of its own.
#[derive(Debug, Clone)]
pub(crate) struct Ctx {
    /// Where everything is.
    pub(crate) layout: Layout,
    /// Whose daemon it is, and which firecracker and jailer.
    pub(crate) record: Record,
    /// `/proc`.
    pub(crate) proc: PathBuf,
    /// `/sys`.
    pub(crate) sys: PathBuf,
}

/// An error of a kind.
pub(crate) fn error(code: HelperCode, message: impl Into<String>) -> HelperError {
    HelperError {
        code,
        message: message.into(),
        details: Vec::new(),
    }
}

/// A call of the kernel that failed: what was being done, and why it did not work.
pub(crate) fn failed(what: impl std::fmt::Display, why: impl std::fmt::Display) -> HelperError {
    error(HelperCode::Failed, format!("cannot {what}: {why}"))
}
