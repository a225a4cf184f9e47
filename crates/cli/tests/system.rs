//! Which daemon is meant, what is root's to do, and what an audit says.

#![allow(clippy::unwrap_used, reason = "a test may end this way")]

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use support::{Home, MACHINE, Ran};

mod support;

/// Who the owner is: we, or, since root cannot be one, somebody else.
fn uid() -> u32 {
    match rustix::process::getuid().as_raw() {
        0 => 1000,
        uid => uid,
    }
}

/// The program, run by the owner.
struct Owner<'a> {
    home: &'a Home,
    program: PathBuf,
}

impl<'a> Owner<'a> {
    fn of(home: &'a Home) -> Self {
        Self {
            program: home.with_daemon("touch \"$HOME/started\"; exit 1"),
            home,
        }
    }

    fn command(&self) -> Command {
        let mut command = self.home.command(&self.program);
        if uid() != rustix::process::getuid().as_raw() {
            let home = self.home.path("");
            let given = Command::new("chown")
                .arg("-R")
                .arg(uid().to_string())
                .arg(home)
                .status();
            assert!(given.unwrap().success());
            command.uid(uid());
        }
        command
    }

    fn run(&self, mode: &str, arguments: &[&str]) -> Ran {
        Ran::from(
            self.command()
                .env("BANGER_MODE", mode)
                .args(arguments)
                .output()
                .unwrap(),
        )
    }
}

const SYSTEM: &str = "root/run/banger/bangerd.sock";

fn machines(name: &str) -> String {
    format!(
        r#"{{"machines":[{}]}}"#,
        MACHINE.replace(r#""build""#, &format!(r#""{name}""#))
    )
}

#[test]
fn the_owner_meets_the_installed_daemon_and_others_their_own() {
    let home = Home::new();
    home.serve(&[("GET /v1/machines", 200, &machines("mine"))]);
    home.installed_for(uid());
    home.serve_at(SYSTEM, &[("GET /v1/machines", 200, &machines("ours"))]);
    let owner = Owner::of(&home);
    let listed = |mode: &str| owner.run(mode, &["ps", "-q"]);
    let names = |mode: &str| {
        let ran = owner.run(mode, &["ps", "--json"]);
        let value: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        value[0]["name"].as_str().unwrap().to_owned()
    };
    assert_eq!(
        (names(""), names("system"), names("user")),
        ("ours".into(), "ours".into(), "mine".into())
    );
    let ran = listed("both");
    assert!(
        ran.status == Some(2) && ran.stderr.contains("BANGER_MODE is `both`"),
        "{ran:?}"
    );

    // Somebody else's installation.
    home.installed_for(uid() + 1);
    assert_eq!(names(""), "mine");
    let ran = listed("system");
    assert!(
        ran.status == Some(9) && ran.stderr.contains("is dev's, not yours"),
        "{ran:?}"
    );

    // One that cannot be read is nobody's to guess about.
    std::fs::write(home.path("root/etc/banger/install.toml"), "owner").unwrap();
    let ran = listed("");
    assert!(
        ran.status == Some(5) && ran.stderr.contains("install.toml") && ran.stderr.contains("BANGER_MODE=user"),
        "{ran:?}"
    );
    assert_eq!(names("user"), "mine");
}

#[test]
fn the_installed_daemon_is_never_started_nor_stopped() {
    let home = Home::new();
    home.installed_for(uid());
    let owner = Owner::of(&home);
    let run = |arguments: &[&str]| owner.run("", arguments);
    for arguments in [&["vm", "list"][..], &["daemon", "start"], &["doctor"], &["audit"]] {
        let ran = run(arguments);
        assert_eq!(ran.status, Some(9), "{arguments:?} {ran:?}");
        assert!(ran.stderr.contains("sudo banger system restart"), "{ran:?}");
    }
    for (arguments, words) in [
        (["daemon", "stop"], "sudo systemctl stop bangerd"),
        (["daemon", "restart"], "sudo banger system restart"),
    ] {
        let ran = run(&arguments);
        assert!(ran.status == Some(4) && ran.stderr.contains(words), "{ran:?}");
    }
    let ran = run(&["daemon", "status"]);
    assert!(
        ran.status == Some(9) && ran.stdout.contains("installed daemon is not running"),
        "{ran:?}"
    );
    assert!(!home.path("started").exists());
}

#[test]
fn logs_and_keys_are_those_of_the_installation() {
    let home = Home::new();
    home.installed_for(uid());
    std::fs::create_dir_all(home.path("root/var/lib/banger/state")).unwrap();
    std::fs::write(home.path("root/var/lib/banger/state/daemon.log"), "one\ntwo\n").unwrap();
    let owner = Owner::of(&home);
    assert_eq!(owner.run("", &["daemon", "logs", "-n", "1"]).stdout, "two\n");
    owner.run("", &["ssh-config", "--install"]);
    let text = std::fs::read_to_string(home.path(".config/banger/ssh_config")).unwrap();
    assert!(text.contains("root/var/lib/banger/state/ssh/known_hosts"), "{text}");
}

#[test]
fn what_is_roots_to_do_works_on_the_host_only() {
    let home = Home::new();
    for verb in ["install", "restart", "uninstall"] {
        let ran = home.run(&["system", verb]);
        assert!(
            ran.status == Some(2) && ran.stderr.contains("not below BANGER_ROOT="),
            "{verb} {ran:?}"
        );
    }
    let ran = home.run(&["system", "status"]);
    assert!(
        ran.status == Some(3) && ran.stderr.contains("sudo banger system install"),
        "{ran:?}"
    );
}

/// Root's commands say so, and how. Never run as root: that would be the host's own installation.
#[test]
fn somebody_who_is_not_root_is_told_to_be() {
    let home = Home::new();
    let owner = Owner::of(&home);
    for verb in ["install", "restart", "uninstall"] {
        let ran = Ran::from(
            owner
                .command()
                .env_remove("BANGER_ROOT")
                .args(["system", verb])
                .output()
                .unwrap(),
        );
        assert!(ran.status == Some(1) && ran.stderr.contains("needs root"), "{ran:?}");
        let hint = format!("hint: sudo {} system {verb}", owner.program.display());
        assert!(ran.stderr.contains(&hint), "{ran:?}");
    }
}

#[test]
fn the_status_of_an_installation_is_looked_at_without_changing_it() {
    let home = Home::new();
    home.installed_for(uid());
    home.serve_at(
        SYSTEM,
        &[(
            "GET /v1/version",
            200,
            r#"{"version":"9.9.9","commit":"c","api_version":1}"#,
        )],
    );
    let ran = Owner::of(&home).run("", &["system", "status", "--json"]);
    assert_eq!(ran.status, Some(6), "{ran:?}");
    let checks: Vec<serde_json::Value> = serde_json::from_str(&ran.stdout).unwrap();
    let of = |name: &str| {
        let check = checks.iter().find(|c| c["name"] == name).unwrap();
        (check["level"].as_str().unwrap(), check["message"].as_str().unwrap())
    };
    assert_eq!(of("owner"), ("pass", format!("dev (user {})", uid()).as_str()));
    assert!(of("programs").0 == "fail" && of("programs").1.contains("banger-helper is not there"));
    assert_eq!(of("unit bangerd.service").0, "fail");
    assert_eq!(of("helper").0, "fail");
    assert_eq!(of("daemon"), ("warn", "answers, version 9.9.9; this is 0.1.0"));
}

#[test]
fn an_audit_tells_by_its_exit_status() {
    let audit = |objects: &str, blind: &str| format!(r#"{{"objects":[{objects}],"orphans":0,"blind":[{blind}]}}"#);
    let well = r#"{"kind":"process","name":"qemu 7","machine":"00112233aabbccdd"}"#;
    let orphan = r#"{"kind":"interface","name":"tap-fc-1","orphan":"no machine has it"}"#;
    let removed = r#"{"kind":"interface","name":"tap-fc-1","orphan":"no machine has it","removed":true}"#;
    let stuck = r#"{"kind":"dm","name":"fc-x-root","orphan":"no machine has it","failed":"busy"}"#;
    for (objects, blind, status, shown, said) in [
        (well.to_owned(), "", 0, "", "1 well, no orphans"),
        (
            format!("{well},{orphan}"),
            "",
            1,
            "no machine has it",
            "1 well, 1 orphan; `banger audit --fix` removes them",
        ),
        (
            well.to_owned(),
            r#""the helper does not answer""#,
            1,
            "",
            "warning: could not look: the helper",
        ),
        (String::new(), "", 0, "", "0 well, no orphans"),
    ] {
        let home = Home::new();
        home.serve(&[("GET /v1/audit", 200, &audit(&objects, blind))]);
        let ran = home.run(&["audit"]);
        assert_eq!(ran.status, Some(status), "{ran:?}");
        assert!(
            ran.stdout.contains(shown) && (shown.is_empty() == ran.stdout.is_empty()),
            "{ran:?}"
        );
        assert!(ran.stderr.contains(said), "{ran:?}");
        let ran = home.run(&["audit", "--json"]);
        assert_eq!(ran.status, Some(status));
        let value: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(value["schema_version"], 1);
        assert_eq!(
            home.run(&["audit", "--all"]).stdout.contains("well"),
            objects.contains("qemu")
        );
    }
    for (object, status, shown) in [
        (removed, 0, "removed: no machine has it"),
        (stuck, 1, "orphan: no machine has it; cannot be removed: busy"),
    ] {
        let home = Home::new();
        let heard = home.serve(&[("POST /v1/audit/fix", 200, &audit(object, ""))]);
        let ran = home.run(&["audit", "--fix"]);
        assert_eq!(ran.status, Some(status), "{ran:?}");
        assert!(ran.stdout.contains(shown), "{ran:?}");
        assert_eq!(heard.lock().unwrap().len(), 1);
    }
}
