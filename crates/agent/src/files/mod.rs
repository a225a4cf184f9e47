//! Files in and out of the guest, as tar streams. The work is done in blocking threads; [`bridge`] joins them to the bodies.

use std::path::{Path, PathBuf};

use banger_proto::agent::{Stat, Target};
use banger_proto::error::{ApiError, ErrorCode};
use bytes::Bytes;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body as HttpBody, Frame};
use hyper::{Response, StatusCode};

use crate::reply::{self, Body};

mod bridge;
mod pack;
mod unpack;

/// Where a path begins that is not absolute.
const HOME: &str = "/root";

fn place(path: &str) -> Result<PathBuf, ApiError> {
    if path.contains('\0') {
        return Err(ApiError::new(ErrorCode::BadRequest, "a path can't contain a zero byte"));
    }
    Ok(Path::new(HOME).join(path))
}

/// The tar stream of what stands at `path`.
pub(crate) fn get(path: &str) -> Result<Response<Body>, ApiError> {
    let path = place(path)?;
    let missing = |e| {
        ApiError::new(
            ErrorCode::NotFound,
            format!("`{}` can't be read in the guest: {e}", path.display()),
        )
    };
    let name = pack::root_name(&path);
    let meta = std::fs::symlink_metadata(&path).map_err(missing)?;
    let (writer, pieces) = bridge::writer();
    tokio::task::spawn_blocking(move || {
        let failure = writer.failure();
        if let Err(e) = pack::pack(&path, &name, &meta, writer) {
            failure.tell(e);
        }
    });
    let frames = futures_util::StreamExt::map(pieces, |piece| piece.map(Frame::data));
    Ok(reply::with(
        StatusCode::OK,
        BodyExt::boxed_unsync(StreamBody::new(frames)),
    ))
}

/// Unpacks a tar stream below directory `path`.
pub(crate) async fn put<B>(path: &str, body: B) -> Result<Response<Body>, ApiError>
where
    B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    B::Error: std::fmt::Display + Send,
{
    let path = place(path)?;
    let (reader, feed) = bridge::reader();
    let unpacking = tokio::task::spawn_blocking(move || unpack::unpack(&path, reader));
    feed.run(body).await;
    match unpacking.await {
        Ok(Ok(written)) => Ok(reply::json(&written)),
        Ok(Err(e)) => {
            let code = if e.is_no_space() { ErrorCode::NoSpace } else { e.code() };
            Err(ApiError::new(code, crate::console::chain(&e)))
        }
        Err(e) => Err(ApiError::new(ErrorCode::Internal, format!("unpacking broke off: {e}"))),
    }
}

/// What stands at `path`, and where a link leads.
pub(crate) fn stat(path: &str) -> Result<Stat, ApiError> {
    let path = place(path)?;
    let Ok(meta) = std::fs::symlink_metadata(&path) else {
        return Ok(Stat {
            kind: "missing".to_owned(),
            size: 0,
            target: None,
        });
    };
    let target = if meta.is_symlink() { target(&path) } else { None };
    Ok(Stat {
        kind: kind(&meta).to_owned(),
        size: if meta.is_file() { meta.len() } else { 0 },
        target,
    })
}

fn target(link: &Path) -> Option<Target> {
    let path = link.canonicalize().ok()?;
    let meta = std::fs::metadata(&path).ok()?;
    Some(Target {
        kind: kind(&meta).to_owned(),
        path: path.into_os_string().into_string().ok()?,
    })
}

fn kind(meta: &std::fs::Metadata) -> &'static str {
    match meta.file_type() {
        t if t.is_file() => "file",
        t if t.is_dir() => "dir",
        t if t.is_symlink() => "symlink",
        _ => "other",
    }
}
