//! The installation that the helper serves, and where the kernel's file systems are.

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
