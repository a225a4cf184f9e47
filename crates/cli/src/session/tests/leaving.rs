//! Ways out of a session other than the end of its program: deadlines and signals before it is open, and a terminal that goes.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use super::*;

fn session<'a>(client: &'a Client, printer: &'a Printer, open: Open) -> Session<'a> {
    Session {
        client,
        printer,
        machine: "m1".into(),
        id: "s1".into(),
        open,
        detach: None,
        marks: Rc::default(),
        patience: Patience::default(),
    }
}

/// Runs a session that hears this once its program was told to go or, of a guest that opens sessions, once there is output.
async fn hears(client: &Client, guest: &Arc<Mutex<Guest>>, open: Open, heard: Heard) -> Result<End> {
    let (output, mut received, done) = Output::channel();
    let (signal, signals_in) = mpsc::channel(8);
    let shared = Arc::clone(guest);
    let opens = guest.lock().unwrap().opens_sessions;
    tokio::spawn(async move {
        if opens {
            received.recv().await.unwrap();
        }
        while shared.lock().unwrap().runs == 0 {
            tokio::task::yield_now().await;
        }
        signal.send(heard).await.unwrap();
        while received.recv().await.is_some() {}
        let _ = done.send(());
        std::future::pending::<()>().await;
    });
    let printer = Printer::new(true, Color::Never);
    let streams = Streams {
        input: open_but_silent,
        output,
        signals: signals_in,
        screen: None,
    };
    let end = tokio::time::timeout(Duration::from_secs(5), session(client, &printer, open).run(streams)).await;
    end.expect("the session ends")
}

/// A guest that takes a session and never says that it is open.
fn dead(dir: &std::path::Path) -> (Client, Arc<Mutex<Guest>>) {
    serve(dir, 1, |_, mut socket, guest| async move {
        while hear(&mut socket, &guest).await.is_some() {}
    })
}

#[tokio::test]
async fn a_signal_before_the_session_is_open_ends_the_client_at_once() {
    for number in [signals::TERM, signals::INT, signals::HUP, signals::QUIT] {
        for tty in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (client, guest) = dead(dir.path());
            let open = Open { tty, ..command() };
            let error = hears(&client, &guest, open, Heard::Signal(number)).await.unwrap_err();
            assert_eq!(error.kind, Kind::Signal(number));
            // Should the program run by now, it has heard of it.
            while guest.lock().unwrap().signals.is_empty() {
                tokio::task::yield_now().await;
            }
        }
    }
}

#[tokio::test]
async fn a_session_that_does_not_open_has_a_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let (client, _guest) = dead(dir.path());
    let printer = Printer::new(true, Color::Never);
    let mut session = session(&client, &printer, command());
    session.patience.open = Duration::from_millis(100);
    let (output, _received, _done) = Output::channel();
    let (_signal, signals_in) = mpsc::channel(1);
    let streams = Streams {
        input: open_but_silent,
        output,
        signals: signals_in,
        screen: None,
    };
    let end = tokio::time::timeout(Duration::from_secs(5), session.run(streams)).await;
    let error = end.expect("the session ends").unwrap_err();
    assert_eq!(error.kind, Kind::Timeout);
    assert!(
        error.message.contains("open the session in machine m1 within 100ms"),
        "{error}"
    );
}

#[tokio::test]
async fn a_daemon_that_does_not_answer_has_a_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bangerd.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let client = Client::at(path, false, None);
    let printer = Printer::new(true, Color::Never);
    let mut session = session(&client, &printer, command());
    session.patience.connect = Duration::from_millis(100);
    let (output, _received, _done) = Output::channel();
    let (_signal, signals_in) = mpsc::channel(1);
    let streams = Streams {
        input: open_but_silent,
        output,
        signals: signals_in,
        screen: None,
    };
    let end = tokio::time::timeout(Duration::from_secs(5), session.run(streams)).await;
    assert_eq!(end.expect("the session ends").unwrap_err().kind, Kind::Timeout);
}

#[tokio::test]
async fn a_terminal_that_goes_before_the_session_is_open_tells_the_program_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = dead(dir.path());
    let open = Open { tty: true, ..command() };
    let end = hears(&client, &guest, open, Heard::HungUp).await.unwrap();
    assert_eq!(end, End::HungUp);
    assert!(guest.lock().unwrap().signals.is_empty());
}

/// A guest whose session is open, and that waits for the client to leave.
fn open_session(dir: &std::path::Path) -> (Client, Arc<Mutex<Guest>>) {
    let (client, guest) = serve(dir, 1, |_, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Open).await;
        say(&mut socket, FrameKind::Opened, &Opened::default()).await;
        say_bytes(&mut socket, FrameKind::Stdout, b"begun").await;
        while hear(&mut socket, &guest).await.is_some() {}
    });
    guest.lock().unwrap().opens_sessions = true;
    (client, guest)
}

async fn until_detached(guest: &Arc<Mutex<Guest>>) {
    let detached = async {
        while !guest.lock().unwrap().detached {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), detached).await.unwrap();
    let guest = guest.lock().unwrap();
    assert!(
        guest.signals.is_empty() && !guest.eof,
        "the program hears nothing of it"
    );
}

#[tokio::test]
async fn a_terminal_that_goes_leaves_the_program_running() {
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = open_session(dir.path());
    let open = Open { tty: true, ..command() };
    let end = hears(&client, &guest, open, Heard::HungUp).await.unwrap();
    assert_eq!(end, End::HungUp);
    until_detached(&guest).await;
}

#[tokio::test]
async fn a_hangup_that_somebody_sent_is_the_programs() {
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = open_session(dir.path());
    let open = Open { tty: true, ..command() };
    let end = hears(&client, &guest, open, Heard::Signal(signals::HUP)).await.unwrap();
    assert_eq!(end, End::Exit(129));
    assert_eq!(guest.lock().unwrap().signals.first(), Some(&signals::HUP));
}

/// Both sides of a terminal: that of its window, and that of programs.
fn terminal() -> (OwnedFd, OwnedFd) {
    let host = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&host).and_then(|()| unlockpt(&host)).unwrap();
    let name = ptsname(&host, Vec::new()).unwrap();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let inner = rustix::fs::open(name, flags, Mode::empty()).unwrap();
    (host, inner)
}

/// The end of what is typed, and output that is not taken, may come before the signal.
#[tokio::test]
async fn the_end_of_a_terminal_is_no_end_of_input_and_no_broken_output() {
    for broken in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (client, guest) = open_session(dir.path());
        let (host, inner) = terminal();
        let screen = Screen::of(inner.as_fd()).map(Arc::new);
        drop(host);
        let (output, _received, _done) = Output::channel();
        if broken {
            output.failure.set(rustix::io::Errno::IO).unwrap();
            output.broken.notify_one();
        }
        let (_signal, signals_in) = mpsc::channel(1);
        let printer = Printer::new(true, Color::Never);
        let streams = Streams {
            input: if broken { open_but_silent } else { nothing },
            output,
            signals: signals_in,
            screen,
        };
        let session = session(&client, &printer, Open { tty: true, ..command() });
        let end = tokio::time::timeout(Duration::from_secs(5), session.run(streams)).await;
        assert_eq!(end.expect("the session ends").unwrap(), End::HungUp);
        until_detached(&guest).await;
    }
}

#[tokio::test]
async fn output_that_cannot_be_written_ends_the_program_and_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let (client, guest) = serve(dir.path(), 1, |_, mut socket, guest| async move {
        hear_until(&mut socket, &guest, FrameKind::Open).await;
        say(&mut socket, FrameKind::Opened, &Opened::default()).await;
        hear_until(&mut socket, &guest, FrameKind::Signal).await;
        say(&mut socket, FrameKind::Exit, &Exit { code: 0 }).await;
    });
    let (output, _received, done) = Output::channel();
    drop(done);
    output.failure.set(rustix::io::Errno::NOSPC).unwrap();
    output.broken.notify_one();
    let (_signal, signals_in) = mpsc::channel(1);
    let printer = Printer::new(true, Color::Never);
    let streams = Streams {
        input: open_but_silent,
        output,
        signals: signals_in,
        screen: None,
    };
    let error = session(&client, &printer, command()).run(streams).await.unwrap_err();
    assert_eq!(error.kind, Kind::NoSpace, "{error}");
    assert_eq!(guest.lock().unwrap().signals, [signals::PIPE]);
}
