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
    for bad in ["left-over process", "unclean termination", "remains running"] {
        assert!(!said.contains(bad), "{said}");
    }
    lab::banger("vm exec m -- sh -c 'echo the console goes on >/dev/console'").ok();
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
