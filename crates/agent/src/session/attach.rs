//! A client's side of a session: its frames in the request's body, the session's in the answer's.
//!
//! The answer is made when the connection asks for it. So output goes from the log straight into the frame that is sent, and
//! a slow client holds the program back through nothing but the offsets.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use banger_proto::error::{ApiError, ErrorCode};
use banger_proto::frame::{Decoder, Exit, Frame, HEADER, Kind, MAX_OPEN, Open, Opened, StdinAck, header};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame as HttpFrame};
use tokio::sync::oneshot;

use super::log::Stream;
use super::table::Sessions;
use super::{Outcome, Presence, Session, lock};

/// Bytes of output put into one piece of the answer.
const PIECE: usize = 128 * 1024;

/// Standard input that is acknowledged at once; less waits until the program has taken all there is.
const ACK: u64 = 32 * 1024;

type Attached = (Arc<Session>, u64, Opened);

/// Serves a client: reads its frames in a task of its own, and gives back the body of the answer.
pub fn serve<B>(sessions: Arc<Sessions>, id: String, body: B) -> SessionBody
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Send,
{
    let (tell, opened) = oneshot::channel();
    let all = sessions.clone();
    tokio::spawn(async move { read_frames(all, &id, body, tell).await });
    SessionBody {
        sessions,
        opened: Some(opened),
        attached: None,
        ended: false,
    }
}

async fn read_frames<B>(
    sessions: Arc<Sessions>,
    id: &str,
    mut body: B,
    tell: oneshot::Sender<Result<Attached, ApiError>>,
) where
    B: Body<Data = Bytes> + Send + Unpin,
{
    let mut decoder = Decoder::new();
    let first = opening(id, &mut body, &mut decoder).await;
    let opened = first.and_then(|open| sessions.open(id, open));
    let (session, generation) = match &opened {
        Ok((session, generation, _)) => (session.clone(), *generation),
        Err(_) => {
            let _ = tell.send(opened);
            return;
        }
    };
    if tell.send(opened).is_err() {
        session.leave(generation, true);
        sessions.forget_unstarted(&session, generation);
        return;
    }
    loop {
        let frame = match next_frame(&mut body, &mut decoder).await {
            Ok(Some(frame)) => frame,
            // The end of the client's frames is not its departure: it may go on listening.
            Ok(None) => return,
            Err(e) => return session.break_off(generation, e),
        };
        if !session.is_current(generation) {
            return;
        }
        if let Err(e) = take(&sessions, &session, generation, frame) {
            return session.break_off(generation, e);
        }
    }
}

/// What the client asks for, which may have come in several frames.
async fn opening<B>(id: &str, body: &mut B, decoder: &mut Decoder) -> Result<Open, ApiError>
where
    B: Body<Data = Bytes> + Unpin,
{
    let mut parts = Vec::new();
    loop {
        let frame = match next_frame(body, decoder).await? {
            Some(frame) if matches!(frame.kind, Kind::Open | Kind::OpenPart) => frame,
            _ => {
                return Err(bad_request(format!(
                    "session {id} does not begin with an opening frame"
                )));
            }
        };
        if parts.len() + frame.payload.len() > MAX_OPEN {
            return Err(bad_request(format!(
                "the request for session {id} is longer than {MAX_OPEN} bytes"
            )));
        }
        let last = frame.kind == Kind::Open;
        if parts.is_empty() {
            parts = frame.payload;
        } else {
            parts.extend_from_slice(&frame.payload);
        }
        if last {
            return serde_json::from_slice(&parts)
                .map_err(|e| bad_request(format!("the opening frame of session {id} is malformed: {e}")));
        }
    }
}

fn take(sessions: &Arc<Sessions>, session: &Arc<Session>, generation: u64, frame: Frame) -> Result<(), ApiError> {
    let malformed = |e| bad_request(format!("a frame of session {} is malformed: {e}", session.id));
    match frame.kind {
        Kind::Go => session.go(sessions),
        Kind::Stdin => session.take_stdin(frame.payload.into())?,
        Kind::StdinEof => session.end_stdin(),
        Kind::Resize => session.resize(frame.parse().map_err(malformed)?),
        Kind::Signal => session.signal(frame.parse().map_err(malformed)?),
        Kind::Detach => {
            session.leave(generation, false);
            let mut inner = lock(&session.inner);
            inner.generation += 1;
            inner.wake();
        }
        Kind::Open
        | Kind::OpenPart
        | Kind::Opened
        | Kind::Stdout
        | Kind::Stderr
        | Kind::StdinAck
        | Kind::Exit
        | Kind::Error => {
            return Err(bad_request(format!(
                "session {} got a frame that has no place there: {:?}",
                session.id, frame.kind
            )));
        }
    }
    Ok(())
}

async fn next_frame<B>(body: &mut B, decoder: &mut Decoder) -> Result<Option<Frame>, ApiError>
where
    B: Body<Data = Bytes> + Unpin,
{
    loop {
        if let Some(frame) = decoder.next_frame().map_err(|e| bad_request(e.to_string()))? {
            return Ok(Some(frame));
        }
        match body.frame().await {
            Some(Ok(piece)) => {
                if let Ok(bytes) = piece.into_data() {
                    decoder.push(&bytes);
                }
            }
            // A broken connection shows itself in the answer's body.
            Some(Err(_)) | None => return Ok(None),
        }
    }
}

fn bad_request(message: String) -> ApiError {
    ApiError::new(ErrorCode::BadRequest, message)
}

impl Session {
    /// Ends the attachment of `generation` with an error; the session goes on.
    fn break_off(&self, generation: u64, error: ApiError) {
        let mut inner = lock(&self.inner);
        if inner.generation == generation {
            inner.broken_off = Some(error);
            inner.wake();
        }
    }
}

/// The body of the answer: frames, made as they are asked for.
pub struct SessionBody {
    sessions: Arc<Sessions>,
    opened: Option<oneshot::Receiver<Result<Attached, ApiError>>>,
    attached: Option<(Arc<Session>, u64)>,
    ended: bool,
}

impl Body for SessionBody {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<HttpFrame<Bytes>, Self::Error>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let mut piece = Vec::new();
        if let Some(opened) = &mut self.opened {
            let result = match Pin::new(opened).poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(result) => result,
            };
            self.opened = None;
            match result.unwrap_or_else(|_| Err(ApiError::new(ErrorCode::Internal, "the session's reader ended"))) {
                Ok((session, generation, opened)) => {
                    piece = Frame::json(Kind::Opened, &opened).encode();
                    self.attached = Some((session, generation));
                }
                Err(error) => {
                    self.ended = true;
                    return Poll::Ready(Some(Ok(HttpFrame::data(
                        Frame::json(Kind::Error, &error).encode().into(),
                    ))));
                }
            }
        }
        let ended = match &self.attached {
            Some((session, generation)) => session.fill(*generation, &mut piece, cx),
            None => true,
        };
        self.ended = ended;
        match (piece.is_empty(), ended) {
            (false, _) => Poll::Ready(Some(Ok(HttpFrame::data(piece.into())))),
            (true, true) => Poll::Ready(None),
            (true, false) => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

impl Drop for SessionBody {
    fn drop(&mut self) {
        if let Some((session, generation)) = self.attached.take() {
            session.leave(generation, !self.ended);
            self.sessions.forget_unstarted(&session, generation);
        }
    }
}

impl Session {
    /// Adds what there is to say to the client of `generation`. True when that was the last of it; else the task is woken
    /// when there is more.
    fn fill(&self, generation: u64, piece: &mut Vec<u8>, cx: &mut Context<'_>) -> bool {
        let mut inner = lock(&self.inner);
        if inner.generation != generation {
            if inner.presence == Presence::Client {
                let error = ApiError::new(
                    ErrorCode::Conflict,
                    format!("another client has attached to session {}", self.id),
                );
                piece.extend(Frame::json(Kind::Error, &error).encode());
            }
            return true;
        }
        if let Some(error) = inner.broken_off.take() {
            piece.extend(Frame::json(Kind::Error, &error).encode());
            return true;
        }
        let due = inner.stdin_written - inner.stdin_acked;
        if due >= ACK || (due > 0 && inner.stdin_written == inner.stdin_received) {
            inner.stdin_acked = inner.stdin_written;
            piece.extend(
                Frame::json(
                    Kind::StdinAck,
                    &StdinAck {
                        received: inner.stdin_written,
                    },
                )
                .encode(),
            );
        }
        let had_room = inner.has_room();
        while piece.len() < PIECE {
            let Some((stream, halves)) = inner.log.read(inner.sent, PIECE - piece.len()) else {
                break;
            };
            let n = halves[0].len() + halves[1].len();
            let kind = match stream {
                Stream::Out => Kind::Stdout,
                Stream::Err => Kind::Stderr,
            };
            piece.reserve(HEADER + n);
            piece.extend_from_slice(&header(kind, n));
            piece.extend_from_slice(halves[0]);
            piece.extend_from_slice(halves[1]);
            inner.sent = inner.sent.max(inner.log.start()) + n as u64;
        }
        let room = !had_room && inner.has_room();
        let over = inner.sent >= inner.log.end();
        let last = match (&inner.outcome, over) {
            (Some(Outcome::Exit(code)), true) => Some(Frame::json(Kind::Exit, &Exit { code: *code })),
            (Some(Outcome::Failed(error)), true) => Some(Frame::json(Kind::Error, error)),
            _ => None,
        };
        if let Some(last) = &last {
            piece.extend(last.encode());
        } else if piece.is_empty() {
            inner.waker = Some(cx.waker().clone());
        }
        drop(inner);
        if room {
            self.room.notify_waiters();
        }
        last.is_some()
    }
}
