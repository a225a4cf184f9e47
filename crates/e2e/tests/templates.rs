//! Templates: made once, used by every new machine, and never the reason why one does not start.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use banger_testkit::{Cmd, TestEnv, env::CONFIG, processes};
use serde_json::Value;

use crate::copies::{daemon_with, has_entries, templates};
use crate::harness::{MACHINES, create, shared, tests};

tests! { MACHINES;
    damaged_memory_is_no_failed_start,
    damaged_devices_and_disks_are_no_failed_start,
    a_damaged_manifest_is_no_failed_start,
    a_daemon_dies_while_one_is_made,
    the_least_recently_used_go,
    two_first_runs_make_one,
    many_runs_at_once,
    what_there_is_can_be_seen,
    a_cold_start_boots,
    deleting_one_in_use_hurts_nobody,
    removed_under_the_daemon,
    another_measurement_of_the_same_counter_needs_no_other,
    switched_off,
    what_is_cancelled_leaves_nothing,
}

/// How a machine was started.
fn how(env: &TestEnv, m: &str) -> String {
    env.machine(m)["boot"]["how"].as_str().unwrap_or_default().to_owned()
}

/// The template of slim machines, and where it is.
fn slim_template(env: &TestEnv) -> (String, PathBuf) {
    let id = env.ok("template build").out().trim().to_owned();
    let place = env.state().join("templates").join(&id);
    (id, place)
}

fn what_there_is_can_be_seen() {
    let env = TestEnv::new("tpl-list");
    let list = env.json("template list");
    let (id, place) = slim_template(&env);
    let listed = list
        .as_array()
        .unwrap()
        .iter()
        .find(|t| t["id"] == id.as_str())
        .unwrap();
    let (ready, current) = (listed["ready"].as_bool(), listed["current"].as_bool());
    assert_eq!((ready, current), (Some(true), Some(true)), "{listed}");
    assert_eq!(listed["spec"]["memory_mib"], 512);
    // What is shown is what is allocated.
    let memory = listed["memory_bytes"].as_u64().unwrap();
    assert!((20 << 20..200 << 20).contains(&memory), "{listed}");
    assert!(place.join("memory").is_file());
    let text = env.ok("template list").out();
    assert!(
        text.starts_with("ID ") && text.contains(&id[..12]) && text.contains("debian-slim"),
        "{text}"
    );
    assert!(
        env.ok(&format!("template show {}", &id[..6]))
            .out()
            .contains("debian-slim")
    );
    assert!(env.ok("template list --quiet").out().lines().any(|l| l == id));

    // A use is counted.
    let uses = |id: &str| env.json(&format!("template show {id}"))["uses"].as_u64().unwrap();
    let before = uses(&id);
    create(&env, "m", "debian-slim");
    env.ok("vm run --rm -- true");
    assert_eq!(uses(&id), before + 2);
    let boot = env.machine("m")["boot"].clone();
    assert_eq!(
        (boot["how"].as_str(), boot["from"].as_str()),
        (Some("template"), Some(id.as_str())),
        "{boot}"
    );
    assert!(boot["stages"].as_array().is_some_and(|s| s.len() >= 3), "{boot}");
    assert!(
        env.ok("vm show m").out().contains("template"),
        "{}",
        env.ok("vm show m").out()
    );
    let timed = env.ok("vm run --rm --timings -- true").err();
    assert!(timed.contains("identity") || timed.contains("restore"), "{timed}");

    // Other machines, another template; the same, the same.
    let before = std::fs::metadata(&place).unwrap();
    assert_eq!(env.ok("template build debian-slim").out().trim(), id);
    let after = std::fs::metadata(&place).unwrap();
    assert_eq!(
        before.modified().unwrap(),
        after.modified().unwrap(),
        "it was made anew"
    );
    let other = env
        .banger(["template", "build", "--network", "none"])
        .deadline(120)
        .ok()
        .out();
    assert_ne!(other.trim(), id);
    assert!(templates(&env).contains(&other.trim().to_owned()));

    env.run("template show nosuch").fails().says(&["nosuch", "template"]);
    env.run("template delete nosuch").fails().says(&["nosuch"]);
    env.run("template build nosuchimage").fails().says(&["nosuchimage"]);
    env.ok(&format!("template delete {}", other.trim()));
    env.run(&format!("template show {}", other.trim())).fails();
    assert!(!env.state().join("templates").join(other.trim()).exists());
    env.ok("template prune").prints("");
    let all = env.ok("template prune --all").out();
    assert!(all.lines().any(|l| l == id), "{all}");
    assert_eq!(env.json("template list"), serde_json::json!([]));
    assert!(!has_entries(&env.state().join("templates")));
    env.close();
}

fn a_cold_start_boots() {
    let env = shared();
    let run = ["vm", "run", "-d", "--cold", "--name", "cold"];
    env.banger(run).deadline(120).ok();
    assert_eq!(how(env, "cold"), "boot");
    assert!(env.ok("vm show cold").out().contains("boot"));
    env.sh("cold", "hostname").code(0).prints("cold\n");
    env.ok("vm delete cold --force");
}

fn many_runs_at_once() {
    let env = TestEnv::new("tpl-many");
    let runs: Vec<_> = (0..20)
        .map(|i| {
            env.banger(["vm", "run", "--rm", "--name", &format!("m{i}"), "--", "hostname"])
                .deadline(120)
                .spawn()
        })
        .collect();
    for (i, run) in runs.into_iter().enumerate() {
        run.wait().code(0).prints(&format!("m{i}\n"));
    }
    assert!(env.machine_names().is_empty());
    let used = env.json("template list")[0].clone();
    assert_eq!(used["uses"], 20, "{used}");
    env.close();
}

fn two_first_runs_make_one() {
    let env = TestEnv::new("tpl-first");
    env.ok("template prune --all");
    let runs: Vec<_> = ["a", "b"]
        .iter()
        .map(|name| env.banger(["vm", "create", "--name", name]).deadline(120).spawn())
        .collect();
    let mut most = 0;
    processes::until("both machines", Duration::from_secs(100), || {
        let builders = env.engines().iter().filter(|p| !p.command.contains("incoming")).count();
        most = most.max(builders);
        env.machine_names().len() == 2 && ["a", "b"].iter().all(|m| env.machine_state(m) == "running")
    });
    runs.into_iter().for_each(|r| drop(r.wait().code(0)));
    assert_eq!(most, 1, "engines that booted at once");
    let list = env.json("template list");
    assert_eq!(
        (list.as_array().unwrap().len(), list[0]["uses"].as_u64()),
        (1, Some(2)),
        "{list}"
    );
    for m in ["a", "b"] {
        assert_eq!(how(&env, m), "template");
    }
    env.close();
}

/// A file with other content, and another file than the one that other environments have too.
fn rewrite(path: &Path, change: impl FnOnce(&Path)) {
    let copy = path.with_extension("changed");
    let cp = Command::new("cp")
        .args(["--sparse=always", "--reflink=never"])
        .args([path, &copy])
        .status();
    assert!(cp.unwrap().success());
    change(&copy);
    std::fs::rename(&copy, path).unwrap();
}

/// Other bytes in the middle of a file.
fn flip(path: &Path) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut bytes = [0; 64];
    let middle = file.metadata().unwrap().len() / 2;
    file.read_exact_at(&mut bytes, middle).unwrap();
    file.write_all_at(&bytes.map(|b| !b), middle).unwrap();
}

fn truncate(path: &Path) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
}

/// What is done to a template in its directory, and what that is called.
type Damage = (&'static str, fn(&Path));

/// Starts a machine from a template with each damage: it starts all the same. Then the next one starts from a template that is whole.
fn damaged(name: &str, damages: &[Damage]) {
    let env = TestEnv::new(name);
    let (id, place) = slim_template(&env);
    let whole = env.root().join("whole");
    Cmd::new("cp")
        .args(["-al".as_ref(), place.as_os_str(), whole.as_os_str()])
        .ok();
    for (what, damage) in damages {
        env.ok("daemon stop");
        let _ = std::fs::remove_dir_all(&place);
        Cmd::new("cp")
            .args(["-al".as_ref(), whole.as_os_str(), place.as_os_str()])
            .ok();
        damage(&place);
        env.banger(["vm", "create", "--name", "m"]).deadline(120).ok();
        env.sh("m", "hostname").code(0).prints("m\n");
        let started = how(&env, "m");
        // What cannot be read was no template, and another one is made at once; any other shows when it is used.
        assert!(started == "boot" || started == "template", "{what}: {started}");
        if started == "boot" {
            assert!(!place.join("manifest.json").exists(), "{what}: the template is kept");
            assert!(
                env.daemon_log().contains("a template failed and is dropped"),
                "{what}: the log says nothing"
            );
        }
        env.ok("vm delete m --force");
        assert!(env.machinery().is_empty(), "{what}: {:?}", env.processes());
    }
    create(&env, "m", "debian-slim");
    assert_eq!(how(&env, "m"), "template", "the template is not replaced");
    assert_eq!(env.machine("m")["boot"]["from"].as_str(), Some(id.as_str()));
    env.close();
}

fn damaged_memory_is_no_failed_start() {
    damaged(
        "tpl-memory",
        &[
            ("memory with other bytes", |t| rewrite(&t.join("memory"), flip)),
            ("memory cut off", |t| rewrite(&t.join("memory"), truncate)),
            ("no memory", |t| std::fs::remove_file(t.join("memory")).unwrap()),
        ],
    );
}

fn damaged_devices_and_disks_are_no_failed_start() {
    damaged(
        "tpl-devices",
        &[
            ("devices with other bytes", |t| rewrite(&t.join("state"), flip)),
            ("no devices", |t| std::fs::remove_file(t.join("state")).unwrap()),
            ("no disks", |t| std::fs::remove_dir_all(t.join("disks")).unwrap()),
        ],
    );
}

fn a_damaged_manifest_is_no_failed_start() {
    damaged(
        "tpl-manifest",
        &[
            ("a manifest that is no JSON", |t| {
                rewrite(&t.join("manifest.json"), truncate)
            }),
            ("no manifest", |t| {
                std::fs::remove_file(t.join("manifest.json")).unwrap()
            }),
        ],
    );
}

fn removed_under_the_daemon() {
    let env = TestEnv::new("tpl-gone");
    let (id, place) = slim_template(&env);
    // The daemon has used it and knows it.
    env.ok("vm run --rm -- true");
    std::fs::remove_dir_all(&place).unwrap();
    create(&env, "m", "debian-slim");
    env.sh("m", "hostname").code(0).prints("m\n");
    create(&env, "n", "debian-slim");
    assert_eq!(how(&env, "n"), "template");
    assert_eq!(templates(&env).iter().filter(|t| **t == id).count(), 1);
    // Nor does it need the directory of all of them.
    std::fs::remove_dir_all(env.state().join("templates")).unwrap();
    env.banger(["vm", "run", "--rm", "--", "true"]).deadline(120).ok();
    env.close();
}

/// The kernel line holds the frequency of the host's counter, of which each daemon makes a measurement of its own.
fn another_measurement_of_the_same_counter_needs_no_other() {
    let env = TestEnv::new("tpl-counter");
    let (id, _) = slim_template(&env);
    let file = env.state().join("tsc-khz");
    let kept = || std::fs::read_to_string(&file).unwrap().trim().parse::<u64>().unwrap();
    env.ok("daemon stop");
    // Far enough from any measurement now, near enough to be the same counter.
    let other = kept() + 20;
    std::fs::write(&file, format!("{other}\n")).unwrap();
    let by_other = slim_template(&env).0;
    assert_ne!(by_other, id, "the figure that is kept is not used");
    env.ok("daemon stop");
    assert_eq!(slim_template(&env).0, by_other, "a restart needs another template");
    assert_eq!(kept(), other);
    create(&env, "m", "debian-slim");
    assert_eq!(env.machine("m")["boot"]["from"].as_str(), Some(by_other.as_str()));
    env.close();
}

fn the_least_recently_used_go() {
    let env = TestEnv::new("tpl-budget");
    let (slim, _) = slim_template(&env);
    let bytes = |t: &Value| t["memory_bytes"].as_u64().unwrap() + t["disk_bytes"].as_u64().unwrap();
    let list = env.json("template list");
    let list = list.as_array().unwrap();
    assert_eq!(list.len(), 2, "those of slim and of debian");
    let of_slim = bytes(list.iter().find(|t| t["id"] == slim.as_str()).unwrap());
    let of_debian = bytes(list.iter().find(|t| t["id"] != slim.as_str()).unwrap());
    env.ok("daemon stop");
    // Room for two of slim, and not for that of debian beside them.
    let budget = (2 * of_slim + of_debian / 2) >> 20;
    env.config(&format!("{CONFIG}\n[templates]\nbudget = \"{budget}M\"\n"));
    env.ok("vm run --rm -- true");
    let third = env
        .banger(["template", "build", "--network", "none"])
        .deadline(120)
        .ok()
        .out();
    let mut left = templates(&env);
    left.sort();
    let mut expected = [slim.clone(), third.trim().to_owned()];
    expected.sort();
    assert_eq!(left, expected, "budget {budget}M, slim {of_slim}, debian {of_debian}");
    // Without room for any machines start all the same.
    env.ok("daemon stop");
    env.config(&format!("{CONFIG}\n[templates]\nbudget = \"1M\"\n"));
    env.ok("template prune");
    assert_eq!(templates(&env), [""; 0]);
    env.banger(["vm", "run", "--rm", "--", "true"]).deadline(120).ok();
    env.close();
}

fn deleting_one_in_use_hurts_nobody() {
    let env = TestEnv::new("tpl-in-use");
    let (id, _) = slim_template(&env);
    create(&env, "m", "debian-slim");
    create(&env, "n", "debian-slim");
    env.ok(&format!("template delete {id}"));
    let touch = "ls -R /usr/bin /etc >/dev/null && echo kept >/root/work && echo kept >/opt/root";
    env.sh("m", touch).code(0);
    env.kill_daemon();
    env.sh("m", "cat /opt/root; find /usr -type f | xargs cat | wc -c >/dev/null")
        .code(0)
        .prints("kept\n");
    // They boot with their disks.
    for m in ["m", "n"] {
        env.ok(&format!("vm stop {m}"));
        env.ok(&format!("vm start {m}"));
        assert_eq!(how(&env, m), "boot");
        env.sh(m, "hostname").code(0).prints(&format!("{m}\n"));
    }
    env.sh("m", "cat /opt/root /root/work").code(0).prints("kept\nkept\n");
    env.close();
}

fn switched_off() {
    let env = TestEnv::new("tpl-off");
    env.config(&format!("{CONFIG}\n[templates]\nenabled = false\n"));
    let before = env.json("template list");
    create(&env, "m", "debian-slim");
    assert_eq!(how(&env, "m"), "boot");
    env.sh("m", "hostname").code(0).prints("m\n");
    assert_eq!(env.json("template list"), before);
    env.close();
}

fn what_is_cancelled_leaves_nothing() {
    let env = TestEnv::new("tpl-cancel");
    env.ok("template prune --all");
    for args in [["template", "build"].as_slice(), &["vm", "create", "--name", "m"]] {
        let running = env.banger(args).spawn();
        processes::until("the engine to run", Duration::from_secs(20), || {
            !env.engines().is_empty()
        });
        running.signal(rustix::process::Signal::INT);
        running.wait().code(130);
        processes::until("all to be gone", Duration::from_secs(10), || {
            env.machinery().is_empty() && !has_entries(&env.state().join("templates"))
        });
        assert!(env.machine_names().is_empty());
        assert!(!has_entries(&env.state().join("machines")));
    }
    env.close();
}

fn a_daemon_dies_while_one_is_made() {
    let env = TestEnv::new("tpl-die");
    env.ok("template prune --all");
    for point in ["template.row", "template.launched", "template.booted", "template.saved"] {
        daemon_with(&env, &format!("{point}=abort"));
        env.banger(["vm", "create", "--name", "m"]).deadline(60).run().fails();
        // The next daemon takes away what was begun of the template.
        env.ok("vm list");
        let settled = || env.machinery().is_empty() && !has_entries(&env.state().join("templates"));
        processes::until(&format!("the rest of {point}"), Duration::from_secs(20), settled);
        assert!(!has_entries(&env.runtime().join("m")), "sockets are left after {point}");
        assert_eq!(env.json("template list"), serde_json::json!([]), "{point}");
        // The machine is there and cold, or gone.
        let names = env.machine_names();
        if !names.is_empty() {
            assert_eq!(
                (names, env.machine_state("m").as_str()),
                (vec!["m".to_owned()], "stopped"),
                "{point}"
            );
            env.ok("vm delete m");
        }
    }
    create(&env, "m", "debian-slim");
    assert_eq!(how(&env, "m"), "template");
    env.sh("m", "true").code(0);
    env.close();
}
