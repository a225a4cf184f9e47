//! Extractors whose rejections are errors of the API.

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::request::Parts;
use banger_proto::error::{ApiError, ErrorCode};
use serde::de::DeserializeOwned;

use crate::error::Failure;

/// A JSON body, whatever its content type says; an absent one stands for `{}`.
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let bytes = Bytes::from_request(request, state).await.map_err(|e| {
            Failure(ApiError::new(
                ErrorCode::BadRequest,
                format!("the body cannot be read: {e}"),
            ))
        })?;
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        serde_json::from_slice(text).map(Self).map_err(|e| {
            Failure(ApiError::new(
                ErrorCode::BadRequest,
                format!("the body does not fit: {e}"),
            ))
        })
    }
}

/// Parameters of the query.
pub(super) struct Params<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        Query::try_from_uri(&parts.uri)
            .map(|Query(params)| Self(params))
            .map_err(|e| {
                Failure(ApiError::new(
                    ErrorCode::BadRequest,
                    format!("the query does not fit: {e}"),
                ))
            })
    }
}
