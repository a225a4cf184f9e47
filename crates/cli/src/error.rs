//! What can go wrong in the command line, how it is shown, and which exit status each kind of failure has.

use std::fmt;
use std::path::Path;

use banger_proto::error::{ApiError, ErrorCode};

/// Kind of failure; decides the exit status. Documented in `docs/cli.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The operation failed.
    Failed,
    /// The command line makes no sense.
    Usage,
    /// No such object, or several fit.
    NotFound,
    /// Name taken, object in use, or in the wrong state.
    Conflict,
    /// A specification or configuration that is not acceptable.
    Invalid,
    /// Engine or host lack something.
    Unsupported,
    /// A deadline passed.
    Timeout,
    /// The disk is full.
    NoSpace,
    /// No daemon.
    Unavailable,
    /// The reader of our output is gone.
    BrokenPipe,
    /// Ended by a signal of this number.
    Signal(i32),
}

/// Every kind with a fixed status, and what it means: the table of `docs/cli.md` and of `--help`.
pub(crate) const STATUSES: &[(u8, &str)] = &[
    (0, "success"),
    (1, "the operation failed"),
    (2, "the command line is wrong"),
    (3, "no such machine, image or kernel, or the reference fits several"),
    (4, "name taken, object in use, or the machine is in the wrong state"),
    (5, "a specification or the configuration is not acceptable"),
    (6, "the engine or the host lacks something (see `banger doctor`)"),
    (7, "a deadline passed"),
    (8, "no space left"),
    (9, "the daemon is not available"),
    (
        125,
        "in run, exec, shell, attach: banger itself failed, whatever the kind",
    ),
    (126, "in run, exec: the command cannot be run"),
    (127, "in run, exec: the command is not there"),
    (130, "interrupted; 128 + n in general for signal n"),
    (141, "the reader of the output went away"),
];

/// Status of banger's own failures in commands whose status is the guest's.
pub(crate) const GUEST_COMMAND_FAILED: u8 = 125;

impl Kind {
    /// The exit status.
    pub(crate) fn status(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::Invalid => 5,
            Self::Unsupported => 6,
            Self::Timeout => 7,
            Self::NoSpace => 8,
            Self::Unavailable => 9,
            Self::BrokenPipe => 141,
            Self::Signal(n) => u8::try_from(128 + n).unwrap_or(1),
        }
    }
}

impl From<ErrorCode> for Kind {
    fn from(code: ErrorCode) -> Self {
        match code {
            ErrorCode::BadRequest | ErrorCode::Engine | ErrorCode::Guest | ErrorCode::Internal => Self::Failed,
            ErrorCode::InvalidSpec => Self::Invalid,
            ErrorCode::NotFound | ErrorCode::Ambiguous => Self::NotFound,
            ErrorCode::Conflict | ErrorCode::WrongState => Self::Conflict,
            ErrorCode::Unsupported => Self::Unsupported,
            ErrorCode::Timeout => Self::Timeout,
            ErrorCode::NoSpace => Self::NoSpace,
            ErrorCode::Canceled => Self::Signal(2),
            ErrorCode::Unavailable => Self::Unavailable,
        }
    }
}

/// A failure as it is shown: what failed on what, details, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Error {
    /// Kind of failure.
    pub(crate) kind: Kind,
    /// The code that the daemon gave, where it was the daemon.
    pub(crate) code: Option<ErrorCode>,
    /// One sentence.
    pub(crate) message: String,
    /// What to do about it.
    pub(crate) hint: Option<String>,
    /// Further lines.
    pub(crate) details: Vec<String>,
    /// Operation of the daemon in which it happened.
    pub(crate) operation: Option<String>,
}

/// Result of everything here.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure of this kind.
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            code: None,
            message: message.into(),
            hint: None,
            details: Vec::new(),
            operation: None,
        }
    }

    /// An operation that failed.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(Kind::Failed, message)
    }

    /// A command line that makes no sense.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// No daemon.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Kind::Unavailable, message)
    }

    /// Ended by a signal.
    pub(crate) fn signal(number: i32) -> Self {
        Self::new(Kind::Signal(number), "interrupted")
    }

    /// A failed system call on a path.
    pub(crate) fn io(doing: &str, path: &Path, error: impl Into<std::io::Error>) -> Self {
        let error = error.into();
        Self::new(
            io_kind(&error),
            format!("cannot {doing} {}: {}", path.display(), reason(&error)),
        )
    }

    /// Adds what to do.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds lines to show below the message.
    pub(crate) fn details(mut self, details: Vec<String>) -> Self {
        self.details = details;
        self
    }

    /// Whether the daemon said this code.
    pub(crate) fn is(&self, code: ErrorCode) -> bool {
        self.code == Some(code)
    }
}

/// The words of a system error without Rust's `(os error N)`.
pub(crate) fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut letters = text.chars();
    letters
        .next()
        .map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

fn io_kind(error: &std::io::Error) -> Kind {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Kind::NoSpace,
        std::io::ErrorKind::BrokenPipe => Kind::BrokenPipe,
        _ => Kind::Failed,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<ApiError> for Error {
    fn from(error: ApiError) -> Self {
        Self {
            kind: error.code.into(),
            code: Some(error.code),
            message: error.message,
            hint: error.hint,
            details: error.details,
            operation: error.operation,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_status() {
        for (code, status) in [
            (ErrorCode::BadRequest, 1),
            (ErrorCode::InvalidSpec, 5),
            (ErrorCode::NotFound, 3),
            (ErrorCode::Ambiguous, 3),
            (ErrorCode::Conflict, 4),
            (ErrorCode::WrongState, 4),
            (ErrorCode::Unsupported, 6),
            (ErrorCode::Engine, 1),
            (ErrorCode::Guest, 1),
            (ErrorCode::Timeout, 7),
            (ErrorCode::NoSpace, 8),
            (ErrorCode::Canceled, 130),
            (ErrorCode::Unavailable, 9),
            (ErrorCode::Internal, 1),
        ] {
            assert_eq!(Kind::from(code).status(), status, "{code:?}");
            assert!(STATUSES.iter().any(|s| s.0 == status), "{status} is documented");
        }
    }

    #[test]
    fn system_errors_read_like_ours() {
        let error = std::io::Error::from_raw_os_error(2);
        assert_eq!(reason(&error), "no such file or directory");
        assert_eq!(
            Error::io("open", Path::new("/x"), error).message,
            "cannot open /x: no such file or directory"
        );
    }
}
