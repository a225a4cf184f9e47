//! As little of a client of the guest agent as does its work: the greeting, and requests over HTTP/2, one at a time, on a blocking
//! socket.
//!
//! Requests are sent whole and at once, headers as literals. Of an answer's head only the status is looked at, and of that only
//! whether it is 200, which is one byte. Windows are never filled: what is said here is some kilobytes.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use banger_proto::hello::{GREETING, Greeting, GreetingKind, Scanner};

/// Time between two calls.
const CALL_EVERY: Duration = Duration::from_millis(100);
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Length of a frame's header.
const HEAD: usize = 9;
/// Longest frame that is read.
const MAX_FRAME: usize = 1 << 20;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// `:status 200`, as every sender of HTTP/2 that knows its tables writes it.
const OK: u8 = 0x88;

/// A connection to an agent.
pub(super) struct Agent {
    stream: UnixStream,
    /// Read and not used.
    ahead: Vec<u8>,
    next_stream: u32,
    /// The agent answers every call: what it said more than once may still lie ahead of the first frame.
    repeated: Option<[u8; GREETING]>,
}

/// What came back.
pub(super) struct Answer {
    /// It is a success.
    pub(super) ok: bool,
    /// The body, as far as it was wanted.
    pub(super) body: Vec<u8>,
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Calls the guest once. It may not run yet: the call waits for it.
pub(super) fn call(stream: &mut UnixStream, nonce: [u8; 16]) -> io::Result<()> {
    stream.write_all(&Greeting::new(GreetingKind::Call, nonce).encode())
}

impl Agent {
    /// Waits for the answer to a call, calling again now and then, and says go.
    pub(super) fn greet(mut stream: UnixStream, nonce: [u8; 16]) -> io::Result<Self> {
        let end = Instant::now() + PATIENCE;
        let mut scanner = Scanner::new();
        let mut buffer = [0; 4096];
        stream.set_read_timeout(Some(CALL_EVERY))?;
        let (answer, rest) = 'heard: loop {
            let n = match stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                    call(&mut stream, nonce)?;
                    continue;
                }
                Err(e) => return Err(e),
            };
            for (i, &byte) in buffer[..n].iter().enumerate() {
                if let Some(greeting) = scanner.push(byte)
                    && greeting.kind == GreetingKind::Answer
                    && greeting.nonce == nonce
                {
                    break 'heard (greeting, buffer[i + 1..n].to_vec());
                }
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut first = Greeting::new(GreetingKind::Go, nonce).encode().to_vec();
        first.extend(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        first.extend(frame(SETTINGS, 0, 0, &[]));
        stream.write_all(&first)?;
        Ok(Self {
            stream,
            ahead: rest,
            next_stream: 1,
            repeated: Some(answer.encode()),
        })
    }

    /// Sends a request and reads its answer to the end, or until `enough` of its body is there.
    pub(super) fn post(&mut self, path: &str, body: &[u8], enough: impl Fn(&[u8]) -> bool) -> io::Result<Answer> {
        let stream = self.next_stream;
        self.next_stream += 2;
        // `:method POST`, `:scheme http`, then `:path` and `:authority` with values of their own.
        let mut headers = vec![0x83, 0x86];
        for (name, value) in [(4, path), (1, "agent")] {
            let length = u8::try_from(value.len()).ok().filter(|&l| l < 127);
            headers.extend([name, length.ok_or_else(|| malformed("a long path"))?]);
            headers.extend(value.as_bytes());
        }
        let mut request = frame(HEADERS, END_HEADERS, stream, &headers);
        request.extend(frame(DATA, END_STREAM, stream, body));
        self.stream.write_all(&request)?;
        let mut answer = Answer {
            ok: false,
            body: Vec::new(),
        };
        loop {
            let (kind, flags, of, payload) = self.frame()?;
            match kind {
                SETTINGS if flags & ACK == 0 => self.stream.write_all(&frame(SETTINGS, ACK, 0, &[]))?,
                PING if flags & ACK == 0 => self.stream.write_all(&frame(PING, ACK, 0, &payload))?,
                HEADERS if of == stream => answer.ok = payload.first() == Some(&OK),
                DATA if of == stream => answer.body.extend(payload),
                RST_STREAM if of == stream => return Err(malformed("the agent broke a request off")),
                GOAWAY => return Err(malformed("the agent ended the connection")),
                _ => {}
            }
            let over = of == stream && matches!(kind, HEADERS | DATA) && flags & END_STREAM != 0;
            if over || enough(&answer.body) {
                return Ok(answer);
            }
        }
    }

    fn frame(&mut self) -> io::Result<(u8, u8, u32, Vec<u8>)> {
        self.read_ahead(HEAD)?;
        while let Some(answer) = self.repeated {
            if self.ahead[..HEAD] != answer[..HEAD] {
                self.repeated = None;
                break;
            }
            self.read_ahead(GREETING + HEAD)?;
            self.ahead.drain(..GREETING);
        }
        let head = &self.ahead[..HEAD];
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let (kind, flags) = (head[3], head[4]);
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & !(1 << 31);
        if length > MAX_FRAME {
            return Err(malformed("a frame that is too long"));
        }
        self.read_ahead(HEAD + length)?;
        let payload = self.ahead[HEAD..HEAD + length].to_vec();
        self.ahead.drain(..HEAD + length);
        Ok((kind, flags, stream, payload))
    }

    /// Makes sure that so many bytes have been read.
    fn read_ahead(&mut self, count: usize) -> io::Result<()> {
        let mut buffer = [0; 16 * 1024];
        while self.ahead.len() < count {
            match self.stream.read(&mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => self.ahead.extend_from_slice(&buffer[..n]),
            }
        }
        Ok(())
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    let mut out = vec![length[1], length[2], length[3], kind, flags];
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}
