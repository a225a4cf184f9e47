//! How machines end that nobody ended, and which of them come up again.

use std::time::Duration;

use banger_testkit::{TestEnv, processes};

use crate::harness::{MACHINES, create, machine, tests};

tests! { MACHINES;
    a_reboot_is_a_reboot,
    a_reboot_without_a_daemon,
    a_panic_is_told_and_answered_as_it_is_set,
    power_off_is_no_reboot,
    a_guest_that_does_not_answer_is_not_called_running,
}

/// The system call behind `reboot -f`, which needs nothing of an image but Perl.
const REBOOT: &str = "sync; perl -e 'syscall(169, 0xfee1dead, 0x28121969, 0x01234567, 0)'";
/// The same for power off.
const POWER_OFF: &str = "sync; perl -e 'syscall(169, 0xfee1dead, 0x28121969, 0x4321fedc, 0)'";
const CRASH: &str = "sync; echo c >/proc/sysrq-trigger";

fn cause(env: &TestEnv) -> String {
    env.machine("m")["cause"].as_str().unwrap_or_default().to_owned()
}

/// Waits until the machine runs another time than `boot`.
#[track_caller]
fn up_again(env: &TestEnv, boot: &str) -> String {
    processes::until("the machine to be up again", Duration::from_secs(90), || {
        let shown = env.machine("m");
        let now = shown["guest"]["boot_id"].as_str().unwrap_or(boot).to_owned();
        shown["state"] == "running" && now != boot
    });
    env.boot_id("m")
}

#[track_caller]
fn stopped(env: &TestEnv) {
    processes::until("the machine to be stopped", Duration::from_secs(60), || {
        env.machine_state("m") == "stopped"
    });
}

fn a_reboot_is_a_reboot() {
    let env = TestEnv::new("reboot");
    env.banger(["vm", "create", "--name", "m", "--image", "debian-slim", "-p", "80"])
        .deadline(180)
        .ok();
    let before = env.machine("m");
    assert_eq!(before["boot"]["how"], "template", "{before:#}");
    let mut boot = env.boot_id("m");
    env.sh("m", "echo kept >/root/work; echo kept >/opt/root; sync").code(0);
    for (script, of) in [
        (REBOOT, "asked for"),
        ("sync; echo b >/proc/sysrq-trigger", "by a reset"),
    ] {
        let session = env
            .banger(["vm", "exec", "m", "--", "sleep", "600"])
            .deadline(60)
            .spawn();
        processes::until("the session to be there", Duration::from_secs(20), || {
            env.sh("m", "ls /proc/*/exe -l 2>/dev/null | grep -c sleep")
                .out()
                .trim()
                != "0"
        });
        let _ = env.sh("m", script);
        // Who had a program in it hears what became of it.
        let ended = session.wait();
        assert_ne!(ended.status, 0, "{of}: {ended:?}");
        assert!(
            ended
                .err()
                .contains("the program ended with machine `m`: the guest rebooted"),
            "{of}: {ended:?}"
        );
        boot = up_again(&env, &boot);
        assert_eq!(env.sh("m", "cat /root/work /opt/root").code(0).out(), "kept\nkept\n");
        let after = env.machine("m");
        for same in ["id", "name", "spec", "forwards"] {
            assert_eq!(after[same], before[same], "{of}");
        }
        assert_eq!(
            (after["boot"]["how"].as_str(), cause(&env).as_str()),
            (Some("boot"), "the guest rebooted")
        );
    }
    env.close();
}

fn a_reboot_without_a_daemon() {
    let env = machine("reboot-alone");
    let boot = env.boot_id("m");
    let engine = env.engine("m");
    env.sh("m", "(sleep 3; sync; echo b >/proc/sysrq-trigger) >/dev/null 2>&1 &")
        .code(0);
    env.kill_daemon();
    processes::until("the engine to end", Duration::from_secs(60), || {
        !processes::alive(&engine)
    });
    up_again(&env, &boot);
    assert_eq!(cause(&env), "the guest rebooted");
    env.close();
}

fn a_panic_is_told_and_answered_as_it_is_set() {
    let env = machine("panic");
    assert_eq!(env.machine("m")["on_panic"], "stop");
    let _ = env.sh("m", CRASH);
    stopped(&env);
    assert_eq!(cause(&env), "the guest's kernel panicked: sysrq triggered crash");
    env.run("vm set m --on-panic never").fails().says(&["stop", "restart"]);
    env.ok("vm set m --on-panic restart");
    assert_eq!(env.machine("m")["on_panic"], "restart");
    let shown = env.ok("vm show m").out();
    assert!(shown.contains("on panic"), "{shown}");
    env.ok("vm start m");
    // One that panics again and again is stopped in the end.
    let mut boot = env.boot_id("m");
    for _ in 0..5 {
        let _ = env.sh("m", CRASH);
        boot = up_again(&env, &boot);
        assert_eq!(cause(&env), "the guest's kernel panicked: sysrq triggered crash");
    }
    let _ = env.sh("m", CRASH);
    stopped(&env);
    let told = cause(&env);
    assert!(
        told.contains("sysrq triggered crash") && told.contains("5 times"),
        "{told}"
    );
    env.close();
}

fn power_off_is_no_reboot() {
    let env = TestEnv::new("power-off");
    env.banger([
        "vm",
        "create",
        "--name",
        "m",
        "--image",
        "debian-slim",
        "--on-panic",
        "restart",
    ])
    .deadline(180)
    .ok();
    let _ = env.sh("m", POWER_OFF);
    stopped(&env);
    assert_eq!(cause(&env), "the guest powered itself off");
    // Nor is an engine that somebody has ended.
    env.ok("vm start m");
    let engine = env.engine("m");
    processes::signal(&engine, rustix::process::Signal::KILL);
    stopped(&env);
    assert_eq!(cause(&env), "its engine was ended by signal 9 (SIGKILL)");
    env.close();
}

fn a_guest_that_does_not_answer_is_not_called_running() {
    let env = TestEnv::new("mute");
    create(&env, "m", "debian-slim");
    // The shell's parent is the agent, and its console goes on.
    let script = "kill -STOP $PPID; echo '<0>the agent is stopped' >/dev/kmsg";
    let mut session = env
        .banger(["vm", "exec", "m", "--", "sh", "-c", script])
        .deadline(300)
        .spawn();
    processes::until("the agent to be stopped", Duration::from_secs(30), || {
        env.run("vm logs m").out().contains("the agent is stopped")
    });
    env.ok("vm pause m");
    env.banger(["vm", "resume", "m"])
        .deadline(90)
        .run()
        .fails()
        .says(&["did not answer", "hint:"]);
    assert_eq!(env.machine_state("m"), "paused");
    assert!(cause(&env).contains("did not answer"), "{}", cause(&env));
    session.signal(rustix::process::Signal::KILL);
    processes::until("the session's client to end", Duration::from_secs(10), || {
        session.has_ended()
    });
    env.ok("vm kill m");
    env.ok("vm start m");
    env.sh("m", "true").code(0);
    assert_eq!(cause(&env), "");
    env.close();
}
