//! Machines outlive the daemon, and the next one finds them.

use std::time::Duration;

use banger_testkit::{TestEnv, processes};
use rustix::process::Signal;

use crate::harness::{MACHINES, machine, tests};

tests! { MACHINES;
    the_daemon_is_killed,
    the_daemon_is_stopped,
    the_engine_dies_while_the_daemon_is_away,
    the_engine_dies_under_the_daemon,
    handles_are_damaged,
    a_foreign_process_is_never_touched,
    a_death_in_the_middle_of_a_create,
    a_death_in_the_middle_of_a_start,
    a_death_in_the_middle_of_a_stop,
    a_death_in_the_middle_of_a_delete,
    many_machines,
}

/// What has to be the same before and after.
fn identity(env: &TestEnv) -> (String, i32, u64) {
    let engine = env.engine("m");
    (env.boot_id("m"), engine.pid, engine.start)
}

fn the_daemon_is_killed() {
    let env = machine("adopt-kill");
    env.sh(
        "m",
        "echo before >/dev/shm/mark; sleep 1000 >/dev/null 2>&1 & echo $! >/dev/shm/pid",
    )
    .code(0);
    let before = identity(&env);
    for _ in 0..3 {
        env.kill_daemon();
        assert_eq!(identity(&env), before);
    }
    env.sh("m", "kill -0 $(cat /dev/shm/pid)").code(0);
    // Everything works with the new daemon, to the end.
    env.ok("vm restart m");
    assert_ne!(env.boot_id("m"), before.0);
    env.ok("vm stop m");
    env.close();
}

fn the_daemon_is_stopped() {
    let env = machine("adopt-stop");
    let before = identity(&env);
    env.ok("daemon stop");
    assert!(env.daemon().is_none(), "the daemon runs on after `daemon stop`");
    assert!(!env.socket().exists(), "its socket is left");
    assert!(
        env.processes().iter().any(|p| p.pid == before.1),
        "the machine went with the daemon"
    );
    assert_eq!(identity(&env), before);
    env.close();
}

fn the_engine_dies_while_the_daemon_is_away() {
    let env = machine("adopt-dead");
    let engine = env.engine("m");
    env.kill_daemon();
    processes::kill(&engine);
    let shown = env.json("vm show m");
    assert_eq!(shown["state"], "stopped");
    let cause = shown["cause"].as_str().unwrap_or_default();
    assert!(cause.contains("signal") || cause.contains("kill"), "cause: {cause:?}");
    env.ok("vm start m");
    env.sh("m", "true").code(0);
    assert_eq!(env.json("vm show m")["cause"], serde_json::Value::Null);
    env.close();
}

fn the_engine_dies_under_the_daemon() {
    let env = machine("engine-dies");
    let running = env
        .banger(["vm", "exec", "m", "--", "sh", "-c", "echo ready; sleep 100"])
        .spawn();
    running.expect("ready");
    processes::kill(&env.engine("m"));
    processes::until("the machine to be stopped", Duration::from_secs(10), || {
        env.machine_state("m") == "stopped"
    });
    assert!(env.machine("m")["cause"].as_str().is_some_and(|c| !c.is_empty()));
    let done = running.wait();
    assert_eq!(done.status, 125, "{}", done.err());
    env.ok("vm start m");
    env.close();
}

// B17: a damaged handles.json stranded what it named.
fn handles_are_damaged() {
    let env = machine("handles");
    let before = identity(&env);
    let id = env.machine("m")["id"].as_str().unwrap().to_owned();
    let file = env.state().join("machines").join(id).join("handles.json");
    let good = std::fs::read_to_string(&file).unwrap();
    let wrong_pid = good.replace(&before.1.to_string(), "1");
    assert_ne!(good, wrong_pid);
    for damage in [
        "",
        "{",
        "\0\0\0\0",
        "[]",
        "{\"pid\": -1}",
        &"[".repeat(100_000),
        &wrong_pid,
    ] {
        env.kill_daemon();
        std::fs::write(&file, damage).unwrap();
        assert_eq!(identity(&env), before, "after {:?}", &damage[..damage.len().min(40)]);
    }
    env.kill_daemon();
    std::fs::remove_file(&file).unwrap();
    assert_eq!(identity(&env), before);
    env.ok("vm stop m");
    env.close();
}

// B21: any process of the engine's name was taken for the machine's.
fn a_foreign_process_is_never_touched() {
    let env = machine("foreign");
    let engine = env.engine("m");
    let id = env.machine("m")["id"].as_str().unwrap().to_owned();
    let file = env.state().join("machines").join(id).join("handles.json");
    env.kill_daemon();
    processes::kill(&engine);
    // Another process under the number that is written down, as after a wrap of process ids.
    let mut stranger = std::process::Command::new("sleep").arg("120").spawn().unwrap();
    let handles = std::fs::read_to_string(&file).unwrap_or_default();
    std::fs::write(
        &file,
        handles.replace(&engine.pid.to_string(), &stranger.id().to_string()),
    )
    .unwrap();
    assert_eq!(env.json("vm show m")["state"], "stopped");
    env.ok("vm kill m");
    env.ok("vm delete m");
    assert!(
        stranger.try_wait().unwrap().is_none(),
        "a process that is not the machine's was killed"
    );
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    env.close();
}

/// Starts a daemon that dies at a point.
fn daemon_that_dies_at(env: &TestEnv, point: &str) {
    let _ = env.run("daemon stop");
    env.banger(["daemon", "start"])
        .env("BANGER_FAILPOINT", format!("{point}=abort"))
        .ok();
}

fn a_death_in_the_middle_of_a_create() {
    let env = TestEnv::new("die-create");
    for point in ["create.row", "create.stock", "create.disks"] {
        daemon_that_dies_at(&env, point);
        env.run("vm create --name m --no-start").fails();
        // The next daemon undoes what was begun, and the name is free again.
        processes::until("the half-made machine to be gone", Duration::from_secs(20), || {
            env.run("vm list --quiet").out().is_empty()
        });
        env.ok("vm create --name m --no-start");
        env.ok("vm delete m");
    }
    env.close();
}

fn a_death_in_the_middle_of_a_start() {
    let env = TestEnv::new("die-start");
    for (start, point) in [
        ("vm start m", "restore.disks"),
        ("vm start m", "start.launched"),
        ("vm start m", "restore.channel"),
        ("vm start m", "restore.renewed"),
        ("vm start m --cold", "start.launched"),
        ("vm start m --cold", "start.handles"),
        ("vm start m --cold", "start.channel"),
    ] {
        env.ok("vm create --name m --no-start");
        daemon_that_dies_at(&env, point);
        env.run(start).fails();
        // Either the start is finished or the machine is stopped; nobody is lost.
        processes::until("the machine to be settled", Duration::from_secs(40), || {
            let state = env.json("vm show m")["state"].as_str().unwrap_or_default().to_owned();
            state == "running" || state == "stopped"
        });
        let engines = env.engines().len();
        let expected = usize::from(env.machine_state("m") == "running");
        assert_eq!(engines, expected, "after {point}: {:?}", env.processes());
        if expected == 0 {
            assert!(
                env.machine("m")["cause"].as_str().is_some_and(|c| !c.is_empty()),
                "after {point}: no cause"
            );
            env.ok("vm start m");
        }
        env.sh("m", "hostname").code(0).prints("m\n");
        env.ok("vm delete m --force");
    }
    env.close();
}

fn a_death_in_the_middle_of_a_stop() {
    let env = machine("die-stop");
    for point in ["stop.row", "stop.asked", "stop.exited"] {
        env.ok("vm start m");
        daemon_that_dies_at(&env, point);
        env.run("vm stop m").fails();
        processes::until("the machine to be stopped", Duration::from_secs(60), || {
            env.json("vm show m")["state"] == "stopped"
        });
        assert!(env.engines().is_empty(), "after {point}: {:?}", env.processes());
    }
    env.close();
}

// B16: an early return in the cleanup stranded what was still there.
fn a_death_in_the_middle_of_a_delete() {
    let env = TestEnv::new("die-delete");
    for point in ["delete.row", "delete.stopped", "delete.files"] {
        env.ok("vm create --name m --no-start");
        daemon_that_dies_at(&env, point);
        env.run("vm delete m").fails();
        processes::until("the machine to be gone", Duration::from_secs(20), || {
            env.run("vm list --quiet").out().is_empty()
        });
        let left = std::fs::read_dir(env.state().join("machines")).unwrap().count();
        assert_eq!(left, 0, "files are left after {point}");
    }
    env.close();
}

fn many_machines() {
    let env = TestEnv::new("adopt-many");
    let creates: Vec<_> = (0..3)
        .map(|i| {
            env.banger(["vm", "create", "--name", &format!("m{i}")])
                .deadline(180)
                .spawn()
        })
        .collect();
    creates.into_iter().for_each(|c| {
        c.wait().code(0);
    });
    let before: Vec<_> = (0..3).map(|i| env.boot_id(&format!("m{i}"))).collect();
    env.kill_daemon();
    let after: Vec<_> = (0..3).map(|i| env.boot_id(&format!("m{i}"))).collect();
    assert_eq!(before, after);
    let m0 = env.engine("m0");
    processes::signal(&m0, Signal::KILL);
    processes::until("the others to be told apart", Duration::from_secs(10), || {
        env.machine_state("m0") == "stopped"
    });
    assert_eq!(env.machine_state("m1"), "running");
    env.ok("vm delete --force m0 m1 m2").prints("m0\nm1\nm2\n");
    env.close();
}
