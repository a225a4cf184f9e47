//! A host's side of the agent, over a pair of buffers in one process.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::time::Duration;

use banger_agent::agent::Agent;
use banger_agent::server;
use banger_proto::error::ApiError;
use banger_proto::frame::{Decoder, Exit, Frame, Kind, Open, Opened, StdinAck};
use bytes::Bytes;
use futures_util::Stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame as HttpFrame, Incoming};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// How long anything in these tests may take.
pub const LIMIT: Duration = Duration::from_secs(30);

/// One connection to an agent. Dropped, it is lost without a word.
pub struct Link {
    pub send: SendRequest<Body>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

pub async fn link(agent: &Arc<Agent>) -> Link {
    let (host, guest) = tokio::io::duplex(64 * 1024);
    let agent = agent.clone();
    let serving = tokio::spawn(async move {
        let _ = server::serve(agent, guest).await;
    });
    let (send, connection) = Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(host))
        .await
        .unwrap();
    let driving = tokio::spawn(async move {
        let _ = connection.await;
    });
    Link {
        send,
        _tasks: vec![AbortOnDropHandle::new(driving), AbortOnDropHandle::new(serving)],
    }
}

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

struct Pieces(mpsc::Receiver<Bytes>);

impl Stream for Pieces {
    type Item = std::io::Result<HttpFrame<Bytes>>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0
            .poll_recv(cx)
            .map(|piece| piece.map(|bytes| Ok(HttpFrame::data(bytes))))
    }
}

pub fn channel() -> (mpsc::Sender<Bytes>, Body) {
    let (send, receive) = mpsc::channel(4);
    (send, BodyExt::boxed_unsync(StreamBody::new(Pieces(receive))))
}

impl Link {
    pub async fn call(&mut self, method: &str, path: &str, body: Body) -> Response<Incoming> {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://agent{path}"))
            .body(body)
            .unwrap();
        tokio::time::timeout(LIMIT, self.send.send_request(request))
            .await
            .unwrap()
            .unwrap()
    }

    pub async fn get(&mut self, path: &str) -> (u16, Bytes) {
        read(self.call("GET", path, full("")).await).await
    }

    pub async fn session(&mut self, id: &str, open: &Open) -> Client {
        let (send, body) = channel();
        send.send(Frame::json(Kind::Open, open).encode().into()).await.unwrap();
        let response = self.call("POST", &format!("/v1/sessions/{id}"), body).await;
        assert_eq!(response.status(), 200);
        Client {
            send: Some(send),
            body: response.into_body(),
            decoder: Decoder::new(),
        }
    }
}

pub async fn read(response: Response<Incoming>) -> (u16, Bytes) {
    let status = response.status().as_u16();
    (
        status,
        tokio::time::timeout(LIMIT, response.into_body().collect())
            .await
            .unwrap()
            .unwrap()
            .to_bytes(),
    )
}

/// A client of a session.
pub struct Client {
    pub send: Option<mpsc::Sender<Bytes>>,
    body: Incoming,
    decoder: Decoder,
}

/// What came of a session.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Run {
    pub out: Vec<u8>,
    pub err: Vec<u8>,
    pub acked: u64,
    pub exit: Option<i32>,
    pub error: Option<ApiError>,
}

impl Run {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }
}

impl Client {
    pub async fn tell(&mut self, frame: Frame) {
        // The agent may have ended the session already.
        let _ = self.send.as_ref().unwrap().send(frame.encode().into()).await;
    }

    pub async fn go(&mut self) {
        self.tell(Frame::new(Kind::Go, [])).await;
    }

    pub async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            let piece = tokio::time::timeout(LIMIT, self.body.frame())
                .await
                .expect("a frame within the limit")?;
            self.decoder.push(&piece.ok()?.into_data().ok()?);
        }
    }

    pub async fn opened(&mut self) -> Opened {
        let frame = self.next().await.unwrap();
        assert_eq!(frame.kind, Kind::Opened, "{}", String::from_utf8_lossy(&frame.payload));
        frame.parse().unwrap()
    }

    /// Takes a frame in; true when it was the last.
    pub fn take(run: &mut Run, frame: &Frame) -> bool {
        match frame.kind {
            Kind::Stdout => run.out.extend(&frame.payload),
            Kind::Stderr => run.err.extend(&frame.payload),
            Kind::StdinAck => run.acked = frame.parse::<StdinAck>().unwrap().received,
            Kind::Exit => run.exit = Some(frame.parse::<Exit>().unwrap().code),
            Kind::Error => run.error = Some(frame.parse().unwrap()),
            other => panic!("{other:?}"),
        }
        matches!(frame.kind, Kind::Exit | Kind::Error)
    }

    /// Everything to the end.
    pub async fn rest(&mut self) -> Run {
        let mut run = Run::default();
        while let Some(frame) = self.next().await {
            if Self::take(&mut run, &frame) {
                break;
            }
        }
        run
    }

    /// Until `bytes` of output have come.
    pub async fn at_least(&mut self, bytes: usize) -> Run {
        let mut run = Run::default();
        while run.out.len() + run.err.len() < bytes {
            let frame = self.next().await.expect("more output");
            assert!(!Self::take(&mut run, &frame), "{run:?}");
        }
        run
    }
}

pub fn command(words: &[&str]) -> Open {
    Open {
        command: words.iter().map(|&w| w.to_owned()).collect(),
        workdir: Some("/".into()),
        user: me(),
        ..Open::default()
    }
}

pub fn shell(script: &str) -> Open {
    command(&["sh", "-c", script])
}

/// Whoever runs the tests need not be root.
pub fn me() -> Option<String> {
    Some(rustix::process::geteuid().as_raw().to_string())
}
