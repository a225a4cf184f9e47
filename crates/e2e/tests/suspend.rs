//! Machines that stand still: paused, suspended, woken by who needs them, and suspended by themselves when nobody does.

use std::time::{Duration, Instant};

use banger_testkit::{Need, TestEnv, env::CONFIG, need, processes};

use crate::copies::daemon_with;
use crate::harness::{MACHINES, create, machine, tests};
use crate::snapshots::{count, finished, goes_on_counting, home};

tests! { MACHINES;
    a_daemon_dies_in_a_suspension,
    a_daemon_dies_in_a_wake,
    whoever_needs_it_wakes_it,
    ssh_wakes_it,
    who_is_idle_and_who_is_not,
    stopped_when_stale,
    damaged_memory,
    a_disk_that_is_full,
    suspend_and_start,
    paused,
    wakes_and_stops_at_once,
    what_is_refused,
    daemons_come_and_go,
    a_kill_drops_the_memory,
    a_wake_that_is_interrupted_loses_nothing,
}

/// It holds neither processor nor memory: there is no process, and its memory is a file.
#[track_caller]
fn rests(env: &TestEnv, m: &str) {
    assert_eq!(env.machine_state(m), "suspended");
    assert!(env.machinery().is_empty(), "{:?}", env.processes());
    let home = home(env, m);
    assert!(home.join("suspended/memory").is_file() && home.join("suspended/state").is_file());
    assert!(!home.join("memory").exists());
    finished(env, m, "now");
}

/// It runs, once, and what it was suspended in is gone.
#[track_caller]
fn runs(env: &TestEnv, m: &str) {
    assert_eq!((env.machine_state(m).as_str(), env.engines().len()), ("running", 1));
    let home = home(env, m);
    assert!(!home.join("suspended").exists());
    finished(env, m, "now");
}

fn suspend_and_start() {
    let env = machine("suspend");
    count(&env, "m");
    let boot = env.boot_id("m");
    // A session outlives it.
    let session = env
        .banger(["vm", "exec", "m", "--", "sh", "-c", "echo begun; sleep 1000"])
        .spawn();
    session.expect("begun");
    for round in 0..3 {
        env.ok("vm suspend m").prints("m\n");
        rests(&env, "m");
        env.ok("vm suspend m");
        assert!(env.ok("vm list").out().contains("suspended"));
        env.ok("vm start m").prints("m\n");
        runs(&env, "m");
        assert_eq!(env.machine("m")["boot"]["how"], "wake");
        goes_on_counting(&env, "m");
        assert_eq!(env.boot_id("m"), boot, "round {round}");
    }
    let sessions = env.json("vm sessions m");
    assert!(sessions.to_string().contains("sleep 1000"), "{sessions}");
    drop(session);
    env.ok("vm stop m");
    env.ok("vm start m");
    assert_ne!(env.boot_id("m"), boot);
    env.close();
}

fn paused() {
    let env = machine("pause");
    count(&env, "m");
    let engine = env.engine("m");
    env.ok("vm pause m").prints("m\n");
    assert_eq!(env.machine_state("m"), "paused");
    env.ok("vm pause m");
    let cpu = || std::fs::read_to_string(format!("/proc/{}/stat", engine.pid)).unwrap();
    let used = |stat: &str| -> u64 {
        stat.rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .nth(11)
            .unwrap()
            .parse()
            .unwrap()
    };
    let before = used(&cpu());
    std::thread::sleep(Duration::from_secs(1));
    assert!(used(&cpu()) <= before + 5, "a paused machine computes");
    for line in [
        "vm exec m -- true",
        "vm suspend m",
        "vm snapshot create m s",
        "vm fork m",
        "vm start m",
        "vm cp m:/etc/hostname x",
        "vm set m --disk-size 8G",
        "vm commit m image",
    ] {
        env.run(line).fails().says(&["paused", "hint:"]);
    }
    // The next daemon leaves it as it is.
    env.kill_daemon();
    env.ok("vm list");
    assert_eq!(
        (env.machine_state("m").as_str(), env.engine("m").pid),
        ("paused", engine.pid)
    );
    env.run("vm exec m -- true").fails();
    env.ok("vm resume m").prints("m\n");
    env.ok("vm resume m");
    goes_on_counting(&env, "m");
    for end in ["vm stop m --timeout 3s", "vm kill m", "vm delete m --force"] {
        env.ok("vm start m");
        env.ok("vm pause m");
        let begun = Instant::now();
        env.ok(end);
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{end} took {:?}",
            begun.elapsed()
        );
        assert!(env.machinery().is_empty(), "{end}: {:?}", env.processes());
    }
    env.close();
}

fn whoever_needs_it_wakes_it() {
    let env = machine("wakes");
    count(&env, "m");
    std::fs::write(env.work().join("file"), "content\n").unwrap();
    for line in [
        "vm exec m -- test -e /root/count",
        "vm cp file m:/root/file",
        "vm cp m:/root/file back",
    ] {
        env.ok("vm suspend m");
        rests(&env, "m");
        env.banger(line.split(' ')).deadline(20).ok();
        runs(&env, "m");
    }
    assert_eq!(std::fs::read_to_string(env.work().join("back")).unwrap(), "content\n");
    // On a terminal as well.
    env.ok("vm suspend m");
    let mut shell = env.terminal(["vm", "shell", "m"]);
    shell.until_raw();
    shell.send("echo wo''rd; exit 3\r");
    shell.expect("word");
    assert_eq!(shell.wait(), 3);
    runs(&env, "m");
    // Looking at it does not.
    env.ok("vm suspend m");
    env.ok("vm show m");
    env.ok("vm list");
    let _ = env.run("vm stats m");
    let _ = env.run("vm logs m");
    env.ok("vm wait m --state suspended");
    rests(&env, "m");
    goes_on_counting(&env, "m");
    env.close();
}

fn ssh_wakes_it() {
    need::require(&[Need::Ssh]);
    let env = TestEnv::new("wake-ssh");
    create(&env, "m", "debian");
    env.ok("vm suspend m");
    rests(&env, "m");
    let done = env.banger(["vm", "ssh", "m", "--", "hostname"]).deadline(60).run();
    done.code(0).prints("m\n");
    runs(&env, "m");
    // A connection that is forwarded through the agent: what ssh goes through, spoken to by hand.
    env.ok("vm suspend m");
    let mut running = env
        .banger(["internal", "ssh-proxy", "m.vm"])
        .stdin_held()
        .deadline(30)
        .spawn();
    running.expect("SSH-2.0");
    runs(&env, "m");
    // It is a use for as long as it lasts, though nothing goes through it.
    env.ok("vm set m --idle-suspend-after 2s");
    std::thread::sleep(Duration::from_secs(4));
    runs(&env, "m");
    running.write("nonsense\r\n\r\n");
    running.close_stdin();
    drop(running);
    env.ok("vm wait m --state suspended --timeout 20s");
    env.ok("vm set m --idle-suspend-after 0s");
    let failed = env.sh("m", "systemctl --failed --no-legend --plain").code(0).out();
    assert_eq!(failed, "", "units failed over a suspension");
    env.close();
}

fn wakes_and_stops_at_once() {
    let env = machine("wake-race");
    count(&env, "m");
    env.ok("vm suspend m");
    // Two at once, and more: one engine, and both get what they want.
    let execs: Vec<_> = (0..4)
        .map(|i| env.banger(["vm", "exec", "m", "--", "echo", &i.to_string()]).spawn())
        .collect();
    let start = env.banger(["vm", "start", "m"]).spawn();
    for (i, exec) in execs.into_iter().enumerate() {
        exec.wait().code(0).prints(&format!("{i}\n"));
    }
    start.wait().code(0);
    runs(&env, "m");
    goes_on_counting(&env, "m");
    for end in [
        ["vm", "stop", "m"].as_slice(),
        &["vm", "kill", "m"],
        &["vm", "suspend", "m"],
    ] {
        for pause in [0, 30, 90, 150] {
            if env.machine_state("m") != "suspended" {
                env.ok("vm start m");
                env.ok("vm suspend m");
            }
            let exec = env.banger(["vm", "exec", "m", "--", "true"]).spawn();
            std::thread::sleep(Duration::from_millis(pause));
            let ended = env.banger(end).spawn();
            let _ = exec.wait();
            let _ = ended.wait();
            processes::until("m to settle", Duration::from_secs(20), || {
                ["running", "stopped", "suspended"].contains(&env.machine_state("m").as_str())
            });
            let state = env.machine_state("m");
            processes::until(
                &format!("the engines of a machine that is {state}"),
                Duration::from_secs(5),
                || env.engines().len() == usize::from(state == "running"),
            );
            finished(&env, "m", &format!("{end:?} after {pause} ms"));
            assert_eq!(
                home(&env, "m").join("suspended").exists(),
                state == "suspended",
                "{end:?} after {pause} ms"
            );
        }
    }
    if env.machine_state("m") != "suspended" {
        env.ok("vm start m");
        env.ok("vm suspend m");
    }
    let exec = env.banger(["vm", "exec", "m", "--", "true"]).spawn();
    std::thread::sleep(Duration::from_millis(60));
    env.ok("vm delete m --force");
    let _ = exec.wait();
    assert!(env.machine_names().is_empty() && env.machinery().is_empty());
    env.close();
}

fn a_wake_that_is_interrupted_loses_nothing() {
    let env = machine("wake-cancel");
    count(&env, "m");
    let boot = env.boot_id("m");
    for point in ["wake.launched", "wake.spent", "restore.channel", "restore.renewed"] {
        env.ok("vm suspend m");
        daemon_with(&env, &format!("{point}=delay:1000"));
        let running = env.banger(["vm", "start", "m"]).spawn();
        processes::until("the engine to run", Duration::from_secs(10), || {
            !env.engines().is_empty()
        });
        std::thread::sleep(Duration::from_millis(300));
        running.signal(rustix::process::Signal::INT);
        running.wait();
        goes_on_counting(&env, "m");
        assert_eq!(env.boot_id("m"), boot, "{point}: its memory was lost");
    }
    // Nor does a time that is too short.
    env.ok("vm suspend m");
    let _ = env.run("vm start m --timeout 1ms");
    goes_on_counting(&env, "m");
    assert_eq!(env.boot_id("m"), boot, "its memory was lost");
    env.close();
}

fn a_kill_drops_the_memory() {
    let env = machine("drop");
    env.sh("m", "echo kept >/root/kept; sync; echo held >/dev/shm/held")
        .code(0);
    env.ok("vm suspend m");
    env.ok("vm kill m");
    assert_eq!(env.machine_state("m"), "stopped");
    assert!(!home(&env, "m").join("suspended").exists());
    env.ok("vm start m");
    env.sh("m", "cat /root/kept; ls /dev/shm").code(0).prints("kept\n");
    env.ok("vm suspend m");
    env.ok("vm start m --cold");
    assert_eq!(env.machine("m")["boot"]["how"], "boot");
    runs(&env, "m");
    env.ok("vm suspend m");
    env.ok("vm delete m --force");
    env.close();
}

fn what_is_refused() {
    let env = machine("suspended-no");
    env.ok("vm suspend m");
    for line in [
        "vm set m --vcpu 2",
        "vm set m --memory 1G",
        "vm set m --disk-size 8G",
        "vm commit m image",
        "vm fork m",
        "vm snapshot create m s",
        "vm pause m",
        "vm resume m",
    ] {
        env.run(line).fails().says(&["suspended", "hint:"]);
        rests(&env, "m");
    }
    env.ok("vm rename m other");
    env.sh("other", "true").code(0);
    env.ok("vm stop other");
    env.run("vm suspend other").fails().says(&["stopped", "hint:"]);
    env.run("vm pause other").fails().says(&["stopped", "hint:"]);
    env.close();
}

fn damaged_memory() {
    use std::os::unix::fs::FileExt;
    let env = machine("wake-damage");
    env.sh("m", "echo kept >/root/kept; sync").code(0);
    type Damage = fn(&std::path::Path);
    let damages: [(&str, Damage); 4] = [
        ("memory", |f| {
            let open = std::fs::OpenOptions::new().write(true).open(f).unwrap();
            open.write_all_at(b"not what was written here", 100_000_000).unwrap();
        }),
        ("memory", |f| std::fs::remove_file(f).unwrap()),
        ("state", |f| {
            std::fs::OpenOptions::new()
                .write(true)
                .open(f)
                .unwrap()
                .set_len(1000)
                .unwrap()
        }),
        ("manifest.json", |f| std::fs::write(f, "{").unwrap()),
    ];
    for (file, damage) in damages {
        env.ok("vm suspend m");
        damage(&home(&env, "m").join("suspended").join(file));
        env.run("vm start m").fails().says(&["memory", "hint:", "--cold"]);
        env.run("vm exec m -- true").fails().says(&["--cold"]);
        assert_eq!(env.machine_state("m"), "suspended", "{file}");
        assert!(env.machinery().is_empty(), "{file}");
        env.ok("vm start m --cold");
        env.sh("m", "cat /root/kept").code(0).prints("kept\n");
    }
    env.close();
}

fn a_disk_that_is_full() {
    need::require(&[Need::MountNamespace]);
    let env = TestEnv::new("suspend-full");
    // The whole state is on a file system of its own, which is then filled; templates on another one would not do.
    // The larger image leaves no room in it for two memories, each of which has all of its pages on tmpfs.
    let script = "
        mkdir -p $W/state && mount -t tmpfs -o size=1400m,mode=700 none $W/state && cp -a $S $W/state/ || exit 90
        export XDG_STATE_HOME=$W/state
        $B image delete debian >/dev/null || exit 92
        $B vm create --name m >/dev/null || exit 91
        boot=$($B vm exec m -- cat /proc/sys/kernel/random/boot_id)
        head -c 1400m /dev/zero >$W/state/fill 2>/dev/null; truncate -s -8M $W/state/fill
        $B vm suspend m; echo suspend: $?
        $B vm snapshot create m s; echo snapshot: $?
        test \"$($B vm exec m -- cat /proc/sys/kernel/random/boot_id)\" = \"$boot\" && echo the same
        ls $W/state/banger/machines/* | grep -e new -e next
        rm $W/state/fill
        $B vm suspend m; $B vm exec m -- echo woken
        $B vm delete --force m >/dev/null; $B daemon stop >/dev/null 2>&1";
    let done = env
        .program("unshare")
        .args(need::namespace_flags())
        .args(["sh", "-c", script])
        .env("B", banger_testkit::binaries::program("banger"))
        .env("S", env.state())
        .env("W", env.work())
        .deadline(120)
        .run()
        .code(0);
    let lines: Vec<String> = done.out().lines().map(str::to_owned).collect();
    assert_eq!(
        lines,
        ["suspend: 8", "snapshot: 8", "the same", "m", "woken"],
        "{}",
        done.err()
    );
    done.says(&["space"]);
    env.close();
}

fn daemons_come_and_go() {
    let env = machine("suspend-adopt");
    count(&env, "m");
    env.ok("vm suspend m");
    env.kill_daemon();
    env.ok("vm list");
    rests(&env, "m");
    env.ok("daemon stop");
    goes_on_counting(&env, "m");
    runs(&env, "m");
    env.close();
}

/// After a daemon died: the machine runs, or is suspended and wakes, with its program alive in both; or it is stopped and says why.
#[track_caller]
fn settled(env: &TestEnv, boot: &mut String, point: &str) {
    env.ok("vm list");
    processes::until(&format!("m to settle after {point}"), Duration::from_secs(40), || {
        ["running", "stopped", "suspended"].contains(&env.machine_state("m").as_str())
    });
    let state = env.machine_state("m");
    assert_eq!(env.engines().len(), usize::from(state == "running"), "{point}: {state}");
    finished(env, "m", &format!("{point}: {state}"));
    eprintln!("{point}: {state}");
    if state == "stopped" {
        assert!(
            env.machine("m")["cause"].as_str().is_some_and(|c| !c.is_empty()),
            "{point}: no cause"
        );
        env.ok("vm start m");
        env.sh("m", "rm /root/count").code(0);
        count(env, "m");
        *boot = env.boot_id("m");
    } else {
        goes_on_counting(env, "m");
        assert_eq!(env.boot_id("m"), *boot, "{point}: {state}");
    }
    assert_eq!(env.engines().len(), 1, "{point}");
}

fn a_daemon_dies_in_a_suspension() {
    let env = machine("suspend-die");
    count(&env, "m");
    let mut boot = env.boot_id("m");
    for point in [
        "suspend.row",
        "save.frozen",
        "suspend.saved",
        "suspend.sealed",
        "suspend.committed",
        "suspend.ended",
    ] {
        daemon_with(&env, &format!("{point}=abort"));
        env.run("vm suspend m").fails();
        let before = boot.clone();
        settled(&env, &mut boot, point);
        assert_eq!(before, boot, "{point}: memory was lost in a suspension");
    }
    env.close();
}

fn a_daemon_dies_in_a_wake() {
    let env = machine("wake-die");
    count(&env, "m");
    let mut boot = env.boot_id("m");
    for point in [
        "start.row",
        "start.launched",
        "start.handles",
        "wake.launched",
        "wake.spent",
        "restore.channel",
        "restore.renewed",
    ] {
        env.ok("vm suspend m");
        daemon_with(&env, &format!("{point}=abort"));
        env.run("vm start m").fails();
        settled(&env, &mut boot, point);
    }
    env.close();
}

fn who_is_idle_and_who_is_not() {
    let env = TestEnv::new("idle");
    env.config(&format!("idle_suspend_after = \"3s\"\n{CONFIG}"));
    // By the configuration, by the machine's own setting, which wins, and by a later change.
    create(&env, "idle", "debian-slim");
    for (name, after) in [
        ("session", "3s"),
        ("detached", "3s"),
        ("computes", "3s"),
        ("never", "0s"),
    ] {
        env.ok(&format!("vm create --name {name} --idle-suspend-after {after}"));
    }
    let session = env.banger(["vm", "exec", "session", "--", "sleep", "1000"]).spawn();
    let detached = env
        .banger(["vm", "exec", "detached", "--", "sh", "-c", "echo begun; sleep 1000"])
        .spawn();
    detached.expect("begun");
    detached.signal(rustix::process::Signal::KILL);
    detached.wait();
    env.sh(
        "computes",
        "setsid sh -c 'while :; do :; done' >/dev/null 2>&1 </dev/null &",
    )
    .code(0);
    let begun = Instant::now();
    env.ok("vm wait idle --state suspended --timeout 20s");
    assert!(
        begun.elapsed() < Duration::from_secs(15),
        "it took {:?}",
        begun.elapsed()
    );
    processes::until("twice the time", Duration::from_secs(20), || {
        begun.elapsed() > Duration::from_secs(7)
    });
    for name in ["session", "detached", "computes", "never"] {
        assert_eq!(env.machine_state(name), "running", "{name}");
    }
    // Whoever wants something of it wakes it, and then it is idle again.
    env.sh("idle", "hostname").code(0).prints("idle\n");
    assert_eq!(env.machine_state("idle"), "running");
    drop(session);
    // A session that is over is none, and a change of the setting counts at once.
    env.ok("vm set never --idle-suspend-after 2s");
    env.sh("computes", "killall sh 2>/dev/null || kill $(pgrep -x sh) || true");
    env.ok("vm wait never --state suspended --timeout 20s");
    env.ok("vm wait idle --state suspended --timeout 20s");
    assert!(
        env.ok("vm show never").out().contains("2.0 s"),
        "{}",
        env.ok("vm show never").out()
    );
    // Bytes that go through all the time: a transfer that lasts is a use.
    let slow = env
        .banger([
            "vm",
            "exec",
            "idle",
            "--",
            "sh",
            "-c",
            "for i in 1 2 3 4 5 6; do echo $i; sleep 1; done",
        ])
        .spawn();
    slow.wait().code(0).prints("1\n2\n3\n4\n5\n6\n");
    env.run("vm set idle --idle-suspend-after nonsense").fails();
    env.close();
}

fn stopped_when_stale() {
    let env = TestEnv::new("stale");
    env.config(&format!("auto_stop_stale_after = \"3s\"\n{CONFIG}"));
    create(&env, "m", "debian-slim");
    create(&env, "used", "debian-slim");
    let mut session = env
        .banger(["vm", "exec", "used", "--", "cat"])
        .stdin_held()
        .deadline(60)
        .spawn();
    session.write("word\n");
    session.expect("word");
    env.ok("vm wait m --state stopped --timeout 30s");
    assert_eq!(env.machine_state("used"), "running");
    session.close_stdin();
    session.wait().code(0);
    // A stopped machine is not started by who needs it: what was in its memory is gone.
    env.run("vm exec m -- true").fails().says(&["stopped", "hint:"]);
    env.ok("vm start m");
    env.sh("m", "true").code(0);
    env.close();
}
