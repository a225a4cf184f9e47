//! System mode without systemd: helper, bridge, addresses, rules, and machines that survive both programs.
//!
//! The lab (`docs/lab.md`) has what is missing here: units, device-mapper, hardware virtualisation, jails.

use std::io::Write;
use std::time::{Duration, Instant};

use banger_testkit::{Need, SystemEnv, processes, system};
use rustix::process::Signal;
use serde_json::json;

use crate::harness::tests;

const SYSTEM: &[Need] = &[Need::System];

tests! { SYSTEM;
    a_machine_on_the_bridge,
    machines_reach_their_group_alone,
    nothing_that_ends_reaches_a_machine,
    rules_that_somebody_flushed_are_made_again,
    a_copy_has_an_address_of_its_own,
    rounds_leave_nothing,
    an_orphan_is_found_and_removed,
    many_machines_are_taken_charge_of,
    what_needs_a_bridge_or_may_not_have_one,
    a_tap_that_somebody_removed_is_missed,
    calls_of_root_name_their_operation,
    routes_are_followed_and_names_answered,
}

/// Whether a machine reaches a TCP port: a refusal is an answer too.
fn reaches(env: &SystemEnv, machine: &str, address: &str, port: u16) -> bool {
    let script = format!("timeout 3 bash -c 'exec 3<>/dev/tcp/{address}/{port}' 2>&1");
    let done = env.bash(machine, &script);
    let said = done.out();
    done.status == 0 || said.contains("refused")
}

/// Whether the host reaches a machine: nobody listens there, and it says so.
fn reached(env: &SystemEnv, address: &str) -> bool {
    let script = format!("exec 3<>/dev/tcp/{address}/9");
    let done = env.as_root(&["timeout", "5", "bash", "-c", &script]).run();
    done.err().contains("refused")
}

fn address(env: &SystemEnv, machine: &str) -> String {
    env.machine(machine)["address"].as_str().expect("an address").to_owned()
}

fn a_machine_on_the_bridge() {
    let env = SystemEnv::new("bridge");
    assert_eq!(env.api("GET", "/v1/daemon", None)["mode"], "system");
    env.create("m", &[]);
    let machine = env.machine("m");
    assert_eq!(
        (machine["address"].as_str(), machine["spec"]["network"].as_str()),
        (Some("172.16.0.2"), Some("bridge"))
    );
    let checks = env.api("GET", "/v1/doctor", None);
    for name in ["mode", "helper", "bridge", "forwarding", "names", "storage", "auto"] {
        let row = checks["checks"]
            .as_array()
            .and_then(|all| all.iter().find(|c| c["name"] == name));
        let row = row.unwrap_or_else(|| panic!("no check `{name}`"));
        assert_ne!(row["level"], "fail", "{row}");
    }
    // What the guest has is what it was given.
    let shown = env.sh("m", "ip -4 addr show || cat /proc/net/fib_trie").code(0);
    assert!(shown.out().contains("172.16.0.2"), "{}", shown.out());
    // The host reaches it, and it does not reach the host but for answers.
    assert!(reached(&env, "172.16.0.2"));
    env.root_sh("ip addr add 10.99.0.1/32 dev lo");
    assert!(!reaches(&env, "m", "172.16.0.1", 22) && !reaches(&env, "m", "10.99.0.1", 22));
    // NAT: who is outside sees the host.
    let listener = env.listen_outside();
    let port = listener.local_addr().expect("its port").port();
    let seen = std::thread::spawn(move || {
        let (mut stream, from) = listener.accept().expect("a connection");
        stream.write_all(b"hello\n").expect("an answer");
        from.ip().to_string()
    });
    let outside = system::OUTSIDE;
    let done = env
        .bash("m", &format!("exec 3<>/dev/tcp/{outside}/{port}; cat <&3"))
        .code(0);
    assert_eq!(
        (done.out().trim(), seen.join().expect("who it was")),
        ("hello", system::HOST.to_string())
    );
    // At once, while it runs.
    env.api("PATCH", "/v1/machines/m", Some(&json!({ "nat": false })));
    assert!(!reaches(&env, "m", &outside.to_string(), 9));
    env.api("PATCH", "/v1/machines/m", Some(&json!({ "nat": true })));
    assert!(reaches(&env, "m", &outside.to_string(), 9));
    // Whoever takes another address is not heard.
    let spoof = "ip addr add 172.16.0.77/24 dev $(ls /sys/class/net | grep -v lo | head -1) 2>&1; \
                 ip route replace 192.0.2.0/30 via 172.16.0.1 src 172.16.0.77 2>&1";
    if env.sh("m", "command -v ip").status == 0 {
        env.sh("m", spoof);
        assert!(!reaches(&env, "m", &outside.to_string(), 9));
    }
    env.ok("vm stop m");
    assert!(
        env.root_sh("ip link show tap-fc-0").status != 0,
        "its tap is gone with its engine"
    );
    env.ok("vm start m");
    assert_eq!(address(&env, "m"), "172.16.0.2");
    env.sh("m", "true").code(0);
    env.close();
}

fn machines_reach_their_group_alone() {
    let env = SystemEnv::new("group");
    for (name, more) in [
        ("a", &["--net-group", "one"][..]),
        ("b", &["--net-group", "one"]),
        ("c", &[]),
    ] {
        env.create(name, more);
    }
    let [a, b, c] = ["a", "b", "c"].map(|name| address(&env, name));
    assert!(reaches(&env, "a", &b, 9) && reaches(&env, "b", &a, 9), "one group");
    assert!(!reaches(&env, "a", &c, 9) && !reaches(&env, "c", &a, 9), "no group");
    // Whose slot comes free is nobody's peer.
    env.ok("vm delete --force b");
    env.create("d", &[]);
    assert_eq!(address(&env, "d"), b);
    assert!(!reaches(&env, "a", &b, 9) && !reaches(&env, "d", &a, 9));
    env.close();
}

fn nothing_that_ends_reaches_a_machine() {
    let env = SystemEnv::new("survive");
    env.create("m", &[]);
    env.sh("m", "echo before >/dev/shm/mark").code(0);
    let before = (env.engine("m").pid, env.boot_id("m"), address(&env, "m"));
    for signal in [Signal::TERM, Signal::KILL] {
        for both in [false, true] {
            env.end_daemon(signal);
            if both {
                env.end_helper(signal);
                env.start_helper();
            }
            env.start_daemon();
            assert_eq!((env.engine("m").pid, env.boot_id("m"), address(&env, "m")), before);
        }
        env.end_helper(signal);
        env.start_helper();
        assert_eq!((env.engine("m").pid, env.boot_id("m"), address(&env, "m")), before);
        // The helper of now knows all that the last one did.
        env.create("n", &[]);
        env.ok("vm delete --force n");
    }
    assert!(reached(&env, "172.16.0.2"));
    assert_eq!(env.sh("m", "cat /dev/shm/mark").code(0).out().trim(), "before");
    // Also when what is known of it is damaged.
    let id = env.machine("m")["id"].as_str().expect("an id").to_owned();
    env.end_daemon(Signal::KILL);
    std::fs::write(env.state().join("machines").join(&id).join("handles.json"), "{").expect("damage");
    env.start_daemon();
    assert_eq!((env.engine("m").pid, env.boot_id("m"), address(&env, "m")), before);
    // An engine that ended meanwhile leaves nothing.
    env.end_daemon(Signal::KILL);
    std::fs::write(env.state().join("machines").join(&id).join("handles.json"), "").expect("damage");
    processes::kill(&env.engines()[0]);
    env.start_daemon();
    assert_eq!(env.machine("m")["state"], "stopped");
    assert!(
        env.audit().iter().all(|(_, _, orphan)| orphan.is_none()),
        "{:?}",
        env.audit()
    );
    assert!(env.root_sh("ip link show tap-fc-0").status != 0);
    env.close();
}

fn rules_that_somebody_flushed_are_made_again() {
    let env = SystemEnv::new("flush");
    env.create("m", &[]);
    let outside = system::OUTSIDE.to_string();
    assert!(reaches(&env, "m", &outside, 9));
    env.root_sh("nft add table ip foreign").code(0);
    env.root_sh("nft flush ruleset").code(0);
    // The next start finds out, whatever the daemon's own look does.
    env.create("n", &[]);
    let rules = env.root_sh("nft list ruleset").code(0);
    assert!(
        rules.out().contains("table bridge banger") && rules.out().contains("table ip banger"),
        "{}",
        rules.out()
    );
    assert!(reaches(&env, "m", &outside, 9) && reaches(&env, "n", &outside, 9));
    assert!(!reaches(&env, "n", &address(&env, "m"), 9));
    // And without one.
    env.root_sh("nft flush ruleset && ip link del br-fc").code(0);
    let end = Instant::now() + Duration::from_secs(25);
    while !reaches(&env, "m", &outside, 9) {
        assert!(Instant::now() < end, "the network was not repaired within 25 s");
    }
    env.close();
}

fn a_copy_has_an_address_of_its_own() {
    let env = SystemEnv::new("copies");
    env.create("m", &[]);
    env.ok("vm fork m --name f --count 2");
    let addresses: Vec<String> = ["m", "f-1", "f-2"].iter().map(|name| address(&env, name)).collect();
    let outside = system::OUTSIDE.to_string();
    for (name, own) in ["m", "f-1", "f-2"].iter().zip(&addresses) {
        assert!(reached(&env, own), "{name}");
        assert!(reaches(&env, name, &outside, 9), "{name}");
    }
    assert_eq!(addresses.iter().collect::<std::collections::BTreeSet<_>>().len(), 3);
    // What is suspended has no tap, and the same address when it wakes.
    env.ok("vm suspend m");
    assert!(env.root_sh("ip link show tap-fc-0").status != 0);
    env.ok("vm start m");
    assert!(reached(&env, &addresses[0]));
    env.ok("vm snapshot create m s");
    env.ok("vm snapshot restore m s");
    assert!(reaches(&env, "m", &outside, 9));
    env.close();
}

fn rounds_leave_nothing() {
    let env = SystemEnv::new("rounds");
    let open = |pid: i32| std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    env.create("warm", &[]);
    env.ok("vm delete --force warm");
    let before = (open(env.daemon_pid()), open(env.helper_pid()));
    for round in 0..20 {
        let name = format!("r{round}");
        env.create(&name, &[]);
        env.ok(&format!("vm delete --force {name}"));
    }
    assert_eq!(env.audit(), []);
    let after = (open(env.daemon_pid()), open(env.helper_pid()));
    assert!(
        after.0 <= before.0 + 2 && after.1 <= before.1 + 2,
        "descriptors: {before:?}, then {after:?}"
    );
    env.close();
}

fn an_orphan_is_found_and_removed() {
    let env = SystemEnv::new("orphan");
    env.create("m", &[]);
    assert!(!env.audit().is_empty() && env.audit().iter().all(|(_, _, orphan)| orphan.is_none()));
    // A tap that bears the mark of a machine that is none, and files of another.
    env.root_sh("ip tuntap add tap-fc-99 mode tap && ip link set tap-fc-99 alias banger:00112233aabbccdd")
        .code(0);
    let files = env.state().join("machines/ffeeddccbbaa0011");
    std::fs::create_dir(&files).expect("a directory");
    let orphans = || {
        env.audit()
            .into_iter()
            .filter(|(_, _, orphan)| orphan.is_some())
            .count()
    };
    assert!(orphans() >= 2, "{:?}", env.audit());
    let fixed = env.api("POST", "/v1/audit/fix", None);
    assert_eq!(fixed["orphans"], 0, "{fixed}");
    assert_eq!(orphans(), 0);
    assert!(!files.exists() && env.root_sh("ip link show tap-fc-99").status != 0);
    env.sh("m", "true").code(0);
    // What is not banger's is not touched.
    env.root_sh("ip link add foreign0 type bridge").code(0);
    env.api("POST", "/v1/audit/fix", None);
    assert_eq!(env.root_sh("ip link show foreign0").status, 0);
    env.close();
}

/// With `BANGER_TEST_FIGURES=1` twenty of them, and how long it took.
fn many_machines_are_taken_charge_of() {
    let env = SystemEnv::new("many");
    let figures = std::env::var_os("BANGER_TEST_FIGURES").is_some();
    let names: Vec<String> = (0..if figures { 20 } else { 4 }).map(|n| format!("m{n}")).collect();
    for name in &names {
        env.create(name, &[]);
    }
    let engines = |env: &SystemEnv| names.iter().map(|name| env.engine(name).pid).collect::<Vec<_>>();
    let before = engines(&env);
    env.end_daemon(Signal::KILL);
    let begun = Instant::now();
    env.start_daemon();
    if figures {
        eprintln!(
            "{} machines after {:?}, the start of the daemon included",
            names.len(),
            begun.elapsed()
        );
    }
    assert_eq!(engines(&env), before);
    for name in &names {
        env.sh(name, "true").code(0);
    }
    env.close();
}

fn what_needs_a_bridge_or_may_not_have_one() {
    let env = SystemEnv::new("kinds");
    let refused = env
        .banger(["vm", "create", "--name", "x", "--network", "none", "--net-group", "a"])
        .run();
    assert_ne!(refused.status, 0);
    assert!(refused.err().contains("bridge"), "{}", refused.err());
    env.create("alone", &["--network", "none"]);
    assert!(env.machine("alone")["address"].is_null());
    assert!(
        env.audit().iter().all(|(kind, _, _)| kind != "interface"),
        "{:?}",
        env.audit()
    );
    // Its place in the network is its own all the same.
    env.create("m", &["--no-nat"]);
    assert_eq!(address(&env, "m"), "172.16.0.3");
    assert!(!reaches(&env, "m", &system::OUTSIDE.to_string(), 9));
    env.ok("vm stop alone");
    env.ok("vm delete --force alone m");
    // The smallest place is given again.
    env.create("n", &[]);
    assert_eq!(address(&env, "n"), "172.16.0.2");
    env.close();
}

fn a_tap_that_somebody_removed_is_missed() {
    let env = SystemEnv::new("missed");
    env.create("m", &[]);
    let id = env.machine("m")["id"].as_str().expect("an id").to_owned();
    assert_eq!(env.api("GET", "/v1/audit", None)["missing"], json!([]));
    env.root_sh("ip link del tap-fc-0").code(0);
    let missing = env.api("GET", "/v1/audit", None)["missing"].clone();
    assert_eq!(
        (&missing[0]["name"], &missing[0]["machine"]),
        (&json!("tap-fc-0"), &json!(id)),
        "{missing}"
    );
    let done = env.banger(["audit"]).run();
    assert!(done.status == 1 && done.err().contains("vm restart m"), "{done:?}");
    let doctor = env.api("GET", "/v1/doctor", None);
    let row = doctor["checks"]
        .as_array()
        .and_then(|all| all.iter().find(|c| c["name"] == "taps"));
    assert_eq!(row.expect("a row")["level"], "fail");
    // What is said to do about it is what helps.
    env.ok("vm restart m");
    assert_eq!(env.api("GET", "/v1/audit", None)["missing"], json!([]));
    assert!(reached(&env, &address(&env, "m")));
    env.close();
}

/// The helper's log names the daemon's operation with whatever is done for a machine.
fn calls_of_root_name_their_operation() {
    let env = SystemEnv::new("calls");
    env.create("m", &[]);
    env.ok("vm stop m");
    env.ok("vm start m");
    env.ok("vm delete --force m");
    let log = env.helper_log();
    let mut seen = std::collections::BTreeSet::new();
    for line in log
        .lines()
        .filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok())
    {
        let method = line["method"].as_str().unwrap_or_default().to_owned();
        if matches!(
            method.as_str(),
            "tap_take" | "disk_attach" | "engine_launch" | "engine_scope" | "machine_remove"
        ) {
            assert!(line["op"].as_str().is_some_and(|op| op.starts_with("op-")), "{line}");
            seen.insert(method);
        }
    }
    // The slot that was freed is the next one's: its tap is made again before that comes.
    let warm = || env.root_sh("ip link show tap-fc-0").out().contains("alias banger:pool");
    assert!(processes::reached(Duration::from_secs(4), warm));
    assert!(
        ["tap_take", "engine_scope", "machine_remove"]
            .iter()
            .all(|m| seen.contains(*m)),
        "{seen:?}"
    );
    env.close();
}

fn routes_are_followed_and_names_answered() {
    let env = SystemEnv::new("routes");
    env.create("m", &[]);
    let outside = system::OUTSIDE.to_string();
    assert!(reaches(&env, "m", &outside, 9));
    // The network that leads outside is one among others now, and then leads outside again: long before the daemon looks by itself.
    let follows = |change: &str, reached: bool| {
        env.root_sh(change).code(0);
        let end = Instant::now() + Duration::from_secs(8);
        while reaches(&env, "m", &outside, 9) != reached {
            assert!(Instant::now() < end, "`{change}` was not followed within 8 s");
        }
    };
    follows("ip route del default", false);
    follows(&format!("ip route add default via {outside}"), true);
    // Nobody else can have the port of names, not even when the daemon has been killed; the next one has it again.
    let take = "setpriv --reuid 65000 --regid 65000 --clear-groups -- python3 -c 'import socket; \
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind((\"127.0.0.1\", 253))' 2>&1";
    let names = || {
        let doctor = env.api("GET", "/v1/doctor", None);
        let checks = doctor["checks"].as_array().cloned().unwrap_or_default();
        checks.into_iter().find(|c| c["name"] == "names").expect("a row")["message"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let served = || names().starts_with("*.vm at 127.0.0.1:253");
    assert!(processes::reached(Duration::from_secs(10), served), "{}", names());
    env.end_daemon(Signal::KILL);
    assert!(
        env.root_sh(take).out().contains("Permission"),
        "{:?}",
        env.root_sh(take)
    );
    env.start_daemon();
    assert!(processes::reached(Duration::from_secs(15), served), "{}", names());
    env.close();
}
