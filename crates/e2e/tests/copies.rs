//! What a copy never shares with its source: of a template, and of a running machine.

use std::collections::BTreeSet;
use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use banger_testkit::{Need, Repository, TestEnv, need, processes};

use crate::harness::{MACHINES, create, machine, shared, tests};
use crate::search;

tests! { MACHINES;
    journal_and_units_of_a_copy,
    no_secret_in_a_template,
    own_ssh_host_key,
    own_hostname,
    own_machine_id,
    own_mac_and_network_works,
    own_boot_id,
    own_randomness,
    own_randomness_of_what_runs_on,
    clock_is_right_at_once,
    monotonic_clock_is_sane,
    no_session_in_a_copy,
    a_rehearsal_leaves_nothing,
    workspace_is_in_a_fork,
    a_fork_that_cannot_become_itself_is_not_handed_over,
    a_machine_that_cannot_become_itself_boots,
}

/// A machine from the template, another one, and a fork of the first: `NAME`, `NAME-other`, `NAME-fork`.
fn three(env: &TestEnv, name: &str, image: &str) -> [String; 3] {
    let names = [name.to_owned(), format!("{name}-other"), format!("{name}-fork")];
    create(env, name, image);
    create(env, &names[1], image);
    for name in &names[..2] {
        assert_eq!(
            env.machine(name)["boot"]["how"],
            "template",
            "{name} was not started from a template"
        );
    }
    env.ok(&format!("vm fork {name} --name {name}-fork"))
        .prints(&format!("{name}-fork\n"));
    assert_eq!(env.machine(&names[2])["boot"]["how"], "fork");
    names
}

fn delete(env: &TestEnv, names: &[String]) {
    env.banger(["vm", "delete", "--force"]).args(names).ok();
}

/// What a script prints in each machine, and that it is not the same in any two of them.
#[track_caller]
fn all_differ(env: &TestEnv, names: &[String], script: &str) -> Vec<String> {
    let words: Vec<String> = names
        .iter()
        .map(|name| env.sh(name, script).code(0).out().trim().to_owned())
        .collect();
    let different: BTreeSet<&String> = words.iter().collect();
    assert_eq!(
        different.len(),
        words.len(),
        "{names:?} share what `{script}` prints: {words:?}"
    );
    assert!(
        !words.contains(&String::new()),
        "`{script}` prints nothing in some of {names:?}"
    );
    words
}

fn own_hostname() {
    let env = shared();
    let names = three(env, "hostname", "debian-slim");
    for script in ["hostname", "cat /proc/sys/kernel/hostname", "cat /etc/hostname"] {
        assert_eq!(all_differ(env, &names, script), names, "{script}");
    }
    // A name of the source is not left where names are looked up.
    let hosts = env.sh(&names[2], "cat /etc/hosts").code(0).out();
    assert!(
        hosts.split_whitespace().any(|w| w == names[2]) && !hosts.split_whitespace().any(|w| w == names[0]),
        "{hosts}"
    );
    delete(env, &names);
}

fn own_machine_id() {
    let env = shared();
    let names = three(env, "machine-id", "debian-slim");
    for id in all_differ(env, &names, "cat /etc/machine-id") {
        assert!(id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()), "{id}");
    }
    delete(env, &names);
}

fn own_ssh_host_key() {
    need::require(&[Need::Ssh]);
    let env = shared();
    let names = three(env, "host-key", "debian");
    let public =
        "f=/etc/ssh/ssh_host_ed25519_key; test -e $f || f=/run/banger/ssh_host_ed25519_key; ssh-keygen -y -f $f";
    let keys = all_differ(env, &names, public);
    for (name, key) in names.iter().zip(keys) {
        // The one that is pinned on the host, and that sshd shows: ssh refuses any other.
        let known = std::fs::read_to_string(env.state().join("ssh/known_hosts")).unwrap();
        let key = key.split_whitespace().nth(1).unwrap();
        let pinned = |l: &&str| l.split([' ', ',']).any(|w| w == format!("{name}.vm"));
        let pin = known
            .lines()
            .find(pinned)
            .unwrap_or_else(|| panic!("no pin of {name}: {known}"));
        assert!(
            pin.contains(key),
            "{name} is pinned with another key than it has: {pin}"
        );
        env.banger(["vm", "ssh", name, "--", "hostname"])
            .deadline(60)
            .ok()
            .prints(&format!("{name}\n"));
    }
    delete(env, &names);
}

fn own_mac_and_network_works() {
    let env = shared();
    let names = three(env, "network", "debian-slim");
    let macs = all_differ(env, &names, "cat /sys/class/net/eth0/address");
    for (name, mac) in names.iter().zip(macs) {
        let line = env.engine(name).command;
        assert!(
            line.contains(&format!("mac={mac}")),
            "{name} has {mac}, its engine another one: {line}"
        );
        // Out of the guest to this host's loopback, by the engine's own network.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let heard = std::thread::spawn(move || {
            let mut text = String::new();
            listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
            text
        });
        let script = format!("echo $(hostname) >/dev/tcp/10.0.2.2/{port}");
        env.banger(["vm", "exec", name, "--", "bash", "-c", &script])
            .deadline(20)
            .ok();
        assert_eq!(heard.join().unwrap(), format!("{name}\n"));
    }
    delete(env, &names);
}

fn own_boot_id() {
    let env = shared();
    let names = three(env, "boot-id", "debian-slim");
    let ids = all_differ(env, &names, "cat /proc/sys/kernel/random/boot_id");
    for (name, id) in names.iter().zip(ids) {
        assert_eq!(env.boot_id(name), id, "it changes");
        assert_eq!(env.machine(name)["guest"]["boot_id"].as_str(), Some(id.as_str()));
    }
    delete(env, &names);
}

/// Draws randomness in every way that the image knows, one a line.
const DRAW: &str = "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid; mktemp -u XXXXXXXXXXXXXXXX; \
    perl -e 'print rand, qq(\\n)'; perl -e 'my $b = qq(\\0) x 16; syscall(318, $b, 16, 0); print unpack(q(H*), $b), qq(\\n)'; \
    for p in openssl python3; do command -v $p >/dev/null && case $p in openssl) openssl rand -hex 16;; \
    python3) python3 -c 'import os, random; print(random.random(), os.urandom(8).hex())';; esac; done; true";

fn no_two_lines(draws: &[String]) {
    let lines: Vec<&str> = draws.iter().flat_map(|d| d.lines()).collect();
    let different: BTreeSet<&&str> = lines.iter().collect();
    assert!(lines.len() >= draws.len() * 4, "too little was drawn: {draws:?}");
    assert_eq!(different.len(), lines.len(), "the same was drawn twice: {draws:?}");
}

// What is started later. That the kernel itself was given other randomness shows in what runs on, below.
fn own_randomness() {
    let env = shared();
    // The first thing that each of them does.
    let runs: Vec<_> = (0..5)
        .map(|i| {
            env.banger([
                "vm",
                "run",
                "--rm",
                "--name",
                &format!("draws{i}"),
                "--",
                "sh",
                "-c",
                DRAW,
            ])
            .deadline(120)
            .spawn()
        })
        .collect();
    no_two_lines(&runs.into_iter().map(|r| r.wait().code(0).out()).collect::<Vec<_>>());
    create(env, "draws", "debian-slim");
    let mut names = vec!["draws".to_owned()];
    names.extend(env.ok("vm fork draws -n 3").out().lines().map(str::to_owned));
    let draws: Vec<_> = names
        .iter()
        .map(|name| env.banger(["vm", "exec", name, "--", "sh", "-c", DRAW]).spawn())
        .collect();
    no_two_lines(&draws.into_iter().map(|r| r.wait().code(0).out()).collect::<Vec<_>>());
    delete(env, &names);
}

fn own_randomness_of_what_runs_on() {
    let env = shared();
    create(env, "reader", "debian-slim");
    // It never stops to draw, and runs on in the copies.
    let script =
        "setsid sh -c 'while :; do od -An -N8 -tx1 /dev/urandom >>/dev/shm/draws; done' >/dev/null 2>&1 </dev/null &";
    env.sh("reader", script).code(0);
    let drawn = |name: &str| -> Vec<String> {
        let text = env.sh(name, "cat /dev/shm/draws 2>/dev/null || true").code(0).out();
        text.lines().map(str::to_owned).collect()
    };
    processes::until("the reader", Duration::from_secs(20), || drawn("reader").len() > 20);
    let mut names = vec!["reader".to_owned()];
    names.extend(env.ok("vm fork reader -n 2").out().lines().map(str::to_owned));
    let before = drawn("reader").len();
    processes::until("all of them to draw", Duration::from_secs(30), || {
        names.iter().all(|n| drawn(n).len() > before + 20)
    });
    let draws: Vec<Vec<String>> = names.iter().map(|n| drawn(n)).collect();
    let common = |a: &[String], b: &[String]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
    for (at, one) in draws.iter().enumerate() {
        for other in &draws[at + 1..] {
            let both = common(one, other);
            // Nothing after the parting of their ways; a line that was half written then may differ in its end.
            let first: BTreeSet<&String> = one[both..].iter().collect();
            let twice: Vec<&String> = other[both..].iter().filter(|d| first.contains(d)).collect();
            assert!(
                both > 0 && twice.is_empty(),
                "drawn twice after {both} lines: {twice:?}"
            );
        }
    }
    delete(env, &names);
}

/// Time of this host in seconds.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

/// Runs a line that ends in the guest's `date +%s.%N` and holds its answer against this host's clock.
#[track_caller]
fn clock_is_right(done: impl FnOnce() -> String) {
    let before = now();
    let text = done();
    let after = now();
    let guest: f64 = text.trim().parse().unwrap_or_else(|e| panic!("{text:?}: {e}"));
    assert!(
        (before - 1.0..=after + 1.0).contains(&guest),
        "the guest says {guest}, it was asked between {before} and {after}"
    );
}

fn clock_is_right_at_once() {
    let env = machine("clock");
    // A template that is some seconds old, or minutes.
    env.ok("template build --force");
    env.ok("vm snapshot create m old");
    env.ok("vm suspend m");
    std::thread::sleep(Duration::from_secs(4));
    let date = |machine: &str| env.ok(&format!("vm exec {machine} -- date +%s.%N")).out();
    clock_is_right(|| date("m"));
    assert_eq!(env.machine("m")["boot"]["how"], "wake");
    clock_is_right(|| env.ok("vm run --rm -- date +%s.%N").out());
    env.ok("vm snapshot restore m old");
    clock_is_right(|| date("m"));
    // One that went wrong in the source is right in the copy.
    env.sh("m", "date -s @1000000000").code(0);
    env.ok("vm fork m --name copy");
    clock_is_right(|| date("copy"));
    // A paused machine missed time.
    env.ok("vm pause m");
    std::thread::sleep(Duration::from_secs(2));
    env.ok("vm resume m");
    clock_is_right(|| date("m"));
    env.close();
}

fn monotonic_clock_is_sane() {
    let env = machine("monotonic");
    // Uptime of the guest, and between which moments it was read.
    let uptime = |m: &str| -> (f64, Instant, Instant) {
        let before = Instant::now();
        let text = env.ok(&format!("vm exec {m} -- cat /proc/uptime")).out();
        (text.split(' ').next().unwrap().parse().unwrap(), before, Instant::now())
    };
    // A second by the guest's clock is one by ours, as exactly as can be told from outside.
    let runs = |m: &str, least: f64| {
        let (first, from, until) = uptime(m);
        env.ok(&format!("vm exec {m} -- sleep 1"));
        let (second, later, latest) = uptime(m);
        let passed = second - first;
        let (least_here, most_here) = ((later - until).as_secs_f64(), (latest - from).as_secs_f64());
        assert!(first >= least, "the clock of {m} went back: {first} after {least}");
        assert!(
            (least_here - 0.1..=most_here + 0.1).contains(&passed),
            "{passed} s in {m}, {least_here} to {most_here} s here"
        );
        second
    };
    let source = runs("m", 0.0);
    env.ok("vm fork m --name copy");
    runs("copy", source);
    let source = runs("m", source);
    env.ok("vm suspend m");
    std::thread::sleep(Duration::from_secs(1));
    runs("m", source);
    env.close();
}

fn no_secret_in_a_template() {
    let env = TestEnv::new("secrets");
    let secret = "fb7e3a-hunter2-0c9d11";
    create(&env, "wilhelmina", "debian-slim");
    let show = ["vm", "exec", "--env", &format!("SECRET={secret}"), "wilhelmina", "--"];
    env.banger(show)
        .args(["sh", "-c", "echo $SECRET >/dev/shm/secret"])
        .ok();
    env.ok("vm snapshot create wilhelmina control");
    let template = env.ok("template build --force").out().trim().to_owned();
    let machine = env.machine("wilhelmina")["id"].as_str().unwrap().to_owned();
    let own = env.state().join("machines").join(&machine);

    let mut needles: Vec<(String, Vec<u8>)> = vec![
        ("the name of a machine".into(), b"wilhelmina".to_vec()),
        ("the id of a machine".into(), machine.clone().into_bytes()),
        ("a variable of a command".into(), secret.as_bytes().to_vec()),
    ];
    for (what, file) in [
        ("user", env.state().join("ssh/id_ed25519")),
        ("machine", own.join("ssh_host_ed25519_key")),
    ] {
        let text = std::fs::read_to_string(&file).unwrap();
        let body: String = text.lines().filter(|l| !l.starts_with('-')).collect();
        let raw = search::base64(&body);
        // The private half is the 64 bytes before the comment; its first 32 are what nobody may know.
        let public = std::fs::read_to_string(file.with_extension("pub")).unwrap_or_default();
        let public = public.split_whitespace().nth(1).unwrap_or_default().to_owned();
        let point = search::base64(&public);
        let point = point[point.len() - 32..].to_vec();
        let last = search::positions(&raw, &point)
            .last()
            .copied()
            .expect("a public half in the private key");
        needles.push((format!("the private key of the {what}"), raw[last - 32..last].to_vec()));
        needles.push((
            format!("the key of the {what} in its file"),
            body.as_bytes()[80..120].to_vec(),
        ));
        needles.push((format!("the public key of the {what}"), point));
        needles.push((format!("the public key of the {what} in its file"), public.into_bytes()));
    }
    // What the machine itself holds is found where it is: the search finds.
    let found = search::in_tree(&own.join("snapshots/control"), &needles);
    for what in [
        "the name of a machine",
        "a variable of a command",
        "the public key of the user in its file",
    ] {
        assert!(
            found.iter().any(|f| f.0 == what),
            "the search does not find {what} in the snapshot: {found:?}"
        );
    }
    let place = env.state().join("templates").join(&template);
    let kernel = [("a kernel".to_owned(), b"Linux version".to_vec())];
    assert!(
        !search::in_tree(&place, &kernel).is_empty(),
        "there is no memory in {}",
        place.display()
    );
    let found = search::in_tree(&place, &needles);
    assert!(found.is_empty(), "in the template: {found:?}");
    env.close();
}

/// A copy with a second processor runs a command of the agent's there while it wakes.
fn a_rehearsal_leaves_nothing() {
    let env = TestEnv::new("rehearsal");
    env.ok("vm create --name m --vcpu 2 --memory 256M debian-slim");
    assert_eq!(env.machine("m")["boot"]["how"], "template");
    assert_eq!(env.json("vm sessions m"), serde_json::json!([]));
    let processes = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done";
    processes::until("the rehearsal to end", Duration::from_secs(10), || {
        !env.sh("m", &format!("{processes} | grep -w '[n]othing' || true"))
            .code(0)
            .out()
            .contains("nothing")
    });
    // What it was is over, and what follows is as ever.
    env.sh("m", "exit 7").code(7);
    env.close();
}

fn no_session_in_a_copy() {
    let env = machine("no-session");
    let mut running = env
        .banger([
            "vm",
            "exec",
            "m",
            "--",
            "sh",
            "-c",
            "echo begun; read word; echo $word; exit 9",
        ])
        .stdin_held()
        .spawn();
    running.expect("begun");
    let other = env
        .banger(["vm", "exec", "m", "--", "sh", "-c", "echo begun; sleep 1000"])
        .spawn();
    other.expect("begun");
    env.ok("vm fork m -n 2 --name copy");
    for copy in ["copy-1", "copy-2"] {
        assert_eq!(
            env.json(&format!("vm sessions {copy}")),
            serde_json::json!([]),
            "{copy}"
        );
        // Nor do their programs run there.
        let left = env.sh(
            copy,
            "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep -x '[1]000' || echo none",
        );
        left.code(0).prints("none\n");
    }
    let source = env.json("vm sessions m");
    let runs = |s: &&serde_json::Value| s["running"] == true;
    assert_eq!(source.as_array().unwrap().iter().filter(runs).count(), 2, "{source}");
    running.write("ended\n");
    running.wait().code(9).prints("begun\nended\n");
    drop(other);
    env.close();
}

fn workspace_is_in_a_fork() {
    let env = TestEnv::new("workspace");
    let repository = Repository::typical(env.work().join("repo"));
    env.banger(["vm", "run", "-d", "--name", "m", "./repo"])
        .deadline(120)
        .ok();
    env.sh("m", "echo changed >README; echo new >/root/other; echo held >/tmp/held")
        .code(0);
    env.ok("vm fork m --name copy");
    // What stood in memory alone is there as well: nothing was synced.
    let seen = "pwd; cat .git/HEAD README /root/other /tmp/held; ls; test -x run.sh";
    let source = env.sh("m", seen).code(0).out();
    assert!(
        source.starts_with("/root/repo\nref: refs/heads/main\nchanged\nnew\nheld\n"),
        "{source}"
    );
    assert_eq!(env.sh("copy", seen).code(0).out(), source);
    assert_eq!(env.machine("copy")["workspace"], env.machine("m")["workspace"]);
    // From now on each has its own.
    env.sh("copy", "echo copy >README; sync").code(0);
    env.sh("m", "cat README").code(0).prints("changed\n");
    assert_eq!(repository.git(&["show", "HEAD:README"]), "hello\n");
    env.close();
}

fn journal_and_units_of_a_copy() {
    let env = shared();
    let names = ["units", "units-other", "units-fork"].map(str::to_owned);
    create(env, "units", "debian");
    create(env, "units-other", "debian");
    // The source's journal has been written to: what writes it knows who it is there.
    env.sh("units", "logger word-of-the-source").code(0);
    processes::until("the word in the source's journal", Duration::from_secs(20), || {
        let seen = env.sh("units", "journalctl --no-pager -n 200 -o cat");
        seen.out().contains("word-of-the-source")
    });
    env.ok("vm fork units --name units-fork");
    for name in &names[1..] {
        let sh = |script: &str| env.sh(name, script).code(0).out();
        assert_eq!(
            sh("systemctl --failed --no-legend --plain"),
            "",
            "units of {name} failed"
        );
        assert_eq!(sh("systemctl is-system-running").trim(), "running", "{name}");
        // The journal is that of this machine, and it writes.
        sh(&format!("logger word-of-{name}; journalctl --sync || true"));
        processes::until("the word in the journal", Duration::from_secs(10), || {
            sh("journalctl --no-pager -n 200 -o cat").contains(&format!("word-of-{name}"))
        });
        let host = sh(&format!("journalctl --no-pager -o export _HOSTNAME={name} -n 5"));
        assert!(
            host.contains(&format!("word-of-{name}")),
            "the journal has another host name: {host}"
        );
        let entry = sh(&format!("journalctl --no-pager -o export MESSAGE=word-of-{name}"));
        let id = sh("cat /etc/machine-id");
        assert!(
            entry.contains(&format!("_MACHINE_ID={}", id.trim())),
            "the journal is that of another machine: {entry}"
        );
        // No timer went off because of the jump in time.
        let fired = sh("systemctl list-timers --all --no-legend --plain | grep -c ' ago ' || true");
        assert_eq!(fired.trim(), "0", "{}", sh("systemctl list-timers --all"));
        // Systemd knows who it is.
        assert_eq!(sh("hostnamectl hostname 2>/dev/null || hostname").trim(), name);
        assert_eq!(
            sh("cat /etc/machine-id; tr -d - </etc/machine-id | wc -c")
                .lines()
                .nth(1),
            Some("33")
        );
        let id = sh("cat /etc/machine-id");
        let bus = sh("cat /var/lib/dbus/machine-id 2>/dev/null || cat /etc/machine-id");
        assert_eq!(bus, id, "two machine ids");
    }
    delete(env, &names);
}

/// A daemon with a point where it fails.
pub(crate) fn daemon_with(env: &TestEnv, points: &str) {
    let _ = env.run("daemon stop");
    env.banger(["daemon", "start"]).env("BANGER_FAILPOINT", points).ok();
}

/// Directories of machines.
fn machines_on_disk(env: &TestEnv) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(env.state().join("machines")).unwrap();
    entries.flatten().map(|e| e.path()).collect()
}

fn a_fork_that_cannot_become_itself_is_not_handed_over() {
    let env = machine("no-identity");
    let boot = env.boot_id("m");
    for point in ["restore.channel", "restore.renewed"] {
        daemon_with(&env, &format!("{point}=error"));
        let done = env.run("vm fork m -n 2 --name copy").fails();
        assert_eq!(done.out(), "", "{point}");
        assert_eq!(env.machine_names(), ["m"], "{point}");
        assert_eq!(machines_on_disk(&env).len(), 1, "{point}");
        processes::until("the engines of the copies to be gone", Duration::from_secs(5), || {
            env.engines().len() == 1
        });
        processes::until("what copies start from to be gone", Duration::from_secs(5), || {
            !has_entries(&env.state().join("forks"))
        });
        // The source goes on, and its name is still free.
        assert_eq!(env.boot_id("m"), boot);
    }
    env.ok("daemon stop");
    env.ok("vm fork m -n 2 --name copy").prints("copy-1\ncopy-2\n");
    env.close();
}

fn a_machine_that_cannot_become_itself_boots() {
    let env = TestEnv::new("boots-instead");
    for point in ["restore.channel", "restore.renewed"] {
        let template = env.ok("template build").out().trim().to_owned();
        daemon_with(&env, &format!("{point}=error"));
        create(&env, "m", "debian-slim");
        let shown = env.machine("m");
        assert_eq!(shown["boot"]["how"], "boot", "{point}: {shown}");
        env.sh("m", "hostname").code(0).prints("m\n");
        let names: Vec<String> = templates(&env);
        assert!(!names.contains(&template), "{point}: the template that failed is kept");
        let log = env.daemon_log();
        let told = log.lines().rfind(|l| l.contains(&template) && l.contains("dropped"));
        assert!(
            told.is_some_and(|l| l.contains(point)),
            "{point}: the log does not say why: {told:?}"
        );
        assert_eq!(env.engines().len(), 1, "{point}");
        env.ok("vm delete m --force");
    }
    env.close();
}

/// Ids of all templates.
pub(crate) fn templates(env: &TestEnv) -> Vec<String> {
    let list = env.json("template list");
    let ids = list.as_array().unwrap().iter();
    ids.map(|t| t["id"].as_str().unwrap().to_owned()).collect()
}

/// Whether there is anything in a directory.
pub(crate) fn has_entries(dir: &Path) -> bool {
    std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}
