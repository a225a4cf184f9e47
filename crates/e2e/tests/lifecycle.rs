//! The life of machines: made, started, stopped, changed, removed.

use std::time::{Duration, Instant};

use banger_testkit::{TestEnv, processes};

use crate::harness::{MACHINES, create, machine, slim, tests};

tests! { MACHINES;
    start_stop_restart,
    kill_ends_stopped,
    changes_take_effect,
    prune_spares_what_runs,
    several_at_once,
    references,
    looking_at_a_machine,
    waiting,
    a_stop_does_not_wait_for_others,
    nothing_keeps_what_its_starter_had_open,
}

fn start_stop_restart() {
    let env = TestEnv::new("start-stop");
    env.ok("vm create --name m --no-start").prints("m\n");
    assert_eq!(env.machine_state("m"), "stopped");
    env.run("vm exec m -- true").fails().says(&["m", "stopped", "hint:"]);
    assert!(env.engines().is_empty());

    env.ok("vm start m");
    let first = env.boot_id("m");
    let engine = env.engine("m");
    // Starting what runs is no error and changes nothing.
    env.ok("vm start m");
    assert_eq!(env.boot_id("m"), first);
    // Not synced: B2, a stop lost what had just been written.
    env.sh("m", "echo kept >/root/work; echo kept >/opt/root").code(0);
    env.ok("vm stop m");
    assert_eq!(env.machine_state("m"), "stopped");
    assert!(!processes::alive(&engine), "the engine runs on");
    env.ok("vm stop m");

    env.ok("vm start m");
    assert_eq!(env.sh("m", "cat /root/work /opt/root").code(0).out(), "kept\nkept\n");
    let second = env.boot_id("m");
    env.ok("vm restart m");
    let third = env.boot_id("m");
    assert!(
        first != second && second != third,
        "a boot id came twice: {first} {second} {third}"
    );

    // The guest powers itself off.
    let _ = env.run("vm exec m -- /sbin/poweroff -f");
    let _ = env.sh("m", "echo o >/proc/sysrq-trigger");
    processes::until("the machine to be stopped", Duration::from_secs(20), || {
        env.machine_state("m") == "stopped"
    });
    env.ok("vm delete m");
    env.run("vm show m").fails();
    env.close();
}

// B28: a machine that was killed was left in an error state by a stale process id.
fn kill_ends_stopped() {
    let env = machine("kill");
    let engine = env.engine("m");
    env.ok("vm kill m");
    assert!(!processes::alive(&engine));
    assert_eq!(env.machine_state("m"), "stopped");
    env.ok("vm kill m");
    // Nothing of the run is left, and it starts again.
    assert!(env.machinery().is_empty(), "{:?}", env.processes());
    env.ok("vm start m");
    env.sh("m", "true").code(0);
    env.ok("vm kill --signal TERM m");
    processes::until("the machine to be stopped", Duration::from_secs(20), || {
        env.machine_state("m") == "stopped"
    });
    env.run("vm kill --signal NOSUCH m").fails();
    env.close();
}

fn changes_take_effect() {
    let env = TestEnv::new("changes");
    env.ok("vm create --name m --no-start");
    env.ok("vm set m --vcpu 2 --memory 768M --disk-size 6G");
    env.ok("vm start m");
    let seen = env
        .sh(
            "m",
            "nproc; awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo; df -k / | awk 'END {print $2}'",
        )
        .code(0)
        .out();
    let numbers: Vec<u64> = seen.lines().map(|l| l.trim().parse().unwrap()).collect();
    assert_eq!(numbers[0], 2);
    assert!((650..=768).contains(&numbers[1]), "{} MiB", numbers[1]);
    assert!((5_400_000..=6_291_456).contains(&numbers[2]), "{} KiB", numbers[2]);
    // A disk grows only while nothing uses it, and never shrinks.
    env.run("vm set m --disk-size 7G").fails().says(&["stopped"]);
    env.ok("vm rename m other");
    env.run("vm show m").fails();
    assert_eq!(env.machine_state("other"), "running");
    env.ok("vm set other --vcpu 1");
    env.ok("vm kill other");
    env.run("vm set other --disk-size 1G").fails();
    env.run("vm set other --vcpu 0").fails();
    env.run("vm set other --vcpu 99").fails();
    env.ok("vm start other");
    assert_eq!(env.sh("other", "nproc; hostname").code(0).out(), "1\nother\n");
    env.close();
}

fn prune_spares_what_runs() {
    let env = machine("prune");
    env.ok("vm create --name idle1 --no-start");
    env.ok("vm create --name idle2 --no-start");
    let boot = env.boot_id("m");
    // Nobody to ask and not told to go ahead: nothing happens.
    env.run("vm prune").fails();
    assert_eq!(env.machine_names().len(), 3);
    env.ok("vm prune --force");
    assert_eq!(env.machine_names(), ["m"]);
    assert_eq!(env.boot_id("m"), boot);
    env.ok("vm prune --force");
    env.close();
}

fn several_at_once() {
    let env = TestEnv::new("several");
    for name in ["a", "b", "c"] {
        env.ok(&format!("vm create --name {name} --no-start"));
    }
    // Good references run though others are wrong; output in the order given; duplicates once.
    let done = env.run("vm delete b nosuch a b").fails().says(&["nosuch"]);
    assert_eq!(done.out(), "b\na\n");
    assert_eq!(env.machine_names(), ["c"]);
    let json = env.ok("vm delete c --json").json();
    assert_eq!(
        (json[0]["name"].clone(), json.as_array().map(Vec::len)),
        ("c".into(), Some(1))
    );
    env.close();
}

fn references() {
    let env = TestEnv::new("references");
    env.ok("vm create --name alpha --no-start");
    env.ok("vm create --name alpine --no-start");
    let id = env.machine("alpha")["id"].as_str().unwrap().to_owned();
    for reference in ["alpha", "alph", id.as_str(), &id[..8]] {
        assert_eq!(
            env.json(&format!("vm show {reference}"))["name"],
            "alpha",
            "{reference}"
        );
    }
    env.run("vm show alp").fails().says(&["alpha", "alpine"]);
    env.run("vm show aplha").fails().says(&["hint:"]);
    env.close();
}

fn looking_at_a_machine() {
    let (env, m) = slim();
    let list = env.ok("vm list").out();
    assert!(
        list.starts_with("ID ") && list.lines().any(|l| l.contains(" slim ") && l.contains("running")),
        "{list}"
    );
    assert_eq!(env.ok("ps").out().lines().next(), list.lines().next());
    let show = env.json(&format!("vm show {m}"));
    assert_eq!(
        (
            show["name"].as_str(),
            show["state"].as_str(),
            show["spec"]["vcpu"].as_u64()
        ),
        (Some(m), Some("running"), Some(1))
    );
    assert_eq!(show["guest"]["boot_id"].as_str(), Some(env.boot_id(m).as_str()));
    assert!(
        show["boot"]["stages"].as_array().is_some_and(|s| !s.is_empty()),
        "{show}"
    );
    let quiet = env.ok("vm list --quiet").out();
    assert!(quiet.lines().any(|l| show["id"].as_str() == Some(l)), "{quiet}");
    let stats = env.json(&format!("vm stats {m}"));
    let stats = if stats.is_array() { stats[0].clone() } else { stats };
    assert!(
        stats["resident_bytes"].as_u64().is_some_and(|b| b > 50_000_000),
        "{stats}"
    );
    assert!(stats["guest_uptime_ms"].as_u64().is_some_and(|t| t > 0), "{stats}");
    env.sh(m, "echo word-on-the-console >/dev/console").code(0);
    processes::until("the word in the log", Duration::from_secs(5), || {
        env.ok(&format!("vm logs {m}")).out().contains("word-on-the-console")
    });
    let follow = env.banger(["vm", "logs", "--follow", m]).spawn();
    follow.expect("word-on-the-console");
    env.sh(m, "echo later-word >/dev/console").code(0);
    follow.expect("later-word");
    follow.signal(rustix::process::Signal::INT);
    assert!([0, 130].contains(&follow.wait().status));
}

fn waiting() {
    let env = TestEnv::new("waiting");
    env.ok("vm create --name m --no-start");
    env.ok("vm wait m --state stopped");
    let waiting = env
        .banger(["vm", "wait", "m", "--state", "running"])
        .deadline(90)
        .spawn();
    env.ok("vm start m");
    waiting.wait().code(0);
    let begun = Instant::now();
    env.run("vm wait m --state stopped --timeout 1s").code(7).says(&["m"]);
    assert!(begun.elapsed() < Duration::from_secs(10));
    let waiting = env.banger(["vm", "wait", "m", "--state", "stopped"]).spawn();
    env.ok("vm kill m");
    waiting.wait().code(0);
    env.close();
}

// B15: a machine was locked as long as a transfer ran.
fn a_stop_does_not_wait_for_others() {
    let env = TestEnv::new("no-lock");
    create(&env, "m", "debian-slim");
    let running = env
        .banger(["vm", "exec", "m", "--", "sh", "-c", "echo ready; cat /dev/zero"])
        .stdout_file(std::fs::File::create("/dev/null").unwrap())
        .spawn();
    std::thread::sleep(Duration::from_millis(500));
    env.json("vm show m");
    env.ok("vm list");
    let begun = Instant::now();
    env.ok("vm stop m");
    assert!(
        begun.elapsed() < Duration::from_secs(30),
        "the stop took {:?}",
        begun.elapsed()
    );
    // The command's client ends with an error of its own, it does not hang.
    let done = running.wait();
    assert_ne!(done.status, 0);
    assert_eq!(env.machine_state("m"), "stopped");
    env.close();
}

/// Locks and pipes of whoever happens to call first belong to them: neither daemon nor machine keeps them.
fn nothing_keeps_what_its_starter_had_open() {
    let env = TestEnv::new("inherited");
    let lock = env.work().join("lock");
    let script = "exec 7>&1 8>lock; exec \"$0\" vm create --name m";
    let banger = banger_testkit::binaries::program("banger");
    let mut sh = env.program("sh");
    sh = sh.args(["-c", script]).arg(banger);
    // That its output is closed with it is seen to by the wait.
    sh.deadline(120).run().code(0).prints("m\n");
    let mut seen = 0;
    for process in env.processes() {
        for fd in std::fs::read_dir(format!("/proc/{}/fd", process.pid))
            .into_iter()
            .flatten()
            .flatten()
        {
            let target = std::fs::read_link(fd.path()).unwrap_or_default();
            assert_ne!(target, lock, "{} holds it", process.name);
            seen += 1;
        }
    }
    assert!(seen > 10, "daemon, shim and engine were looked at");
    env.close();
}
