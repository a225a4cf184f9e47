//! Installing, what is in its way, what it leaves.

use std::path::Path;

use crate::harness::scenarios;
use crate::installed::{Installed, assert_clean, assert_same, failures, listing};
use crate::lab;

scenarios! {
    units_are_sound: 240,
    wrong_inputs_change_nothing: 240,
    a_machine_with_all_that_root_gives_it: 420,
    images_are_asked_for_by_name: 300,
    a_second_installation_changes_nothing: 360,
    an_installation_that_fails_is_taken_back: 480,
    uninstalling_refuses_while_machines_run: 420,
    state_outlives_an_uninstallation: 360,
}

/// systemd finds nothing to say about the units.
fn units_are_sound() {
    let installed = Installed::new();
    let verify = lab::root(["systemd-analyze", "verify"])
        .args(
            [
                "bangerd.service",
                "bangerd-root.service",
                "banger.slice",
                "banger-build.socket",
                "banger-build@.service",
            ]
            .map(|u| format!("/etc/systemd/system/{u}")),
        )
        .ok();
    assert_eq!(verify.out() + &verify.err(), "");
    for (unit, directives) in [
        (
            "bangerd-root.service",
            &["SendSIGKILL=no", "ProtectHome=yes", "User="][..],
        ),
        (
            "bangerd.service",
            &["ProtectHome=read-only", "User=dev", "CapabilityBoundingSet="],
        ),
    ] {
        for line in [
            "KillMode=process",
            "RuntimeDirectoryPreserve=yes",
            "NoNewPrivileges=yes",
            "ProtectSystem=strict",
        ]
        .iter()
        .chain(directives)
        {
            let (key, value) = line.split_once('=').unwrap();
            assert_eq!(lab::unit(unit, key), value, "{unit} {key}");
        }
    }
    let capabilities = lab::unit("bangerd-root.service", "CapabilityBoundingSet");
    assert_eq!(capabilities.split_whitespace().count(), 12, "{capabilities}");
    installed.close();
}

fn wrong_inputs_change_nothing() {
    let before = listing();
    let fails = |line: &str, status: i32, words: &str| {
        let done = lab::sudo_banger(line).run();
        assert!(done.status == status && done.err().contains(words), "{line}: {done:?}");
    };
    let done = lab::banger("system install").run();
    assert!(done.status == 1 && done.err().contains("needs root"), "{done:?}");
    assert!(
        done.err().contains("hint: sudo /payload/bin/banger system install"),
        "{done:?}"
    );
    fails("system install --owner root", 5, "root cannot be the owner");
    fails("system install --owner nobody-here", 3, "no user `nobody-here`");
    fails("system uninstall --yes", 3, "not installed");
    fails("system restart", 3, "not installed");
    assert_eq!(lab::banger("system status").run().status, 3);
    let done = lab::root(["/payload/bin/banger", "system", "install"]).run();
    assert!(done.status == 2 && done.err().contains("--owner USER"), "{done:?}");

    // Things in the way, each named, all left alone.
    lab::sh("printf '[Service]\nExecStart=/bin/true\n' >/etc/systemd/system/bangerd.service").code(0);
    fails(
        "system install",
        4,
        "/etc/systemd/system/bangerd.service is there and was not put",
    );
    lab::sh("rm /etc/systemd/system/bangerd.service; echo other >/usr/local/bin/banger").code(0);
    fails("system install", 4, "/usr/local/bin/banger is there");
    lab::sh("rm /usr/local/bin/banger; ip link add br-fc type bridge").code(0);
    fails("system install", 4, "br-fc that is not banger's");
    lab::sh("ip link delete br-fc; ln -s /tmp /etc/banger").code(0);
    fails("system install", 4, "/etc/banger is a symbolic link");
    lab::sh("rm /etc/banger").code(0);
    // Programs that the owner could exchange are not what root starts.
    lab::dev(["cp", "/bin/true", "/tmp/jailer"]).ok();
    fails("system install --jailer /tmp/jailer", 5, "belongs to user 1000");
    fails("system install --firecracker /home/dev/fc", 5, "below /home");
    lab::root(["rm", "/tmp/jailer"]).ok();
    // And a dry run is one.
    let done = lab::sudo_banger("system install --dry-run").ok();
    assert!(done.out().contains("/etc/systemd/system/bangerd.service"), "{done:?}");
    assert_same(&before, &listing());
}

fn a_machine_with_all_that_root_gives_it() {
    let installed = Installed::new();
    // The lab has no default image and nothing to build it with, which is all that is wrong with it.
    let doctor = failures(&lab::banger("doctor --json").run());
    assert!(
        matches!(doctor.as_slice(), [one] if one.contains("mmdebstrap")),
        "doctor: {doctor:?}"
    );
    assert_eq!(failures(&lab::banger("system status --json").run()), [""; 0], "status");
    // Who is neither the owner nor root is told what is theirs to know.
    let done = lab::user(lab::STRANGER, ["banger", "system", "status"]).run();
    assert!(done.status == 0 && done.out().contains("not asked"), "{done:?}");
    let status = lab::json("daemon status");
    assert_eq!(
        (status["mode"].as_str(), status["state_dir"].as_str()),
        (Some("system"), Some(lab::STATE))
    );

    lab::banger("vm run -d --name m --image debian-slim").deadline(240).ok();
    let shown = lab::json("vm show m");
    assert_eq!(shown["spec"]["network"], "bridge", "{shown:#}");
    let address = shown["address"].as_str().unwrap().to_owned();
    // Bridge: the host reaches it. NAT: it has a rule. DNS: its name is known. Device-mapper: its disks are there.
    lab::root(["ping", "-c", "1", "-W", "5", &address]).ok();
    let asked = lab::root(["resolvectl", "query", "--legend=no", "m.vm"]).ok();
    assert!(asked.out().contains(&address), "{asked:?}");
    let rules = lab::sh("nft list ruleset").code(0);
    assert!(rules.out().contains("masquerade"), "{}", rules.out());
    let devices = lab::sh("dmsetup ls").code(0);
    let id = shown["id"].as_str().unwrap();
    for role in ["root", "work"] {
        assert!(devices.out().contains(&format!("fc-{id}-{role}")), "{}", devices.out());
    }
    let inside = lab::banger("vm exec m -- cat /proc/net/fib_trie").ok();
    assert!(inside.out().contains(&address), "{inside:?}");
    assert_clean();
    lab::banger("vm delete --force m").ok();
    installed.close();
}

/// What bootstraps images has more rights than the daemon: it takes names of recipes, and those from the owner only.
fn images_are_asked_for_by_name() {
    let installed = Installed::new();
    let ask = |user: &str, name: &str| {
        let words = [
            "BANGER_BUILDER=/run/banger-build.sock",
            "bangerd",
            "--ask-builder",
            name,
        ];
        lab::user(user, words).deadline(60).run()
    };
    for name in ["nonsense", "debian;id", "--setup-hook=id", ""] {
        let done = ask(lab::OWNER, name);
        assert!(
            done.status == 1 && done.err().contains("there is no recipe"),
            "{name}: {done:?}"
        );
    }
    // The lab has no such tool, and no network.
    let done = ask(lab::OWNER, "debian-slim");
    assert!(done.status == 1 && done.err().contains("mmdebstrap"), "{done:?}");
    let done = ask(lab::STRANGER, "debian-slim");
    assert!(done.status == 1 && done.err().contains("ermission denied"), "{done:?}");
    // The daemon asks there, too.
    let done = lab::banger("image build debian").deadline(120).run();
    assert!(done.status != 0 && done.err().contains("mmdebstrap"), "{done:?}");
    installed.close();
}

fn a_second_installation_changes_nothing() {
    let installed = Installed::new();
    let before = (listing(), pids());
    let done = lab::sudo_banger("system install").ok();
    assert!(
        done.out().is_empty() && done.err().contains("nothing to do"),
        "{done:?}"
    );
    // Also from the installed program, by root, who is not sudo.
    let done = lab::root(["/usr/local/bin/banger", "system", "install", "--json"]).ok();
    assert_eq!(done.json()["steps"].as_array().map(Vec::len), Some(0), "{done:?}");
    assert_eq!(pids(), before.1, "services run on");
    assert_same(&before.0, &listing());

    // What was changed is put right, and nothing else.
    lab::sh("echo '# edited' >>/etc/systemd/system/bangerd-root.service; systemctl daemon-reload; chmod 755 /var/lib/banger/state")
        .code(0);
    let status = lab::banger("system status").run();
    assert!(status.out().contains("is not what this banger installs"), "{status:?}");
    let done = lab::sudo_banger("system install --json").ok();
    let steps: Vec<String> = done.json()["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["action"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(steps, ["set rights", "replace", "reload", "restart"], "{done:?}");
    assert_eq!(pids().1, before.1.1, "the daemon was not concerned");
    assert_same(&before.0, &listing());
    installed.close();
}

fn pids() -> (i32, i32) {
    (lab::main_pid("bangerd-root.service"), lab::main_pid("bangerd.service"))
}

fn an_installation_that_fails_is_taken_back() {
    lab::sh("modprobe -a dm_snapshot loop tun bridge nf_tables kvm_amd; true").code(0);
    let before = listing();
    // A daemon that does not come up.
    lab::sh("cp -r /payload/bin /tmp/broken && printf '#!/bin/sh\necho no >&2\nexit 2\n' >/tmp/broken/bangerd").code(0);
    let done = lab::dev(["sudo", "/tmp/broken/banger", "system", "install"])
        .deadline(200)
        .run();
    assert_eq!(done.status, 1, "{done:?}");
    assert!(
        done.err().contains("bangerd.service") && done.err().contains("taken back"),
        "{done:?}"
    );
    assert_same(&before, &listing());

    // As an update of one that works: the old ones run again.
    let installed = Installed::new();
    let (helper, _) = pids();
    let kept = listing();
    let done = lab::dev(["sudo", "/tmp/broken/banger", "system", "install"])
        .deadline(200)
        .run();
    assert_eq!(done.status, 1, "{done:?}");
    lab::wait_unit("bangerd.service", "active");
    assert_eq!(pids().0, helper, "the helper was not concerned");
    lab::banger("ps").ok();
    assert_same(&kept, &listing());
    lab::root(["rm", "-r", "/tmp/broken"]).ok();
    installed.close();
}

fn uninstalling_refuses_while_machines_run() {
    let installed = Installed::new();
    lab::banger("vm run -d --name m --image debian-slim").deadline(240).ok();
    let kept = listing();
    let done = lab::sudo_banger("system uninstall --yes").run();
    assert!(done.status == 4 && done.err().contains("a machine runs: m"), "{done:?}");
    let done = lab::sudo_banger("system uninstall --force").run();
    assert!(done.status == 2 && done.err().contains("--yes"), "{done:?}");
    assert_same(&kept, &listing());
    let done = lab::sudo_banger("system uninstall --force --yes").deadline(240).ok();
    assert!(done.err().contains("kept /var/lib/banger/state"), "{done:?}");
    // What it said is all that is left.
    lab::root(["rm", "-r", "/var/lib/banger"]).ok();
    assert_same(installed.before(), &listing());
}

fn state_outlives_an_uninstallation() {
    let installed = Installed::new();
    lab::banger("vm run -d --name m --image debian-slim").deadline(240).ok();
    lab::banger("vm exec m -- sh -c echo>/root/kept").ok();
    lab::banger("vm stop m").deadline(240).ok();
    lab::sudo_banger("system uninstall --yes").deadline(240).ok();
    assert!(Path::new(lab::STATE).join("banger.db").is_file());
    assert!(!Path::new("/etc/banger").exists() && !Path::new("/var/lib/banger/jail").exists());
    lab::sudo_banger("system install").deadline(240).ok();
    lab::banger("vm start m").deadline(240).ok();
    lab::banger("vm exec m -- test -e /root/kept").ok();
    assert_clean();
    lab::banger("vm delete --force m").ok();
    installed.close();
}
