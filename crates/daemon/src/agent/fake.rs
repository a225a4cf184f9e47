//! A guest in this process: the handshake, then HTTP/2 with answers as a test wants them.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use banger_core::id::MachineId;
use banger_proto::agent::Health;
use banger_proto::frame::{Decoder, Exit, Frame, Kind, Opened};
use banger_proto::hello::{Greeting, GreetingKind, Scanner};
use banger_vmm::EngineError;
use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::link::{Body, Dial, Link};

/// How the guest behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// As it should: sessions echo their input.
    Good,
    /// Never answers the handshake.
    Silent,
    /// Never answers on the first channel, and as it should on the next.
    Deaf,
    /// Sends garbage and stale answers first.
    Noisy,
    /// Says that it is another machine.
    Stranger,
    /// Answers lists with megabytes.
    Verbose,
    /// Takes requests and never answers them.
    Mute,
    /// Begins to answer requests and never goes on.
    Stuck,
    /// Sends output without end.
    Flood,
    /// Closes the channel in the middle of a session.
    Breaks,
    /// Sends frames that only clients send.
    Confused,
    /// Sends an error full of escape sequences.
    Painter,
    /// Ends a session without its last frame.
    Abrupt,
}

/// What a test can see of it.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Connections made.
    pub(crate) dials: AtomicUsize,
    /// Connections open now.
    pub(crate) open: AtomicUsize,
    /// There were two at once.
    pub(crate) overlapped: AtomicBool,
    /// Bytes of output that left the guest.
    pub(crate) sent: AtomicU64,
    /// Bytes of standard input that arrived.
    pub(crate) received: AtomicU64,
}

pub(crate) struct Guest {
    manner: Manner,
    id: MachineId,
    pub(crate) seen: Arc<Seen>,
}

pub(crate) fn id() -> MachineId {
    MachineId::from_random([0xab; 8])
}

/// A link to a guest that behaves so.
pub(crate) fn link(manner: Manner) -> (Arc<Link>, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    let guest = Guest {
        manner,
        id: id(),
        seen: seen.clone(),
    };
    (Arc::new(Link::new(id(), Box::new(guest))), seen)
}

impl Dial for Guest {
    fn dial(&self) -> Pin<Box<dyn Future<Output = Result<UnixStream, EngineError>> + Send + '_>> {
        Box::pin(async {
            let (host, guest) = UnixStream::pair().map_err(|source| EngineError::Io {
                what: "pair".to_owned(),
                source,
            })?;
            self.seen.dials.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(serve(guest, self.manner, self.id.to_string(), self.seen.clone()));
            Ok(host)
        })
    }
}

async fn serve(mut stream: UnixStream, manner: Manner, id: String, seen: Arc<Seen>) {
    if seen.open.fetch_add(1, Ordering::SeqCst) > 0 {
        seen.overlapped.store(true, Ordering::SeqCst);
    }
    let _ = serve_inner(&mut stream, manner, id, seen.clone()).await;
    seen.open.fetch_sub(1, Ordering::SeqCst);
}

async fn serve_inner(stream: &mut UnixStream, manner: Manner, id: String, seen: Arc<Seen>) -> std::io::Result<()> {
    let first = seen.dials.load(Ordering::SeqCst) == 1;
    if manner == Manner::Silent || manner == Manner::Deaf && first {
        let mut sink = [0; 64];
        while stream.read(&mut sink).await? > 0 {}
        return Ok(());
    }
    if manner == Manner::Noisy {
        stream.write_all(&[0; 1000]).await?;
        stream.write_all(b"PRI * HTTP/2.0\x00BANG").await?;
        stream
            .write_all(&Greeting::new(GreetingKind::Answer, [9; 16]).encode())
            .await?;
    }
    let mut scanner = Scanner::new();
    loop {
        let byte = stream.read_u8().await?;
        match scanner.push(byte) {
            Some(g) if g.kind == GreetingKind::Call => {
                // Every call is answered; once more than needed, as if an earlier one had been late.
                let answer = Greeting::new(GreetingKind::Answer, g.nonce).encode();
                stream.write_all(&answer).await?;
                if manner == Manner::Noisy {
                    stream.write_all(&answer).await?;
                }
            }
            Some(g) if g.kind == GreetingKind::Go => break,
            _ => {}
        }
    }
    let breaking = Arc::new(tokio::sync::Notify::new());
    let (told, answering) = (breaking.clone(), seen.clone());
    let service = service_fn(move |request| {
        let (id, seen, breaking) = (id.clone(), answering.clone(), told.clone());
        async move {
            let answer = answer(request, manner, &id, seen, breaking).await;
            Ok::<_, std::io::Error>(plain(answer))
        }
    });
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .max_frame_size(256 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        _ = connection => {}
        () = breaking.notified() => {}
    }
    Ok(())
}

/// Spelled out for the compiler, which does not see through the closure's lifetimes.
fn plain(answer: Response<Body>) -> Response<UnsyncBoxBody<Bytes, std::io::Error>> {
    answer.map(|body| {
        body.map_err(|e: super::link::BodyError| std::io::Error::other(e.to_string()))
            .boxed_unsync()
    })
}

fn bytes(text: impl Into<Bytes>) -> Body {
    super::calls::full(text.into().to_vec())
}

async fn answer(
    request: Request<Incoming>,
    manner: Manner,
    id: &str,
    seen: Arc<Seen>,
    breaking: Arc<tokio::sync::Notify>,
) -> Response<Body> {
    if manner == Manner::Mute {
        std::future::pending::<()>().await;
    }
    if manner == Manner::Stuck {
        return Response::new(Body::new(StreamBody::new(futures_util::stream::pending())));
    }
    let path = request.uri().path().to_owned();
    let body = if ["/v1/health", "/v1/freeze", "/v1/renew"].contains(&path.as_str()) {
        let health = Health {
            agent_version: "test\x1b[31m".to_owned(),
            machine_id: if manner == Manner::Stranger {
                "ffff".to_owned()
            } else {
                id.to_owned()
            },
            boot_id: "b".to_owned(),
            kernel: "k".repeat(1000),
            uptime_ms: 1,
            system: "none".to_owned(),
            frozen: path == "/v1/freeze",
        };
        bytes(serde_json::to_vec(&health).unwrap())
    } else if path == "/v1/sessions" {
        bytes(if manner == Manner::Verbose {
            "[".repeat(4 << 20)
        } else {
            "[]".to_owned()
        })
    } else if path.starts_with("/v1/sessions/") {
        session(request.into_body(), manner, seen, breaking)
    } else if path == "/v1/connect" && manner == Manner::Flood {
        let stream = futures_util::stream::repeat_with(move || {
            seen.sent.fetch_add(64 * 1024, Ordering::SeqCst);
            Ok(hyper::body::Frame::data(Bytes::from_static(&[7; 64 * 1024])))
        });
        Body::new(StreamBody::new(stream))
    } else if path == "/v1/connect" {
        request.into_body().map_err(Into::into).boxed_unsync()
    } else {
        bytes("{}")
    };
    Response::new(body)
}

fn session(mut input: Incoming, manner: Manner, seen: Arc<Seen>, breaking: Arc<tokio::sync::Notify>) -> Body {
    let (send, receive) = mpsc::channel::<Vec<u8>>(1);
    tokio::spawn(async move {
        let say = async |frame: Frame| send.send(frame.encode()).await;
        let mut decoder = Decoder::new();
        while let Some(Ok(frame)) = input.frame().await {
            let Ok(data) = frame.into_data() else { continue };
            decoder.push(&data);
            while let Ok(Some(frame)) = decoder.next_frame() {
                match (frame.kind, manner) {
                    (Kind::Open, Manner::Confused) => drop(say(Frame::new(Kind::Stdin, b"x".to_vec())).await),
                    (Kind::Open, Manner::Painter) => {
                        let error = banger_proto::error::ApiError::new(
                            banger_proto::error::ErrorCode::Guest,
                            "\x1b]0;evil\x07",
                        );
                        drop(say(Frame::json(Kind::Error, &error)).await);
                    }
                    (Kind::Open, Manner::Abrupt) => return,
                    (Kind::Open, _) => drop(say(Frame::json(Kind::Opened, &Opened::default())).await),
                    (Kind::Go, Manner::Flood) => {
                        let chunk = Frame::new(Kind::Stdout, vec![7; 64 * 1024]);
                        loop {
                            if say(chunk.clone()).await.is_err() {
                                return;
                            }
                            seen.sent.fetch_add(64 * 1024, Ordering::SeqCst);
                        }
                    }
                    (Kind::Go, Manner::Breaks) => {
                        drop(say(Frame::new(Kind::Stdout, b"some".to_vec())).await);
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        breaking.notify_one();
                    }
                    (Kind::Stdin, _) => {
                        seen.received.fetch_add(frame.payload.len() as u64, Ordering::SeqCst);
                        drop(say(Frame::new(Kind::Stdout, frame.payload)).await);
                    }
                    (Kind::StdinEof, _) => {
                        drop(say(Frame::json(Kind::Exit, &Exit { code: 3 })).await);
                        return;
                    }
                    _ => {}
                }
            }
        }
    });
    let stream = futures_util::stream::unfold(receive, |mut r| async move { r.recv().await.map(|b| (b, r)) });
    Body::new(StreamBody::new(
        stream.map(|b| Ok(hyper::body::Frame::data(Bytes::from(b)))),
    ))
}
