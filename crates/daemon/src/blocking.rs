//! Work that blocks, on files mostly, where it may.

use banger_proto::error::{ApiError, ErrorCode};

use crate::error::IntoApi;

/// Runs it on a thread that may block, to its end whatever becomes of the caller.
pub async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, ApiError>
where
    T: Send + 'static,
    E: IntoApi + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(IntoApi::into_api),
        Err(e) => Err(ApiError::new(
            ErrorCode::Internal,
            format!("work on files broke off: {e}"),
        )),
    }
}
