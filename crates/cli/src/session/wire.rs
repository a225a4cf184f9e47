//! Frames of a session as messages of its WebSocket, and what goes wrong with them.

use banger_proto::error::{ApiError, ErrorCode};
use banger_proto::frame::{Frame, Kind as FrameKind, Signal};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite;
use tokio_tungstenite::tungstenite::Message;

use crate::error::{Error, Result};
use crate::session::input::CHUNK;

/// Why a connection is no longer used.
pub(super) enum Broken {
    /// Worth another try.
    Retry(Error),
    /// Final.
    Fatal(Error),
}

/// What waits to be sent.
pub(super) type Frames = mpsc::UnboundedSender<Message>;

/// The next frame of a connection. Cancel safe.
pub(super) async fn next<S>(frames: &mut S) -> Result<(FrameKind, Bytes), Broken>
where
    S: futures_util::Stream<Item = Result<Message, tungstenite::Error>> + Unpin,
{
    loop {
        return match frames.next().await {
            Some(Ok(Message::Binary(mut message))) => {
                let kind = message.first().copied().and_then(FrameKind::from_u8);
                let Some(kind) = kind else {
                    return Err(Broken::Fatal(protocol("a frame of unknown kind")));
                };
                let _ = message.split_to(1);
                Ok((kind, message))
            }
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
            Some(Ok(Message::Text(_) | Message::Frame(_))) => {
                Err(Broken::Fatal(protocol("a message that is no frame")))
            }
            Some(Ok(Message::Close(_))) | None => {
                Err(Broken::Retry(Error::unavailable("the daemon closed the connection")))
            }
            Some(Err(error)) => Err(lost(error)),
        };
    }
}

/// The payload of a frame.
pub(super) fn parse<T: serde::de::DeserializeOwned>(payload: &[u8]) -> Result<T, Broken> {
    serde_json::from_slice(payload).map_err(|e| Broken::Fatal(protocol(&e.to_string())))
}

/// An error frame.
pub(super) fn refused(payload: &[u8]) -> Broken {
    match serde_json::from_slice::<ApiError>(payload) {
        Ok(error) if error.code == ErrorCode::Unavailable => Broken::Retry(error.into()),
        Ok(error) => Broken::Fatal(error.into()),
        Err(error) => Broken::Fatal(protocol(&error.to_string())),
    }
}

/// A connection that did not take or give a message.
pub(super) fn lost(error: tungstenite::Error) -> Broken {
    Broken::Retry(Error::unavailable(format!("the connection was lost: {error}")))
}

/// A frame that has no place there.
pub(super) fn protocol(what: &str) -> Error {
    Error::failed(format!("the session broke its protocol: {what}"))
}

/// A frame as a message.
pub(super) fn message(kind: FrameKind, payload: &[u8]) -> Message {
    let mut message = BytesMut::with_capacity(1 + payload.len());
    message.put_u8(kind as u8);
    message.extend_from_slice(payload);
    Message::Binary(message.freeze())
}

/// Sends a frame.
pub(super) fn send(sender: &Frames, kind: FrameKind, payload: &[u8]) {
    debug_assert!(payload.len() <= CHUNK.max(4096), "frames of a client are small");
    // The receiver goes only with the connection, which is then found broken.
    let _ = sender.send(message(kind, payload));
}

/// Sends a signal.
pub(super) fn send_signal(sender: &Frames, signal: i32) {
    send(
        sender,
        FrameKind::Signal,
        &Frame::json(FrameKind::Signal, &Signal { signal }).payload,
    );
}
