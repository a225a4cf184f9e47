//! `--rm` leaves nothing, however the run ends.

use std::time::Duration;

use banger_testkit::{Repository, TestEnv, processes};
use rustix::process::Signal;

use crate::harness::{MACHINES, tests};

tests! { MACHINES;
    gone_after_success_and_failure,
    gone_after_an_interrupt_while_starting,
    gone_after_an_interrupt_of_the_command,
    gone_after_control_c_on_a_terminal,
    gone_when_the_client_is_killed,
    a_detached_machine_stays,
    what_nobody_owns_is_found_and_removed,
}

fn nothing_is_left(env: &TestEnv) {
    let empty = || std::fs::read_dir(env.state().join("machines")).is_ok_and(|mut d| d.next().is_none());
    let engines = || !env.machinery().is_empty();
    processes::until("everything of the machine to be gone", Duration::from_secs(15), || {
        env.machine_names().is_empty() && empty() && !engines()
    });
}

fn gone_after_success_and_failure() {
    let env = TestEnv::new("rm-end");
    Repository::typical(env.work().join("repo"));
    env.run("vm run --rm -- true").code(0);
    nothing_is_left(&env);
    env.run("vm run --rm -- false").code(1);
    nothing_is_left(&env);
    // The workspace cannot go in: the machine goes all the same.
    env.run("vm run --rm --workdir /proc/nowhere ./repo -- true").code(125);
    nothing_is_left(&env);
    env.close();
}

fn gone_after_an_interrupt_while_starting() {
    let env = TestEnv::new("rm-start");
    for signal in [Signal::INT, Signal::TERM] {
        let running = env.banger(["vm", "run", "--rm", "--", "sleep", "60"]).spawn();
        processes::until("the engine to run", Duration::from_secs(30), || {
            !env.engines().is_empty()
        });
        running.signal(signal);
        let done = running.wait();
        assert_eq!(done.status, 128 + signal.as_raw(), "{}", done.err());
        nothing_is_left(&env);
    }
    // Before anything is there.
    let running = env.banger(["vm", "run", "--rm", "--", "sleep", "60"]).spawn();
    running.signal(Signal::INT);
    running.wait();
    nothing_is_left(&env);
    env.close();
}

fn gone_after_an_interrupt_of_the_command() {
    let env = TestEnv::new("rm-command");
    let running = env
        .banger(["vm", "run", "--rm", "--", "sh", "-c", "echo ready; exec sleep 60"])
        .spawn();
    running.expect("ready");
    running.signal(Signal::INT);
    // Impatience changes nothing.
    running.signal(Signal::INT);
    let done = running.wait().code(130);
    assert!(!done.err().contains("still running"));
    nothing_is_left(&env);
    env.close();
}

fn gone_after_control_c_on_a_terminal() {
    let env = TestEnv::new("rm-terminal");
    let mut terminal = env.terminal(["vm", "run", "--rm", "--name", "gone"]);
    terminal.until_raw();
    terminal.send("echo re''ady\r");
    terminal.expect("ready\r");
    terminal.expect("# ");
    // In a shell this ends nothing but the line.
    terminal.send([3]);
    terminal.expect("^C");
    // What is typed while the shell handles the signal may be lost, and one that was just printing its prompt prints no other: a line
    // that has an answer tells that it listens again.
    let listens = (0..20).any(|_| {
        terminal.send("echo aga''in\r");
        terminal.screen.until(Duration::from_secs(3), |screen| {
            screen.windows(5).any(|text| text == b"again")
        })
    });
    assert!(listens, "{}", terminal.screen.text());
    terminal.send("exit 3\r");
    assert_eq!(terminal.wait(), 3);
    // B30: the reminder came under --rm.
    assert!(
        !terminal.screen.text().contains("still running"),
        "{}",
        terminal.screen.text()
    );
    nothing_is_left(&env);

    let mut terminal = env.terminal([
        "vm",
        "run",
        "--rm",
        "-t",
        "--",
        "sh",
        "-c",
        "echo re''ady; exec sleep 60",
    ]);
    terminal.expect("ready");
    terminal.until_raw();
    terminal.send([3]);
    assert_eq!(terminal.wait(), 130);
    nothing_is_left(&env);
    env.close();
}

fn gone_when_the_client_is_killed() {
    let env = TestEnv::new("rm-killed");
    let running = env
        .banger(["vm", "run", "--rm", "--", "sh", "-c", "echo ready; sleep 300"])
        .spawn();
    running.expect("ready");
    running.signal(Signal::KILL);
    running.wait();
    // The daemon gives a client that went away some time to come back.
    processes::until("the machine to be removed", Duration::from_secs(60), || {
        env.machine_names().is_empty()
    });
    nothing_is_left(&env);
    env.close();
}

fn a_detached_machine_stays() {
    let env = TestEnv::new("detached");
    let done = env.ok("vm run -d --name stays").prints("stays\n");
    assert!(done.err().contains("spec:"), "{}", done.err());
    assert_eq!(env.machine_state("stays"), "running");
    env.sh("stays", "true").code(0);
    env.close();
}

fn what_nobody_owns_is_found_and_removed() {
    let env = crate::harness::machine("audit");
    let orphans = |audit: &serde_json::Value| audit["orphans"].as_u64().expect("a number");
    let audit = env.api("GET", "/v1/audit", None);
    assert_eq!(orphans(&audit), 0, "{audit}");
    let kinds = |kind: &str| {
        audit["objects"]
            .as_array()
            .map_or(0, |o| o.iter().filter(|o| o["kind"] == kind).count())
    };
    assert_eq!((kinds("process"), kinds("socket"), kinds("file")), (1, 1, 1), "{audit}");
    // Sockets of a machine that is stopped, and files of one that never was.
    let id = env.machine("m")["id"].as_str().expect("an id").to_owned();
    let files = env.state().join("machines/ffeeddccbbaa0011");
    std::fs::create_dir(&files).expect("a directory");
    env.ok("vm stop m");
    let stray = env.runtime().join("m").join(&id);
    std::fs::create_dir(&stray).expect("a directory");
    let found = env.api("GET", "/v1/audit", None);
    assert_eq!(orphans(&found), 2, "{found}");
    let fixed = env.api("POST", "/v1/audit/fix", None);
    assert_eq!(orphans(&fixed), 0, "{fixed}");
    assert!(!files.exists() && !stray.exists());
    // The machine itself has lost nothing.
    env.ok("vm start m");
    env.sh("m", "true").code(0);
    assert_eq!(orphans(&env.api("GET", "/v1/audit", None)), 0);
    env.close();
}
