//! Answers: bodies and errors.

use banger_proto::error::{ApiError, ErrorBody, ErrorCode};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::{Response, StatusCode};
use serde::Serialize;

/// The body of any answer.
pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// Bytes as a body.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// An answer of `status` with a body.
pub(crate) fn with(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

/// A JSON answer.
pub(crate) fn json<T: Serialize>(value: &T) -> Response<Body> {
    // The wire types have string keys and no failing serializers.
    with(StatusCode::OK, full(serde_json::to_vec(value).unwrap_or_default()))
}

/// The answer that carries an error.
pub(crate) fn error(error: ApiError) -> Response<Body> {
    let status = status(error.code);
    with(
        status,
        full(serde_json::to_vec(&ErrorBody { error }).unwrap_or_default()),
    )
}

fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::BadRequest | ErrorCode::InvalidSpec | ErrorCode::Ambiguous => StatusCode::BAD_REQUEST,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::Conflict | ErrorCode::WrongState => StatusCode::CONFLICT,
        ErrorCode::Unsupported => StatusCode::NOT_IMPLEMENTED,
        ErrorCode::Timeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::Engine | ErrorCode::Guest | ErrorCode::Canceled | ErrorCode::Internal => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}
