//! The error body that every failed request carries, and the closed list of its codes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What kind of failure this is; clients branch on it, people read the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request itself is malformed.
    BadRequest,
    /// A name, size or combination in the request is not acceptable.
    InvalidSpec,
    /// The object does not exist.
    NotFound,
    /// A reference fits several objects.
    Ambiguous,
    /// The name is taken, or the object is in use.
    Conflict,
    /// The machine is not in a state that allows the request.
    WrongState,
    /// The engine or host lacks what the request needs.
    Unsupported,
    /// The engine failed.
    Engine,
    /// The guest failed or broke the protocol.
    Guest,
    /// A deadline passed.
    Timeout,
    /// The disk is full.
    NoSpace,
    /// The operation was cancelled.
    Canceled,
    /// The daemon is stopping or not reachable.
    Unavailable,
    /// A fault of banger's own.
    Internal,
}

/// A failure: what failed on what, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Kind of failure.
    pub code: ErrorCode,
    /// One sentence: lower case, no full stop, names the object.
    pub message: String,
    /// What the user can do about it, if there is something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Further lines worth showing as they are: the engine's last words, the end of the guest's console.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
    /// The operation this happened in, as it stands in the daemon's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
}

impl ApiError {
    /// An error without hint or details.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
            details: Vec::new(),
            operation: None,
        }
    }

    /// Adds what the user can do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds lines to show below the message.
    #[must_use]
    pub fn details(mut self, details: Vec<String>) -> Self {
        self.details = details;
        self
    }
}

/// The body of every answer with a status of 400 or above.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The failure.
    pub error: ApiError,
}
