//! A tar stream made on a thread of its own, on its way into a request's body.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use banger_proto::api::FilesWritten;
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::sync::{mpsc, oneshot};

use crate::client::{Body, Client, encode, machine_path};
use crate::error::{Error, Result};
use crate::printer::Activity;

/// Size of the pieces of a stream.
const PIECE: usize = 256 * 1024;

/// Where the stream is written.
#[derive(Debug)]
pub(crate) struct Sink {
    buffer: BytesMut,
    pieces: mpsc::Sender<io::Result<Bytes>>,
    written: Arc<AtomicU64>,
}

impl Sink {
    fn send(&mut self) -> io::Result<()> {
        let piece = self.buffer.split().freeze();
        if piece.is_empty() {
            return Ok(());
        }
        self.written.fetch_add(piece.len() as u64, Ordering::Relaxed);
        self.pieces
            .blocking_send(Ok(piece))
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PIECE {
            self.send()?;
            self.buffer.reserve(PIECE + 4096);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

/// Puts what `pack` writes below a directory of a machine. `total` is the expected length, for the progress.
pub(crate) async fn put<P>(
    client: &Client,
    machine: &str,
    directory: &str,
    total: u64,
    activity: &mut Activity<'_>,
    pack: P,
) -> Result<FilesWritten>
where
    P: FnOnce(&mut Sink) -> Result<()> + Send + 'static,
{
    let (pieces, mut received) = mpsc::channel(4);
    let written = Arc::new(AtomicU64::new(0));
    let mut sink = Sink {
        buffer: BytesMut::with_capacity(PIECE + 4096),
        pieces,
        written: Arc::clone(&written),
    };
    let (outcome, packed) = oneshot::channel();
    std::thread::spawn(move || {
        let result = pack(&mut sink).and_then(|()| sink.flush().map_err(|_| aborted()));
        if result.is_err() {
            // The body must not look complete.
            let _ = sink.pieces.blocking_send(Err(io::ErrorKind::InvalidData.into()));
        }
        let _ = outcome.send(result);
    });
    let stream = futures_util::stream::poll_fn(move |context| received.poll_recv(context));
    let stream = futures_util::StreamExt::map(stream, |piece| piece.map(Frame::data));
    let body: Body = StreamBody::new(stream).boxed_unsync();
    let path = format!("{}/files?path={}", machine_path(machine), encode(directory));
    let request = client.put::<FilesWritten>(&path, body);
    tokio::pin!(request);
    let answer = loop {
        tokio::select! {
            answer = &mut request => break answer,
            () = tokio::time::sleep(Duration::from_millis(100)) => activity.bytes(written.load(Ordering::Relaxed).min(total), total),
        }
    };
    match (answer, packed.await) {
        (Ok(done), Ok(Ok(()))) => Ok(done),
        // What went wrong while packing is the cause of whatever the daemon says.
        (_, Ok(Err(error))) if error.message != ABORTED => Err(error),
        (Err(error), _) => Err(error),
        (Ok(_), _) => Err(aborted()),
    }
}

const ABORTED: &str = "the transfer was broken off";

/// The other end takes no more.
pub(crate) fn aborted() -> Error {
    Error::failed(ABORTED)
}
