//! The guest's console, from its end and on.

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path as FsPath, PathBuf};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use banger_proto::error::ErrorBody;
use serde::Deserialize;
use tokio::fs::File;
use tokio::io::AsyncReadExt;
use utoipa::IntoParams;

use super::App;
use super::extract::Params;
use crate::error::{self, Failure};

/// How often a followed log is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Bytes read at once.
const CHUNK: usize = 64 * 1024;
/// Most lines from the end.
const MAX_TAIL: usize = 100_000;

/// Which part of the log.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct LogParams {
    /// Only so many lines from the end.
    tail: Option<usize>,
    /// Go on with what comes, until the client leaves or the machine is removed.
    #[serde(default)]
    follow: bool,
}

/// The console of a machine, as bytes that the guest wrote (a client shows them with care).
#[utoipa::path(get, path = "/v1/machines/{ref}/logs", tag = "machines", params(("ref" = String, Path), LogParams),
    responses((status = 200, content_type = "text/plain"), (status = "4XX", body = ErrorBody)))]
pub(super) async fn logs(
    State(app): State<App>,
    Path(reference): Path<String>,
    Params(params): Params<LogParams>,
) -> Result<Response, Failure> {
    let m = app.find(&reference)?;
    let path = m.paths.console_log();
    let mut older = path.clone().into_os_string();
    older.push(".1");
    let follow = params.follow.then(|| (m.clone(), app.stopping.clone()));
    let mut reader = Reader {
        path,
        older: Some(PathBuf::from(older)),
        current: None,
    };
    let first = match params.tail {
        Some(lines) => reader
            .tail(lines.min(MAX_TAIL))
            .await
            .map_err(|e| Failure(error::io("read the console log", e)))?,
        None => Vec::new(),
    };
    let stream = futures_util::stream::unfold(
        (reader, Some(first), follow),
        |(mut reader, first, follow)| async move {
            if let Some(first) = first {
                return Some((Ok(Bytes::from(first)), (reader, None, follow)));
            }
            loop {
                match reader.next().await {
                    Ok(Some(bytes)) => return Some((Ok(bytes), (reader, None, follow))),
                    Ok(None) => {}
                    Err(e) => return Some((Err(e), (reader, None, None))),
                }
                let (m, stopping) = follow.as_ref()?;
                if m.is_gone() || stopping.is_cancelled() {
                    return None;
                }
                tokio::time::sleep(LOOK).await;
            }
        },
    );
    Ok((
        [(header::CONTENT_TYPE, "text/plain; charset=utf-8")],
        Body::from_stream(stream),
    )
        .into_response())
}

/// Reads a log that is turned over now and then: first the older file, then the current one, then whatever takes its place.
struct Reader {
    path: PathBuf,
    older: Option<PathBuf>,
    current: Option<(File, u64)>,
}

impl Reader {
    /// The last lines; reading goes on behind them.
    async fn tail(&mut self, lines: usize) -> io::Result<Vec<u8>> {
        let mut kept: VecDeque<Vec<u8>> = VecDeque::new();
        let mut open = false;
        while let Some(bytes) = self.next().await? {
            for piece in bytes.split_inclusive(|b| *b == b'\n') {
                match kept.back_mut() {
                    Some(last) if open => last.extend_from_slice(piece),
                    _ => kept.push_back(piece.to_vec()),
                }
                open = !piece.ends_with(b"\n");
                while kept.len() > lines {
                    kept.pop_front();
                }
            }
        }
        Ok(kept.into_iter().flatten().collect())
    }

    /// The next bytes, `None` when there are none now.
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        if let Some(older) = self.older.take() {
            self.current = open(&older).await?;
        }
        if self.current.is_none() {
            self.current = open(&self.path).await?;
        }
        let Some((file, inode)) = &mut self.current else {
            return Ok(None);
        };
        let mut buffer = vec![0; CHUNK];
        let n = file.read(&mut buffer).await?;
        if n > 0 {
            buffer.truncate(n);
            return Ok(Some(buffer.into()));
        }
        // At its end: has another file taken its place?
        let moved = tokio::fs::metadata(&self.path)
            .await
            .is_ok_and(|now| now.ino() != *inode);
        if moved {
            self.current = open(&self.path).await?;
            return Box::pin(self.next()).await;
        }
        Ok(None)
    }
}

async fn open(path: &FsPath) -> io::Result<Option<(File, u64)>> {
    match File::open(path).await {
        Ok(file) => {
            let inode = file.metadata().await?.ino();
            Ok(Some((file, inode)))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(dir: &FsPath) -> Reader {
        Reader {
            path: dir.join("log"),
            older: Some(dir.join("log.1")),
            current: None,
        }
    }

    #[tokio::test]
    async fn the_tail_reaches_into_the_older_file() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(tmp.path().join("log.1"), "a\nb\nc").unwrap();
        std::fs::write(tmp.path().join("log"), "c\nd\n").unwrap();
        assert_eq!(reader(tmp.path()).tail(3).await.unwrap(), b"b\ncc\nd\n");
        assert_eq!(reader(tmp.path()).tail(1).await.unwrap(), b"d\n");
        assert_eq!(reader(tmp.path()).tail(0).await.unwrap(), b"");
    }

    #[tokio::test]
    async fn following_goes_on_in_the_file_that_takes_its_place() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(tmp.path().join("log"), "1\n").unwrap();
        let mut reader = reader(tmp.path());
        assert_eq!(reader.next().await.unwrap().unwrap(), "1\n");
        assert!(reader.next().await.unwrap().is_none());
        std::fs::rename(tmp.path().join("log"), tmp.path().join("log.1")).unwrap();
        std::fs::write(tmp.path().join("log"), "2\n").unwrap();
        assert_eq!(reader.next().await.unwrap().unwrap(), "2\n");
    }

    #[tokio::test]
    async fn no_log_is_an_empty_one() {
        let tmp = tempfile::tempdir().unwrap();
        assert!(reader(tmp.path()).next().await.unwrap().is_none());
    }
}
