//! As much of HTTP/1.1 as Firecracker's API needs: one request after the other on a connection, answers of a known length.
//!
//! What answers is the engine, which a guest may have taken over: everything is bounded in size and time.

use std::path::Path;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use crate::dial::{dial, peer};

/// Longest head of an answer.
const HEAD: u64 = 16 << 10;
/// Longest body of an answer.
const BODY: u64 = 1 << 20;

/// What went wrong on a connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// The socket cannot be reached: not there yet, or nobody listens.
    #[error("cannot connect to the API socket")]
    Unreachable(#[source] std::io::Error),
    /// The connection broke.
    #[error("cannot talk over the API socket")]
    Io(#[source] std::io::Error),
    /// The other side hung up.
    #[error("the API socket was closed before the answer")]
    Closed,
    /// The deadline passed.
    #[error("no answer in time")]
    Timeout,
    /// The other side does not speak the protocol.
    #[error("the API socket does not speak HTTP: {0}")]
    Protocol(&'static str),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Body.
    pub body: Vec<u8>,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<UnixStream>,
    broken: bool,
}

impl Connection {
    /// Connects.
    pub async fn open(path: &Path, deadline: Instant) -> Result<Self, HttpError> {
        match dial(path, deadline).await {
            Ok(stream) => Ok(Self {
                stream: BufReader::new(stream),
                broken: false,
            }),
            Err(e) if e.kind() == std::io::ErrorKind::TimedOut => Err(HttpError::Timeout),
            Err(e) => Err(HttpError::Unreachable(e)),
        }
    }

    /// The process that opened the socket, as the kernel knows it.
    pub fn peer(&self) -> Option<u32> {
        peer(self.stream.get_ref())
    }

    /// Sends a request and reads the answer. After an error, the connection is of no use any more.
    pub async fn send(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&[u8]>,
        deadline: Instant,
    ) -> Result<Answer, HttpError> {
        if std::mem::replace(&mut self.broken, true) {
            return Err(HttpError::Closed);
        }
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
        if let Some(body) = body {
            request.push_str("Content-Type: application/json\r\n");
            request.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        request.push_str("\r\n");
        let mut request = request.into_bytes();
        request.extend_from_slice(body.unwrap_or_default());
        let exchange = async {
            let sent = self.stream.write_all(&request).await;
            // One that hangs up may have said why before.
            match self.read().await {
                Err(HttpError::Closed) => match sent {
                    Err(e) => Err(HttpError::Io(e)),
                    Ok(()) => Err(HttpError::Closed),
                },
                other => other,
            }
        };
        let (answer, goes_on) = match timeout_at(deadline, exchange).await {
            Ok(outcome) => outcome?,
            Err(_) => return Err(HttpError::Timeout),
        };
        self.broken = !goes_on;
        Ok(answer)
    }

    async fn read(&mut self) -> Result<(Answer, bool), HttpError> {
        let mut head = (&mut self.stream).take(HEAD);
        let mut line = Vec::new();
        let (mut first, mut length, mut goes_on) = (None, 0, true);
        loop {
            line.clear();
            let read = head.read_until(b'\n', &mut line).await.map_err(HttpError::Io)?;
            if !line.ends_with(b"\n") {
                return Err(match (read, first, head.limit()) {
                    (0, None, 1..) => HttpError::Closed,
                    (_, _, 0) => HttpError::Protocol("the head of an answer is too long"),
                    _ => HttpError::Closed,
                });
            }
            let text = line.trim_ascii_end();
            let Some(status) = first else {
                first = Some(status_of(text).ok_or(HttpError::Protocol("an answer does not begin with a status"))?);
                continue;
            };
            if text.is_empty() {
                // 100 says that the real answer is still to come.
                if status == 100 {
                    first = None;
                    continue;
                }
                break;
            }
            let (name, value) = header(text).ok_or(HttpError::Protocol("an answer has a line that is no header"))?;
            if name.eq_ignore_ascii_case("content-length") {
                length = value
                    .parse()
                    .ok()
                    .filter(|length| *length <= BODY)
                    .ok_or(HttpError::Protocol("an answer is too long"))?;
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                return Err(HttpError::Protocol("an answer has no length"));
            } else if name.eq_ignore_ascii_case("connection") {
                goes_on = !value.eq_ignore_ascii_case("close");
            }
        }
        let status = first.ok_or(HttpError::Closed)?;
        let mut body = Vec::new();
        let read = (&mut self.stream)
            .take(length)
            .read_to_end(&mut body)
            .await
            .map_err(HttpError::Io)?;
        if read as u64 != length {
            return Err(HttpError::Closed);
        }
        Ok((Answer { status, body }, goes_on))
    }
}

/// The code in `HTTP/1.1 204 No Content`.
fn status_of(line: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split(' ');
    let version = words.next()?;
    let code = words.next()?.parse().ok()?;
    (matches!(version, "HTTP/1.0" | "HTTP/1.1") && (100..600).contains(&code)).then_some(code)
}

fn header(line: &[u8]) -> Option<(&str, &str)> {
    let (name, value) = std::str::from_utf8(line).ok()?.split_once(':')?;
    Some((name.trim(), value.trim()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::UnixListener;

    use super::*;

    /// What a client makes of an answer.
    async fn answered(text: &[u8]) -> Result<Answer, HttpError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let text = text.to_vec();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let read = stream.read(&mut request).await.unwrap();
            stream.write_all(&text).await.unwrap();
            String::from_utf8_lossy(&request[..read]).into_owned()
        });
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut connection = Connection::open(&path, deadline).await.unwrap();
        assert_eq!(connection.peer(), Some(std::process::id()));
        let answer = connection.send("PUT", "/x", Some(b"{}"), deadline).await;
        let request = server.await.unwrap();
        assert!(
            request.starts_with("PUT /x HTTP/1.1\r\n") && request.ends_with("Content-Length: 2\r\n\r\n{}"),
            "{request}"
        );
        answer
    }

    #[tokio::test]
    async fn answers_with_and_without_a_body() {
        let answer = answered(b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n").await;
        assert_eq!((answer.as_ref().unwrap().status, answer.unwrap().body.len()), (204, 0));
        let answer = answered(b"HTTP/1.1 400 \r\ncontent-length: 3\r\n\r\nbadrest")
            .await
            .unwrap();
        assert_eq!((answer.status, answer.body.as_slice()), (400, b"bad".as_slice()));
        let answer = answered(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx").await;
        assert_eq!(answer.unwrap().status, 200);
    }

    #[tokio::test]
    async fn what_is_no_answer() {
        for (text, closed) in [
            (b"".as_slice(), true),
            (b"HTTP/1.1 200 OK\r\n", true),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", true),
            (b"hello\r\n\r\n", false),
            (b"HTTP/1.1 999 x\r\n\r\n", false),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", false),
            (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", false),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", false),
            (b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n", false),
            (&[b'x'; 100_000], false),
        ] {
            let answer = answered(text).await;
            match (closed, &answer) {
                (true, Err(HttpError::Closed)) | (false, Err(HttpError::Protocol(_))) => {}
                _ => panic!(
                    "{answer:?} to {:?}",
                    String::from_utf8_lossy(&text[..text.len().min(60)])
                ),
            }
        }
    }

    #[tokio::test]
    async fn nobody_and_somebody_who_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let soon = || Instant::now() + Duration::from_millis(100);
        assert!(matches!(
            Connection::open(&path, soon()).await,
            Err(HttpError::Unreachable(_))
        ));
        let _listener = UnixListener::bind(&path).unwrap();
        let mut connection = Connection::open(&path, soon()).await.unwrap();
        let answer = connection.send("GET", "/", None, soon()).await;
        assert!(matches!(answer, Err(HttpError::Timeout)));
        let answer = connection.send("GET", "/", None, soon()).await;
        assert!(matches!(answer, Err(HttpError::Closed)), "it is not in step any more");
    }
}
