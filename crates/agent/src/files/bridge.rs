//! Between asynchronous bodies and blocking readers and writers: bounded channels of pieces.

use std::io::{self, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use futures_util::Stream;
use http_body_util::BodyExt;
use hyper::body::Body;
use tokio::sync::mpsc;

/// Bytes gathered before they are handed on.
const PIECE: usize = 128 * 1024;

/// Pieces under way.
const QUEUE: usize = 4;

type Piece = io::Result<Bytes>;

/// A blocking writer and the stream of what was written to it.
pub(super) fn writer() -> (PieceWriter, Pieces) {
    let (send, receive) = mpsc::channel(QUEUE);
    (
        PieceWriter {
            send,
            gathered: Vec::with_capacity(PIECE),
        },
        Pieces(receive),
    )
}

/// The blocking end.
pub(super) struct PieceWriter {
    send: mpsc::Sender<Piece>,
    gathered: Vec<u8>,
}

/// The way to end the stream with an error.
pub(super) struct Failure(mpsc::Sender<Piece>);

impl Failure {
    /// Ends it.
    pub(super) fn tell(self, error: io::Error) {
        // Nobody is there to hear it when the client has gone.
        let _ = self.0.blocking_send(Err(error));
    }
}

impl PieceWriter {
    /// For later.
    pub(super) fn failure(&self) -> Failure {
        Failure(self.send.clone())
    }
}

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.gathered.len() >= PIECE {
            self.flush()?;
        }
        let n = bytes.len().min(PIECE - self.gathered.len());
        self.gathered.extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.gathered, Vec::with_capacity(PIECE));
        self.send
            .blocking_send(Ok(piece.into()))
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// The asynchronous end.
pub(super) struct Pieces(mpsc::Receiver<Piece>);

impl Stream for Pieces {
    type Item = Piece;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Piece>> {
        self.0.poll_recv(cx)
    }
}

/// A blocking reader and what feeds it.
pub(super) fn reader() -> (PieceReader, Feed) {
    let (send, receive) = mpsc::channel(QUEUE);
    (
        PieceReader {
            receive,
            now: Bytes::new(),
            ended: false,
        },
        Feed(send),
    )
}

/// The blocking end.
pub(super) struct PieceReader {
    /// Nothing is the end.
    receive: mpsc::Receiver<Option<Piece>>,
    now: Bytes,
    ended: bool,
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.now.is_empty() {
            if self.ended {
                return Ok(0);
            }
            match self.receive.blocking_recv() {
                Some(Some(piece)) => self.now = piece?,
                Some(None) => self.ended = true,
                // The request was given up before its end: what came so far is not the whole.
                None => return Err(io::Error::new(io::ErrorKind::ConnectionReset, "the stream broke off")),
            }
        }
        let n = buffer.len().min(self.now.len());
        self.now.copy_to_slice(&mut buffer[..n]);
        Ok(n)
    }
}

/// The asynchronous end.
pub(super) struct Feed(mpsc::Sender<Option<Piece>>);

impl Feed {
    /// Hands a body on until its end, or until nobody reads it any more.
    pub(super) async fn run<B>(self, mut body: B)
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        while let Some(frame) = body.frame().await {
            let piece = match frame.map(hyper::body::Frame::into_data) {
                Ok(Ok(bytes)) => Ok(bytes),
                Ok(Err(_)) => continue,
                Err(e) => Err(io::Error::new(
                    io::ErrorKind::ConnectionReset,
                    format!("the stream broke off: {e}"),
                )),
            };
            let broken = piece.is_err();
            if self.0.send(Some(piece)).await.is_err() || broken {
                return;
            }
        }
        let _ = self.0.send(None).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_is_given_up_is_no_end() {
        let (mut reader, feed) = reader();
        feed.0.blocking_send(Some(Ok(Bytes::from_static(b"half")))).unwrap();
        drop(feed);
        let mut read = Vec::new();
        let error = reader.read_to_end(&mut read).unwrap_err();
        assert_eq!(
            (error.kind(), read.as_slice()),
            (io::ErrorKind::ConnectionReset, &b"half"[..])
        );
        let (mut reader, feed) = super::reader();
        feed.0.blocking_send(Some(Ok(Bytes::from_static(b"whole")))).unwrap();
        feed.0.blocking_send(None).unwrap();
        drop(feed);
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert_eq!(read, b"whole");
    }
}
