//! Files in and out of the guest.

use banger_proto::agent::Stat;
use banger_proto::error::{ApiError, ErrorCode};
use hyper::Response;
use hyper::body::Incoming;

use crate::reply::Body;

pub(crate) async fn get(path: &str) -> Result<Response<Body>, ApiError> {
    Err(ApiError::new(
        ErrorCode::Unsupported,
        format!("`{path}` can't be read yet"),
    ))
}

pub(crate) async fn put(path: &str, _body: Incoming) -> Result<Response<Body>, ApiError> {
    Err(ApiError::new(
        ErrorCode::Unsupported,
        format!("`{path}` can't be written yet"),
    ))
}

/// What stands at `path`.
pub(crate) fn stat(path: &str) -> Stat {
    let Ok(meta) = std::fs::symlink_metadata(path) else {
        return Stat {
            kind: "missing".to_owned(),
            size: 0,
        };
    };
    let kind = match meta.file_type() {
        t if t.is_file() => "file",
        t if t.is_dir() => "dir",
        t if t.is_symlink() => "symlink",
        _ => "other",
    };
    Stat {
        kind: kind.to_owned(),
        size: if meta.is_file() { meta.len() } else { 0 },
    }
}
