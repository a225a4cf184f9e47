//! What was lost (files, links, the database, a client together with its daemon), and what was cut off, is told, finished or undone.

use std::time::{Duration, Instant};

use banger_testkit::{Done, TestEnv, processes};
use rustix::process::Signal;

use crate::copies::daemon_with;
use crate::harness::{MACHINES, create, machine, tests};
use crate::snapshots::home;

tests! { MACHINES;
    requests_wait_for_a_frozen_guest,
    a_run_that_lost_its_daemon_leaves_nothing,
    a_run_that_lost_its_client_and_daemon_leaves_nothing,
    a_restore_of_disks_is_carried_out,
    a_restart_is_carried_out,
    half_a_change_is_made_whole,
    an_engine_that_does_not_answer,
    an_engine_whose_sockets_are_lost,
    reads_say_what_they_do_not_know,
    a_lost_database,
    damaged_snapshots,
    a_commit_ends_with_its_daemon,
    programs_of_an_ended_daemon_are_ended,
}

/// Waits until a machine is in a state.
#[track_caller]
fn becomes(env: &TestEnv, m: &str, state: &str, when: &str) {
    processes::until(&format!("{m} to be {state} ({when})"), Duration::from_secs(60), || {
        env.machine_state(m) == state
    });
}

/// What a command prints holds all of this.
#[track_caller]
fn prints_parts(done: &Done, parts: &[&str]) {
    for part in parts {
        assert!(done.out().contains(part), "{part:?} is not in {}", done.out());
    }
}

fn nothing_is_left(env: &TestEnv, when: &str) {
    let empty = || std::fs::read_dir(env.state().join("machines")).is_ok_and(|mut d| d.next().is_none());
    processes::until(
        &format!("everything of the machine to be gone ({when})"),
        Duration::from_secs(75),
        || env.machine_names().is_empty() && empty() && env.machinery().is_empty(),
    );
}

// "It has to be renewed first".
fn requests_wait_for_a_frozen_guest() {
    let env = machine("frozen");
    std::fs::write(env.work().join("file"), "x").unwrap();
    daemon_with(&env, "save.frozen=delay:5000");
    env.sh("m", "true").code(0);
    let lines = [
        "vm exec m -- true",
        "vm cp file m:/tmp/file",
        "vm cp m:/etc/hostname name",
        "vm ports m",
        "vm stats m",
    ];
    let mut snapshot = env.banger(["vm", "snapshot", "create", "m", "s"]).spawn();
    let (mut longest, mut count) = (vec![Duration::ZERO; lines.len()], 0);
    while !snapshot.has_ended() {
        let running: Vec<_> = lines
            .iter()
            .map(|line| {
                let cmd = env.banger(line.split(' ')).cwd(env.work()).deadline(60);
                (line, Instant::now(), cmd.spawn())
            })
            .collect();
        for (n, (line, began, running)) in running.into_iter().enumerate() {
            let done = running.wait();
            assert_eq!(done.status, 0, "{line}: {}", done.err());
            longest[n] = longest[n].max(began.elapsed());
            count += 1;
        }
    }
    snapshot.wait().code(0);
    assert!(count >= 5, "no request was made meanwhile");
    let met = longest.iter().filter(|time| **time > Duration::from_secs(2)).count();
    assert!(met >= 4, "requests did not meet the frozen guest: {longest:?}");
    env.close();
}

fn a_run_that_lost_its_daemon_leaves_nothing() {
    let env = TestEnv::new("rm-daemon");
    for point in [
        "create.row",
        "create.stock",
        "create.disks",
        "restore.disks",
        "start.launched",
        "start.handles",
        "restore.channel",
        "restore.renewed",
    ] {
        daemon_with(&env, &format!("{point}=abort"));
        env.run("vm run --rm -- true").fails();
        nothing_is_left(&env, point);
    }
    env.close();
}

fn a_run_that_lost_its_client_and_daemon_leaves_nothing() {
    let env = TestEnv::new("rm-both");
    // The row is there; an engine runs; all of it runs.
    for point in ["create.stock", "start.handles", "restore.renewed"] {
        daemon_with(&env, &format!("{point}=delay:20000"));
        let run = env.banger(["vm", "run", "--rm", "--", "sleep", "1000"]).spawn();
        processes::until("the machine to be known", Duration::from_secs(30), || {
            let engines = point == "create.stock" || !env.engines().is_empty();
            engines && !env.machine_names().is_empty()
        });
        run.signal(Signal::KILL);
        env.kill_daemon();
        run.wait();
        nothing_is_left(&env, point);
    }
    // The command runs.
    let run = env
        .banger(["vm", "run", "--rm", "--", "sh", "-c", "echo ready; sleep 1000"])
        .spawn();
    run.expect("ready");
    run.signal(Signal::KILL);
    env.kill_daemon();
    run.wait();
    nothing_is_left(&env, "while the command runs");
    // A client that is still there keeps it.
    let run = env
        .banger(["vm", "run", "--rm", "--", "sh", "-c", "echo ready; sleep 40; echo done"])
        .spawn();
    run.expect("ready");
    env.kill_daemon();
    run.wait().code(0).says_not("error");
    nothing_is_left(&env, "after its end");
    env.close();
}

fn a_restore_of_disks_is_carried_out() {
    let env = machine("rollback-disk-die");
    env.sh("m", "echo then >/root/when; sync").code(0);
    env.ok("vm snapshot create m s --disk-only");
    let points = [
        "rollback.journaled",
        "rollback.stopping",
        "rollback.killed",
        "rollback.stopped",
        "rollback.exchanged",
        "rollback.memory",
        "rollback.row",
    ];
    for point in points {
        env.sh("m", "echo now >/root/when; sync").code(0);
        daemon_with(&env, &format!("{point}=abort"));
        env.run("vm snapshot restore m s").fails();
        if point == "rollback.journaled" {
            // Nothing had been ended yet.
            becomes(&env, "m", "running", point);
            env.sh("m", "cat /root/when").code(0).prints("now\n");
            continue;
        }
        becomes(&env, "m", "stopped", point);
        let cause = env.machine("m")["cause"].as_str().unwrap_or_default().to_owned();
        assert!(cause.contains("put back to snapshot `s`"), "{point}: {cause:?}");
        env.ok("vm start m");
        env.sh("m", "cat /root/when").code(0).prints("then\n");
        assert!(!home(&env, "m").join("journal.json").exists(), "{point}");
    }
    env.close();
}

fn a_restart_is_carried_out() {
    let env = machine("restart-die");
    for point in [
        "restart.begun",
        "stop.row",
        "stop.asked",
        "stop.exited",
        "restart.stopped",
    ] {
        let before = env.boot_id("m");
        daemon_with(&env, &format!("{point}=abort"));
        env.run("vm restart m").fails();
        becomes(&env, "m", "running", point);
        assert_eq!(env.boot_id("m") == before, point == "restart.begun", "{point}");
        assert_eq!(env.engines().len(), 1, "{point}");
        assert!(!home(&env, "m").join("journal.json").exists(), "{point}");
    }
    env.close();
}

/// Changes of two steps: what the first one did is not contradicted by the second one's absence.
fn half_a_change_is_made_whole() {
    let env = TestEnv::new("half");
    env.ok("vm create --name m --no-start");
    daemon_with(&env, "grow.disk=abort");
    env.run("vm set m --disk-size 20G").fails();
    assert_eq!(env.machine_state("m"), "stopped");
    env.ok("vm set m --disk-size 20G");
    daemon_with(&env, "rename.row=abort");
    env.run("vm rename m n").fails();
    assert_eq!(env.machine_names(), ["n"]);
    env.ok("vm start n");
    env.sh("n", "hostname").code(0).prints("n\n");
    env.sh("n", "test $(df -k --output=size / | tail -1) -gt 19000000")
        .code(0);
    let known = std::fs::read_to_string(env.state().join("ssh/known_hosts")).unwrap_or_default();
    assert!(!known.contains("m.vm") && known.contains('n'), "{known}");
    // Half a removal of a snapshot is a removal.
    env.ok("vm snapshot create n s");
    daemon_with(&env, "snapshot.unlinked=abort");
    env.run("vm snapshot delete n s").fails();
    assert_eq!(env.json("vm snapshot list n").as_array().map(Vec::len), Some(0));
    env.ok("vm snapshot create n s");
    env.close();
}

/// State and cause as they are shown.
fn shown(env: &TestEnv, m: &str) -> (String, String) {
    let shown = env.machine(m);
    let text = |key: &str| shown[key].as_str().unwrap_or_default().to_owned();
    (text("state"), text("cause"))
}

fn an_engine_that_does_not_answer() {
    let env = machine("silent");
    let engine = env.engine("m");
    let id = env.machine("m")["id"].as_str().unwrap().to_owned();
    processes::signal(&engine, Signal::STOP);
    env.kill_daemon();
    prints_parts(&env.ok("vm list"), &["unverified"]);
    processes::until("the doubt to be told", Duration::from_secs(30), || {
        shown(&env, "m").1.contains("cannot be verified")
    });
    // Nothing is done to it by the way, and it is told what can be done.
    env.run("vm stop m")
        .fails()
        .says(&["cannot be verified", "vm kill --force m"]);
    env.run("vm delete m").fails();
    prints_parts(&env.run("audit").code(0), &["does not answer", "vm kill --force m"]);
    env.run("audit --fix").code(0);
    env.run(&format!("vm kill --force {}", &id[..6]))
        .code(2)
        .says(&["whole name"]);
    assert!(processes::alive(&engine), "it was ended without a wish");
    env.ok("vm kill --force m");
    assert!(!processes::alive(&engine));
    let (state, cause) = shown(&env, "m");
    assert_eq!(state, "stopped");
    assert!(cause.contains("did not answer"), "{cause}");
    env.ok("vm start m");
    env.sh("m", "true").code(0);
    // One that answers again is taken back.
    let engine = env.engine("m");
    let boot = env.boot_id("m");
    processes::signal(&engine, Signal::STOP);
    env.kill_daemon();
    env.ok("vm list");
    processes::signal(&engine, Signal::CONT);
    becomes(&env, "m", "running", "after it went on");
    assert_eq!(env.boot_id("m"), boot);
    env.close();
}

fn an_engine_whose_sockets_are_lost() {
    let env = machine("no-sockets");
    for (line, left) in [
        ("vm stop --force m", true),
        ("vm kill --force m", true),
        ("vm delete --force m", false),
    ] {
        let engine = env.engine("m");
        let id = env.machine("m")["id"].as_str().unwrap().to_owned();
        env.kill_daemon();
        // Two losses at once cost no machine.
        std::fs::remove_dir_all(env.runtime().join("m")).unwrap();
        std::fs::remove_file(env.state().join("machines").join(&id).join("handles.json")).unwrap();
        processes::until("the doubt to be told", Duration::from_secs(30), || {
            env.ok("vm list");
            shown(&env, "m").1.contains("cannot be verified")
        });
        env.run("vm exec m -- true").fails();
        assert!(processes::alive(&engine), "{line}");
        env.ok(line);
        assert!(!processes::alive(&engine), "{line}");
        if left {
            assert_eq!(env.machine_state("m"), "stopped");
            env.ok("vm start m");
            env.sh("m", "true").code(0);
        }
    }
    assert!(env.machine_names().is_empty());
    env.close();
}

// A dead machine was shown `running` for as long as the daemon looked.
fn reads_say_what_they_do_not_know() {
    let env = machine("reads");
    env.ok("vm create --name s --no-start");
    let engine = env.engine("m");
    env.kill_daemon();
    processes::kill(&engine);
    env.banger(["daemon", "start"])
        .env("BANGER_FAILPOINT", "adopt.found=delay:8000")
        .ok();
    let (state, cause) = shown(&env, "m");
    assert_eq!(state, "unverified");
    assert!(cause.contains("was running"), "{cause}");
    assert_eq!(
        env.machine_state("s"),
        "stopped",
        "without an engine there is nothing to look for"
    );
    prints_parts(&env.ok("vm list"), &["unverified"]);
    env.run("vm wait m --state running --timeout 1s").fails();
    env.ok("vm wait m --state stopped --timeout 60s");
    let cause = shown(&env, "m").1;
    assert!(cause.contains("signal") || cause.contains("kill"), "{cause}");
    env.close();
}

fn a_lost_database() {
    let env = TestEnv::new("lost-db");
    create(&env, "runs", "debian-slim");
    env.banger(["vm", "set", "runs", "--publish", "127.0.0.1:0:80"]).run();
    create(&env, "stands", "debian-slim");
    env.sh("stands", "echo kept >/root/kept; sync").code(0);
    env.ok("vm snapshot create stands s");
    env.ok("vm stop stands");
    create(&env, "sleeps", "debian-slim");
    env.sh("sleeps", "echo kept >/dev/shm/kept").code(0);
    env.ok("vm suspend sleeps");
    let boot = env.boot_id("runs");
    let before = env.json("vm show runs");
    for emptied in [false, true] {
        env.kill_daemon();
        for name in ["banger.db", "banger.db-wal", "banger.db-shm"] {
            let file = env.state().join(name);
            if emptied && name == "banger.db" {
                std::fs::write(file, []).unwrap();
            } else {
                let _ = std::fs::remove_file(file);
            }
        }
        assert!(env.machine_names().is_empty());
        env.ok("vm list").says(&["banger vm recover"]);
        env.run("vm exec runs -- true").fails();
        env.run("vm show runs").fails().says(&["banger vm recover runs"]);
        // Nobody recommends, and nobody does, what would destroy them.
        let audit = env.run("audit").code(0);
        assert!(!audit.out().contains("orphan:"), "{}", audit.out());
        prints_parts(&audit, &["vm recover runs"]);
        env.run("audit --fix").code(0);
        assert_eq!(env.engines().len(), 1);
        let listed = env.ok("vm recover").out();
        assert!(
            ["runs", "stands", "sleeps"].iter().all(|name| listed.contains(name)),
            "{listed}"
        );
        env.run("vm recover nosuch").fails().says(&["nosuch", "hint:"]);
        env.ok("vm recover stands").prints("stands\n");
        env.run("vm recover stands").fails();
        env.ok("vm recover --all");
        assert_eq!(env.boot_id("runs"), boot);
        let after = env.json("vm show runs");
        for key in ["id", "name", "spec", "created_at", "forwards", "pid"] {
            assert_eq!(after[key], before[key], "{key}");
        }
        assert_eq!(env.machine_state("sleeps"), "suspended");
        assert_eq!(env.machine_state("stands"), "stopped");
        assert!(shown(&env, "stands").1.contains("taken back"));
        env.ok("vm recover").says(&["every machine"]);
    }
    // What cannot be taken back is not removed either.
    let home = home(&env, "stands");
    env.kill_daemon();
    for name in ["banger.db", "banger.db-wal", "banger.db-shm"] {
        let _ = std::fs::remove_file(env.state().join(name));
    }
    let file = home.join("machine.json");
    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, "{").unwrap();
    env.run("audit --fix").code(0);
    assert!(home.join("disks").is_dir());
    env.run("vm recover stands").fails();
    std::fs::write(&file, good).unwrap();
    env.ok("vm recover --all");
    env.ok("vm start stands");
    env.sh("stands", "cat /root/kept").code(0).prints("kept\n");
    env.ok("vm snapshot restore stands s");
    env.sh("sleeps", "cat /dev/shm/kept").code(0).prints("kept\n");
    env.close();
}

fn damaged_snapshots() {
    let env = machine("snap-damage");
    for (n, damage) in ["", "{", "[]", "{\"format\": 99}"].iter().enumerate() {
        env.ok("vm snapshot create m s --disk-only");
        let manifest = home(&env, "m").join("snapshots/s/manifest.json");
        if n == 0 {
            std::fs::remove_file(&manifest).unwrap();
        } else {
            std::fs::write(&manifest, damage).unwrap();
        }
        prints_parts(&env.ok("vm snapshot list m"), &["damaged"]);
        let list = env.json("vm snapshot list m");
        assert_eq!(list[0]["name"], "s");
        assert!(
            list[0]["damaged"].as_str().is_some_and(|why| why.contains("manifest")),
            "{list}"
        );
        prints_parts(&env.ok("vm snapshot show m s"), &["damaged"]);
        env.run("vm snapshot create m s")
            .fails()
            .says(&["vm snapshot delete m s"]);
        env.run("vm snapshot restore m s")
            .fails()
            .says(&["damaged", "vm snapshot delete m s"]);
        env.run("vm commit m img --snapshot s").fails().says(&["damaged"]);
        env.sh("m", "true").code(0);
        env.ok("vm snapshot delete m s");
        assert_eq!(env.json("vm snapshot list m").as_array().map(Vec::len), Some(0));
    }
    env.close();
}

// The QEMU that copied ran on, with a deleted file of the image's size.
fn a_commit_ends_with_its_daemon() {
    let env = machine("commit-die");
    env.ok("vm stop m");
    let copying = || {
        let all = env.processes();
        all.into_iter()
            .find(|p| p.program.starts_with("qemu-system") && p.command.contains("-machine none"))
    };
    let mut met = false;
    for n in 0..5 {
        let mut commit = env.banger(["vm", "commit", "m", &format!("image-{n}")]).spawn();
        let mut found = None;
        while found.is_none() && !commit.has_ended() {
            found = copying();
        }
        let Some(copier) = found else { continue };
        met = true;
        env.kill_daemon();
        commit.wait();
        processes::until("the copying program to end", Duration::from_secs(10), || {
            !processes::alive(&copier)
        });
        break;
    }
    assert!(met, "no program was seen copying");
    env.run("audit").code(0);
    assert!(copying().is_none());
    env.ok("vm commit m again");
    env.close();
}

fn programs_of_an_ended_daemon_are_ended() {
    let env = TestEnv::new("workers");
    env.ok("daemon start");
    let left = |owner: &str| {
        let mark = format!("{owner}:{}", env.state().display());
        let mut sleep = std::process::Command::new("sleep");
        sleep.arg("600").env("BANGER_WORKER", mark).spawn().unwrap()
    };
    let mut one = left("1.1");
    prints_parts(
        &env.run("audit").code(1),
        &["sleep", "daemon that started it has ended"],
    );
    env.run("audit --fix").code(0);
    one.wait().unwrap();
    // A daemon that starts ends them too.
    let mut two = left("1.1");
    env.kill_daemon();
    env.ok("vm list");
    two.wait().unwrap();
    env.run("audit").code(0);
    env.close();
}
