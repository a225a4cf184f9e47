//! Running copies of running machines: all of them or none, and each lives on its own.

use std::time::{Duration, Instant};

use banger_testkit::{TestEnv, http, processes};
use serde_json::json;

use crate::copies::{daemon_with, has_entries};
use crate::harness::{MACHINES, machine, tests};
use crate::snapshots::{count, finished, goes_on_counting};

tests! { MACHINES;
    a_daemon_dies_in_a_fork,
    the_source_dies_in_a_fork,
    copies_outlive_their_source,
    copies_and_their_names,
    a_fork_of_a_fork,
    what_is_refused,
    a_cancelled_fork,
}

/// Nothing but these machines is there: no engine, no file, no row.
#[track_caller]
fn only(env: &TestEnv, names: &[&str], when: &str) {
    let mut there = env.machine_names();
    there.sort();
    let mut names = names.to_vec();
    names.sort_unstable();
    assert_eq!(there, names, "{when}");
    let dirs = std::fs::read_dir(env.state().join("machines")).unwrap().count();
    assert_eq!(dirs, names.len(), "directories of machines {when}");
    processes::until(
        &format!("what copies start from to be gone {when}"),
        Duration::from_secs(5),
        || !has_entries(&env.state().join("forks")),
    );
    let running = names.iter().filter(|m| env.machine_state(m) == "running").count();
    processes::until(&format!("{running} engines {when}"), Duration::from_secs(5), || {
        env.engines().len() == running
    });
    let sockets = std::fs::read_dir(env.runtime().join("m")).map_or(0, Iterator::count);
    assert!(sockets <= names.len(), "{when}: sockets are left");
}

fn copies_and_their_names() {
    let env = machine("forks");
    env.sh(
        "m",
        "echo held >/dev/shm/held; echo kept >/root/kept; echo root >/opt/root",
    )
    .code(0);
    let boot = env.boot_id("m");
    let begun = Instant::now();
    let done = env.ok("vm fork m -n 4 --name copy").says(&["paused", "ms"]);
    let took = begun.elapsed();
    assert_eq!(done.out(), "copy-1\ncopy-2\ncopy-3\ncopy-4\n");
    assert!(took < Duration::from_secs(20), "four copies took {took:?}");
    for copy in done.out().lines() {
        let seen = env
            .sh(copy, "hostname; cat /dev/shm/held /root/kept /opt/root")
            .code(0)
            .out();
        assert_eq!(seen, format!("{copy}\nheld\nkept\nroot\n"));
        let boot = env.machine(copy)["boot"].clone();
        assert_eq!(
            (boot["how"].as_str(), boot["from"].as_str()),
            (Some("fork"), Some("m")),
            "{boot}"
        );
        assert!(boot["source_paused_ms"].as_u64().is_some_and(|ms| ms > 0), "{boot}");
    }
    assert_eq!(env.boot_id("m"), boot);
    // Each writes for itself.
    for copy in ["copy-1", "copy-2"] {
        env.sh(
            copy,
            &format!("echo {copy} | tee /root/kept /opt/root /dev/shm/held; sync"),
        )
        .code(0);
    }
    let read = "echo 3 >/proc/sys/vm/drop_caches; cat /root/kept /opt/root /dev/shm/held";
    env.sh("copy-1", read).prints("copy-1\ncopy-1\ncopy-1\n");
    env.sh("copy-2", read).prints("copy-2\ncopy-2\ncopy-2\n");
    env.sh("copy-3", read).prints("kept\nroot\nheld\n");
    env.sh("m", read).prints("kept\nroot\nheld\n");
    // One copy takes the name as it is; without a name one is made up.
    env.ok("vm fork m --name one").prints("one\n");
    let list = env.json("vm fork m -n 2");
    let made: Vec<&str> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["name"].as_str().unwrap())
        .collect();
    assert!(made.len() == 2 && made[0] != made[1], "{list}");
    assert!(
        list.as_array()
            .unwrap()
            .iter()
            .all(|m| m["state"] == "running" && m["schema_version"] == 1),
        "{list}"
    );
    only(
        &env,
        &["copy-1", "copy-2", "copy-3", "copy-4", "m", made[0], made[1], "one"],
        "after forks",
    );
    env.close();
}

fn a_fork_of_a_fork() {
    let env = machine("fork-fork");
    count(&env, "m");
    env.ok("vm fork m --name a");
    goes_on_counting(&env, "a");
    env.sh("a", "echo a >>/dev/shm/line").code(0);
    env.ok("vm fork a --name b");
    env.ok("vm delete m --force");
    goes_on_counting(&env, "b");
    env.sh("b", "echo b >>/dev/shm/line").code(0);
    env.ok("vm snapshot create b s");
    env.ok("vm fork b -n 2 --name c");
    env.ok("vm delete a --force");
    for copy in ["c-1", "c-2"] {
        env.sh(copy, "hostname; cat /dev/shm/line")
            .code(0)
            .prints(&format!("{copy}\na\nb\n"));
        goes_on_counting(&env, copy);
    }
    // Snapshots are the source's, and go with it.
    assert_eq!(env.json("vm snapshot list c-1"), json!([]));
    env.ok("vm suspend c-1");
    goes_on_counting(&env, "c-1");
    env.ok("vm snapshot restore b s");
    goes_on_counting(&env, "b");
    env.close();
}

fn copies_outlive_their_source() {
    let env = machine("fork-alone");
    env.sh("m", "echo kept >/root/kept; echo root >/opt/root").code(0);
    env.ok("vm fork m --name copy");
    env.ok("vm delete m --force");
    env.kill_daemon();
    env.sh(
        "copy",
        "cat /root/kept /opt/root; find /usr/bin -type f | xargs cat | wc -c >/dev/null",
    )
    .code(0)
    .prints("kept\nroot\n");
    let id = env.sh("copy", "cat /etc/machine-id").code(0).out();
    let boot = env.boot_id("copy");
    env.ok("vm stop copy");
    env.ok("vm start copy");
    assert_eq!(env.machine("copy")["boot"]["how"], "boot");
    assert_ne!(env.boot_id("copy"), boot);
    env.sh("copy", "hostname; cat /root/kept /opt/root /etc/machine-id")
        .prints(&format!("copy\nkept\nroot\n{id}"));
    env.ok("vm stop copy");
    env.ok("vm commit copy image").prints("image\n");
    env.close();
}

fn what_is_refused() {
    let env = machine("fork-no");
    let fork = |count: u64| {
        http::request(
            &env.socket(),
            "POST",
            "/v1/machines/m/fork",
            Some(&json!({"count": count})),
        )
        .unwrap()
    };
    for count in [0, 65, 4_000_000_000] {
        let answer = fork(count);
        assert!((400..500).contains(&answer.status), "{count}: {}", answer.status);
    }
    env.run("vm fork m -n 0").fails();
    env.run("vm fork m -n 65").fails().says(&["64"]);
    env.run("vm fork m --name Bad_Name").fails().says(&["name"]);
    env.run("vm fork nosuch").fails().says(&["nosuch"]);
    // One of the names is taken: none is made.
    env.ok("vm create --name copy-2 --no-start");
    env.run("vm fork m -n 3 --name copy").fails().says(&["copy-2"]);
    env.run("vm fork m --name m").fails().says(&["m"]);
    only(&env, &["copy-2", "m"], "after a name that is taken");
    env.run("vm fork copy-2").fails().says(&["copy-2", "hint:"]);
    env.ok("vm pause m");
    env.run("vm fork m").fails().says(&["paused", "hint:"]);
    env.ok("vm resume m");
    env.ok("vm delete copy-2");
    env.ok("vm fork m -n 3 --name copy").prints("copy-1\ncopy-2\ncopy-3\n");
    env.close();
}

fn the_source_dies_in_a_fork() {
    let env = machine("fork-dead");
    for point in ["fork.begun", "save.frozen", "fork.disks"] {
        daemon_with(&env, &format!("{point}=delay:1500"));
        let running = env.banger(["vm", "fork", "m", "-n", "2", "--name", "copy"]).spawn();
        processes::until("the fork to be under way", Duration::from_secs(10), || {
            has_entries(&env.state().join("forks"))
        });
        std::thread::sleep(Duration::from_millis(400));
        processes::kill(&env.engine("m"));
        let done = running.wait();
        if done.status == 0 {
            // It was saved already: the copies have all that they need.
            assert_eq!(point, "fork.disks");
            for copy in ["copy-1", "copy-2"] {
                env.sh(copy, "hostname").code(0).prints(&format!("{copy}\n"));
            }
            env.ok("vm delete --force copy-1 copy-2");
        } else {
            assert_eq!(done.out(), "");
        }
        processes::until("m to be stopped", Duration::from_secs(10), || {
            env.machine_state("m") == "stopped"
        });
        only(&env, &["m"], point);
        finished(&env, "m", point);
        env.ok("vm start m");
        env.sh("m", "true").code(0);
    }
    env.close();
}

fn a_cancelled_fork() {
    let env = machine("fork-cancel");
    count(&env, "m");
    daemon_with(&env, "fork.disks=delay:1500");
    let running = env.banger(["vm", "fork", "m", "-n", "2", "--name", "copy"]).spawn();
    processes::until("the fork to be under way", Duration::from_secs(10), || {
        has_entries(&env.state().join("forks"))
    });
    std::thread::sleep(Duration::from_millis(500));
    running.signal(rustix::process::Signal::INT);
    running.wait().code(130);
    processes::until("the copies to be gone", Duration::from_secs(20), || {
        env.machine_names() == ["m"]
    });
    only(&env, &["m"], "after a fork that was cancelled");
    goes_on_counting(&env, "m");
    env.close();
}

fn a_daemon_dies_in_a_fork() {
    let env = machine("fork-die");
    count(&env, "m");
    let boot = env.boot_id("m");
    let points = [
        "create.row",
        "fork.begun",
        "save.frozen",
        "save.saved",
        "fork.saved",
        "fork.disks",
        "start.launched",
        "start.handles",
        "restore.channel",
        "restore.renewed",
    ];
    for point in points {
        daemon_with(&env, &format!("{point}=abort"));
        env.run("vm fork m -n 2 --name copy").fails();
        env.ok("vm list");
        // A copy that was cut off is removed, or stopped if its disks are whole; it never runs as somebody that it is not.
        processes::until(
            &format!("the copies to settle after {point}"),
            Duration::from_secs(40),
            || {
                let names = env.machine_names();
                names
                    .iter()
                    .all(|m| ["running", "stopped"].contains(&env.machine_state(m).as_str()))
            },
        );
        for copy in env.machine_names().iter().filter(|m| *m != "m") {
            if env.machine_state(copy) == "running" {
                env.sh(copy, "hostname").code(0).prints(&format!("{copy}\n"));
                assert_ne!(env.boot_id(copy), boot, "{point}");
            } else {
                assert!(
                    env.machine(copy)["cause"].as_str().is_some_and(|c| !c.is_empty()),
                    "{point}: no cause"
                );
            }
            env.ok(&format!("vm delete --force {copy}"));
        }
        only(&env, &["m"], point);
        goes_on_counting(&env, "m");
        assert_eq!(env.boot_id("m"), boot, "{point}");
        finished(&env, "m", point);
    }
    env.close();
}
