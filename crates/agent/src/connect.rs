//! Raw byte streams into the guest.

use banger_proto::error::{ApiError, ErrorCode};
use hyper::Response;
use hyper::body::Incoming;

use crate::agent::Agent;
use crate::reply::Body;

/// Connects a request's body to `target`.
pub(crate) async fn serve(_agent: &Agent, target: &str, _body: Incoming) -> Result<Response<Body>, ApiError> {
    Err(ApiError::new(
        ErrorCode::Unsupported,
        format!("no connections to `{target}` yet"),
    ))
}
