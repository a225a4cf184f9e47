//! What is printed where, and how.

use std::process::Stdio;

use banger_testkit::{TestEnv, binaries};
use serde_json::{Value, json};

use crate::harness::{MACHINES, shared, slim, tests};

tests! { MACHINES;
    lists_are_empty_arrays,
    everything_that_prints_data_prints_json,
    data_and_the_rest_are_apart,
    colours_obey,
    a_closed_pipe,
    versions,
    completion_and_manual_pages,
    help_has_examples,
    errors_have_a_form,
}

fn lists_are_empty_arrays() {
    let env = TestEnv::bare("empty");
    for line in ["vm list", "ps", "image list", "kernel list", "vm stats"] {
        assert_eq!(env.json(line), json!([]), "{line}");
        let table = env.ok(line).out();
        assert!(table.lines().count() <= 1, "{line}: {table}");
        assert_eq!(env.ok(&format!("{line} --json")).json(), json!([]), "{line}");
    }
    env.close();
}

fn everything_that_prints_data_prints_json() {
    let (env, m) = slim();
    for line in [
        format!("vm show {m}"),
        "image show debian-slim".to_owned(),
        "kernel show default".to_owned(),
        "daemon status".to_owned(),
        "version".to_owned(),
    ] {
        let value = env.json(&line);
        assert!(value["schema_version"].as_u64().is_some(), "{line}: {value}");
    }
    for line in ["vm list", "image list", "kernel list", "vm stats"] {
        let value = env.json(line);
        let items = value.as_array().unwrap_or_else(|| panic!("{line}: {value}"));
        assert!(
            !items.is_empty() && items.iter().all(|i| i["schema_version"].is_u64()),
            "{line}: {value}"
        );
    }
    let doctor = env.banger(["doctor", "--json"]).run();
    let doctor: Value = doctor.json();
    let text = doctor.to_string();
    assert!(text.contains("tcg") || text.contains("kvm"), "{text}");
    let images = env.json("image list");
    assert!(
        images
            .as_array()
            .unwrap()
            .iter()
            .any(|i| i["name"] == "debian" && i["init"].is_string()),
        "{images}"
    );
    assert!(
        images
            .as_array()
            .unwrap()
            .iter()
            .any(|i| i["name"] == "debian-slim" && i["init"].is_null()),
        "{images}"
    );
}

fn data_and_the_rest_are_apart() {
    let env = shared();
    let done = env.ok("vm create --name apart --no-start");
    assert_eq!(done.out(), "apart\n");
    assert!(done.err().contains("spec:"), "{}", done.err());
    let done = env.ok("vm delete apart --quiet");
    assert_eq!(done.err(), "");
    let done = env.ok("vm create --name apart --no-start --quiet");
    assert_eq!((done.out().as_str(), done.err().as_str()), ("apart\n", ""));
    env.ok("vm delete apart");
    // Progress that is no terminal's comes as plain lines.
    assert!(!env.ok("vm list").out().contains('\u{1b}'));
    assert!(!done.err().contains('\r'));
    assert_eq!(env.run("vm show nosuch").out(), "");
}

fn colours_obey() {
    let env = shared();
    let on_terminal = |variables: &[(&str, &str)], args: &[&str]| {
        let mut terminal = banger_testkit::Terminal::start(&binaries::program("banger"), 24, 120, |c| {
            env.prepare(c);
            c.envs(variables.iter().copied()).args(args);
        });
        terminal.wait();
        terminal.screen.text()
    };
    let colour = |text: &str| text.contains("\u{1b}[");
    assert!(colour(&on_terminal(&[], &["vm", "show", "nosuch"])));
    assert!(!colour(&on_terminal(&[("NO_COLOR", "1")], &["vm", "show", "nosuch"])));
    assert!(!colour(&on_terminal(&[("TERM", "dumb")], &["vm", "show", "nosuch"])));
    assert!(!colour(&on_terminal(
        &[],
        &["--color", "never", "vm", "show", "nosuch"]
    )));
    assert!(!colour(&env.run("vm show nosuch").err()));
    assert!(colour(&env.run("--color always vm show nosuch").err()));
}

fn a_closed_pipe() {
    let env = shared();
    for args in [vec!["--help"], vec!["vm", "list", "--json"], vec!["completion", "bash"]] {
        let mut command = std::process::Command::new(binaries::program("banger"));
        env.prepare(&mut command);
        command
            .args(&args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(
            !err.contains("panicked") && !err.contains("roken pipe"),
            "{args:?}: {err}"
        );
    }
}

fn versions() {
    let env = TestEnv::bare("version");
    let line = env.ok("--version").out();
    assert_eq!(line.lines().count(), 1);
    assert!(line.starts_with("banger "), "{line}");
    let daemon = env
        .program(binaries::program("bangerd"))
        .arg("--version")
        .run()
        .code(0)
        .out();
    assert!(
        daemon.starts_with("bangerd ") && daemon.lines().count() == 1,
        "{daemon}"
    );
    let version = env.json("version");
    assert!(line.contains(version["version"].as_str().unwrap()), "{version}");
    env.close();
}

fn completion_and_manual_pages() {
    let env = TestEnv::bare("manual");
    for shell in ["bash", "zsh", "fish"] {
        let script = env.ok(&format!("completion {shell}")).out();
        assert!(script.contains("banger"), "{shell}");
    }
    let dir = env.work().join("man");
    std::fs::create_dir(&dir).unwrap();
    env.ok("man man");
    let pages = std::fs::read_dir(&dir).unwrap().count();
    assert!(pages > 20, "{pages} manual pages");
    assert!(env.processes().is_empty());
    env.close();
}

fn help_has_examples() {
    let env = TestEnv::bare("help");
    for line in [
        "vm run",
        "vm create",
        "vm exec",
        "vm cp",
        "vm ssh",
        "image build",
        "kernel import",
        "daemon status",
        "ssh-config",
    ] {
        let help = env.ok(&format!("{line} --help")).out();
        assert!(help.contains("Example") && help.contains("banger "), "{line}: {help}");
    }
    // A group alone prints its help.
    for group in ["vm", "image", "kernel", "daemon"] {
        assert!(env.ok(group).out().contains("Usage"), "{group}");
    }
    env.close();
}

fn errors_have_a_form() {
    let env = shared();
    let done = env.run("vm show nosuch-machine").code(3);
    let err = done.err();
    let lines: Vec<&str> = err.lines().collect();
    assert!(
        lines[0].starts_with("error: ") && lines[0].contains("nosuch-machine") && !lines[0].ends_with('.'),
        "{err}"
    );
    assert!(lines.iter().any(|l| l.trim_start().starts_with("hint: ")), "{err}");
}
