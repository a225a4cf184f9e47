//! The host's side of the handshake in [`banger_proto::hello`].

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use banger_proto::agent::AGENT_PROTOCOL;
use banger_proto::hello::{GREETING, Greeting, GreetingKind, Scanner};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, timeout_at};

/// Time between two calls.
const CALL_EVERY: Duration = Duration::from_millis(100);

/// Bytes that are skipped before the guest is given up. More than all windows of an earlier connection hold.
const MAX_NOISE: u64 = 256 * 1024 * 1024;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// No answer in time.
    #[error("the guest agent did not answer within {0:?}")]
    Silent(Duration),
    /// Bytes without end, and no answer among them.
    #[error("the guest sent {0} bytes without an answer among them")]
    Noise(u64),
    /// The channel ended: the engine is gone or has closed it.
    #[error("the guest channel was closed")]
    Closed,
    /// An agent of another generation.
    #[error("the guest agent speaks protocol {found}, this daemon {AGENT_PROTOCOL}")]
    Protocol {
        /// What the agent speaks.
        found: u16,
    },
    /// An operating system call failed.
    #[error("the guest channel failed")]
    Io(#[from] io::Error),
}

/// To whole milliseconds, as an error shows it.
pub(super) fn rounded(time: Duration) -> Duration {
    Duration::from_millis(u64::try_from((time.as_micros() + 500) / 1000).unwrap_or(u64::MAX))
}

/// Calls until the agent answers. Comes back with its answer, and what was read beyond it.
pub async fn call<S>(stream: &mut S, nonce: [u8; 16], deadline: Instant) -> Result<(Greeting, Vec<u8>), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let began = Instant::now();
    let (mut read, mut write) = tokio::io::split(stream);
    let call = Greeting::new(GreetingKind::Call, nonce).encode();
    // A guest that is not up yet does not read; the calls then wait in the channel, and must not keep us from listening.
    let calling = async {
        let mut tick = tokio::time::interval(CALL_EVERY);
        loop {
            tick.tick().await;
            write.write_all(&call).await?;
            write.flush().await?;
        }
    };
    let listening = listen(&mut read, nonce);
    let either = async {
        tokio::select! {
            heard = listening => heard,
            stopped = calling => {
                let stopped: Result<(), io::Error> = stopped;
                Err(stopped.err().map_or(HandshakeError::Closed, broken))
            }
        }
    };
    let silent = |_| HandshakeError::Silent(rounded(deadline.duration_since(began)));
    let (answer, rest) = timeout_at(deadline, either).await.map_err(silent)??;
    if answer.protocol != AGENT_PROTOCOL {
        return Err(HandshakeError::Protocol { found: answer.protocol });
    }
    Ok((answer, rest))
}

/// Calls until the agent answers, then says go. What comes back is at the first byte of HTTP/2.
pub async fn shake<S>(mut stream: S, nonce: [u8; 16], deadline: Instant) -> Result<Channel<S>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let began = Instant::now();
    let (answer, rest) = call(&mut stream, nonce, deadline).await?;
    let go = Greeting::new(GreetingKind::Go, nonce).encode();
    timeout_at(deadline, async {
        stream.write_all(&go).await?;
        stream.flush().await
    })
    .await
    .map_err(|_| HandshakeError::Silent(rounded(deadline.duration_since(began))))?
    .map_err(broken)?;
    Ok(Channel {
        stream,
        answer: answer.encode(),
        pending: rest,
        skipping: true,
    })
}

fn broken(e: io::Error) -> HandshakeError {
    match e.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => {
            HandshakeError::Closed
        }
        _ => HandshakeError::Io(e),
    }
}

/// Reads until an answer to `nonce`; also what was read beyond it.
async fn listen(read: &mut (impl AsyncRead + Unpin), nonce: [u8; 16]) -> Result<(Greeting, Vec<u8>), HandshakeError> {
    let mut scanner = Scanner::new();
    let mut buffer = vec![0; 16 * 1024];
    let mut skipped = 0;
    loop {
        let n = read.read(&mut buffer).await.map_err(broken)?;
        if n == 0 {
            return Err(HandshakeError::Closed);
        }
        for (i, &byte) in buffer[..n].iter().enumerate() {
            if let Some(greeting) = scanner.push(byte)
                && greeting.kind == GreetingKind::Answer
                && greeting.nonce == nonce
            {
                return Ok((greeting, buffer[i + 1..n].to_vec()));
            }
        }
        skipped += n as u64;
        if skipped > MAX_NOISE {
            return Err(HandshakeError::Noise(skipped));
        }
    }
}

/// The channel after the handshake. The agent answers every call, so copies of its answer may still lie before the first byte
/// of HTTP/2; they are dropped here. (HTTP/2 begins with a frame length, whose second byte is not that of a greeting.)
#[derive(Debug)]
pub struct Channel<S> {
    stream: S,
    answer: [u8; GREETING],
    pending: Vec<u8>,
    skipping: bool,
}

impl<S: AsyncRead + Unpin> AsyncRead for Channel<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.skipping {
            let known = this.pending.len().min(GREETING);
            if this.pending[..known] != this.answer[..known] {
                this.skipping = false;
            } else if known == GREETING {
                this.pending.drain(..GREETING);
            } else {
                let mut more = [0; GREETING];
                let mut more = ReadBuf::new(&mut more[known..]);
                ready!(Pin::new(&mut this.stream).poll_read(cx, &mut more))?;
                if more.filled().is_empty() {
                    this.skipping = false;
                }
                this.pending.extend_from_slice(more.filled());
            }
        }
        if this.pending.is_empty() {
            return Pin::new(&mut this.stream).poll_read(cx, buf);
        }
        let n = this.pending.len().min(buf.remaining());
        buf.put_slice(&this.pending[..n]);
        this.pending.drain(..n);
        if this.pending.is_empty() {
            this.pending = Vec::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Channel<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NONCE: [u8; 16] = [7; 16];

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(700)
    }

    fn answer(nonce: [u8; 16]) -> Vec<u8> {
        Greeting::new(GreetingKind::Answer, nonce).encode().to_vec()
    }

    /// What the host reads after the handshake when the guest sends `bytes`, cut into pieces.
    async fn after(bytes: Vec<u8>, cut: usize) -> Result<Vec<u8>, HandshakeError> {
        let (host, mut guest) = tokio::io::duplex(512);
        let sends = tokio::spawn(async move {
            for piece in bytes.chunks(cut) {
                let _ = guest.write_all(piece).await;
                tokio::task::yield_now().await;
            }
            guest
        });
        let mut channel = shake(host, NONCE, soon()).await?;
        drop(sends.await);
        let mut rest = Vec::new();
        channel.read_to_end(&mut rest).await?;
        Ok(rest)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn noise_before_and_answers_behind_are_dropped(
            noise in prop::collection::vec(any::<u8>(), 0..300),
            stale: bool,
            copies in 1usize..5,
            cut in 1usize..100,
        ) {
            let mut bytes = noise;
            if stale {
                bytes.extend(answer([1; 16]));
            }
            for _ in 0..copies {
                bytes.extend(answer(NONCE));
            }
            let http: &[u8] = b"\x00\x00\x0c\x04\x00settings";
            bytes.extend(http);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let rest = runtime.block_on(after(bytes, cut)).unwrap();
            prop_assert_eq!(rest, http);
        }
    }

    #[tokio::test]
    async fn a_guest_that_never_answers_is_given_up_in_time() {
        let (host, guest) = tokio::io::duplex(64);
        let began = Instant::now();
        let error = shake(host, NONCE, Instant::now() + Duration::from_millis(300))
            .await
            .unwrap_err();
        assert!(matches!(error, HandshakeError::Silent(_)), "{error}");
        assert!(began.elapsed() < Duration::from_secs(2));
        drop(guest);
    }

    #[tokio::test]
    async fn a_closed_channel_is_noticed_at_once() {
        let (host, guest) = tokio::io::duplex(64);
        drop(guest);
        assert!(matches!(shake(host, NONCE, soon()).await, Err(HandshakeError::Closed)));
    }

    #[tokio::test]
    async fn another_protocol_is_named() {
        let (host, mut guest) = tokio::io::duplex(4096);
        let other = Greeting {
            kind: GreetingKind::Answer,
            protocol: 99,
            nonce: NONCE,
        };
        guest.write_all(&other.encode()).await.unwrap();
        assert!(matches!(
            shake(host, NONCE, soon()).await,
            Err(HandshakeError::Protocol { found: 99 })
        ));
    }

    #[tokio::test]
    async fn a_flood_is_given_up() {
        let (host, mut guest) = tokio::io::duplex(1 << 16);
        let flood = tokio::spawn(async move { while guest.write_all(&[0; 4096]).await.is_ok() {} });
        let error = shake(host, NONCE, soon()).await.unwrap_err();
        assert!(
            matches!(error, HandshakeError::Silent(_) | HandshakeError::Noise(_)),
            "{error}"
        );
        let _ = flood.await;
    }
}
