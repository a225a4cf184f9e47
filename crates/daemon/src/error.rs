//! From the errors of the layers below to the error that clients see.

use std::error::Error;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use banger_core::name::NameError;
use banger_core::reference::ReferenceError;
use banger_core::spec::SpecError;
use banger_proto::error::{ApiError, ErrorBody, ErrorCode};
use banger_vmm::{EngineError, space};

use crate::agent::LinkError;
use crate::db::{self, DbError};

/// An error on its way to a client.
#[derive(Debug)]
pub struct Failure(pub ApiError);

impl<E: IntoApi> From<E> for Failure {
    fn from(e: E) -> Self {
        Self(e.into_api())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (status(self.0.code), Json(ErrorBody { error: self.0 })).into_response()
    }
}

/// The status that goes with a code.
pub fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::BadRequest => StatusCode::BAD_REQUEST,
        ErrorCode::InvalidSpec | ErrorCode::Unsupported => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::Ambiguous | ErrorCode::Conflict | ErrorCode::WrongState | ErrorCode::Canceled => {
            StatusCode::CONFLICT
        }
        ErrorCode::Engine | ErrorCode::Guest => StatusCode::BAD_GATEWAY,
        ErrorCode::Timeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Errors that can be told to a client.
pub trait IntoApi {
    /// What the client is told.
    fn into_api(self) -> ApiError;
}

impl IntoApi for ApiError {
    fn into_api(self) -> ApiError {
        self
    }
}

/// An error with all its causes in one line: `cannot do x: because y: because z`.
pub fn chain(e: &dyn Error) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some libraries repeat their cause in their own message.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Whether one of an error's causes is a full disk.
pub fn is_full(e: &(dyn Error + 'static)) -> bool {
    let mut next = Some(e);
    while let Some(e) = next {
        if e.downcast_ref::<std::io::Error>().is_some_and(space::says_full) {
            return true;
        }
        next = e.source();
    }
    false
}

fn no_space(message: String) -> ApiError {
    ApiError::new(ErrorCode::NoSpace, message).hint(db::FREE)
}

/// A failure of the host's file system while `what` was done.
pub fn io(what: impl std::fmt::Display, e: std::io::Error) -> ApiError {
    if is_full(&e) {
        return no_space(format!("cannot {what}: no space left"));
    }
    ApiError::new(ErrorCode::Internal, format!("cannot {what}: {e}"))
}

impl IntoApi for EngineError {
    fn into_api(self) -> ApiError {
        if is_full(&self) {
            return no_space(chain(&self));
        }
        let message = chain(&self);
        match self {
            Self::Missing { engine, .. } if engine != crate::engines::QEMU => {
                ApiError::new(ErrorCode::Unsupported, message).hint(format!("install it, or name the binary with `{engine}_bin` in the configuration"))
            }
            Self::Missing { .. } => ApiError::new(ErrorCode::Unsupported, message)
                .hint("install it (Debian: apt-get install qemu-system-x86), or name the binary with `qemu_bin` in the configuration"),
            Self::Unsupported { .. } => ApiError::new(ErrorCode::Unsupported, message),
            Self::Died { last_words, .. } => ApiError::new(ErrorCode::Engine, message).details(last_words),
            Self::Timeout { .. } => ApiError::new(ErrorCode::Timeout, message),
            _ => ApiError::new(ErrorCode::Engine, message),
        }
    }
}

impl IntoApi for LinkError {
    fn into_api(self) -> ApiError {
        let message = chain(&self);
        match self {
            Self::Refused(e) => e,
            Self::Engine(e) => e.into_api(),
            Self::Timeout { .. } | Self::Handshake(crate::agent::handshake::HandshakeError::Silent(_)) => {
                ApiError::new(ErrorCode::Timeout, message).hint("look at the guest's console: `banger vm logs`")
            }
            Self::Frozen { .. } => ApiError::new(ErrorCode::Timeout, message)
                .hint("try again; where it stays frozen, start it anew: banger vm kill NAME, banger vm start NAME"),
            Self::Broken { .. } => {
                ApiError::new(ErrorCode::Unavailable, message).hint("try again: the daemon connects anew")
            }
            Self::Stalled(stall) => crate::machine::stall::error(&stall),
            Self::Busy => ApiError::new(ErrorCode::Conflict, message).hint("end some of them"),
            Self::Handshake(_) | Self::Answer { .. } | Self::WrongMachine { .. } => {
                ApiError::new(ErrorCode::Guest, message)
            }
        }
    }
}

impl IntoApi for DbError {
    fn into_api(self) -> ApiError {
        if self.is_full() {
            return no_space(chain(&self));
        }
        let hint = self.hint();
        let message = chain(&self);
        let mut error = match self {
            Self::NameTaken(name) => {
                return ApiError::new(ErrorCode::Conflict, format!("there is a machine `{name}` already"))
                    .hint("choose another name, or delete that one");
            }
            Self::Closed => ApiError::new(ErrorCode::Unavailable, "the daemon is stopping"),
            Self::NoSlot(_) => {
                return ApiError::new(ErrorCode::NoSpace, "every address of the machines' network is taken").hint(
                    "delete machines that are not needed, or give [network] in the configuration a larger network",
                );
            }
            _ => ApiError::new(ErrorCode::Internal, message),
        };
        error.hint = hint;
        error
    }
}

impl IntoApi for SpecError {
    fn into_api(self) -> ApiError {
        let mut error = ApiError::new(ErrorCode::InvalidSpec, self.to_string());
        error.hint = self.hint().map(str::to_owned);
        error
    }
}

impl IntoApi for NameError {
    fn into_api(self) -> ApiError {
        ApiError::new(ErrorCode::InvalidSpec, self.to_string())
            .hint("a name has 1 to 63 characters of a-z, 0-9 and `-`, and no `-` at either end")
    }
}

impl IntoApi for ReferenceError {
    fn into_api(self) -> ApiError {
        let message = self.to_string();
        match self {
            Self::NotFound {
                similar: Some(name), ..
            } => ApiError::new(ErrorCode::NotFound, message).hint(format!("did you mean `{name}`?")),
            Self::NotFound { .. } => {
                ApiError::new(ErrorCode::NotFound, message).hint("`banger vm list` shows all machines")
            }
            Self::Ambiguous { .. } => {
                ApiError::new(ErrorCode::Ambiguous, message).hint("give more of it, or the whole name")
            }
            Self::Inexact { .. } => {
                ApiError::new(ErrorCode::NotFound, message).hint(banger_core::reference::EXACT_HINT)
            }
        }
    }
}

impl IntoApi for banger_image::Error {
    fn into_api(self) -> ApiError {
        let code = match &self {
            Self::NoSpace { .. } => ErrorCode::NoSpace,
            Self::Cancelled => ErrorCode::Canceled,
            Self::ProgramMissing { .. }
            | Self::NoApt
            | Self::NoKernelPackage { .. }
            | Self::NoSubordinateIds { .. }
            | Self::NoUserNamespaces { .. } => ErrorCode::Unsupported,
            Self::NoRecipe { .. } | Self::NoKernel(_) | Self::NoImage(_) => ErrorCode::NotFound,
            Self::DiskSize { .. } => ErrorCode::InvalidSpec,
            Self::ProgramTimeout { .. } => ErrorCode::Timeout,
            _ if is_full(&self) => ErrorCode::NoSpace,
            _ => ErrorCode::Internal,
        };
        let mut error = ApiError::new(code, chain(&self)).details(self.details().to_vec());
        error.hint = self.hint();
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_wherever_it_hides() {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let engine = EngineError::Io {
            what: "write x".to_owned(),
            source: full,
        };
        assert_eq!(engine.into_api().code, ErrorCode::NoSpace);
    }

    #[test]
    fn causes_are_told_once() {
        let e = EngineError::Io {
            what: "open /x".to_owned(),
            source: std::io::Error::other("nope"),
        };
        assert_eq!(chain(&e), "cannot open /x: nope");
    }
}
