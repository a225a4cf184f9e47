//! Sessions as a client sees them, with real programs of the host.

mod common;

use std::time::{Duration, Instant};

use banger_agent::agent::Agent;
use banger_proto::api;
use banger_proto::error::ErrorCode;
use banger_proto::frame::{Frame, Kind, OUTPUT_BUFFER, Open, Resize, STDIN_WINDOW, Signal};
use common::{Client, Run, command, link, shell};

async fn run(open: Open) -> Run {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    let mut client = link.session("s", &open).await;
    let opened = client.opened().await;
    assert!(!opened.existing && !opened.started);
    client.go().await;
    client.rest().await
}

#[tokio::test]
async fn statuses_are_those_of_a_shell() {
    assert_eq!(
        run(command(&["true"])).await,
        Run {
            exit: Some(0),
            ..Run::default()
        }
    );
    assert_eq!(run(shell("exit 42")).await.exit, Some(42));
    assert_eq!(run(shell("kill -9 $$")).await.exit, Some(137));
    let missing = run(command(&["no-such-program"])).await;
    assert_eq!(missing.exit, Some(127));
    assert_eq!(
        String::from_utf8(missing.err).unwrap(),
        "banger: no-such-program: command not found\n"
    );
    assert_eq!(run(command(&["/etc/passwd"])).await.exit, Some(126));
    assert_eq!(run(command(&["/nope/x"])).await.exit, Some(127));
}

#[tokio::test]
async fn output_streams_stay_apart_and_arguments_whole() {
    let got = run(shell("printf 'a b'; printf c >&2")).await;
    assert_eq!(
        (got.out.as_slice(), got.err.as_slice(), got.exit),
        (&b"a b"[..], &b"c"[..], Some(0))
    );
    let got = run(command(&["printf", "%s|", "a b", "$HOME", "", "*", "'q'"])).await;
    assert_eq!(got.text(), "a b|$HOME||*|'q'|");
}

#[tokio::test]
async fn environment_and_directory() {
    let mut open = shell("pwd; echo $A; echo $LANG");
    open.workdir = Some("/usr".into());
    open.env = [("A".to_owned(), "1 2".to_owned())].into();
    assert_eq!(run(open).await.text(), "/usr\n1 2\nC.UTF-8\n");
    let mut open = shell("true");
    open.workdir = Some("/no/such/place".into());
    let error = run(open).await.error.unwrap();
    assert_eq!(error.code, ErrorCode::NotFound);
    assert!(error.message.contains("/no/such/place"), "{error}");
    let mut open = shell("true");
    open.user = Some("no-such-user".into());
    assert!(run(open).await.error.unwrap().message.contains("no-such-user"));
}

#[tokio::test]
async fn no_input_is_the_end_of_it() {
    assert_eq!(
        run(command(&["cat"])).await,
        Run {
            exit: Some(0),
            ..Run::default()
        }
    );
}

#[tokio::test]
async fn a_background_process_does_not_keep_the_session() {
    let begun = Instant::now();
    let got = run(shell("sleep 100 & echo hi")).await;
    assert_eq!((got.text().as_str(), got.exit), ("hi\n", Some(0)));
    assert!(begun.elapsed() < Duration::from_secs(5));
    // What comes within a moment of the end still counts.
    let got = run(shell("(sleep 0.05; echo late) & echo early")).await;
    assert_eq!(got.text(), "early\nlate\n");
}

#[tokio::test]
async fn a_mebibyte_through_cat() {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    let mut open = command(&["cat"]);
    open.stdin = true;
    let mut client = link.session("s", &open).await;
    client.opened().await;
    client.go().await;
    let data: Vec<u8> = (0..1_048_576u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let mut got = Run::default();
    let mut sent = 0;
    while got.out.len() < data.len() {
        while sent < data.len() && (sent as u64) < got.acked + STDIN_WINDOW {
            let end = data.len().min(sent + 50_000).min((got.acked + STDIN_WINDOW) as usize);
            client.tell(Frame::new(Kind::Stdin, &data[sent..end])).await;
            sent = end;
        }
        let frame = client.next().await.unwrap();
        assert!(!Client::take(&mut got, &frame));
    }
    client.tell(Frame::new(Kind::StdinEof, [])).await;
    let end = client.rest().await;
    assert_eq!(end.exit, Some(0));
    assert!(got.out == data && end.out.is_empty());
    assert_eq!(got.acked.max(end.acked), data.len() as u64);
}

#[tokio::test]
async fn input_that_nobody_reads_does_not_block() {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    let mut open = shell("exec <&-; sleep 0.3; echo done");
    open.stdin = true;
    let mut client = link.session("s", &open).await;
    client.opened().await;
    client.go().await;
    client.tell(Frame::new(Kind::Stdin, vec![0; 200_000])).await;
    let got = client.rest().await;
    assert_eq!((got.text().as_str(), got.exit), ("done\n", Some(0)));
}

#[tokio::test]
async fn a_terminal_has_a_size_and_one_stream() {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    let mut open = shell("stty size; tty >/dev/null && echo tty; read x; stty size; echo $x; echo $TERM >&2");
    open.tty = true;
    open.stdin = true;
    open.size = Some(Resize { rows: 33, cols: 77 });
    let mut client = link.session("s", &open).await;
    client.opened().await;
    client.go().await;
    let first = client.at_least(12).await;
    assert!(first.text().starts_with("33 77\r\ntty\r\n"), "{first:?}");
    client
        .tell(Frame::json(Kind::Resize, &Resize { rows: 10, cols: 20 }))
        .await;
    client.tell(Frame::new(Kind::Stdin, &b"word\n"[..])).await;
    let got = client.rest().await;
    assert_eq!(
        (got.text().as_str(), got.exit),
        ("word\r\n10 20\r\nword\r\nxterm-256color\r\n", Some(0))
    );
}

#[tokio::test]
async fn the_interrupt_key_reaches_the_foreground() {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    // Without children: a signal that meets a shell between fork and exec may be lost to it.
    let mut open = shell("trap 'echo caught; exit 3' INT; echo ready; while :; do :; done");
    open.tty = true;
    open.stdin = true;
    let mut client = link.session("s", &open).await;
    client.opened().await;
    client.go().await;
    client.at_least(7).await;
    client.tell(Frame::new(Kind::Stdin, [3])).await;
    let got = client.rest().await;
    assert!(got.text().ends_with("caught\r\n"), "{got:?}");
    assert_eq!(got.exit, Some(3));
}

#[tokio::test]
async fn signals_reach_the_whole_group() {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    let mut client = link.session("s", &shell("echo ready; sleep 100; echo after")).await;
    client.opened().await;
    client.go().await;
    client.at_least(6).await;
    client.tell(Frame::json(Kind::Signal, &Signal { signal: 99 })).await;
    client.tell(Frame::json(Kind::Signal, &Signal { signal: 15 })).await;
    assert_eq!(
        client.rest().await,
        Run {
            exit: Some(143),
            ..Run::default()
        }
    );
}

#[tokio::test]
async fn nothing_is_lost_or_doubled_over_lost_connections() {
    let agent = Agent::for_tests();
    let script = "i=0; while [ $i -lt 60000 ]; do echo line $i; i=$((i+1)); done; exit 7";
    let expected: String = (0..60_000).map(|i| format!("line {i}\n")).collect();
    let mut got = Vec::new();
    let mut first = true;
    let exit = loop {
        let mut link = link(&agent).await;
        let open = Open {
            output_offset: got.len() as u64,
            ..shell(script)
        };
        let mut client = link.session("s", &open).await;
        let opened = client.opened().await;
        assert_eq!((opened.existing, opened.started, opened.dropped), (!first, !first, 0));
        // A second go must not run it again.
        client.go().await;
        client.go().await;
        first = false;
        let mut run = Run::default();
        let mut ended = false;
        while run.out.len() < 90_000 && !ended {
            ended = Client::take(&mut run, &client.next().await.unwrap());
        }
        got.extend(run.out);
        if let Some(code) = run.exit {
            break code;
        }
        // Dropping the link here loses the connection with output under way.
    };
    assert_eq!(exit, 7);
    assert!(String::from_utf8(got).unwrap() == expected);
}

#[tokio::test]
async fn a_slow_client_holds_the_program_back() {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    let total = 8 * OUTPUT_BUFFER;
    let mut client = link
        .session("s", &shell(&format!("head -c {total} /dev/zero; echo over >&2")))
        .await;
    client.opened().await;
    client.go().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut second = common::link(&agent).await;
    let (_, list) = second.get("/v1/sessions").await;
    let list: Vec<api::Session> = serde_json::from_slice(&list).unwrap();
    assert!(list[0].running && list[0].attached, "{list:?}");
    let got = client.rest().await;
    assert_eq!(
        (got.out.len(), got.err.as_slice(), got.exit),
        (total, &b"over\n"[..], Some(0))
    );
}

#[tokio::test]
async fn after_a_detach_the_program_runs_freely_and_old_output_goes() {
    let agent = Agent::for_tests();
    let mut first = link(&agent).await;
    let total = 2 * OUTPUT_BUFFER;
    let open = shell(&format!("echo begin; sleep 0.2; head -c {total} /dev/zero; exit 5"));
    let mut client = first.session("s", &open).await;
    client.opened().await;
    client.go().await;
    client.at_least(6).await;
    client.tell(Frame::new(Kind::Detach, [])).await;
    assert_eq!(client.next().await, None, "a detached client gets no more");
    let deadline = Instant::now() + common::LIMIT;
    loop {
        let list: Vec<api::Session> = serde_json::from_slice(&first.get("/v1/sessions").await.1).unwrap();
        if !list[0].running {
            assert_eq!(list[0].exit_code, Some(5));
            break;
        }
        assert!(Instant::now() < deadline, "the program ends by itself");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut late = first
        .session(
            "s",
            &Open {
                attach_only: true,
                output_offset: 6,
                ..Open::default()
            },
        )
        .await;
    let opened = late.opened().await;
    assert_eq!(
        (opened.existing, opened.started, opened.dropped),
        (true, true, (total - OUTPUT_BUFFER) as u64)
    );
    let got = late.rest().await;
    assert_eq!((got.out.len(), got.exit), (OUTPUT_BUFFER, Some(5)));
}

#[tokio::test]
async fn a_second_client_displaces_the_first() {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    let mut open = shell("echo one; read x; echo $x");
    open.stdin = true;
    let mut first = link.session("s", &open).await;
    first.opened().await;
    first.go().await;
    first.at_least(4).await;
    let mut second = link
        .session(
            "s",
            &Open {
                attach_only: true,
                ..Open::default()
            },
        )
        .await;
    assert!(second.opened().await.started);
    assert_eq!(first.rest().await.error.unwrap().code, ErrorCode::Conflict);
    second.tell(Frame::new(Kind::Stdin, &b"two\n"[..])).await;
    let got = second.rest().await;
    assert_eq!((got.text().as_str(), got.exit), ("one\ntwo\n", Some(0)));
}

#[tokio::test]
async fn nothing_runs_before_go_and_an_unstarted_session_is_forgotten() {
    let agent = Agent::for_tests();
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("ran");
    let open = shell(&format!("echo x >> {}", mark.display()));
    {
        let mut link = link(&agent).await;
        let mut client = link.session("s", &open).await;
        client.opened().await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(!mark.exists());
    let mut link = link(&agent).await;
    for _ in 0..3 {
        let mut client = link.session("s", &open).await;
        client.opened().await;
        client.go().await;
        assert_eq!(client.rest().await.exit, Some(0));
    }
    assert_eq!(std::fs::read_to_string(&mark).unwrap(), "x\n", "one id, one run");
}

#[tokio::test]
async fn what_makes_no_sense_is_an_error() {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    let mut client = link
        .session(
            "s",
            &Open {
                attach_only: true,
                ..Open::default()
            },
        )
        .await;
    assert_eq!(client.rest().await.error.unwrap().code, ErrorCode::NotFound);
    let mut client = link
        .session(
            "t",
            &Open {
                output_offset: 5,
                ..shell("true")
            },
        )
        .await;
    assert_eq!(client.rest().await.error.unwrap().code, ErrorCode::BadRequest);
    let mut client = link.session("u", &shell("true")).await;
    client.opened().await;
    client.tell(Frame::new(Kind::Stdout, [])).await;
    assert_eq!(client.rest().await.error.unwrap().code, ErrorCode::BadRequest);
    let (_, body) = common::channel();
    let response = link.call("POST", "/v1/sessions/a%20b", body).await;
    assert_eq!(response.status(), 400);
    let (send, body) = common::channel();
    send.send(bytes::Bytes::from_static(&[255; 64])).await.unwrap();
    let (status, bytes) = common::read(link.call("POST", "/v1/sessions/v", body).await).await;
    assert_eq!((status, bytes[0]), (200, Kind::Error as u8));
    assert_eq!(link.get("/v1/nope").await.0, 404);
}

#[tokio::test]
async fn finished_sessions_are_bounded() {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    for i in 0..80 {
        let mut client = link.session(&format!("s{i}"), &command(&["true"])).await;
        client.opened().await;
        client.go().await;
        assert_eq!(client.rest().await.exit, Some(0));
    }
    let list: Vec<api::Session> = serde_json::from_slice(&link.get("/v1/sessions").await.1).unwrap();
    assert_eq!(list.len(), 64);
    assert!(list.iter().any(|s| s.id == "s79") && !list.iter().any(|s| s.id == "s0"));
}
