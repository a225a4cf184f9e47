//! Relays between a client's WebSocket, or a connection to a forwarded port, and the agent, one to one, with backpressure from end to end: nothing is read on one
//! side before the other side has taken what was read before. At most a frame is held in each direction beside the windows of
//! the connection.

use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket};
use banger_proto::error::{ApiError, ErrorCode};
use banger_proto::frame::{Frame, FrameError, HEADER, Kind, MAX_PAYLOAD, header};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::call::Call;
use super::handshake::rounded;
use super::link::{Body, BodyError, Link, LinkError};
use super::sanitize;

/// Pieces on their way to the guest.
const UP: usize = 2;
/// Payloads up to this size are copied behind their header, to be sent as one piece.
const SMALL: usize = 8 * 1024;
/// How long a closing client is waited for.
const CLOSE: Duration = Duration::from_secs(2);

type Up = mpsc::Sender<Result<hyper::body::Frame<Bytes>, BodyError>>;
type Pieces = mpsc::Receiver<Result<hyper::body::Frame<Bytes>, BodyError>>;

fn body(pieces: Pieces) -> Body {
    let stream = futures_util::stream::unfold(pieces, |mut pieces| async move {
        let piece = pieces.recv().await?;
        Some((piece, pieces))
    });
    Body::new(StreamBody::new(stream))
}

/// Relays an exec session until either side ends it. Client and agent each have a deadline until it is open, and none from
/// then on.
///
/// `explain` says what the client is told of a fault of the guest's side.
pub async fn session<F>(socket: WebSocket, link: &Link, id: &str, explain: impl FnOnce(LinkError) -> F)
where
    F: Future<Output = ApiError>,
{
    let (mut sink, mut stream) = socket.split();
    let (up, pieces) = mpsc::channel(UP);
    let within = link.patience().answer;
    let outcome = match tokio::time::timeout(within, next_up(&mut stream, &up)).await {
        Ok(Ok(())) => {
            let down = async {
                let _permit = link.relay_permit()?;
                let answer = link
                    .send(Call::Session, id, body(pieces), link.connect_by(), within)
                    .await?;
                let answer = link.refusal(Call::Session, answer).await?;
                frames_down(answer.into_body(), &mut sink, within).await
            };
            let up = frames_up(&mut stream, up);
            tokio::pin!(down);
            tokio::select! {
                outcome = &mut down => outcome.map_err(Fault::Guest),
                ended = up => match ended {
                    // The client said all it had to say: the answer goes on. A client that went away breaks the answer itself.
                    UpEnd::Done => down.await.map_err(Fault::Guest),
                    UpEnd::Gone => return,
                    UpEnd::Bad(e) => Err(Fault::Client(ApiError::new(ErrorCode::BadRequest, e))),
                },
            }
        }
        Ok(Err(UpEnd::Bad(e))) => Err(Fault::Client(ApiError::new(ErrorCode::BadRequest, e))),
        Ok(Err(UpEnd::Done | UpEnd::Gone)) => return,
        Err(_) => Err(Fault::Client(ApiError::new(
            ErrorCode::Timeout,
            format!("the client took longer than {within:?} to ask for session {id}"),
        ))),
    };
    if let Err(fault) = outcome {
        let error = match fault {
            Fault::Guest(error) => explain(error).await,
            Fault::Client(error) => error,
        };
        tracing::info!(machine = %link.id(), error = %error.message, "session relay ended");
        let frame = Frame::json(Kind::Error, &error).to_message();
        let _ = sink.send(Message::Binary(frame.into())).await;
    }
    close(sink, stream).await;
}

/// Whose fault it is that a session ends.
enum Fault {
    Guest(LinkError),
    Client(ApiError),
}

async fn close(mut sink: SplitSink<WebSocket, Message>, mut stream: SplitStream<WebSocket>) {
    let closing = async {
        let _ = sink
            .send(Message::Close(Some(CloseFrame {
                code: 1000,
                reason: "".into(),
            })))
            .await;
        while let Some(Ok(_)) = stream.next().await {}
    };
    let _ = tokio::time::timeout(CLOSE, closing).await;
}

/// How the client's side ended.
enum UpEnd {
    /// It closed its direction in good order, or the agent takes no more.
    Done,
    /// It is gone.
    Gone,
    /// It broke the protocol.
    Bad(String),
}

async fn frames_up(stream: &mut SplitStream<WebSocket>, up: Up) -> UpEnd {
    loop {
        if let Err(end) = next_up(stream, &up).await {
            return end;
        }
    }
}

/// Passes the client's next frame on.
async fn next_up(stream: &mut SplitStream<WebSocket>, up: &Up) -> Result<(), UpEnd> {
    let message = loop {
        match stream.next().await {
            Some(Ok(Message::Binary(bytes))) => break bytes,
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Text(_))) => {
                return Err(UpEnd::Bad("a session takes binary messages only".to_owned()));
            }
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(UpEnd::Gone),
        }
    };
    let kind = client_kind(&message).map_err(UpEnd::Bad)?;
    let payload = message.slice(1..);
    let head = header(kind, payload.len());
    // At most as many pieces as wait on their way, so that the first frame needs no reader yet.
    let pieces: [_; UP] = if payload.len() <= SMALL {
        let mut whole = BytesMut::with_capacity(HEADER + payload.len());
        whole.extend_from_slice(&head);
        whole.extend_from_slice(&payload);
        [Some(whole.freeze()), None]
    } else {
        [Some(Bytes::copy_from_slice(&head)), Some(payload)]
    };
    for piece in pieces.into_iter().flatten() {
        if up.send(Ok(hyper::body::Frame::data(piece))).await.is_err() {
            return Err(UpEnd::Done);
        }
    }
    Ok(())
}

/// The kind of a client's message, if a client may send it.
fn client_kind(message: &[u8]) -> Result<Kind, String> {
    let &byte = message.first().ok_or_else(|| FrameError::Empty.to_string())?;
    let kind = Kind::from_u8(byte).ok_or_else(|| FrameError::UnknownKind(byte).to_string())?;
    if is_agents(kind) {
        return Err(format!("a client does not send {kind:?} frames"));
    }
    if message.len() - 1 > MAX_PAYLOAD {
        return Err(FrameError::TooLong(message.len() - 1).to_string());
    }
    Ok(kind)
}

fn is_agents(kind: Kind) -> bool {
    kind as u8 >= Kind::Opened as u8
}

/// Cuts the agent's bytes into frames. Holds at most one incomplete frame.
#[derive(Debug, Default)]
struct Cutter {
    buffer: BytesMut,
}

impl Cutter {
    fn push(&mut self, data: &[u8]) {
        self.buffer.extend_from_slice(data);
    }

    /// The next frame in the form of the WebSocket: the kind is written over the header's last byte, so that the payload
    /// stays where it is.
    fn next(&mut self) -> Result<Option<(Kind, Bytes)>, String> {
        let Some(head) = self.buffer.get(..HEADER) else {
            return Ok(None);
        };
        let kind = Kind::from_u8(head[0]).ok_or_else(|| FrameError::UnknownKind(head[0]).to_string())?;
        if !is_agents(kind) {
            return Err(format!("a {kind:?} frame, which only clients send"));
        }
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > MAX_PAYLOAD {
            return Err(FrameError::TooLong(length).to_string());
        }
        if self.buffer.len() < HEADER + length {
            return Ok(None);
        }
        let mut frame = self.buffer.split_to(HEADER + length);
        frame.advance(HEADER - 1);
        frame[0] = kind as u8;
        Ok(Some((kind, frame.freeze())))
    }
}

/// Relays the agent's frames. The first one, which says that the session is open, has to come in time.
async fn frames_down(
    mut body: Incoming,
    sink: &mut SplitSink<WebSocket, Message>,
    open_within: Duration,
) -> Result<(), LinkError> {
    let mut cutter = Cutter::default();
    let wrong = |why: String| LinkError::Answer {
        what: "the session".to_owned(),
        why,
    };
    let (mut open, mut last) = (false, false);
    let late = tokio::time::sleep(open_within);
    tokio::pin!(late);
    loop {
        let frame = tokio::select! {
            biased;
            frame = body.frame() => frame,
            () = &mut late, if !open => {
                return Err(LinkError::Timeout {
                    what: "open the session".to_owned(),
                    after: open_within,
                });
            }
        };
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|source| LinkError::Broken {
            doing: "relaying the session".to_owned(),
            source,
        })?;
        let Ok(data) = frame.into_data() else { continue };
        cutter.push(&data);
        drop(data);
        while let Some((kind, mut message)) = cutter.next().map_err(wrong)? {
            if kind == Kind::Error {
                let error: ApiError = serde_json::from_slice(&message[1..])
                    .map_err(|e| wrong(format!("an error that does not fit: {e}")))?;
                message = Frame::json(Kind::Error, &sanitize::error(&error)).to_message().into();
            }
            open = true;
            last |= matches!(kind, Kind::Exit | Kind::Error);
            if sink.send(Message::Binary(message)).await.is_err() {
                // The client is gone; the session lives on in the guest.
                return Ok(());
            }
        }
        if last {
            return Ok(());
        }
    }
    if last {
        Ok(())
    } else {
        Err(wrong("an end before the session's last frame".to_owned()))
    }
}

/// Connects to a target in the guest. The answer's body is what comes from there.
async fn connect(link: &Link, target: &str, pieces: Pieces, connect_by: Instant) -> Result<Incoming, LinkError> {
    let answer = link
        .send(Call::Connect, target, body(pieces), connect_by, link.patience().answer)
        .await?;
    Ok(link.refusal(Call::Connect, answer).await?.into_body())
}

/// Relays raw bytes to and from this target until both directions have ended, or one is broken. The client ends its direction with an empty message,
/// the guest's end is a close.
pub async fn raw(socket: WebSocket, link: &Link, target: &str, sanitize_error: impl Fn(LinkError) -> ApiError) {
    let (mut sink, mut stream) = socket.split();
    let (up, pieces) = mpsc::channel(UP);
    let outcome = {
        let down = async {
            let _permit = link.relay_permit()?;
            let mut body = connect(link, target, pieces, link.connect_by()).await?;
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|source| LinkError::Broken {
                    doing: "relaying a connection".to_owned(),
                    source,
                })?;
                if let Ok(data) = frame.into_data()
                    && !data.is_empty()
                    && sink.send(Message::Binary(data)).await.is_err()
                {
                    break;
                }
            }
            Ok(())
        };
        let up = raw_up(&mut stream, up);
        tokio::pin!(down);
        tokio::select! {
            outcome = &mut down => outcome,
            ended = up => match ended {
                UpEnd::Done => down.await,
                UpEnd::Gone | UpEnd::Bad(_) => return,
            },
        }
    };
    if let Err(error) = outcome {
        let error = sanitize_error(error);
        tracing::info!(machine = %link.id(), error = %error.message, "connection relay ended");
        let reason = error
            .message
            .chars()
            .take(100)
            .filter(char::is_ascii)
            .collect::<String>();
        let _ = sink
            .send(Message::Close(Some(CloseFrame {
                code: 1011,
                reason: reason.into(),
            })))
            .await;
    }
    close(sink, stream).await;
}

async fn raw_up(stream: &mut SplitStream<WebSocket>, up: Up) -> UpEnd {
    loop {
        match stream.next().await {
            Some(Ok(Message::Binary(bytes))) if bytes.is_empty() => return UpEnd::Done,
            Some(Ok(Message::Binary(bytes))) => {
                if up.send(Ok(hyper::body::Frame::data(bytes))).await.is_err() {
                    // The agent takes no more; what it still sends goes on.
                    return UpEnd::Done;
                }
            }
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Text(_))) => {}
            Some(Ok(Message::Close(_)) | Err(_)) | None => return UpEnd::Gone,
        }
    }
}

/// Bytes of a host's connection that are read at once.
const READ: usize = 64 * 1024;
/// How long a connection whose guest has said all may be without a byte of its client: whether the guest still listens is not known.
const HALF_CLOSED: Duration = Duration::from_secs(60);

/// Relays a connection to this host to a TCP port in the guest, each direction to its own end.
pub async fn tcp(stream: &TcpStream, link: &Link, port: u16) -> Result<(), LinkError> {
    let _permit = link.relay_permit()?;
    let (up, pieces) = mpsc::channel(UP);
    let mut body = connect(link, &format!("tcp:{port}"), pieces, link.connect_by()).await?;
    let guest_ended = CancellationToken::new();
    let down = async {
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|source| LinkError::Broken {
                doing: "relaying a connection".to_owned(),
                source,
            })?;
            if let Ok(data) = frame.into_data()
                && write_all(stream, &data).await.is_err()
            {
                // The client is gone.
                return Ok(false);
            }
        }
        let _ = rustix::net::shutdown(stream, rustix::net::Shutdown::Write);
        guest_ended.cancel();
        Ok::<bool, LinkError>(true)
    };
    let up = tcp_up(stream, up, &guest_ended);
    tokio::pin!(down, up);
    tokio::select! {
        down = &mut down => if down? {
            up.await;
        },
        orderly = &mut up => if orderly {
            down.await?;
        },
    }
    Ok(())
}

/// Reads to the end of the client's direction. False when the client is gone altogether.
async fn tcp_up(stream: &TcpStream, up: Up, guest_ended: &CancellationToken) -> bool {
    let mut buffer = BytesMut::new();
    loop {
        let readable = stream.readable();
        let ready = if guest_ended.is_cancelled() {
            match tokio::time::timeout(HALF_CLOSED, readable).await {
                Ok(ready) => ready,
                Err(_) => return false,
            }
        } else {
            tokio::select! {
                ready = readable => ready,
                () = guest_ended.cancelled() => continue,
            }
        };
        if ready.is_err() {
            return false;
        }
        buffer.reserve(READ);
        match stream.try_read_buf(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {
                let piece = hyper::body::Frame::data(buffer.split().freeze());
                if up.send(Ok(piece)).await.is_err() {
                    // The guest takes no more; what it still sends goes on.
                    return true;
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
    }
}

async fn write_all(stream: &TcpStream, mut data: &[u8]) -> std::io::Result<()> {
    while !data.is_empty() {
        stream.writable().await?;
        match stream.try_write(data) {
            Ok(n) => data = &data[n..],
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Whether a TCP port of the guest answers as HTTP by this time. At most a few bytes of the answer are looked at.
pub async fn is_http(link: &Link, port: u16, by: Instant) -> Result<bool, LinkError> {
    let began = Instant::now();
    timeout_at(by, speaks_http(link, port, by)).await.unwrap_or_else(|_| {
        Err(LinkError::Timeout {
            what: format!("say what port {port} speaks"),
            after: rounded(by.duration_since(began)),
        })
    })
}

async fn speaks_http(link: &Link, port: u16, by: Instant) -> Result<bool, LinkError> {
    const HEAD: &[u8] = b"HEAD / HTTP/1.0\r\nHost: localhost\r\nUser-Agent: banger\r\n\r\n";
    const ANSWER: &[u8] = b"HTTP/";
    let _permit = link.relay_permit()?;
    let (up, pieces) = mpsc::channel(UP);
    let mut body = connect(link, &format!("tcp:{port}"), pieces, by).await?;
    // The sender is kept: a server that sees the client's end may not answer.
    let sent = up.send(Ok(hyper::body::Frame::data(Bytes::from_static(HEAD)))).await;
    if sent.is_err() {
        return Ok(false);
    }
    let mut seen = Vec::new();
    while seen.len() < ANSWER.len()
        && let Some(Ok(frame)) = body.frame().await
    {
        if let Ok(data) = frame.into_data() {
            seen.extend_from_slice(&data[..data.len().min(ANSWER.len())]);
        }
    }
    Ok(seen.starts_with(ANSWER))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn cutting_is_the_inverse_of_encoding(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..6),
            cut in 1usize..200,
        ) {
            let frames: Vec<Frame> = payloads.into_iter().map(|p| Frame::new(Kind::Stdout, p)).collect();
            let bytes: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
            let mut cutter = Cutter::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(cut) {
                cutter.push(piece);
                while let Some((_, message)) = cutter.next().unwrap() {
                    seen.push(Frame::from_message(&message).unwrap());
                }
            }
            prop_assert_eq!(seen, frames);
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = client_kind(&bytes);
            let mut cutter = Cutter::default();
            cutter.push(&bytes);
            while let Ok(Some(_)) = cutter.next() {}
        }
    }

    #[test]
    fn each_side_sends_only_its_own_kinds() {
        assert!(client_kind(&[Kind::Stdin as u8, 1]).is_ok());
        assert!(client_kind(&[Kind::Stdout as u8, 1]).is_err());
        let mut cutter = Cutter::default();
        cutter.push(&Frame::new(Kind::Stdin, vec![1]).encode());
        assert!(cutter.next().is_err());
    }

    #[test]
    fn a_frame_too_long_is_refused_at_its_header() {
        let mut cutter = Cutter::default();
        cutter.push(&[Kind::Stdout as u8, 0x7f, 0, 0, 0]);
        assert!(cutter.next().is_err());
    }
}
