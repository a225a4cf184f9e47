//! Machines do not notice what happens to the daemon, the helper, their units and their programs.

use crate::harness::scenarios;
use crate::installed::{Installed, Same, assert_clean, firecracker_options};
use crate::lab;

scenarios! {
    qemu_outlives_services: 900,
    firecracker_outlives_services: 900,
    consoles_outlive_the_daemons_unit: 600,
    qemu_is_saved_and_copied: 900,
    firecracker_is_saved_and_copied: 900,
    qemu_is_paused_and_reboots: 900,
    firecracker_is_paused_and_reboots: 900,
}

const HELPER: &str = "bangerd-root.service";
const DAEMON: &str = "bangerd.service";

fn qemu_outlives_services() {
    let installed = Installed::new();
    outlive("qemu");
    installed.close();
}

fn firecracker_outlives_services() {
    let options = firecracker_options();
    let installed = Installed::with(&options);
    outlive("firecracker");
    installed.close();
    lab::root(["rm", "-f", "/opt/firecracker", "/opt/jailer"]).ok();
}

/// The same for a machine on either engine: everything that can happen to the services, one after the other.
fn outlive(engine: &str) {
    lab::banger(&format!("vm create --name m --image debian-slim --engine {engine}"))
        .deadline(240)
        .ok();
    lab::banger("vm start m").deadline(240).ok();
    assert_eq!(lab::json("vm show m")["spec"]["engine"], engine);
    let machine = Same::of("m");
    // A program in it is talked to all the while, through every daemon there is.
    let mut talk = lab::banger("vm exec m -- cat").stdin_held().deadline(900).spawn();
    let mut said = 0;
    let mut check = |after: &str| {
        machine.check(after);
        said += 1;
        talk.write(format!("{said}: {after}\n"));
        talk.expect(&format!("{said}: {after}\n"));
    };
    check("its start");

    for unit in [HELPER, DAEMON] {
        let old = lab::main_pid(unit);
        lab::root(["systemctl", "restart", unit]).ok();
        assert_ne!(lab::main_pid(unit), old);
        check(&format!("a restart of {unit}"));
    }
    lab::sudo_banger("system restart").ok();
    check("a restart of both");
    for unit in [HELPER, DAEMON] {
        let old = lab::main_pid(unit);
        lab::root(["kill", "-KILL", &old.to_string()]).ok();
        restarted(unit, old);
        check(&format!("kill -9 of {unit}"));
    }
    // Both at once, and the daemon's commands wait until it is there again.
    let (helper, daemon) = (lab::main_pid(HELPER), lab::main_pid(DAEMON));
    lab::root(["kill", "-KILL", &helper.to_string(), &daemon.to_string()]).ok();
    restarted(HELPER, helper);
    restarted(DAEMON, daemon);
    check("kill -9 of both");

    // Other programs underneath.
    lab::sh("rm -rf /tmp/newer && cp -r /payload/bin /tmp/newer && for f in /tmp/newer/*; do printf x >>$f; done")
        .code(0);
    let (helper, daemon) = (lab::main_pid(HELPER), lab::main_pid(DAEMON));
    lab::dev(["sudo", "/tmp/newer/banger", "system", "install"])
        .deadline(240)
        .ok();
    assert!(lab::main_pid(HELPER) != helper && lab::main_pid(DAEMON) != daemon);
    check("an update");
    lab::root(["rm", "-r", "/tmp/newer"]).ok();

    talk.close_stdin();
    talk.wait().code(0);

    // Stopped for a while, which is no reason to die either.
    lab::root(["systemctl", "stop", DAEMON, HELPER]).ok();
    let done = lab::banger("ps").run();
    assert!(
        done.status == 9 && done.err().contains("sudo banger system restart"),
        "{done:?}"
    );
    lab::sudo_banger("system restart").ok();
    machine.check("a stop of both");

    // What has been forgotten is found again, and one whose engine has died is not taken for another.
    lab::root(["systemctl", "stop", DAEMON]).ok();
    let id = lab::sh("ls /var/lib/banger/state/machines")
        .code(0)
        .out()
        .trim()
        .to_owned();
    lab::sh(&format!(
        "echo garbage >/var/lib/banger/state/machines/{id}/handles.json"
    ))
    .code(0);
    lab::root(["systemctl", "start", DAEMON]).ok();
    machine.check("its handles were lost");

    lab::root(["systemctl", "stop", DAEMON]).ok();
    lab::root(["kill", "-KILL", &machine.engine().to_string()]).ok();
    lab::root(["systemctl", "start", DAEMON]).ok();
    let shown = lab::json("vm show m");
    assert_eq!(shown["state"], "stopped", "{shown:#}");
    assert!(shown["cause"].is_string(), "{shown:#}");
    assert_clean();
    lab::banger("vm start m").deadline(240).ok();
    assert_ne!(Same::of("m"), machine);
    assert_clean();
    lab::banger("vm delete --force m").deadline(120).ok();
    assert_clean();
}

/// The shims, which keep consoles and write down how engines end, are no part of the daemon's unit.
fn consoles_outlive_the_daemons_unit() {
    let installed = Installed::new();
    lab::banger("vm run -d --name m --image debian-slim --engine qemu")
        .deadline(240)
        .ok();
    let id = lab::json("vm show m")["id"].as_str().unwrap().to_owned();
    let shim = lab::sh(&format!("pgrep -f '^banger-shim monitor banger-{id}'"))
        .code(0)
        .out();
    let shim = shim.trim();
    let scope = format!("0::/banger.slice/banger-shim-{id}.scope");
    let moved = || std::fs::read_to_string(format!("/proc/{shim}/cgroup")).is_ok_and(|text| text.trim() == scope);
    assert!(
        banger_testkit::processes::reached(std::time::Duration::from_secs(30), moved),
        "waited 30 s in vain for the shim to be in {scope}"
    );
    let old = lab::main_pid(DAEMON);
    lab::root(["systemctl", "kill", "--kill-whom=all", "--signal=KILL", DAEMON]).ok();
    restarted(DAEMON, old);
    lab::root(["systemctl", "restart", DAEMON]).ok();
    lab::wait_unit(DAEMON, "active");
    let said = lab::root(["journalctl", "--no-pager", "-u", DAEMON]).ok().out();
    // A thread of the kernel's that KVM makes with every virtual machine stays where the machine was made (decision 73).
    let left = said
        .lines()
        .filter(|line| line.contains("left-over process") || line.contains("remains running"));
    let ours: Vec<&str> = left.filter(|line| !line.contains("(kvm-")).collect();
    assert_eq!(ours, [""; 0], "left in the daemon's unit");
    let script = "echo the console goes on >/dev/console";
    lab::dev(["banger", "vm", "exec", "m", "--", "sh", "-c", script]).ok();
    let heard = || lab::banger("vm logs m").run().out().contains("the console goes on");
    assert!(
        banger_testkit::processes::reached(std::time::Duration::from_secs(30), heard),
        "waited 30 s in vain for the console"
    );
    // It writes down the engine's end, and ends with its scope.
    let engine = Same::of("m").engine();
    lab::root(["kill", "-KILL", &engine.to_string()]).ok();
    let stopped = || lab::json("vm show m")["state"] == "stopped";
    assert!(
        banger_testkit::processes::reached(std::time::Duration::from_secs(60), stopped),
        "waited 60 s in vain for the machine to be stopped"
    );
    let cause = lab::json("vm show m")["cause"].to_string();
    assert!(cause.contains("SIGKILL") || cause.contains("signal 9"), "{cause}");
    let scopes = || {
        lab::sh("systemctl list-units --all --plain --no-legend 'banger-shim-*'")
            .out()
            .is_empty()
    };
    assert!(
        banger_testkit::processes::reached(std::time::Duration::from_secs(30), scopes),
        "waited 30 s in vain for the scope to go"
    );
    lab::banger("vm delete --force m").deadline(120).ok();
    installed.close();
}

/// Waits until systemd has started a unit again.
#[track_caller]
fn restarted(unit: &str, old: i32) {
    let again = banger_testkit::processes::reached(std::time::Duration::from_secs(60), || {
        let pid = lab::main_pid(unit);
        pid != 0 && pid != old
    });
    assert!(again, "waited 60 s in vain for {unit} to be started again");
    lab::wait_unit(unit, "active");
}

fn qemu_is_saved_and_copied() {
    let installed = Installed::new();
    saved_and_copied("qemu");
    installed.close();
}

fn firecracker_is_saved_and_copied() {
    let options = firecracker_options();
    let installed = Installed::with(&options);
    saved_and_copied("firecracker");
    installed.close();
    lab::root(["rm", "-f", "/opt/firecracker", "/opt/jailer"]).ok();
}

/// Snapshot, rollback, copies, suspension and waking: memory and disks are one moment, and every copy has an address of its own.
fn saved_and_copied(engine: &str) {
    lab::banger(&format!("vm run -d --name m --image debian-slim --engine {engine}"))
        .deadline(240)
        .ok();
    lab::banger("vm exec m -- sh -c echo>/root/before").ok();
    lab::banger("vm snapshot create m s1").deadline(120).ok();
    lab::banger("vm exec m -- rm /root/before").ok();
    lab::banger("vm snapshot restore m s1").deadline(240).ok();
    lab::banger("vm exec m -- test -e /root/before").ok();
    lab::banger("vm fork m -n 2").deadline(240).ok();
    let machines = lab::json("ps");
    let running = machines
        .as_array()
        .unwrap()
        .iter()
        .filter(|m| m["state"] == "running")
        .count();
    assert_eq!(running, 3, "{machines:#}");
    let mut addresses: Vec<_> = machines
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["address"].to_string())
        .collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 3);
    lab::banger("vm suspend m").deadline(120).ok();
    lab::banger("vm exec m -- test -e /root/before").deadline(240).ok();
    assert_clean();
    for machine in machines.as_array().unwrap() {
        lab::banger(&format!("vm delete --force {}", machine["name"].as_str().unwrap()))
            .deadline(120)
            .ok();
    }
}

fn qemu_is_paused_and_reboots() {
    let installed = Installed::new();
    paused_and_rebooted("qemu");
    installed.close();
}

fn firecracker_is_paused_and_reboots() {
    let options = firecracker_options();
    let installed = Installed::with(&options);
    paused_and_rebooted("firecracker");
    installed.close();
    lab::root(["rm", "-f", "/opt/firecracker", "/opt/jailer"]).ok();
}

/// Whatever makes its processors stand still, its guest is reached afterwards; and how its engine ended is told.
fn paused_and_rebooted(engine: &str) {
    lab::banger(&format!("vm run -d --name m --image debian-slim --engine {engine}"))
        .deadline(240)
        .ok();
    let machine = Same::of("m");
    for round in 1..=3 {
        lab::banger("vm pause m").ok();
        lab::banger("vm resume m").ok();
        machine.check(&format!("pause and resume {round}"));
    }
    // The daemon dies in the middle of a suspension: the machine runs on, or is suspended and wakes; its programs go on either way.
    lab::banger("vm exec m -- sh -c")
        .arg("sleep 3600 >/dev/null 2>&1 &")
        .ok();
    for delay in ["0.05", "0.10", "0.13", "0.15", "0.30"] {
        let daemon = lab::main_pid(DAEMON);
        let mut suspend = lab::banger("vm suspend m").deadline(120).spawn();
        lab::sh(&format!("sleep {delay}; kill -KILL {daemon}")).code(0);
        restarted(DAEMON, daemon);
        let over = banger_testkit::processes::reached(std::time::Duration::from_secs(120), || suspend.has_ended());
        assert!(over, "waited 120 s in vain for the client of a suspension");
        let sleeps = lab::banger("vm exec m -- sh -c")
            .arg("cat /proc/[0-9]*/comm | grep -c sleep")
            .deadline(240)
            .ok();
        assert_eq!(sleeps.out().trim(), "1", "killed after {delay} s");
        assert_eq!(lab::json("vm show m")["state"], "running", "killed after {delay} s");
        assert_clean();
    }

    // A reboot, a panic, and an engine that somebody ends.
    let cause = || lab::json("vm show m")["cause"].as_str().unwrap_or_default().to_owned();
    let reached = |state: &str, boot: Option<&str>| {
        let is = || {
            let shown = lab::json("vm show m");
            let other = boot.is_none_or(|boot| shown["guest"]["boot_id"].as_str().is_some_and(|id| id != boot));
            shown["state"] == state && other
        };
        let reached = banger_testkit::processes::reached(std::time::Duration::from_secs(240), is);
        assert!(
            reached,
            "waited 240 s in vain for `{state}`: {:#}",
            lab::json("vm show m")
        );
    };
    let boot = lab::boot_id("m");
    let reboot = "sync; perl -e 'syscall(169, 0xfee1dead, 0x28121969, 0x01234567, 0)'";
    let done = lab::banger("vm exec m -- sh -c").arg(reboot).deadline(240).run();
    assert!(done.err().contains("the guest rebooted"), "{done:?}");
    reached("running", Some(&boot));
    assert_eq!(cause(), "the guest rebooted");
    let crash = "sync; echo c >/proc/sysrq-trigger";
    lab::banger("vm exec m -- sh -c").arg(crash).deadline(240).run();
    reached("stopped", None);
    assert_eq!(cause(), "the guest's kernel panicked: sysrq triggered crash");
    lab::banger("vm start m").deadline(240).ok();
    lab::root(["kill", "-KILL", &lab::engine_pid("m").to_string()]).ok();
    reached("stopped", None);
    assert_eq!(cause(), "its engine was ended by signal 9 (SIGKILL)");
    assert_clean();
    lab::banger("vm delete m").deadline(120).ok();
    assert_clean();
}
