//! The client against a guest in this process, good and bad ones.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::extract::ws::WebSocketUpgrade;
use axum::routing::get;
use banger_proto::error::{ApiError, ErrorCode};
use banger_proto::frame::{Exit, Frame, Kind, Open};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::{Instant, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use super::fake::{Manner, Seen, link};
use super::{Link, LinkError, relay};
use crate::error::IntoApi;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

#[tokio::test]
async fn health_comes_from_a_good_guest_and_from_a_noisy_one() {
    for manner in [Manner::Good, Manner::Noisy] {
        let (link, seen) = link(manner);
        assert_eq!(link.health(soon()).await.unwrap().system, "none");
        link.health(soon()).await.unwrap();
        assert_eq!(seen.dials.load(Ordering::SeqCst), 1, "one connection does");
    }
}

#[tokio::test]
async fn what_the_guest_says_is_made_fit() {
    let (link, _) = link(Manner::Good);
    let info = super::sanitize::guest_info(&link.health(soon()).await.unwrap());
    assert!(!info.agent_version.contains('\x1b'));
    assert!(info.kernel.chars().count() <= 65);
}

#[tokio::test]
async fn a_silent_guest_is_given_up_in_time() {
    let (link, _) = link(Manner::Silent);
    let began = Instant::now();
    let error = link
        .health(Instant::now() + Duration::from_millis(300))
        .await
        .unwrap_err();
    assert_eq!(error.into_api().code, ErrorCode::Timeout);
    assert!(began.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn a_channel_without_an_answer_is_opened_again() {
    let (link, seen) = link(Manner::Deaf);
    let began = Instant::now();
    link.health(began + Duration::from_secs(10)).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(seen.dials.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_mute_guest_is_given_up_in_time() {
    let (link, _) = link(Manner::Mute);
    let error = link.shutdown(true, Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(error, LinkError::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn requests_wait_for_a_guest_that_is_frozen_and_its_own_do_not() {
    let (link, _) = link(Manner::Good);
    let held = link.hold();
    link.health(soon()).await.unwrap();
    let waiting = tokio::spawn({
        let link = link.clone();
        async move { link.sessions().await.map(drop) }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished(), "a request reached a frozen guest");
    drop(held);
    timeout(Duration::from_secs(5), waiting)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn another_machine_on_the_channel_is_noticed() {
    let (link, _) = link(Manner::Stranger);
    assert!(matches!(link.health(soon()).await, Err(LinkError::WrongMachine { .. })));
}

#[tokio::test]
async fn a_long_answer_is_cut_off() {
    let (link, _) = link(Manner::Verbose);
    let error = link.sessions().await.unwrap_err();
    assert!(error.to_string().contains("more than"), "{error}");
}

#[tokio::test]
async fn two_who_come_at_once_share_a_connection() {
    let (link, seen) = link(Manner::Good);
    let (one, two) = tokio::join!(link.health(soon()), link.sessions());
    one.unwrap();
    two.unwrap();
    assert_eq!(seen.dials.load(Ordering::SeqCst), 1);
}

/// A WebSocket to a relay over this link.
pub(super) async fn client(link: Arc<Link>, raw: bool) -> (tempfile::TempDir, WebSocketStream<UnixStream>) {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let route = get(move |upgrade: WebSocketUpgrade| {
        let link = link.clone();
        async move {
            upgrade.on_upgrade(move |socket| async move {
                if raw {
                    relay::raw(socket, &link, "sshd", IntoApi::into_api).await;
                } else {
                    relay::session(socket, &link, "x", |e| std::future::ready(e.into_api())).await;
                }
            })
        }
    });
    let app = Router::new().route("/s", route);
    tokio::spawn(async move { axum::serve(listener, app).await });
    let stream = UnixStream::connect(&path).await.unwrap();
    let (socket, _) = tokio_tungstenite::client_async("ws://d/s", stream).await.unwrap();
    (tmp, socket)
}

pub(super) async fn say(socket: &mut WebSocketStream<UnixStream>, frame: Frame) {
    socket.send(Message::Binary(frame.to_message().into())).await.unwrap();
}

pub(super) async fn hear(socket: &mut WebSocketStream<UnixStream>) -> Option<Frame> {
    loop {
        match timeout(Duration::from_secs(10), socket.next())
            .await
            .expect("an answer in time")
        {
            Some(Ok(Message::Binary(bytes))) => return Some(Frame::from_message(&bytes).unwrap()),
            Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
            Some(Ok(_)) => {}
        }
    }
}

async fn open(manner: Manner) -> (tempfile::TempDir, WebSocketStream<UnixStream>, Arc<Link>, Arc<Seen>) {
    let (link, seen) = link(manner);
    let (tmp, mut socket) = client(link.clone(), false).await;
    say(&mut socket, Frame::json(Kind::Open, &Open::default())).await;
    (tmp, socket, link, seen)
}

pub(super) fn error_of(frame: Frame) -> ApiError {
    assert_eq!(frame.kind, Kind::Error, "{frame:?}");
    frame.parse().unwrap()
}

#[tokio::test]
async fn a_session_goes_through_and_ends_with_its_status() {
    let (_tmp, mut socket, _, seen) = open(Manner::Good).await;
    assert_eq!(hear(&mut socket).await.unwrap().kind, Kind::Opened);
    say(&mut socket, Frame::new(Kind::Go, [])).await;
    let mut back = 0;
    for size in [1usize, 8 * 1024, 8 * 1024 + 1, 256 * 1024] {
        say(&mut socket, Frame::new(Kind::Stdin, vec![1; size])).await;
        let frame = hear(&mut socket).await.unwrap();
        assert_eq!((frame.kind, frame.payload.len()), (Kind::Stdout, size));
        back += size as u64;
    }
    say(&mut socket, Frame::new(Kind::StdinEof, [])).await;
    let last = hear(&mut socket).await.unwrap();
    assert_eq!(last.parse::<Exit>().unwrap().code, 3);
    assert!(hear(&mut socket).await.is_none());
    assert_eq!(seen.received.load(Ordering::SeqCst), back);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_waits_for_its_reader_and_then_flows() {
    let (_tmp, mut socket, link, seen) = open(Manner::Flood).await;
    assert_eq!(hear(&mut socket).await.unwrap().kind, Kind::Opened);
    say(&mut socket, Frame::new(Kind::Go, [])).await;
    // Nobody reads: what left the guest is what windows and sockets hold, and stays that.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let held = seen.sent.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(seen.sent.load(Ordering::SeqCst), held, "it goes on though nobody reads");
    assert!(held < 4 << 20, "{held} bytes left the guest");
    // Other calls go through meanwhile.
    link.health(soon()).await.unwrap();
    let began = Instant::now();
    let mut bytes = 0usize;
    while bytes < 64 << 20 {
        bytes += hear(&mut socket).await.unwrap().payload.len();
    }
    let rate = bytes as f64 / began.elapsed().as_secs_f64() / 1e6;
    eprintln!("relay: {rate:.0} MB/s, {held} bytes held for a reader that does not read");
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_stream_only() {
    let (tmp, mut socket, link, seen) = open(Manner::Flood).await;
    assert_eq!(hear(&mut socket).await.unwrap().kind, Kind::Opened);
    say(&mut socket, Frame::new(Kind::Go, [])).await;
    hear(&mut socket).await.unwrap();
    drop((socket, tmp));
    link.health(soon()).await.unwrap();
    let deadline = soon();
    loop {
        let before = seen.sent.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(50)).await;
        if seen.sent.load(Ordering::SeqCst) == before {
            break;
        }
        assert!(Instant::now() < deadline, "the guest still sends");
    }
    assert_eq!(seen.dials.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_connection_that_breaks_is_told_and_made_again() {
    let (_tmp, mut socket, link, seen) = open(Manner::Breaks).await;
    assert_eq!(hear(&mut socket).await.unwrap().kind, Kind::Opened);
    say(&mut socket, Frame::new(Kind::Go, [])).await;
    assert_eq!(hear(&mut socket).await.unwrap().payload, b"some");
    assert_eq!(error_of(hear(&mut socket).await.unwrap()).code, ErrorCode::Unavailable);
    assert!(hear(&mut socket).await.is_none());
    link.health(soon()).await.unwrap();
    assert_eq!(seen.dials.load(Ordering::SeqCst), 2);
    assert!(!seen.overlapped.load(Ordering::SeqCst), "two connections at once");
}

#[tokio::test]
async fn a_guest_that_breaks_the_protocol_is_told() {
    for manner in [Manner::Confused, Manner::Abrupt] {
        let (_tmp, mut socket, ..) = open(manner).await;
        assert_eq!(
            error_of(hear(&mut socket).await.unwrap()).code,
            ErrorCode::Guest,
            "{manner:?}"
        );
    }
}

#[tokio::test]
async fn an_error_of_the_guest_is_made_fit() {
    let (_tmp, mut socket, ..) = open(Manner::Painter).await;
    let error = error_of(hear(&mut socket).await.unwrap());
    assert!(error.message.contains("evil") && !error.message.contains(['\x1b', '\x07']));
}

#[tokio::test]
async fn a_client_that_breaks_the_protocol_is_told() {
    let bad: [Message; 4] = [
        Message::Binary(vec![Kind::Stdout as u8].into()),
        Message::Binary(vec![200].into()),
        Message::Binary(Vec::new().into()),
        Message::Text("hello".into()),
    ];
    for message in bad {
        let (_tmp, mut socket, ..) = open(Manner::Good).await;
        assert_eq!(hear(&mut socket).await.unwrap().kind, Kind::Opened);
        socket.send(message.clone()).await.unwrap();
        assert_eq!(
            error_of(hear(&mut socket).await.unwrap()).code,
            ErrorCode::BadRequest,
            "{message:?}"
        );
    }
}

#[tokio::test]
async fn a_session_of_a_guest_that_is_not_there_says_so() {
    let (link, _) = link(Manner::Good);
    // Its place among the relays is taken by others.
    let mut permits = Vec::new();
    while let Ok(permit) = link.relay_permit() {
        permits.push(permit);
    }
    let (_tmp, mut socket) = client(link, false).await;
    say(&mut socket, Frame::json(Kind::Open, &Open::default())).await;
    assert_eq!(error_of(hear(&mut socket).await.unwrap()).code, ErrorCode::Conflict);
}

#[tokio::test]
async fn raw_bytes_go_both_ways_and_each_direction_ends_alone() {
    let (link, _) = link(Manner::Good);
    let (_tmp, mut socket) = client(link, true).await;
    let mut back = Vec::new();
    for piece in [b"abc".to_vec(), vec![9; 100_000]] {
        let wanted = back.len() + piece.len();
        socket.send(Message::Binary(piece.into())).await.unwrap();
        while back.len() < wanted {
            match timeout(Duration::from_secs(5), socket.next()).await.unwrap() {
                Some(Ok(Message::Binary(bytes))) => back.extend_from_slice(&bytes),
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(back.len(), 100_003);
    // The end of our direction ends the echo, and that is a close.
    socket.send(Message::Binary(Vec::new().into())).await.unwrap();
    let end = timeout(Duration::from_secs(5), socket.next()).await.unwrap();
    assert!(matches!(end, Some(Ok(Message::Close(_)))), "{end:?}");
}

/// Both ends of a connection to a forwarded port.
async fn forwarded() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (client, listener.accept().await.unwrap().0)
}

#[tokio::test]
async fn a_forwarded_connection_ends_each_way_by_itself() {
    let (link, _) = link(Manner::Good);
    let (mut client, host) = forwarded().await;
    let data: Vec<u8> = (0..1_000_000u32).map(|i| (i >> 4) as u8).collect();
    let talks = async {
        let (mut read, mut write) = client.split();
        let mut back = Vec::new();
        let writes = async {
            write.write_all(&data).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let ((), n) = tokio::join!(writes, read.read_to_end(&mut back));
        assert!(n.unwrap() == data.len() && back == data);
    };
    let (relayed, ()) = tokio::join!(relay::tcp(&host, &link, 80), talks);
    relayed.unwrap();
}

#[tokio::test]
async fn a_client_that_goes_away_ends_its_connection() {
    let (link, _) = link(Manner::Good);
    let (mut client, host) = forwarded().await;
    let relayed = tokio::spawn(async move { relay::tcp(&host, &link, 80).await });
    client.write_all(b"x").await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    drop(client);
    timeout(Duration::from_secs(5), relayed)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn a_guest_that_floods_a_connection_waits_for_its_client() {
    let (link, seen) = link(Manner::Flood);
    let (mut client, host) = forwarded().await;
    let relayed = tokio::spawn(async move { relay::tcp(&host, &link, 80).await });
    let mut first = [0; 1024];
    client.read_exact(&mut first).await.unwrap();
    let mut before = 0;
    // It comes to rest when all buffers are full.
    timeout(Duration::from_secs(20), async {
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let now = seen.sent.load(Ordering::SeqCst);
            if now == before {
                return;
            }
            before = now;
        }
    })
    .await
    .unwrap();
    assert!(before < 64 << 20, "{before} bytes are held");
    drop(client);
    timeout(Duration::from_secs(10), relayed)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn only_what_answers_as_http_is_http() {
    for manner in [Manner::Good, Manner::Flood] {
        let (link, _) = link(manner);
        assert!(!relay::is_http(&link, 80, soon()).await.unwrap(), "{manner:?}");
    }
}
