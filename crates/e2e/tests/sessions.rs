//! Sessions live in the guest: clients and daemons come and go.

use std::path::Path;
use std::time::Duration;

use banger_testkit::{Terminal, processes};
use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{MACHINES, machine, slim, tests};

tests! { MACHINES;
    keys_detach_and_attach_returns,
    a_session_survives_its_client,
    a_session_survives_its_terminal,
    a_hangup_that_was_sent_is_passed_on,
    the_daemon_dies_in_mid_output,
    the_daemon_dies_in_mid_input,
    a_command_never_runs_twice,
    sessions_are_listed,
    attaching_to_what_is_not_there,
}

fn sessions(env: &banger_testkit::TestEnv, m: &str) -> Vec<Value> {
    env.json(&format!("vm sessions {m}"))
        .as_array()
        .cloned()
        .expect("a list of sessions")
}

/// The session whose command holds this word.
fn session_of(env: &banger_testkit::TestEnv, m: &str, word: &str) -> Value {
    let all = sessions(env, m);
    let found = all.iter().find(|s| s["command"].to_string().contains(word));
    found
        .unwrap_or_else(|| panic!("no session of {word} in {all:?}"))
        .clone()
}

fn keys_detach_and_attach_returns() {
    let (env, m) = slim();
    let mut terminal = env.terminal([
        "vm",
        "exec",
        "-t",
        m,
        "--",
        "sh",
        "-c",
        "echo be''gun; read line; echo got $line; exit 6",
        "keysword",
    ]);
    terminal.expect("begun");
    terminal.until_raw();
    terminal.send([16, 17]);
    assert_eq!(terminal.wait(), 0, "{}", terminal.screen.text());
    let session = session_of(env, m, "keysword");
    assert_eq!(
        (session["running"].clone(), session["attached"].clone()),
        (true.into(), false.into())
    );
    let id = session["id"].as_str().unwrap();
    let mut again = env.terminal(["vm", "attach", m, id]);
    again.until_raw();
    again.send("word\r");
    again.expect("got word");
    assert_eq!(again.wait(), 6);
}

fn a_session_survives_its_client() {
    let (env, m) = slim();
    let script = "i=0; while [ $i -lt 40 ]; do echo line $i; i=$((i+1)); sleep 0.1; done; exit 4";
    let running = env
        .banger(["vm", "exec", m, "--", "sh", "-c", script, "survivor"])
        .spawn();
    running.expect("line 2\n");
    running.signal(Signal::KILL);
    assert_eq!(running.wait().status, 137);
    let session = session_of(env, m, "survivor");
    assert_eq!(session["running"], true);
    let done = env
        .banger(["vm", "attach", m, session["id"].as_str().unwrap()])
        .deadline(60)
        .run()
        .code(4);
    assert!(done.out().ends_with("line 38\nline 39\n"), "{}", done.out());
}

/// The window is closed, with the client started directly and by a shell, which passes the kernel's signal on as its own.
fn a_session_survives_its_terminal() {
    let (env, m) = slim();
    let banger = banger_testkit::binaries::program("banger");
    let banger = banger.to_str().unwrap();
    let script = "echo be''gun; read line; echo got $line; exit 6";
    for (word, shell) in [("windowword", false), ("jobword", true)] {
        let arguments = ["vm", "exec", "-t", m, "--", "sh", "-c", script, word];
        let mut terminal = if shell {
            Terminal::start(Path::new("/bin/bash"), 24, 80, |c| {
                env.prepare(c);
                c.args(["--norc", "--noprofile", "-i"]);
            })
        } else {
            env.terminal(arguments)
        };
        if shell {
            let words: Vec<String> = arguments
                .iter()
                .map(|word| format!("'{}'", word.replace('\'', "'\\''")))
                .collect();
            terminal.send(format!("{banger} {}\r", words.join(" ")));
        }
        terminal.expect("begun");
        terminal.until_raw();
        terminal.hang_up();
        assert_eq!(terminal.wait(), 129);
        let left = || {
            let session = session_of(env, m, word);
            session["attached"] == false
        };
        processes::until("the client to leave", Duration::from_secs(10), left);
        let session = session_of(env, m, word);
        assert_eq!(session["running"], true, "{word}");
        let mut again = env.terminal(["vm", "attach", m, session["id"].as_str().unwrap()]);
        again.until_raw();
        again.send("word\r");
        again.expect("got word");
        assert_eq!(again.wait(), 6);
    }
    // The same for a shell.
    let mut terminal = env.terminal(["vm", "shell", m]);
    terminal.until_raw();
    terminal.send("mark=kept; echo re''ady\r");
    terminal.expect("ready");
    terminal.hang_up();
    assert_eq!(terminal.wait(), 129);
    let all = sessions(env, m);
    let shells: Vec<&Value> = all
        .iter()
        .filter(|s| s["running"] == true && s["command"].as_array().is_some_and(Vec::is_empty))
        .collect();
    assert_eq!(shells.len(), 1, "{all:?}");
    let mut again = env.terminal(["vm", "attach", m, shells[0]["id"].as_str().unwrap()]);
    again.until_raw();
    again.send("echo \"it was $mark\"; exit 3\r");
    again.expect("it was kept");
    assert_eq!(again.wait(), 3);
}

fn a_hangup_that_was_sent_is_passed_on() {
    let (env, m) = slim();
    let script = "trap 'echo hung > /tmp/hung; exit 9' HUP; echo re''ady; while :; do sleep 0.1; done";
    let mut terminal = env.terminal(["vm", "exec", "-t", m, "--", "sh", "-c", script]);
    terminal.expect("ready");
    terminal.until_raw();
    terminal.signal(Signal::HUP);
    assert_eq!(terminal.wait(), 9);
    env.banger(["vm", "exec", m, "--", "cat", "/tmp/hung"])
        .run()
        .code(0)
        .prints("hung\n");
}

fn the_daemon_dies_in_mid_output() {
    let env = machine("mid-output");
    // Numbered lines: a byte that is lost or comes twice shows. Slow enough to last over the deaths of two daemons.
    let script = "i=0; while [ $i -lt 60 ]; do seq $((i*2000)) $((i*2000+1999)); i=$((i+1)); sleep 0.1; done; exit 7";
    let running = env
        .banger(["vm", "exec", "m", "--", "sh", "-c", script])
        .deadline(120)
        .spawn();
    running.expect("\n20000\n");
    env.kill_daemon();
    running.expect("\n60000\n");
    env.kill_daemon();
    let done = running.wait().code(7);
    let expected: String = (0..120_000).map(|i| format!("{i}\n")).collect();
    assert_eq!(
        done.stdout.len(),
        expected.len(),
        "bytes were lost or repeated: {}",
        done.err()
    );
    assert!(done.stdout == expected.as_bytes(), "output differs: {}", done.err());
    env.close();
}

fn the_daemon_dies_in_mid_input() {
    let env = machine("mid-input");
    let mut running = env
        .banger(["vm", "exec", "m", "--", "sh", "-c", "echo ready; sha256sum"])
        .deadline(120)
        .stdin_held()
        .spawn();
    running.expect("ready");
    let bytes = crate::harness::noise(3_000_000);
    let (first, second) = bytes.split_at(1_300_000);
    running.write(first);
    env.kill_daemon();
    running.write(second);
    running.close_stdin();
    let done = running.wait().code(0);
    assert_eq!(
        done.out(),
        format!("ready\n{}  -\n", crate::harness::sha256(&bytes)),
        "{}",
        done.err()
    );
    env.close();
}

fn a_command_never_runs_twice() {
    let env = machine("once");
    // The command leaves a mark each time it runs; daemons die around its start.
    for i in 0..4_u64 {
        let script = format!("echo ran >>/tmp/mark{i}; sleep 1; wc -l </tmp/mark{i}");
        let running = env
            .banger(["vm", "exec", "m", "--", "sh", "-c", &script])
            .deadline(60)
            .spawn();
        std::thread::sleep(Duration::from_millis(10 + i * 15));
        if let Some(daemon) = env.daemon() {
            processes::kill(&daemon);
        }
        let done = running.wait();
        let marks = env
            .sh("m", &format!("cat /tmp/mark{i} 2>/dev/null | wc -l"))
            .code(0)
            .out()
            .trim()
            .to_owned();
        match done.status {
            0 => assert_eq!((done.out().trim(), marks.as_str()), ("1", "1")),
            // It may have failed before the command began, but then it has not run.
            125 => assert!(marks == "0" || marks == "1", "it ran {marks} times: {}", done.err()),
            other => panic!("status {other}: {}", done.err()),
        }
    }
    env.close();
}

fn sessions_are_listed() {
    let (env, m) = slim();
    let running = env
        .banger(["vm", "exec", m, "--", "sh", "-c", "echo ready; sleep 20", "listed"])
        .spawn();
    running.expect("ready");
    let session = session_of(env, m, "listed");
    assert_eq!(
        (
            session["running"].clone(),
            session["attached"].clone(),
            session["tty"].clone()
        ),
        (true.into(), true.into(), false.into())
    );
    running.signal(Signal::TERM);
    running.wait().code(143);
}

fn attaching_to_what_is_not_there() {
    let (env, m) = slim();
    env.run(&format!("vm attach {m} 0123456789abcdef"))
        .fails()
        .says(&["0123456789abcdef"]);
    env.run(&format!("vm attach {m} ../../health")).fails();
}
