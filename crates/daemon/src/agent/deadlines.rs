//! Every call against agents that are dead or hostile: each one ends in time, and says what it waited for.

use std::sync::Arc;
use std::time::Duration;

use banger_proto::agent::{Freeze, Personalize, Renew};
use banger_proto::error::{ApiError, ErrorCode};
use banger_proto::frame::{Frame, Kind, Open};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, StreamBody};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::Message;

use super::call::{Call, Patience};
use super::fake::{self, Manner};
use super::link::Body;
use super::tests::{client, error_of, hear, say};
use super::{Link, relay};
use crate::error::IntoApi;

const SHORT: Duration = Duration::from_millis(150);

/// How long a call may take in all: each of its steps has a deadline of [`SHORT`].
const TOO_LONG: Duration = Duration::from_secs(5);

fn link(manner: Manner) -> Arc<Link> {
    let (link, _) = fake::link(manner);
    let link = Arc::into_inner(link).unwrap();
    Arc::new(link.with_patience(Patience {
        connect: SHORT,
        answer: SHORT,
        transfer: SHORT,
    }))
}

fn identity() -> Personalize {
    Personalize {
        machine_id: fake::id().to_string(),
        hostname: String::new(),
        time_ns: 0,
        entropy: String::new(),
        network: None,
        authorized_keys: Vec::new(),
        ssh_host_key: None,
        init: banger_proto::agent::Init::Auto,
        mask_units: Vec::new(),
    }
}

fn renewal() -> Renew {
    Renew {
        machine_id: fake::id().to_string(),
        time_ns: 0,
        entropy: String::new(),
        identity: None,
    }
}

/// Makes the call in every way in which the daemon makes it.
async fn perform(call: Call, link: Arc<Link>) -> Vec<Result<(), ApiError>> {
    let one = match call {
        Call::Health => link.health(Instant::now() + SHORT).await.map(drop),
        Call::Personalize => link.personalize(&identity(), SHORT).await.map(drop),
        Call::Freeze => link.freeze(&Freeze::default(), SHORT).await.map(drop),
        Call::Renew => link.renew(&renewal(), SHORT).await.map(drop),
        Call::System => link.system(SHORT).await.map(drop),
        Call::Sessions => link.sessions().await.map(drop),
        Call::Stat => link.stat("/x").await.map(drop),
        Call::Stats => link.stats(SHORT).await.map(drop),
        Call::Clock => link.clock(SHORT).await.map(drop),
        Call::AdjustClock => link.adjust_clock(1, SHORT).await.map(drop),
        Call::Ports => link.ports().await.map(drop),
        Call::Shutdown => link.shutdown(true, SHORT).await,
        Call::ReadFiles => match link.read_files("/x").await {
            Ok(body) => {
                let whole = body.collect().await;
                return vec![
                    whole
                        .map(drop)
                        .map_err(|e| ApiError::new(ErrorCode::Timeout, e.to_string())),
                ];
            }
            Err(e) => Err(e),
        },
        Call::WriteFiles => {
            // More than fits into any window, and then an end.
            let pieces =
                futures_util::stream::repeat_with(|| Ok(hyper::body::Frame::data(Bytes::from_static(&[0; 65536]))));
            let body = Body::new(StreamBody::new(pieces.take(1024)));
            let long = link.write_files("/x", body).await.map(drop);
            let short = link.write_files("/x", super::calls::full(vec![0; 512])).await.map(drop);
            return vec![long.map_err(IntoApi::into_api), short.map_err(IntoApi::into_api)];
        }
        Call::Session => return vec![session(link).await],
        Call::Connect => return connections(link).await,
    };
    vec![one.map_err(IntoApi::into_api)]
}

async fn session(link: Arc<Link>) -> Result<(), ApiError> {
    let (_tmp, mut socket) = client(link, false).await;
    say(&mut socket, Frame::json(Kind::Open, &Open::default())).await;
    say(&mut socket, Frame::new(Kind::Go, [])).await;
    match hear(&mut socket).await {
        Some(frame) if frame.kind == Kind::Error => Err(error_of(frame)),
        _ => Ok(()),
    }
}

async fn connections(link: Arc<Link>) -> Vec<Result<(), ApiError>> {
    let (_tmp, mut socket) = client(link.clone(), true).await;
    socket.send(Message::Binary(Bytes::from_static(b"x"))).await.unwrap();
    let raw = match timeout(TOO_LONG, socket.next()).await {
        Ok(Some(Ok(Message::Close(Some(frame))))) if u16::from(frame.code) == 1011 => {
            Err(ApiError::new(ErrorCode::Timeout, frame.reason.to_string()))
        }
        // A connection that is open has no deadline.
        _ => Ok(()),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (host, _) = listener.accept().await.unwrap();
    let tcp = match timeout(TOO_LONG, relay::tcp(&host, &link, 80)).await {
        Ok(done) => done.map_err(IntoApi::into_api),
        Err(_) => Ok(()),
    };
    let http = relay::is_http(&link, 80, Instant::now() + SHORT).await;
    vec![raw, tcp, http.map(drop).map_err(IntoApi::into_api)]
}

async fn all_end_in_time(manner: Manner, calls: impl Iterator<Item = Call>) {
    for &call in calls.collect::<Vec<_>>().iter() {
        let done = timeout(2 * TOO_LONG, perform(call, link(manner))).await;
        let done = done.unwrap_or_else(|_| panic!("{call:?} hangs with an agent that is {manner:?}"));
        for (way, outcome) in done.into_iter().enumerate() {
            let error = outcome.expect_err(&format!("{call:?} ({way}) with an agent that is {manner:?}"));
            assert_eq!(error.code, ErrorCode::Timeout, "{call:?} ({way}) {manner:?}: {error}");
            assert!(
                error.message.contains("guest agent") && error.message.contains("ms"),
                "{call:?} ({way}) {manner:?} says what was waited for, and how long: {error}"
            );
        }
    }
}

#[tokio::test]
async fn every_call_has_a_deadline_with_an_agent_that_does_not_take_connections() {
    all_end_in_time(Manner::Silent, Call::ALL.iter().copied()).await;
}

#[tokio::test]
async fn every_call_has_a_deadline_with_an_agent_that_does_not_answer() {
    all_end_in_time(Manner::Mute, Call::ALL.iter().copied()).await;
}

#[tokio::test]
async fn every_call_has_a_deadline_with_an_agent_that_does_not_finish_its_answer() {
    // What answers a shutdown is not read, and an open connection may be silent as long as it likes.
    let calls = Call::ALL.iter().copied();
    let calls = calls.filter(|call| !matches!(call, Call::Shutdown | Call::Connect));
    all_end_in_time(Manner::Stuck, calls).await;
}

#[tokio::test]
async fn a_farewell_has_a_deadline() {
    let link = link(Manner::Silent);
    let error = timeout(TOO_LONG, link.hang_up(Instant::now() + SHORT)).await.unwrap();
    assert_eq!(error.unwrap_err().into_api().code, ErrorCode::Timeout);
}

#[tokio::test]
async fn a_client_that_does_not_ask_for_its_session_is_let_go() {
    let (_tmp, mut socket) = client(link(Manner::Good), false).await;
    let error = error_of(hear(&mut socket).await.unwrap());
    assert_eq!(error.code, ErrorCode::Timeout, "{error}");
    assert!(error.message.contains("client took longer"), "{error}");
}
