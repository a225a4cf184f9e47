//! Sessions against a daemon that breaks connections on purpose.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use banger_proto::error::ApiError;
use banger_proto::frame::{Opened, Resize, Signal};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixListener;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::*;
use crate::printer::{Color, Printer};
use crate::session::input::CHUNK;
use crate::session::opening::Patience;
use crate::session::wire::message;

mod go;
mod leaving;

type Socket = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

/// What the agent's end of a session knows, over all its connections.
#[derive(Default)]
struct Guest {
    stdin: Vec<u8>,
    eof: bool,
    runs: usize,
    signals: Vec<i32>,
    opens: Vec<Open>,
    detached: bool,
    /// It says that sessions are open, and has output.
    opens_sessions: bool,
    /// What the daemon says of the machine; it runs otherwise.
    state: Option<MachineState>,
}

/// Serves each connection with the script of its number; beyond the last one connections are refused.
fn serve<F, Fut>(dir: &std::path::Path, scripts: usize, script: F) -> (Client, Arc<Mutex<Guest>>)
where
    F: Fn(usize, Socket, Arc<Mutex<Guest>>) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let path = dir.join("bangerd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let guest = Arc::new(Mutex::new(Guest::default()));
    let number = Arc::new(AtomicUsize::new(0));
    let shared = Arc::clone(&guest);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (script, guest, number) = (script.clone(), Arc::clone(&shared), Arc::clone(&number));
            let service = service_fn(move |mut request: Request<hyper::body::Incoming>| {
                let (script, guest) = (script.clone(), Arc::clone(&guest));
                let of_machine = request.uri().path() == "/v1/machines/m1";
                let number = if of_machine {
                    0
                } else {
                    number.fetch_add(1, Ordering::SeqCst)
                };
                async move {
                    if of_machine {
                        let machine = crate::commands::vm::common::tests::machine("m1", "m1");
                        let state = guest.lock().unwrap().state.unwrap_or(MachineState::Running);
                        let body = serde_json::to_vec(&Machine { state, ..machine }).unwrap();
                        return Ok(Response::new(Full::from(body)));
                    }
                    assert_eq!(request.uri().path(), "/v1/machines/m1/sessions/s1/attach");
                    let mut response = Response::new(Full::new(Bytes::new()));
                    if number >= scripts {
                        let body = r#"{"error":{"code":"not_found","message":"no session `s1`"}}"#;
                        *response.body_mut() = Full::from(body);
                        *response.status_mut() = StatusCode::NOT_FOUND;
                        return Ok::<_, std::convert::Infallible>(response);
                    }
                    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                    response.headers_mut().insert("connection", "Upgrade".parse().unwrap());
                    response.headers_mut().insert("upgrade", "websocket".parse().unwrap());
                    tokio::spawn(async move {
                        let io = TokioIo::new(hyper::upgrade::on(&mut request).await.unwrap());
                        let socket = WebSocketStream::from_raw_socket(io, Role::Server, None).await;
                        script(number, socket, guest).await;
                    });
                    Ok(response)
                }
            });
            tokio::spawn(async move {
                let connection =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                let _ = connection.with_upgrades().await;
            });
        }
    });
    (Client::at(path, false, None), guest)
}

async fn say<T: serde::Serialize>(socket: &mut Socket, kind: FrameKind, value: &T) {
    say_bytes(socket, kind, &serde_json::to_vec(value).unwrap()).await;
}

async fn say_bytes(socket: &mut Socket, kind: FrameKind, payload: &[u8]) {
    let _ = socket.send(message(kind, payload)).await;
}

/// The next frame of the client, noted with the guest.
async fn hear(socket: &mut Socket, guest: &Mutex<Guest>) -> Option<FrameKind> {
    let message = loop {
        match socket.next().await? {
            Ok(Message::Binary(message)) => break message,
            Ok(_) => {}
            Err(_) => return None,
        }
    };
    let frame = Frame::from_message(&message).unwrap();
    let mut guest = guest.lock().unwrap();
    match frame.kind {
        FrameKind::Open => guest.opens.push(frame.parse().unwrap()),
        FrameKind::Go => guest.runs += 1,
        FrameKind::Stdin => guest.stdin.extend_from_slice(&frame.payload),
        FrameKind::StdinEof => guest.eof = true,
        FrameKind::Signal => guest.signals.push(frame.parse::<Signal>().unwrap().signal),
        FrameKind::Detach => guest.detached = true,
        FrameKind::Resize => drop(frame.parse::<Resize>().unwrap()),
        other => panic!("{other:?}"),
    }
    Some(frame.kind)
}

async fn hear_until(socket: &mut Socket, guest: &Mutex<Guest>, kind: FrameKind) {
    while let Some(heard) = hear(socket, guest).await {
        if heard == kind {
            return;
        }
    }
}

struct Outcome {
    end: Result<End>,
    output: Vec<(Stream, Bytes)>,
}

impl Outcome {
    fn stdout(&self) -> Vec<u8> {
        self.output
            .iter()
            .filter(|o| o.0 == Stream::Out)
            .flat_map(|o| o.1.iter().copied())
            .collect()
    }
}

async fn attend(client: &Client, open: Open, detach: Option<&str>, signals: Vec<i32>, input: Input) -> Outcome {
    let (output, mut received, done) = Output::channel();
    let (signal, signals_in) = mpsc::channel(8);
    for number in signals {
        signal.send(Heard::Signal(number)).await.unwrap();
    }
    let collected = tokio::spawn(async move {
        let mut all = Vec::new();
        while let Some(piece) = received.recv().await {
            all.push(piece);
        }
        let _ = done.send(());
        all
    });
    let printer = Printer::new(true, Color::Never);
    let session = Session {
        client,
        printer: &printer,
        machine: "m1".into(),
        id: "s1".into(),
        open,
        detach: detach.map(|keys| DetachKeys::parse(keys).unwrap()),
        marks: Rc::default(),
        patience: Patience::default(),
    };
    let streams = Streams {
        input,
        output,
        signals: signals_in,
        screen: None,
    };
    let end = tokio::time::timeout(Duration::from_secs(20), session.run(streams))
        .await
        .expect("the session ends");
    drop(signal);
    Outcome {
        end,
        output: collected.await.unwrap(),
    }
}

type Input = fn() -> mpsc::Receiver<Bytes>;

fn nothing() -> mpsc::Receiver<Bytes> {
    mpsc::channel(1).1
}

fn open_but_silent() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(1);
    std::mem::forget(sender);
    receiver
}

/// A megabyte that counts.
fn counting() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        for piece in counted(1 << 20).chunks(CHUNK) {
            if sender.send(Bytes::copy_from_slice(piece)).await.is_err() {
                return;
            }
        }
    });
    receiver
}

fn counted(length: usize) -> Vec<u8> {
    (0..length / 4)
        .flat_map(|i| u32::try_from(i).unwrap().to_be_bytes())
        .collect()
}

fn command() -> Open {
    Open {
        command: vec!["x".into()],
        stdin: true,
        ..Open::default()
    }
}

#[tokio::test]
async fn output_and_status_come_through() {
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = serve(dir.path(), 1, |_, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Open).await;
        say(&mut socket, FrameKind::Opened, &Opened::default()).await;
        hear_until(&mut socket, &guest, FrameKind::Go).await;
        hear_until(&mut socket, &guest, FrameKind::StdinEof).await;
        say_bytes(&mut socket, FrameKind::Stdout, b"out").await;
        say_bytes(&mut socket, FrameKind::Stderr, b"err").await;
        say(&mut socket, FrameKind::Exit, &Exit { code: 42 }).await;
    });
    let outcome = attend(&client, command(), None, vec![], nothing).await;
    assert_eq!(outcome.end.unwrap(), End::Exit(42));
    assert_eq!(
        outcome.output,
        [(Stream::Out, "out".into()), (Stream::Err, "err".into())]
    );
    let guest = guest.lock().unwrap();
    assert!(guest.eof && guest.runs == 1 && !guest.opens[0].attach_only);
}

/// The connection breaks ten times, at awkward places; output must come whole and once, and the command run once.
#[tokio::test]
async fn broken_connections_lose_and_double_nothing() {
    const TOTAL: usize = 400_000;
    const STEP: usize = 45_000;
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = serve(dir.path(), 20, |number, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Open).await;
        let from = usize::try_from(guest.lock().unwrap().opens[number].output_offset).unwrap();
        let opened = Opened {
            existing: number > 0,
            started: number > 1,
            ..Opened::default()
        };
        say(&mut socket, FrameKind::Opened, &opened).await;
        // The second connection finds a session whose Go never arrived.
        if number == 0 {
            return;
        }
        if number == 1 {
            hear_until(&mut socket, &guest, FrameKind::Go).await;
        }
        let all = counted(TOTAL);
        let to = (from + STEP).min(TOTAL);
        for piece in all[from..to].chunks(7_001) {
            say_bytes(&mut socket, FrameKind::Stdout, piece).await;
        }
        if to == TOTAL {
            say(&mut socket, FrameKind::Exit, &Exit { code: 0 }).await;
        }
    });
    let outcome = attend(
        &client,
        Open {
            stdin: false,
            ..command()
        },
        None,
        vec![],
        nothing,
    )
    .await;
    assert_eq!(outcome.end.as_ref().unwrap(), &End::Exit(0));
    assert!(outcome.stdout() == counted(TOTAL), "every byte once and in order");
    let guest = guest.lock().unwrap();
    assert!(guest.opens.len() > 8, "{} connections", guest.opens.len());
    assert!(
        guest.opens.iter().skip(1).all(|o| o.attach_only),
        "never asked to run again"
    );
}

/// Input that was sent and not taken when the connection broke is sent again, from where the guest left off.
#[tokio::test]
async fn input_goes_on_where_the_guest_left_off() {
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = serve(dir.path(), 50, |number, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Open).await;
        // What was in flight when the connection broke never arrived.
        let taken = guest.lock().unwrap().stdin.len() as u64;
        let opened = Opened {
            existing: number > 0,
            started: number > 0,
            stdin_received: taken,
            dropped: 0,
        };
        say(&mut socket, FrameKind::Opened, &opened).await;
        for frame in 0.. {
            match hear(&mut socket, &guest).await {
                Some(FrameKind::Stdin) => {
                    let received = guest.lock().unwrap().stdin.len() as u64;
                    // Every third one is never acknowledged before the break.
                    if frame % 3 != 0 {
                        say(&mut socket, FrameKind::StdinAck, &StdinAck { received }).await;
                    }
                }
                Some(FrameKind::StdinEof) => {
                    say(&mut socket, FrameKind::Exit, &Exit { code: 0 }).await;
                    return;
                }
                Some(_) => {}
                None => return,
            }
            if frame == 4 {
                return;
            }
        }
    });
    let outcome = attend(&client, command(), None, vec![], counting).await;
    assert_eq!(outcome.end.unwrap(), End::Exit(0));
    let guest = guest.lock().unwrap();
    assert!(
        guest.stdin == counted(1 << 20),
        "every byte once and in order, {} of them",
        guest.stdin.len()
    );
    assert!(guest.opens.len() > 2);
}

#[tokio::test]
async fn a_session_that_is_gone_is_final() {
    let dir = tempfile::tempdir().unwrap();
    let (client, _guest) = serve(dir.path(), 1, |_, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Open).await;
        say(&mut socket, FrameKind::Opened, &Opened::default()).await;
        hear_until(&mut socket, &guest, FrameKind::Go).await;
    });
    let error = attend(&client, command(), None, vec![], open_but_silent)
        .await
        .end
        .unwrap_err();
    assert_eq!(
        (error.kind, error.message.as_str()),
        (Kind::NotFound, "no session `s1`")
    );
}

#[tokio::test]
async fn errors_of_the_guest_are_final_and_those_of_a_stopping_daemon_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = serve(dir.path(), 2, |number, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Open).await;
        if number == 0 {
            say(&mut socket, FrameKind::Opened, &Opened::default()).await;
            hear_until(&mut socket, &guest, FrameKind::Go).await;
            say(
                &mut socket,
                FrameKind::Error,
                &ApiError::new(ErrorCode::Unavailable, "stopping"),
            )
            .await;
        } else {
            say(
                &mut socket,
                FrameKind::Error,
                &ApiError::new(ErrorCode::Guest, "the agent is confused"),
            )
            .await;
        }
    });
    let error = attend(&client, command(), None, vec![], open_but_silent)
        .await
        .end
        .unwrap_err();
    assert_eq!(error.message, "the agent is confused");
    assert_eq!(guest.lock().unwrap().opens.len(), 2);
}

#[tokio::test]
async fn signals_are_passed_on_and_the_fourth_interrupt_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = serve(dir.path(), 1, |_, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Open).await;
        say(&mut socket, FrameKind::Opened, &Opened::default()).await;
        say_bytes(&mut socket, FrameKind::Stdout, b"begun").await;
        while let Some(kind) = hear(&mut socket, &guest).await {
            let end = guest.lock().unwrap().signals.last() == Some(&9);
            if kind == FrameKind::Signal && end {
                say(&mut socket, FrameKind::Exit, &Exit { code: 137 }).await;
            }
        }
    });
    let (output, mut received, done) = Output::channel();
    let (signal, signals_in) = mpsc::channel(8);
    tokio::spawn(async move {
        // With output the session is open.
        received.recv().await.unwrap();
        for number in [signals::USR1, signals::INT, signals::INT, signals::TERM, signals::INT] {
            signal.send(Heard::Signal(number)).await.unwrap();
        }
        while received.recv().await.is_some() {}
        let _ = done.send(());
        drop(signal);
    });
    let printer = Printer::new(true, Color::Never);
    let session = Session {
        client: &client,
        printer: &printer,
        machine: "m1".into(),
        id: "s1".into(),
        open: command(),
        detach: None,
        marks: Rc::default(),
        patience: Patience::default(),
    };
    let end = session
        .run(Streams {
            input: open_but_silent,
            output,
            signals: signals_in,
            screen: None,
        })
        .await
        .unwrap();
    assert_eq!(end, End::Exit(137));
    assert_eq!(guest.lock().unwrap().signals, [10, 2, 2, 15, 9]);
}

#[tokio::test]
async fn a_closed_output_is_told_to_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = serve(dir.path(), 1, |_, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Open).await;
        say(&mut socket, FrameKind::Opened, &Opened::default()).await;
        hear_until(&mut socket, &guest, FrameKind::Signal).await;
        say(&mut socket, FrameKind::Exit, &Exit { code: 141 }).await;
    });
    let (output, _received, done) = Output::channel();
    drop(done);
    output.broken.notify_one();
    let printer = Printer::new(true, Color::Never);
    let session = Session {
        client: &client,
        printer: &printer,
        machine: "m1".into(),
        id: "s1".into(),
        open: command(),
        detach: None,
        marks: Rc::default(),
        patience: Patience::default(),
    };
    let (_signal, signals_in) = mpsc::channel(1);
    let end = session
        .run(Streams {
            input: open_but_silent,
            output,
            signals: signals_in,
            screen: None,
        })
        .await
        .unwrap();
    assert_eq!(end, End::Exit(141));
    assert_eq!(guest.lock().unwrap().signals, [13]);
}

#[tokio::test]
async fn the_keys_detach() {
    fn typed() -> mpsc::Receiver<Bytes> {
        let (sender, receiver) = mpsc::channel(4);
        sender.try_send(Bytes::from_static(b"ls\r\x10")).unwrap();
        sender.try_send(Bytes::from_static(b"\x11never")).unwrap();
        std::mem::forget(sender);
        receiver
    }
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = serve(dir.path(), 1, |_, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Open).await;
        say(&mut socket, FrameKind::Opened, &Opened::default()).await;
        hear_until(&mut socket, &guest, FrameKind::Detach).await;
    });
    let outcome = attend(
        &client,
        Open { tty: true, ..command() },
        Some("ctrl-p,ctrl-q"),
        vec![],
        typed,
    )
    .await;
    assert_eq!(outcome.end.unwrap(), End::Detached);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let guest = guest.lock().unwrap();
    assert_eq!(guest.stdin, b"ls\r");
    assert!(guest.detached);
}

#[tokio::test]
async fn a_guest_that_breaks_the_protocol_is_refused() {
    for (kind, payload) in [
        (FrameKind::StdinAck, &b"{\"received\":99}"[..]),
        (FrameKind::StdinAck, b"nonsense"),
        (FrameKind::Open, b"{}"),
        (FrameKind::Exit, b"{}}"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (client, _guest) = serve(dir.path(), 1, move |_, mut socket, guest| async move {
            hear_until(&mut socket, &guest, FrameKind::Open).await;
            say(&mut socket, FrameKind::Opened, &Opened::default()).await;
            hear_until(&mut socket, &guest, FrameKind::Go).await;
            say_bytes(&mut socket, kind, payload).await;
            hear_until(&mut socket, &guest, FrameKind::Detach).await;
        });
        let error = attend(&client, command(), None, vec![], open_but_silent)
            .await
            .end
            .unwrap_err();
        assert!(error.message.contains("protocol"), "{kind:?}: {error}");
    }
}
