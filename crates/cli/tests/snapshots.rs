//! Templates, snapshots, forks and suspension as users and scripts meet them. The daemon is a few canned answers.

#![allow(clippy::unwrap_used, reason = "a test may end this way")]

use std::path::Path;

use support::{Home, MACHINE, Ran};

mod support;

const DONE: &str =
    r#"{"operation":{"id":"op-1","kind":"k","target":"0123456789abcdef","state":"done","stage":"","started_at":""}}"#;

const SNAPSHOT: &str = r#"{"name":"clean","machine":"build","created_at":"2026-11-22T10:00:00Z","memory":true,
"memory_bytes":26214400,"disk_bytes":4194304,"paused_ms":31}"#;

const IMAGE: &str = r#"{"name":"toolbox","digest":"sha256:00","size_bytes":8589934592,"allocated_bytes":419430400,
"source":"machine build","created_at":"2026-11-22T10:00:00Z"}"#;

const TEMPLATE: &str = r#"{"id":"0123456789abcdef","image":"debian","spec":{"image":"debian","image_digest":"sha256:0",
"kernel":"default","kernel_digest":"sha256:1","engine":"qemu","accel":"tcg","vcpu":2,"memory_mib":1024,"disk_bytes":8589934592,
"network":"user"},"engine_version":"7.2.17","ready":true,"current":true,"memory_bytes":62914560,"disk_bytes":4194304,"uses":7,
"created_at":"2026-11-22T10:00:00Z"}"#;

#[test]
fn states_are_asked_for_and_told() {
    let home = Home::new();
    let list = format!(r#"{{"machines":[{MACHINE}]}}"#);
    let at = |verb: &str| format!("POST /v1/machines/0123456789abcdef/{verb}");
    let verbs = ["pause", "resume", "suspend", "start", "restart", "kill"];
    let paths: Vec<String> = verbs.iter().map(|v| at(v)).collect();
    let mut answers = vec![("GET /v1/machines", 200, list.as_str())];
    answers.extend(paths.iter().map(|p| (p.as_str(), 202, DONE)));
    let heard = home.serve(&answers);
    for (arguments, result) in [
        (&["pause"][..], "paused"),
        (&["resume"], "resumed"),
        (&["suspend"], "suspended"),
        (&["start"], "started"),
        (&["start", "--cold"], "started"),
        (&["restart"], "restarted"),
        (&["kill"], "killed"),
    ] {
        let line = [&["vm"], arguments, &["build", "--json"]].concat();
        let ran = home.run(&line);
        let value: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!((ran.status, &value[0]["result"]), (Some(0), &result.into()), "{line:?}");
    }
    let heard = heard.lock().unwrap();
    let starts: Vec<_> = heard.iter().filter(|r| r.starts_with(&at("start"))).collect();
    assert!(
        starts[0].contains(r#""cold":false"#) && starts[1].contains(r#""cold":true"#),
        "{starts:?}"
    );
}

#[test]
fn a_snapshot_is_taken_listed_and_brought_back() {
    let home = Home::new();
    let list = format!(r#"{{"snapshots":[{SNAPSHOT}]}}"#);
    let heard = home.serve(&[
        ("GET /v1/machines/build/snapshots", 200, &list),
        ("GET /v1/machines/build/snapshots/clean", 200, SNAPSHOT),
        ("POST /v1/machines/build/snapshots", 202, DONE),
        ("POST /v1/machines/build/snapshots/clean/restore", 202, DONE),
        ("DELETE /v1/machines/build/snapshots/clean", 204, ""),
        ("GET /v1/machines/build", 200, MACHINE),
    ]);
    let ran = home.run(&["vm", "snapshot", "create", "build", "clean"]);
    assert_eq!(
        (ran.status, ran.stdout.as_str(), ran.stderr.as_str()),
        (Some(0), "clean\n", "build paused for 31 ms\n")
    );
    home.run(&["vm", "snapshot", "create", "build", "clean", "--disk-only"]);
    let ran = home.run(&["vm", "snapshot", "list", "build"]);
    let row = ran.stdout.lines().nth(1).unwrap();
    assert!(row.starts_with("clean  whole  25M     4M     31 ms"), "{row}");
    assert_eq!(home.run(&["vm", "snapshot", "ls", "build", "-q"]).stdout, "clean\n");
    assert!(
        home.run(&["vm", "snapshot", "show", "build", "clean"])
            .stdout
            .contains("25M (allocated)")
    );
    assert_eq!(
        home.run(&["vm", "snapshot", "restore", "build", "clean"]).stdout,
        "build\n"
    );
    let ran = home.run(&["vm", "snapshot", "delete", "build", "nope", "clean"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(3), "clean\n"), "{ran:?}");
    let heard = heard.lock().unwrap();
    let created: Vec<_> = heard
        .iter()
        .filter(|r| r.starts_with("POST /v1/machines/build/snapshots {"))
        .collect();
    assert!(
        created[0].contains(r#""disk_only":false"#) && created[1].contains(r#""disk_only":true"#),
        "{created:?}"
    );
}

#[test]
fn copies_are_named_one_a_line_and_the_pause_is_told() {
    let home = Home::new();
    let copy = |id: char, name: &str| {
        let id: String = std::iter::repeat_n(id, 16).collect();
        MACHINE
            .replace("0123456789abcdef", &id)
            .replace(r#""name":"build""#, &format!(r#""name":"{name}""#))
            .replace(
                r#""auto_remove":false"#,
                r#""boot":{"how":"fork","from":"build","source_paused_ms":31,"stages":[]},"auto_remove":false"#,
            )
    };
    let (one, two) = (copy('a', "try-1"), copy('b', "try-2"));
    let accepted = format!(r#"{},"machines":[{one},{two}]}}"#, DONE.strip_suffix('}').unwrap());
    let heard = home.serve(&[
        ("POST /v1/machines/build/fork", 202, &accepted),
        (
            "GET /v1/machines",
            200,
            &format!(r#"{{"machines":[{two},{MACHINE},{one}]}}"#),
        ),
    ]);
    let ran = home.run(&["vm", "fork", "build", "-n", "2", "--name", "try"]);
    assert_eq!(
        (ran.status, ran.stdout.as_str(), ran.stderr.as_str()),
        (Some(0), "try-1\ntry-2\n", "source paused for 31 ms\n")
    );
    let value: serde_json::Value = serde_json::from_str(&home.run(&["vm", "fork", "build", "--json"]).stdout).unwrap();
    assert_eq!(
        (&value[1]["name"], &value[1]["schema_version"]),
        (&"try-2".into(), &1.into())
    );
    let heard = heard.lock().unwrap();
    assert!(heard[0].contains(r#""count":2,"name":"try""#), "{heard:?}");
}

#[test]
fn a_commit_prints_the_image() {
    let home = Home::new();
    let heard = home.serve(&[
        ("POST /v1/machines/build/commit", 202, DONE),
        ("GET /v1/images/toolbox", 200, IMAGE),
    ]);
    let ran = home.run(&["vm", "commit", "build", "toolbox", "--snapshot", "clean", "--force"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(0), "toolbox\n"), "{ran:?}");
    assert!(
        heard.lock().unwrap()[0].contains(r#"{"image":"toolbox","snapshot":"clean","force":true}"#),
        "{heard:?}"
    );
}

#[test]
fn templates_are_shown_with_what_they_take() {
    let home = Home::new();
    let heard = home.serve(&[
        ("GET /v1/templates", 200, &format!(r#"{{"templates":[{TEMPLATE}]}}"#)),
        ("GET /v1/templates/0123456789abcdef", 200, TEMPLATE),
        ("POST /v1/templates", 202, DONE),
        (
            "POST /v1/templates/prune",
            200,
            r#"{"removed":["0123456789abcdef"],"freed_bytes":67108864}"#,
        ),
        ("DELETE /v1/templates/0123", 204, ""),
    ]);
    let ran = home.run(&["template", "list"]);
    assert_eq!(
        ran.stdout,
        "ID            IMAGE   VCPU  MEM       SIZE  USES  LAST USED  CURRENT\n\
         0123456789ab  debian  2     1024 MiB  64M   7     never      yes\n"
    );
    let ran = home.run(&["template", "build", "debian", "--memory", "1G", "--force"]);
    assert_eq!(
        (ran.status, ran.stdout.as_str()),
        (Some(0), "0123456789abcdef\n"),
        "{ran:?}"
    );
    let ran = home.run(&["template", "prune", "--all"]);
    assert_eq!(
        (ran.stdout.as_str(), ran.stderr.as_str()),
        ("0123456789abcdef\n", "freed 64M\n")
    );
    assert_eq!(home.run(&["template", "rm", "0123"]).stdout, "0123\n");
    let shown = home.run(&["template", "show", "0123456789abcdef"]).stdout;
    assert!(
        shown.contains("qemu/tcg 7.2.17") && shown.contains("60M memory, 4M disks (allocated)"),
        "{shown}"
    );
    let heard = heard.lock().unwrap();
    let built = heard.iter().find(|r| r.starts_with("POST /v1/templates {")).unwrap();
    assert!(
        built.contains(r#""image":"debian""#) && built.contains(r#""memory_mib":1024"#),
        "{built}"
    );
    assert!(
        heard.iter().any(|r| r == r#"POST /v1/templates/prune {"all":true}"#),
        "{heard:?}"
    );
}

#[test]
fn a_template_is_found_by_its_image_where_the_operation_does_not_name_it() {
    let home = Home::new();
    let other = TEMPLATE
        .replace("0123456789abcdef", "ffffffffffffffff")
        .replace(r#""vcpu":2"#, r#""vcpu":4"#);
    home.serve(&[
        (
            "GET /v1/templates",
            200,
            &format!(r#"{{"templates":[{other},{TEMPLATE}]}}"#),
        ),
        ("POST /v1/templates", 202, &DONE.replace("0123456789abcdef", "debian")),
    ]);
    let built = |vcpu: &str| home.run(&["template", "build", "--vcpu", vcpu]).stdout;
    assert_eq!(
        (built("2").as_str(), built("4").as_str()),
        ("0123456789abcdef\n", "ffffffffffffffff\n")
    );
    assert_eq!(home.run(&["template", "build", "--vcpu", "1"]).status, Some(3));
}

#[test]
fn idle_suspension_is_set_and_taken_back() {
    let home = Home::new();
    let changed = MACHINE.replace("\"auto_remove\"", "\"idle_suspend_after_ms\":7,\"auto_remove\"");
    let heard = home.serve(&[
        ("GET /v1/machines", 200, &format!(r#"{{"machines":[{MACHINE}]}}"#)),
        ("PATCH /v1/machines/0123456789abcdef", 200, &changed),
    ]);
    for (text, ms) in [("30m", 1_800_000), ("0", 0)] {
        let ran = home.run(&["vm", "set", "build", "--idle-suspend-after", text]);
        assert_eq!(
            (ran.status, ran.stdout.as_str(), ran.stderr.as_str()),
            (Some(0), "build\n", "")
        );
        let last = heard.lock().unwrap().last().unwrap().clone();
        assert!(last.contains(&format!(r#""idle_suspend_after_ms":{ms}"#)), "{last}");
    }
}

#[test]
fn completion_knows_snapshots_of_the_machine_on_the_line() {
    let home = Home::new();
    home.serve(&[
        (
            "GET /v1/machines/build/snapshots",
            200,
            &format!(r#"{{"snapshots":[{SNAPSHOT}]}}"#),
        ),
        ("GET /v1/templates", 200, &format!(r#"{{"templates":[{TEMPLATE}]}}"#)),
    ]);
    let complete = |words: &[&str]| {
        let mut command = home.command(Path::new(support::PROGRAM));
        command
            .env("BANGER_COMPLETE", "fish")
            .args(["--", "banger"])
            .args(words);
        Ran::from(command.output().unwrap()).stdout
    };
    assert!(complete(&["vm", "snapshot", "restore", "build", ""]).contains("clean\t"));
    assert!(complete(&["vm", "commit", "build", "x", "--snapshot", ""]).contains("clean\t"));
    assert!(!complete(&["vm", "snapshot", "restore", "other", ""]).contains("clean"));
    assert!(complete(&["template", "delete", "01"]).contains("0123456789abcdef\tdebian, 2 vcpu"));
}
