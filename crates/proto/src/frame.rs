//! Frames of an exec session.
//!
//! The same frames travel on the guest channel (in the bodies of `POST /v1/sessions/{id}`, with the header below) and on the
//! daemon's WebSocket (one binary message per frame, its first byte the kind, the rest the payload).
//!
//! ```text
//!  on the guest channel          on the WebSocket
//!  +------+--------+---------+   +------+---------+
//!  | kind | length | payload |   | kind | payload |
//!  |  1   | 4 (BE) | length  |   |  1   |  rest   |
//!  +------+--------+---------+   +------+---------+
//! ```
//!
//! The course of a session. *Request, acknowledge, go*: nothing runs before `Go`, and a second `Open` with the same id never
//! runs the command again, it attaches.
//!
//! ```text
//!  client                         agent
//!    OpenPart…            ──────▶            (what does not fit into one frame)
//!    Open{spec, offsets}  ──────▶
//!                         ◀──────  Opened{status, stdin_received}
//!    Go                   ──────▶            (first attach only; harmless later)
//!    Stdin, Resize, Signal ─────▶
//!                         ◀──────  Stdout, Stderr, StdinAck
//!                         ◀──────  Exit{code}
//! ```
//!
//! `Stdin`, `Stdout` and `Stderr` carry bytes. The agent counts what it sent in one sequence over both output streams, in
//! payload bytes; a client that attaches again says in [`Open::output_offset`] how many it has, and the agent goes on from
//! there as far as its buffer reaches back ([`Opened::dropped`] counts what is gone). The other way, [`Opened::stdin_received`]
//! and [`StdinAck`] say how many bytes of standard input the agent has taken.

use serde::{Deserialize, Serialize};

use crate::api::Env;

/// Largest payload of a frame, in bytes. A longer one ends the connection.
pub const MAX_PAYLOAD: usize = 256 * 1024;

/// Most bytes of an [`Open`] as JSON, in all its frames: what [`crate::arguments`] allows, with every byte escaped.
pub const MAX_OPEN: usize = 6 * crate::arguments::MAX_TOTAL + MAX_PAYLOAD;

/// Bytes of standard input that a client may send beyond what was acknowledged.
pub const STDIN_WINDOW: u64 = 256 * 1024;

/// Bytes of output that the agent keeps for a client that attaches again.
pub const OUTPUT_BUFFER: usize = 2 * 1024 * 1024;

/// Length of the header on the guest channel.
pub const HEADER: usize = 5;

/// Kind of a frame. The numbers are the wire format; append only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Client: [`Open`] as JSON.
    Open = 1,
    /// Client: run it. No payload.
    Go = 2,
    /// Client: bytes for standard input.
    Stdin = 3,
    /// Client: no more standard input. No payload.
    StdinEof = 4,
    /// Client: [`Resize`] as JSON.
    Resize = 5,
    /// Client: [`Signal`] as JSON.
    Signal = 6,
    /// Client: leaves on purpose; the session lives on. No payload.
    Detach = 7,
    /// Client: a piece of an [`Open`] that is longer than a frame. Its last piece is sent as [`Kind::Open`].
    OpenPart = 8,
    /// Agent: [`Opened`] as JSON.
    Opened = 65,
    /// Agent: bytes of standard output, or of the terminal.
    Stdout = 66,
    /// Agent: bytes of standard error.
    Stderr = 67,
    /// Agent: [`StdinAck`] as JSON.
    StdinAck = 68,
    /// Agent: [`Exit`] as JSON. The last frame.
    Exit = 69,
    /// Agent or daemon: [`crate::error::ApiError`] as JSON. The last frame.
    Error = 70,
}

impl Kind {
    /// The kind with this number.
    pub fn from_u8(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Open,
            2 => Self::Go,
            3 => Self::Stdin,
            4 => Self::StdinEof,
            5 => Self::Resize,
            6 => Self::Signal,
            7 => Self::Detach,
            8 => Self::OpenPart,
            65 => Self::Opened,
            66 => Self::Stdout,
            67 => Self::Stderr,
            68 => Self::StdinAck,
            69 => Self::Exit,
            70 => Self::Error,
            _ => return None,
        })
    }
}

/// What to run, and where a returning client left off.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Open {
    /// Program and arguments; empty to attach to what is there (or, at the first attach, for a login shell).
    pub command: Vec<String>,
    /// Attach only: fail when there is no session of this id.
    pub attach_only: bool,
    /// Give it a terminal.
    pub tty: bool,
    /// Size of the terminal.
    pub size: Option<Resize>,
    /// Variables on top of the guest's defaults.
    pub env: Env,
    /// Directory to run in; the user's home when absent.
    pub workdir: Option<String>,
    /// Where that directory does not exist, the user's home will do, with a line on standard error: no one asked for it by name.
    pub workdir_or_home: bool,
    /// User name or number, `root` when absent.
    pub user: Option<String>,
    /// Standard input will be sent; without it the program reads end of file at once.
    pub stdin: bool,
    /// Bytes of output that the client already has.
    pub output_offset: u64,
}

/// Answer to [`Open`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Opened {
    /// The session was there before.
    pub existing: bool,
    /// Its command runs or has run.
    pub started: bool,
    /// Bytes of standard input taken so far.
    pub stdin_received: u64,
    /// Bytes of output between the client's offset and what the agent still has.
    pub dropped: u64,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Resize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// A signal for the session's foreground process group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signal {
    /// Linux signal number, 1 to 64.
    pub signal: i32,
}

/// Standard input that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StdinAck {
    /// Bytes in all.
    pub received: u64,
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit status; 128 + n for signal n, 126 for a command that can't be run, 127 for one that is not there.
    pub code: i32,
}

/// A frame as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Its kind.
    pub kind: Kind,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// What is wrong with the bytes of a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Unknown kind.
    #[error("frame of unknown kind {0}")]
    UnknownKind(u8),
    /// Longer than [`MAX_PAYLOAD`].
    #[error("frame of {0} bytes, more than {MAX_PAYLOAD}")]
    TooLong(usize),
    /// A WebSocket message without a kind.
    #[error("empty frame")]
    Empty,
}

impl Frame {
    /// A frame of bytes.
    pub fn new(kind: Kind, payload: impl Into<Vec<u8>>) -> Self {
        Self {
            kind,
            payload: payload.into(),
        }
    }

    /// A frame whose payload is JSON.
    pub fn json<T: Serialize>(kind: Kind, value: &T) -> Self {
        // The types of this module have string keys and no failing serializers.
        Self {
            kind,
            payload: serde_json::to_vec(value).unwrap_or_default(),
        }
    }

    /// The frames that ask for a session.
    pub fn opening(open: &Open) -> Vec<Self> {
        let whole = Self::json(Kind::Open, open).payload;
        let mut frames: Vec<Self> = whole
            .chunks(MAX_PAYLOAD)
            .map(|piece| Self::new(Kind::OpenPart, piece))
            .collect();
        if let Some(last) = frames.last_mut() {
            last.kind = Kind::Open;
        }
        frames
    }

    /// The payload read as JSON.
    pub fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.payload)
    }

    /// The form on the guest channel.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.payload.len());
        out.extend_from_slice(&header(self.kind, self.payload.len()));
        out.extend_from_slice(&self.payload);
        out
    }

    /// The form on the WebSocket.
    pub fn to_message(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(1 + self.payload.len());
        out.push(self.kind as u8);
        out.extend_from_slice(&self.payload);
        out
    }

    /// Reads the form on the WebSocket.
    pub fn from_message(message: &[u8]) -> Result<Self, FrameError> {
        let (&kind, payload) = message.split_first().ok_or(FrameError::Empty)?;
        let kind = Kind::from_u8(kind).ok_or(FrameError::UnknownKind(kind))?;
        if payload.len() > MAX_PAYLOAD {
            return Err(FrameError::TooLong(payload.len()));
        }
        Ok(Self::new(kind, payload))
    }
}

/// The header of a frame on the guest channel.
pub fn header(kind: Kind, length: usize) -> [u8; HEADER] {
    debug_assert!(
        length <= MAX_PAYLOAD,
        "payloads are cut to MAX_PAYLOAD before they are framed"
    );
    let length = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [kind as u8, length[0], length[1], length[2], length[3]]
}

/// Takes frames out of a byte stream that arrives in pieces of any size.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// An empty decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes as they arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 && self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        } else if self.start > MAX_PAYLOAD {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, `None` when more bytes are needed. After an error the stream can't be used any more.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = &self.buffer[self.start..];
        let Some((head, rest)) = rest.split_at_checked(HEADER) else {
            return Ok(None);
        };
        let kind = Kind::from_u8(head[0]).ok_or(FrameError::UnknownKind(head[0]))?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > MAX_PAYLOAD {
            return Err(FrameError::TooLong(length));
        }
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = Frame::new(kind, payload);
        self.start += HEADER + length;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kinds() -> impl Strategy<Value = Kind> {
        any::<u8>().prop_filter_map("a known kind", Kind::from_u8)
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            frames in prop::collection::vec((kinds(), prop::collection::vec(any::<u8>(), 0..200)), 0..8),
            cut in 1usize..64,
        ) {
            let frames: Vec<Frame> = frames.into_iter().map(|(k, p)| Frame::new(k, p)).collect();
            let bytes: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            for piece in bytes.chunks(cut) {
                decoder.push(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push(frame);
                }
            }
            prop_assert_eq!(seen, frames);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let mut decoder = Decoder::new();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_frame() {}
            let _ = Frame::from_message(&bytes);
        }

        #[test]
        fn a_message_reads_back(kind in kinds(), payload in prop::collection::vec(any::<u8>(), 0..300)) {
            let frame = Frame::new(kind, payload);
            prop_assert_eq!(Frame::from_message(&frame.to_message()).unwrap(), frame);
        }
    }

    #[test]
    fn a_long_request_is_cut_into_frames() {
        let open = |n: usize| Open {
            command: vec!["\u{1}".repeat(n)],
            ..Open::default()
        };
        assert_eq!(Frame::opening(&open(10)).len(), 1);
        let long = open(crate::arguments::MAX_TOTAL);
        let frames = Frame::opening(&long);
        let (last, parts) = frames.split_last().unwrap();
        assert!(last.kind == Kind::Open && parts.iter().all(|f| f.kind == Kind::OpenPart));
        assert!(frames.iter().all(|f| f.payload.len() <= MAX_PAYLOAD));
        let whole: Vec<u8> = frames.iter().flat_map(|f| f.payload.clone()).collect();
        assert!(whole.len() <= MAX_OPEN);
        assert_eq!(serde_json::from_slice::<Open>(&whole).unwrap(), long);
    }

    #[test]
    fn a_long_frame_is_refused_before_it_is_buffered() {
        let mut decoder = Decoder::new();
        decoder.push(&[Kind::Stdout as u8, 0xff, 0, 0, 0]);
        assert_eq!(decoder.next_frame(), Err(FrameError::TooLong(0xff00_0000)));
    }
}
