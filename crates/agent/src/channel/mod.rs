//! The guest channel: a way for the host to open one byte stream after another to this agent.
//!
//! [`virtio`] is the channel under QEMU, [`vsock`] the one under Firecracker. A kind of channel is a [`Channel`]; what comes out
//! of it is served by [`crate::server`], which knows nothing of where it came from.

use std::future::Future;
use std::io;

use banger_proto::hello::{GREETING, Greeting, GreetingKind, Scanner};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub mod virtio;
pub mod vsock;

/// A source of connections from the host.
pub trait Channel {
    /// One connection: HTTP/2 with prior knowledge from its first byte on.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Waits for the next connection. An error means that the channel itself is broken.
    fn accept(&mut self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

/// What the bytes of a channel ask for while no connection is open.
#[derive(Debug, Default)]
pub struct Greeter {
    scanner: Scanner,
    answered: Option<[u8; 16]>,
}

/// What to do about a byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Skip,
    /// Send these bytes.
    Answer([u8; GREETING]),
    /// HTTP/2 begins with the next byte.
    Go,
}

impl Greeter {
    /// One that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes one byte. A `Go` counts only with the nonce that was answered last: any other is left over from a host that has
    /// gone.
    pub fn push(&mut self, byte: u8) -> Step {
        let Some(greeting) = self.scanner.push(byte) else {
            return Step::Skip;
        };
        match greeting.kind {
            GreetingKind::Call => {
                self.answered = Some(greeting.nonce);
                Step::Answer(Greeting::new(GreetingKind::Answer, greeting.nonce).encode())
            }
            GreetingKind::Go if self.answered == Some(greeting.nonce) => Step::Go,
            GreetingKind::Go | GreetingKind::Answer => Step::Skip,
        }
    }
}

/// Runs the guest's side of the handshake over `stream`, and gives back the bytes that came behind it.
pub async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<Vec<u8>> {
    let mut greeter = Greeter::new();
    let mut buffer = vec![0; 4096];
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (at, &byte) in buffer[..n].iter().enumerate() {
            match greeter.push(byte) {
                Step::Skip => {}
                Step::Answer(answer) => {
                    stream.write_all(&answer).await?;
                    stream.flush().await?;
                }
                Step::Go => return Ok(buffer[at + 1..n].to_vec()),
            }
        }
    }
}

/// Tells whether `bytes`, the beginning of what one read brought, are a host's call.
///
/// A host that went away and came back between two looks at the port leaves no other trace than its greeting amid what seems
/// to be HTTP/2, where its first bytes would read as the header of a long frame of unknown type, to be skipped.
pub fn is_call(bytes: &[u8]) -> bool {
    let Some(head) = bytes.get(..GREETING) else {
        return false;
    };
    if head[0] != 0 || head[1] != b'B' {
        return false;
    }
    let mut scanner = Scanner::new();
    let found = head.iter().filter_map(|&b| scanner.push(b)).last();
    found.is_some_and(|g| g.kind == GreetingKind::Call)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(greeter: &mut Greeter, bytes: &[u8]) -> Vec<Step> {
        bytes
            .iter()
            .map(|&b| greeter.push(b))
            .filter(|s| *s != Step::Skip)
            .collect()
    }

    #[test]
    fn every_call_is_answered_and_only_its_own_go_opens() {
        let call = |n| Greeting::new(GreetingKind::Call, [n; 16]).encode();
        let answer = |n| Step::Answer(Greeting::new(GreetingKind::Answer, [n; 16]).encode());
        let go = |n| Greeting::new(GreetingKind::Go, [n; 16]).encode();
        let mut greeter = Greeter::new();
        assert_eq!(feed(&mut greeter, &go(1)), vec![], "no go without a call");
        assert_eq!(
            feed(
                &mut greeter,
                &[&b"rest of a lost connection"[..], &call(1), &call(1)].concat()
            ),
            vec![answer(1), answer(1)]
        );
        assert_eq!(feed(&mut greeter, &call(2)), vec![answer(2)]);
        assert_eq!(feed(&mut greeter, &go(1)), vec![], "the go of a host that has gone");
        assert_eq!(feed(&mut greeter, &go(2)), vec![Step::Go]);
    }

    #[test]
    fn a_call_is_told_from_http2() {
        assert!(is_call(&Greeting::new(GreetingKind::Call, [7; 16]).encode()));
        assert!(!is_call(&Greeting::new(GreetingKind::Answer, [7; 16]).encode()));
        assert!(!is_call(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n................"));
        assert!(!is_call(&[0; 40]));
        assert!(!is_call(&Greeting::new(GreetingKind::Call, [7; 16]).encode()[..31]));
    }

    #[tokio::test]
    async fn bytes_behind_the_handshake_are_kept() {
        let (mut host, mut guest) = tokio::io::duplex(4096);
        let call = Greeting::new(GreetingKind::Call, [3; 16]).encode();
        let go = Greeting::new(GreetingKind::Go, [3; 16]).encode();
        host.write_all(&[&call[..], &go[..], b"PRI"].concat()).await.unwrap();
        assert_eq!(greet(&mut guest).await.unwrap(), b"PRI");
        let mut answer = [0; GREETING];
        host.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, Greeting::new(GreetingKind::Answer, [3; 16]).encode());
    }
}
