//! The program as users and scripts meet it: exit statuses, streams, files. The daemon is a few canned answers.

#![allow(clippy::unwrap_used, reason = "a test may end this way")]

use std::path::Path;
use std::process::Stdio;

use support::{Home, MACHINE, PROGRAM, Ran};

mod support;

#[test]
fn groups_without_arguments_show_help() {
    let home = Home::new();
    for arguments in [
        &[][..],
        &["vm"],
        &["vm", "snapshot"],
        &["image"],
        &["kernel"],
        &["template"],
        &["daemon"],
        &["system"],
    ] {
        let ran = home.run(arguments);
        assert_eq!(ran.status, Some(0), "{arguments:?}");
        assert!(ran.stdout.contains("Usage:") && ran.stderr.is_empty(), "{ran:?}");
    }
}

#[test]
fn usage_errors_have_their_status() {
    let home = Home::new();
    for (arguments, status) in [
        (&["vm", "list", "--bogus"][..], 2),
        (&["bogus"], 2),
        (&["vm", "create", "--memory", "512"], 2),
        (&["vm", "create", "--name", "Not-Valid"], 2),
        (&["vm", "set", "x"], 2),
        (&["vm", "cp", "a", "b"], 2),
        (&["vm", "fork", "x", "-n", "0"], 2),
        (&["vm", "kill", "-s", "FOO", "x"], 2),
        (&["vm", "fork", "x", "--name", "../y"], 2),
        (&["vm", "snapshot", "create", "x", "../../y"], 2),
        (&["vm", "create", "--no-start", "--cold"], 2),
        (&["vm", "set", "x", "--idle-suspend-after", "soon"], 2),
        // Where the status is the guest's, ours is always the same.
        (&["run", "--bogus"], 125),
        (&["run", "-d", "--rm"], 125),
        (&["vm", "run", "--vcpu", "0"], 125),
        (&["vm", "exec", "x"], 125),
        (&["run", "./absent", "--", "true"], 125),
    ] {
        let ran = home.run(arguments);
        assert_eq!(ran.status, Some(status), "{arguments:?} {ran:?}");
        assert!(ran.stderr.starts_with("error: ") && ran.stdout.is_empty(), "{ran:?}");
    }
    assert!(
        home.run(&["vm", "create", "--memory", "512"]).stderr.contains("512M"),
        "says what to write"
    );
}

#[test]
fn an_empty_list_is_empty_and_objects_carry_the_schema_version() {
    let home = Home::new();
    home.serve(&[
        ("GET /v1/machines", 200, r#"{"machines":[]}"#),
        ("GET /v1/images", 200, r#"{"images":[]}"#),
        ("GET /v1/kernels", 200, r#"{"kernels":[]}"#),
        ("GET /v1/templates", 200, r#"{"templates":[]}"#),
        ("GET /v1/machines/build/snapshots", 200, r#"{"snapshots":[]}"#),
        ("GET /v1/machines/build", 200, MACHINE),
    ]);
    for arguments in [
        &["vm", "list", "--json"][..],
        &["ps", "--format", "json"],
        &["image", "list", "--json"],
        &["kernel", "list", "--json"],
        &["template", "list", "--json"],
        &["vm", "snapshot", "list", "build", "--json"],
        &["vm", "stats", "--json"],
        &["vm", "prune", "--json", "--force"],
    ] {
        let ran = home.run(arguments);
        assert_eq!(
            (ran.status, ran.stdout.as_str()),
            (Some(0), "[]\n"),
            "{arguments:?} {ran:?}"
        );
    }
    assert_eq!(home.run(&["vm", "list", "--quiet"]).stdout, "");
    assert!(home.run(&["vm", "list"]).stdout.starts_with("ID  NAME"));
    let shown = home.run(&["vm", "show", "build", "--json"]).stdout;
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((&shown["schema_version"], &shown["name"]), (&1.into(), &"build".into()));
}

#[test]
fn failures_have_the_status_of_their_kind_and_a_hint() {
    let home = Home::new();
    let refuse =
        |code: &str| format!(r#"{{"error":{{"code":"{code}","message":"it failed","hint":"try \u001b[31mharder"}}}}"#);
    let cases = [
        ("not_found", 3),
        ("conflict", 4),
        ("invalid_spec", 5),
        ("unsupported", 6),
        ("timeout", 7),
        ("no_space", 8),
    ];
    let answers: Vec<(String, u16, String)> = cases
        .iter()
        .map(|(code, _)| {
            (
                format!("GET /v1/machines/{}", code.replace('_', "-")),
                400,
                refuse(code),
            )
        })
        .collect();
    let answers: Vec<(&str, u16, &str)> = answers.iter().map(|a| (a.0.as_str(), a.1, a.2.as_str())).collect();
    home.serve(&answers);
    for (code, status) in cases {
        let ran = home.run(&["vm", "show", &code.replace('_', "-")]);
        assert_eq!(ran.status, Some(status), "{code} {ran:?}");
        assert_eq!(ran.stderr, "error: it failed\n\nhint: try \u{fffd}[31mharder\n");
    }
    assert_eq!(home.run(&["vm", "exec", "not-found", "true"]).status, Some(125));
}

#[test]
fn several_machines_are_done_whatever_becomes_of_the_others() {
    let home = Home::new();
    let list = format!(r#"{{"machines":[{MACHINE}]}}"#);
    let done = r#"{"operation":{"id":"op-1","kind":"k","target":"t","state":"done","stage":"","started_at":""}}"#;
    home.serve(&[
        ("GET /v1/machines", 200, &list),
        ("POST /v1/machines/0123456789abcdef/stop", 202, done),
    ]);
    let ran = home.run(&["vm", "stop", "nope", "build", "0123", "buidl"]);
    assert_eq!(ran.stdout, "build\n", "once, though it is meant twice");
    assert_eq!(ran.status, Some(3));
    assert!(
        ran.stderr.contains("no machine `nope`") && ran.stderr.contains("did you mean `build`?"),
        "{}",
        ran.stderr
    );
    let ran = home.run(&["vm", "stop", "build", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(value[0]["result"], "stopped");
}

#[test]
fn what_is_so_already_is_unchanged() {
    let home = Home::new();
    let list = format!(r#"{{"machines":[{MACHINE}]}}"#);
    let nothing = r#"{"operation":{"id":"op-1","kind":"k","target":"t","state":"done","stage":"","started_at":"","unchanged":true}}"#;
    let verbs = [
        ("start", "running"),
        ("stop", "stopped"),
        ("kill", "stopped"),
        ("pause", "paused"),
        ("resume", "running"),
        ("suspend", "suspended"),
    ];
    let requests: Vec<String> = verbs
        .iter()
        .map(|(verb, _)| format!("POST /v1/machines/0123456789abcdef/{verb}"))
        .collect();
    let mut answers = vec![
        ("GET /v1/machines", 200, list.as_str()),
        ("GET /v1/machines/build", 200, MACHINE),
        ("PATCH /v1/machines/0123456789abcdef", 200, MACHINE),
    ];
    answers.extend(requests.iter().map(|request| (request.as_str(), 202, nothing)));
    home.serve(&answers);
    let unchanged = |arguments: &[&str], already: &str| {
        let ran = home.run(arguments);
        assert_eq!((ran.status, ran.stdout.as_str()), (Some(0), "build\n"), "{arguments:?}");
        assert!(ran.stderr.contains(already), "{arguments:?}: {}", ran.stderr);
        let ran = home.run(&[arguments, &["--json"]].concat());
        let value: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(value[0]["result"], "unchanged", "{arguments:?}");
        assert_eq!(ran.stderr, "", "{arguments:?}");
    };
    for (verb, state) in verbs {
        unchanged(&["vm", verb, "build"], &format!("build is {state} already"));
    }
    unchanged(&["vm", "set", "build", "--vcpu", "2"], "build is set so already");
    let ran = home.run(&["vm", "rename", "build", "build"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(0), "build\n"));
    assert!(ran.stderr.contains("already"), "{}", ran.stderr);
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let home = Home::new();
    let list = format!(r#"{{"machines":[{MACHINE}]}}"#);
    let done = r#"{"operation":{"id":"op-1","kind":"k","target":"t","state":"done","stage":"","started_at":""}}"#;
    home.serve(&[
        ("GET /v1/machines", 200, &list),
        ("GET /v1/machines/build", 200, MACHINE),
        ("GET /v1/machines/0123456789abcdef/files?path=/x", 200, "a tar stream"),
        ("GET /v1/machines/build/logs?follow=false", 200, "a console"),
        ("GET /v1/images", 200, r#"{"images":[]}"#),
        ("POST /v1/machines/0123456789abcdef/stop", 202, done),
    ]);
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for arguments in [
        &["vm", "list"][..],
        &["vm", "list", "--json"],
        &["vm", "list", "--quiet"],
        &["vm", "show", "build"],
        &["vm", "show", "build", "--json"],
        &["vm", "logs", "build"],
        &["vm", "cp", "build:/x", "-"],
        &["vm", "stop", "build"],
        &["vm", "stop", "build", "--json"],
        &["image", "list", "--json"],
        &["completion", "bash"],
        &["internal", "cli-reference"],
        &["version"],
        &["version", "--json"],
        &["--version"],
        &["--help"],
        &["vm", "list", "--help"],
        &["vm"],
    ] {
        let ran = home
            .command(Path::new(PROGRAM))
            .args(arguments)
            .stdout(full())
            .stderr(Stdio::piped())
            .output();
        let ran = Ran::from(ran.unwrap());
        assert_eq!(ran.status, Some(8), "{arguments:?}: {}", ran.stderr);
        // Help is shown before there is anything that could say more.
        if !arguments.iter().any(|a| a.starts_with("--h") || *a == "--version") && arguments != ["vm"] {
            assert!(
                ran.stderr.contains("cannot write output"),
                "{arguments:?}: {}",
                ran.stderr
            );
        }
    }
}

#[test]
fn a_command_that_linux_cannot_start_is_refused_before_anything_is_sent() {
    let home = Home::new();
    let heard = home.serve(&[("GET /v1/machines/build", 200, MACHINE)]);
    // With a larger stack this host takes more than a guest does.
    let script = "ulimit -s unlimited 2>/dev/null || exit 99; exec \"$0\" vm exec build -- echo $(seq 1 250000)";
    let ran = home.command(Path::new("sh")).args(["-c", script, PROGRAM]).output();
    let ran = Ran::from(ran.unwrap());
    if ran.status == Some(99) {
        return;
    }
    assert_eq!(ran.status, Some(125), "{}", ran.stderr);
    assert!(
        ran.stderr.contains("arguments and variables of the command take") && ran.stderr.contains("hint:"),
        "{}",
        ran.stderr
    );
    assert!(heard.lock().unwrap().is_empty());
}

#[test]
fn a_closed_pipe_is_no_news() {
    let home = Home::new();
    let many = vec![MACHINE; 2000].join(",");
    home.serve(&[("GET /v1/machines", 200, &format!(r#"{{"machines":[{many}]}}"#))]);
    let mut child = home
        .command(Path::new(PROGRAM))
        .args(["vm", "list"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let ran = Ran::from(child.wait_with_output().unwrap());
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(141), ""));
}

#[test]
fn colours_are_for_those_who_want_them() {
    let home = Home::new();
    assert!(!home.run(&["vm", "list", "--bogus"]).stderr.contains('\x1b'));
    assert!(
        home.run(&["vm", "list", "--bogus", "--color", "always"])
            .stderr
            .contains('\x1b')
    );
    let checks = r#"{"checks":[{"name":"kvm","level":"fail","message":"none","hint":"none"}]}"#;
    home.serve(&[("GET /v1/doctor", 200, checks)]);
    let plain = home.run(&["doctor"]);
    assert_eq!(
        (plain.status, plain.stdout.as_str()),
        (Some(6), "FAIL  kvm  none\n           hint: none\n")
    );
    assert!(
        home.run(&["doctor", "--color=always"])
            .stdout
            .contains("\x1b[1;31mFAIL")
    );
}

#[test]
fn a_daemon_that_does_not_start_is_quoted() {
    let home = Home::new();
    let program = home.with_daemon("echo 'error: config.toml:3:1: unknown key `x`' >&2; exit 1");
    let ran = Ran::from(home.command(&program).args(["vm", "list"]).output().unwrap());
    assert_eq!(ran.status, Some(9));
    assert_eq!(
        ran.stderr,
        "error: the daemon did not start: config.toml:3:1: unknown key `x`\n"
    );
    // Asking for its state starts nothing.
    let ran = Ran::from(
        home.command(&program)
            .args(["daemon", "status", "--json"])
            .output()
            .unwrap(),
    );
    assert_eq!(ran.status, Some(9));
    assert!(ran.stdout.contains(r#""running": false"#), "{ran:?}");
    let ran = Ran::from(home.command(&program).args(["daemon", "stop"]).output().unwrap());
    assert_eq!(ran.status, Some(0));
}

#[test]
fn another_version_of_the_daemon_is_named() {
    let home = Home::new();
    home.serve(&[
        ("GET /v1/machines", 200, r#"{"things":[]}"#),
        (
            "GET /v1/version",
            200,
            r#"{"version":"9.9.9","commit":"unknown","api_version":9}"#,
        ),
    ]);
    let ran = home.run(&["vm", "list"]);
    assert_eq!(ran.status, Some(9));
    assert!(
        ran.stderr.contains("version 9.9.9 (API 9)") && ran.stderr.contains("banger daemon stop"),
        "{ran:?}"
    );
}

#[test]
fn a_dry_run_lists_files_and_starts_nothing() {
    let home = Home::new();
    let program = home.with_daemon("touch \"$HOME/started\"; exit 1");
    let git = |arguments: &[&str]| {
        let ran = home
            .command(Path::new("git"))
            .args(["-c", "user.name=T", "-c", "user.email=t@e"])
            .args(arguments)
            .output();
        assert!(ran.unwrap().status.success());
    };
    git(&["init", "-q", "r"]);
    std::fs::write(home.path("r/a b.txt"), "x").unwrap();
    std::fs::write(home.path("r/un\x1btracked"), "x").unwrap();
    git(&["-C", "r", "add", "a b.txt"]);
    git(&["-C", "r", "commit", "-qm", "first"]);
    let ran = Ran::from(
        home.command(&program)
            .args(["run", "./r", "--dry-run"])
            .output()
            .unwrap(),
    );
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(0), "a b.txt\n"));
    assert!(
        ran.stderr
            .contains("1 untracked file is not copied; --include-untracked"),
        "{}",
        ran.stderr
    );
    let ran = home
        .command(&program)
        .args(["run", "~/r", "--dry-run", "--include-untracked", "-q"])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8(ran.stdout).unwrap(),
        "a b.txt\n\"un\\u{1b}tracked\"\n"
    );
    let ran = Ran::from(
        home.command(&program)
            .args(["run", "./r", "--dry-run", "--json"])
            .output()
            .unwrap(),
    );
    let value: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        (
            &value["schema_version"],
            &value["files"][0],
            &value["skipped_untracked"]
        ),
        (&1.into(), &"a b.txt".into(), &1.into())
    );
    assert!(!home.path("started").exists(), "no daemon");
}

#[test]
fn completion_knows_machines_and_starts_nothing() {
    let home = Home::new();
    let program = home.with_daemon("touch \"$HOME/started\"; exit 1");
    let complete = |words: &[&str]| {
        let mut command = home.command(&program);
        command
            .env("BANGER_COMPLETE", "fish")
            .arg("--")
            .arg("banger")
            .args(words);
        Ran::from(command.output().unwrap())
    };
    let ran = complete(&["vm", "stop", ""]);
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(0), ""));
    assert!(!home.path("started").exists());
    let list = format!(r#"{{"machines":[{MACHINE}]}}"#);
    home.serve(&[("GET /v1/machines", 200, &list)]);
    assert!(
        complete(&["vm", "stop", "bu"])
            .stdout
            .contains("build\trunning, debian")
    );
    assert!(complete(&["vm", "sh"]).stdout.contains("shell"));
    for shell in ["bash", "zsh", "fish"] {
        assert!(
            home.run(&["completion", shell]).stdout.contains("BANGER_COMPLETE"),
            "{shell}"
        );
    }
}

#[test]
fn what_loses_something_takes_whole_names() {
    let home = Home::new();
    let machines = format!(r#"{{"machines":[{MACHINE}]}}"#);
    let heard = home.serve(&[("GET /v1/machines", 200, &machines)]);
    for arguments in [
        &["vm", "rm", "bui"][..],
        &["vm", "delete", "012", "--force"],
        &["vm", "kill", "buil"],
        &["vm", "stop", "b"],
        &["vm", "restart", "b"],
        &["vm", "start", "b", "--cold"],
    ] {
        let ran = home.run(arguments);
        assert_eq!(ran.status, Some(3), "{arguments:?} {ran:?}");
        assert!(
            ran.stderr.contains("is only the beginning of build") && ran.stderr.contains("hint: "),
            "{arguments:?} {ran:?}"
        );
    }
    let asked = heard.lock().unwrap().clone();
    assert!(asked.iter().all(|request| request.starts_with("GET")), "{asked:?}");
    // A whole name, and enough of an id. The daemon of this test knows no more than the list.
    for reference in ["build", "0123", "0123456789abcdef"] {
        home.run(&["vm", "rm", reference]);
        let asked = std::mem::take(&mut *heard.lock().unwrap());
        assert!(
            asked
                .iter()
                .any(|request| request.starts_with("DELETE /v1/machines/0123456789abcdef")),
            "{reference}: {asked:?}"
        );
    }
    // Where nothing is lost a beginning is still enough.
    home.run(&["vm", "suspend", "bui"]);
    let asked = heard.lock().unwrap().clone();
    assert!(asked.iter().any(|request| request.starts_with("POST")), "{asked:?}");
}

#[test]
fn a_terminal_is_asked_before_a_machine_at_work_is_removed() {
    let home = Home::new();
    if home.command(Path::new("script")).arg("--version").output().is_err() {
        return;
    }
    let machines = format!(r#"{{"machines":[{MACHINE}]}}"#);
    let heard = home.serve(&[("GET /v1/machines", 200, &machines)]);
    let on_terminal = |arguments: &str, answer: &str| {
        let mut child = home
            .command(Path::new("script"))
            .args(["-q", "-e", "-c", &format!("{PROGRAM} {arguments}"), "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), answer.as_bytes()).unwrap();
        let shown = String::from_utf8_lossy(&child.wait_with_output().unwrap().stdout).into_owned();
        let asked = std::mem::take(&mut *heard.lock().unwrap());
        (shown, asked.iter().any(|request| request.starts_with("DELETE")))
    };
    let (shown, deleted) = on_terminal("vm rm build", "n\n");
    assert!(
        shown.contains("build would be ended and removed") && !deleted,
        "{shown}"
    );
    assert!(shown.contains("nothing removed"), "{shown}");
    assert!(on_terminal("vm rm build", "y\n").1);
    let (shown, deleted) = on_terminal("--quiet vm rm build", "n\n");
    assert!(shown.contains("[y/N]") && !deleted, "asked in silence: {shown}");
    for flag in ["-f", "-y", "--force", "--yes"] {
        let (shown, deleted) = on_terminal(&format!("vm rm {flag} build"), "");
        assert!(deleted && !shown.contains("[y/N]"), "{flag}: {shown}");
    }
    // Not a terminal: a script is not asked.
    home.run(&["vm", "rm", "build"]);
    assert!(
        heard
            .lock()
            .unwrap()
            .iter()
            .any(|request| request.starts_with("DELETE"))
    );
}

#[test]
fn removals_say_in_json_what_went() {
    let home = Home::new();
    home.serve(&[
        ("DELETE /v1/images/one", 204, ""),
        ("DELETE /v1/templates/3f0c3f0c", 204, ""),
    ]);
    let ran = home.run(&["image", "delete", "one", "two", "--json"]);
    assert_eq!(ran.status, Some(3), "{ran:?}");
    let removed: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(removed.as_array().unwrap().len(), 1);
    assert_eq!(
        (&removed[0]["name"], &removed[0]["schema_version"]),
        (&"one".into(), &1.into())
    );
}

#[test]
fn a_wrong_configuration_has_its_status() {
    for (status, expected) in [(2, 5), (1, 9)] {
        let home = Home::new();
        let script =
            format!("echo 'error: the configuration is wrong' >&2; echo 'hint: correct it' >&2; exit {status}");
        let program = home.with_daemon(&script);
        let ran = Ran::from(home.command(&program).args(["vm", "list"]).output().unwrap());
        assert_eq!(ran.status, Some(expected), "{ran:?}");
        assert!(ran.stderr.contains("hint: correct it"), "{ran:?}");
    }
}

#[test]
fn man_pages_are_written_for_every_command() {
    let home = Home::new();
    assert_eq!(home.run(&["man", "pages/man1"]).status, Some(0));
    for page in ["banger.1", "banger-vm.1", "banger-vm-run.1", "banger-image-build.1"] {
        let text = std::fs::read_to_string(home.path("pages/man1").join(page)).unwrap();
        assert!(text.contains(".TH"), "{page}");
    }
}

#[test]
fn version_is_one_line_and_starts_nothing() {
    let home = Home::new();
    let ran = home.run(&["--version"]);
    assert!(
        ran.stdout.starts_with("banger v") && ran.stdout.lines().count() == 1,
        "{ran:?}"
    );
    let ran = home.run(&["version"]);
    assert!(ran.stdout.contains("daemon   not running"), "{ran:?}");
}
