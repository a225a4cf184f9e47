//! Guests that never answer, disks that are full, images that are broken: an error in time, and nothing left.

use std::time::{Duration, Instant};

use banger_testkit::{Need, Running, TestEnv, need, processes};
use rustix::process::{Pid, Signal};

use crate::harness::{MACHINES, machine, tests};

tests! { MACHINES;
    an_agent_that_is_dead,
    a_guest_that_never_answers,
    a_guest_that_stops_answering,
    an_image_that_is_no_file_system,
    a_kernel_that_does_not_boot,
    a_disk_that_is_full,
    a_stop_that_the_guest_ignores,
    a_failed_start_leaves_a_stopped_machine,
    a_cancelled_create,
}

fn nothing_is_left(env: &TestEnv) {
    assert!(env.machine_names().is_empty(), "{:?}", env.machine_names());
    assert_eq!(
        std::fs::read_dir(env.state().join("machines")).unwrap().count(),
        0,
        "files are left"
    );
    let engines = || !env.machinery().is_empty();
    processes::until("the engine to be gone", Duration::from_secs(5), || !engines());
}

/// Replaces every file of the store of this name's beginning by bytes of the test's own.
fn replace_in_store(env: &TestEnv, fits: impl Fn(&std::path::Path) -> bool, content: impl Fn(u64) -> Vec<u8>) -> usize {
    let mut replaced = 0;
    let mut todo = vec![env.state()];
    while let Some(dir) = todo.pop() {
        for path in std::fs::read_dir(dir).unwrap().flatten().map(|e| e.path()) {
            if path.is_dir() {
                todo.push(path);
            } else if fits(&path) {
                let size = std::fs::metadata(&path).unwrap().len();
                // A new file: the old one is shared with every other environment.
                std::fs::remove_file(&path).unwrap();
                std::fs::write(&path, content(size)).unwrap();
                replaced += 1;
            }
        }
    }
    replaced
}

/// The engine stands still, and with it the agent: nothing waits for it for ever.
fn an_agent_that_is_dead() {
    let env = machine("dead-agent");
    let engine = env.engine("m");
    let pid = Pid::from_raw(engine.pid).unwrap();
    env.ok("vm exec m -- true");
    rustix::process::kill_process(pid, Signal::STOP).unwrap();
    let begun = Instant::now();
    let running = env.banger(["vm", "exec", "m", "--", "true"]).spawn();
    std::thread::sleep(Duration::from_secs(1));
    running.signal(Signal::TERM);
    running.wait().code(143);
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "the first TERM ends the client"
    );
    let calls = [
        "vm exec m -- true",
        "vm sessions m",
        "vm ports m",
        "vm cp m:/etc/hostname -",
    ];
    let running: Vec<Running> = calls
        .iter()
        .map(|line| env.banger(line.split(' ')).deadline(60).spawn())
        .collect();
    for (line, running) in calls.iter().zip(running) {
        let done = running.wait();
        assert!(done.status == 125 || done.status == 7, "{line}: {}", done.err());
        assert!(done.err().contains("guest agent"), "{line}: {}", done.err());
    }
    rustix::process::kill_process(pid, Signal::CONT).unwrap();
    env.ok("vm exec m -- true");
    env.close();
}

fn a_guest_that_never_answers() {
    let env = TestEnv::new("hangs");
    let begun = Instant::now();
    let running = env
        .banger(["vm", "create", "--cold", "--name", "m", "--timeout", "6s"])
        .deadline(60)
        .spawn();
    let engine = || env.engines().into_iter().next();
    processes::until("the engine to run", Duration::from_secs(10), || engine().is_some());
    // The guest is held in the middle of its boot.
    std::thread::sleep(Duration::from_millis(800));
    processes::signal(&engine().unwrap(), Signal::STOP);
    let done = running.wait().code(7);
    assert!(
        begun.elapsed() < Duration::from_secs(25),
        "it took {:?}",
        begun.elapsed()
    );
    let err = done.err();
    // It names the stage, and shows the console's last lines.
    assert!(err.contains("stage") || err.contains("agent"), "{err}");
    assert!(err.lines().count() > 2, "{err}");
    nothing_is_left(&env);
    env.close();
}

fn a_guest_that_stops_answering() {
    let env = machine("frozen");
    let engine = env.engine("m");
    processes::signal(&engine, Signal::STOP);
    // Looking does not hang, and neither does the rest of the daemon.
    env.banger(["vm", "list"]).deadline(20).ok();
    env.banger(["vm", "show", "m"]).deadline(40).ok();
    let exec = env.banger(["vm", "exec", "m", "--", "true"]).deadline(120).spawn();
    let begun = Instant::now();
    env.banger(["vm", "kill", "m"]).deadline(30).ok();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(exec.wait().status, 125);
    assert_eq!(env.machine_state("m"), "stopped");
    env.close();
}

fn an_image_that_is_no_file_system() {
    let env = TestEnv::new("bad-image");
    let large = |path: &std::path::Path| {
        path.to_string_lossy().contains("/images/") && std::fs::metadata(path).unwrap().len() > 50_000_000
    };
    // Not all zeros: that could look like an empty disk.
    let replaced = replace_in_store(&env, large, |size| {
        vec![0x5a; usize::try_from(size.min(64 << 20)).unwrap()]
    });
    assert!(replaced > 0, "no image in the store");
    let begun = Instant::now();
    let done = env
        .banger(["vm", "create", "--cold", "--name", "m", "--timeout", "40s"])
        .deadline(90)
        .run()
        .fails();
    // The agent says what is wrong; nobody waits for the deadline.
    assert!(
        begun.elapsed() < Duration::from_secs(35),
        "it took {:?}: {}",
        begun.elapsed(),
        done.err()
    );
    assert!(
        done.err().contains("mount") || done.err().contains("root"),
        "{}",
        done.err()
    );
    nothing_is_left(&env);
    env.close();
}

fn a_kernel_that_does_not_boot() {
    let env = TestEnv::new("bad-kernel");
    let kernel = |path: &std::path::Path| {
        path.to_string_lossy().contains("/kernels/") && path.file_name().is_some_and(|n| n == "vmlinux")
    };
    let replaced = replace_in_store(&env, kernel, |_| {
        b"\x7fELF is how it begins, but it is no kernel".to_vec()
    });
    assert!(replaced > 0, "no kernel in the store");
    let done = env
        .banger(["vm", "create", "--cold", "--name", "m", "--timeout", "10s"])
        .deadline(60)
        .run()
        .fails();
    // The engine's own words come out.
    assert!(
        done.err().to_lowercase().contains("kernel") || done.err().contains("ELF"),
        "{}",
        done.err()
    );
    nothing_is_left(&env);
    env.close();
}

fn a_disk_that_is_full() {
    need::require(&[Need::MountNamespace]);
    let env = TestEnv::new("full");
    let machines = env.state().join("machines");
    std::fs::create_dir_all(&machines).unwrap();
    // The tmpfs exists in a mount namespace of its own; the daemon is started in it.
    let script = format!(
        "mount -t tmpfs -o size=64k,mode=700 none '{dir}' || exit 99\n\
         '{banger}' vm create --name m; status=$?\n\
         '{banger}' vm list --quiet; ls '{dir}'; '{banger}' daemon stop; exit $status",
        dir = machines.display(),
        banger = banger_testkit::binaries::program("banger").display(),
    );
    let done = env
        .program("unshare")
        .args(need::namespace_flags())
        .args(["sh", "-c", &script])
        .deadline(60)
        .run();
    let done = done.code(8).says(&["space", "hint:"]);
    assert_eq!(done.out(), "", "a machine or its files are left");
    env.close();
}

fn a_stop_that_the_guest_ignores() {
    let env = machine("ignores");
    processes::signal(&env.engine("m"), Signal::STOP);
    let begun = Instant::now();
    env.banger(["vm", "stop", "m", "--timeout", "2s"]).deadline(60).ok();
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    assert_eq!(env.machine_state("m"), "stopped");
    env.close();
}

fn a_failed_start_leaves_a_stopped_machine() {
    let env = TestEnv::new("failed-start");
    env.ok("vm create --name m --no-start");
    let running = env
        .banger(["vm", "start", "m", "--cold", "--timeout", "5s"])
        .deadline(60)
        .spawn();
    let engine = || env.engines().into_iter().next();
    processes::until("the engine to run", Duration::from_secs(10), || engine().is_some());
    processes::signal(&engine().unwrap(), Signal::STOP);
    running.wait().code(7);
    assert_eq!(env.machine_state("m"), "stopped");
    assert!(env.machine("m")["cause"].as_str().is_some_and(|c| !c.is_empty()));
    assert!(engine().is_none());
    // Nothing is wrong with it.
    env.ok("vm start m");
    env.sh("m", "true").code(0);
    env.close();
}

fn a_cancelled_create() {
    let env = TestEnv::new("cancelled");
    let running = env.banger(["vm", "create", "--cold", "--name", "m"]).spawn();
    let engine = || !env.engines().is_empty();
    processes::until("the engine to run", Duration::from_secs(10), engine);
    running.signal(Signal::INT);
    running.wait().code(130);
    nothing_is_left(&env);
    // A client that just goes away cancels as well.
    let running = env.banger(["vm", "create", "--cold", "--name", "m"]).spawn();
    processes::until("the engine to run", Duration::from_secs(10), engine);
    running.signal(Signal::KILL);
    running.wait();
    processes::until("the machine to be gone", Duration::from_secs(30), || {
        env.machine_names().is_empty()
    });
    nothing_is_left(&env);
    env.close();
}
