//! Snapshots: memory and disks of one moment, gone back to as often as wanted; and images made of machines.

use std::path::{Path, PathBuf};
use std::time::Duration;

use banger_testkit::{Need, TestEnv, need, processes};

use crate::copies::{daemon_with, has_entries};
use crate::harness::{MACHINES, create, machine, tests};

tests! { MACHINES;
    a_daemon_dies_while_one_is_taken,
    a_daemon_dies_while_one_is_restored,
    disks_alone,
    a_chain,
    memory_and_disks_are_of_one_moment,
    an_image_of_a_machine,
    what_there_is_can_be_seen,
    restored_from_every_state,
    damage_is_told_before_anything_ends,
    a_disk_that_is_full,
}

/// Directory of a machine.
pub(crate) fn home(env: &TestEnv, m: &str) -> PathBuf {
    let id = env.machine(m)["id"].as_str().unwrap().to_owned();
    env.state().join("machines").join(id)
}

/// Names of a machine's snapshots.
fn names(env: &TestEnv, m: &str) -> Vec<String> {
    let list = env.json(&format!("vm snapshot list {m}"));
    let names = list.as_array().unwrap().iter();
    names.map(|s| s["name"].as_str().unwrap().to_owned()).collect()
}

/// Names of what is begun and not done in a machine's directory.
fn unfinished(home: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for dir in [home.to_owned(), home.join("snapshots"), home.join("disks")] {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        all.extend(entries.map(|e| e.file_name().to_string_lossy().into_owned()));
    }
    let signs = [".new", ".spent", ".next", "freeze.json"];
    all.retain(|name| signs.iter().any(|sign| name.contains(sign)));
    all
}

/// Nothing begun is left in a machine's directory. What is over is cleared after it was told.
#[track_caller]
pub(crate) fn finished(env: &TestEnv, m: &str, when: &str) {
    let home = home(env, m);
    let what = format!("what was begun of {m} to be cleared ({when})");
    if !processes::reached(Duration::from_secs(5), || unfinished(&home).is_empty()) {
        panic!("waited in vain for {what}: {:?}", unfinished(&home));
    }
}

/// A program that counts in its memory and writes each number to the disk before the next.
const COUNTER: &str = "cat >/root/count.sh <<'END'\ni=0\nwhile :; do i=$((i+1)); echo $i >>/root/count; sync; done\nEND\n\
    setsid sh /root/count.sh >/dev/null 2>&1 </dev/null & echo $!";

/// Starts the counter and waits for its first numbers.
pub(crate) fn count(env: &TestEnv, m: &str) {
    env.sh(m, COUNTER).code(0);
    goes_on_counting(env, m);
}

/// The counter counts, and what it wrote is what it remembers: no number is missing and none is there twice.
#[track_caller]
pub(crate) fn goes_on_counting(env: &TestEnv, m: &str) {
    // From the disk, not from what the kernel remembers of it.
    let read = "sync; echo 3 >/proc/sys/vm/drop_caches; \
        awk '$1 != NR { print \"line \" NR \" is \" $1; exit 1 } END { print NR }' /root/count";
    let now = || -> u64 { env.sh(m, read).code(0).out().trim().parse().unwrap_or(0) };
    let mut first = None;
    processes::until(&format!("the counter of {m}"), Duration::from_secs(20), || {
        let done = env.sh(m, "test -s /root/count");
        done.status == 0 && {
            let now = now();
            now > *first.get_or_insert(now) + 5
        }
    });
}

fn what_there_is_can_be_seen() {
    let env = machine("snap-list");
    let boot = env.boot_id("m");
    assert_eq!(env.json("vm snapshot list m"), serde_json::json!([]));
    let done = env.ok("vm snapshot create m one").prints("one\n").says(&["paused"]);
    drop(done);
    env.ok("vm snapshot create m two --disk-only");
    assert_eq!(names(&env, "m"), ["one", "two"]);
    let one = env.json("vm snapshot show m one");
    let two = env.json("vm snapshot show m two");
    assert_eq!(
        (one["memory"].as_bool(), two["memory"].as_bool()),
        (Some(true), Some(false))
    );
    assert!(
        one["memory_bytes"]
            .as_u64()
            .is_some_and(|b| (20 << 20..200 << 20).contains(&b)),
        "{one}"
    );
    assert_eq!(two["memory_bytes"], 0);
    assert!(one["paused_ms"].as_u64().is_some_and(|ms| ms > 0 && ms < 5000), "{one}");
    assert!(env.ok("vm snapshot show m one").out().contains("one"));
    let text = env.ok("vm snapshot list m").out();
    assert!(text.starts_with("NAME ") && text.lines().count() == 3, "{text}");
    // The machine noticed nothing.
    assert_eq!(env.boot_id("m"), boot);

    env.run("vm snapshot create m one")
        .fails()
        .says(&["one", "already", "hint:"]);
    for bad in [
        "",
        ".",
        "..",
        "a/b",
        "../x",
        ".new-x",
        "Upper",
        "a b",
        "-x",
        &"x".repeat(80),
    ] {
        env.banger(["vm", "snapshot", "create", "m", "--", bad])
            .run()
            .fails()
            .says(&["name"]);
    }
    env.run("vm snapshot show m onw").fails().says(&["onw", "hint:", "one"]);
    env.run("vm snapshot restore m nosuch").fails().says(&["nosuch"]);
    env.run("vm snapshot delete m nosuch").fails().says(&["nosuch"]);
    env.run("vm snapshot list nosuch").fails().says(&["nosuch"]);
    assert_eq!(env.boot_id("m"), boot);
    env.ok("vm snapshot delete m one two");
    assert_eq!(env.json("vm snapshot list m"), serde_json::json!([]));
    assert!(!has_entries(&home(&env, "m").join("snapshots")));
    // A machine goes with its snapshots.
    env.ok("vm snapshot create m three");
    env.ok("vm delete m --force");
    assert!(!has_entries(&env.state().join("machines")));
    env.close();
}

fn memory_and_disks_are_of_one_moment() {
    let env = machine("snap-pair");
    count(&env, "m");
    let session = env
        .banger(["vm", "exec", "m", "--", "sh", "-c", "echo begun; sleep 3; echo ended"])
        .spawn();
    session.expect("begun");
    env.ok("vm snapshot create m then");
    // A session of the machine goes on over it.
    session.wait().code(0).prints("begun\nended\n");
    goes_on_counting(&env, "m");
    env.sh("m", "touch /root/later /dev/shm/later").code(0);
    for _ in 0..2 {
        env.ok("vm snapshot restore m then").prints("m\n");
        assert_eq!(env.machine_state("m"), "running");
        let boot = env.machine("m")["boot"].clone();
        assert_eq!(
            (boot["how"].as_str(), boot["from"].as_str()),
            (Some("snapshot"), Some("then")),
            "{boot}"
        );
        assert_eq!(
            env.json("vm sessions m"),
            serde_json::json!([]),
            "sessions of that time"
        );
        env.sh("m", "ls /root/later /dev/shm/later 2>/dev/null; hostname")
            .prints("m\n");
        goes_on_counting(&env, "m");
        env.sh("m", "touch /root/later /dev/shm/later").code(0);
    }
    assert_eq!(env.engines().len(), 1);
    env.close();
}

fn disks_alone() {
    let env = machine("snap-disks");
    let write = |text: &str| {
        drop(
            env.sh("m", &format!("echo {text} >/opt/file; echo {text} >/root/file"))
                .code(0),
        )
    };
    let reads = |text: &str| {
        drop(
            env.sh("m", "cat /opt/file /root/file")
                .code(0)
                .prints(&format!("{text}\n{text}\n")),
        )
    };
    write("first");
    // Not synced: the guest writes it out first.
    env.ok("vm snapshot create m running --disk-only");
    write("second");
    env.ok("vm stop m");
    env.ok("vm snapshot create m stopped");
    assert_eq!(env.json("vm snapshot show m stopped")["memory"], false);
    env.ok("vm snapshot restore m running");
    assert_eq!(env.machine_state("m"), "stopped");
    assert!(env.engines().is_empty());
    env.ok("vm start m");
    reads("first");
    write("third");
    // Of a machine that runs: it is stopped then.
    env.ok("vm snapshot restore m stopped");
    assert_eq!(env.machine_state("m"), "stopped");
    env.ok("vm start m");
    reads("second");
    env.close();
}

fn a_chain() {
    let env = machine("snap-chain");
    for i in 1..=5 {
        env.sh(
            "m",
            &format!("echo {i} >>/root/file; echo {i} >>/opt/file; echo {i} >>/dev/shm/file"),
        )
        .code(0);
        env.ok(&format!("vm snapshot create m s{i}"));
    }
    env.ok("vm snapshot delete m s2 s4");
    assert_eq!(names(&env, "m"), ["s1", "s3", "s5"]);
    let reads = |last: u32| {
        let lines: String = (1..=last).map(|i| format!("{i}\n")).collect();
        let script = "echo 3 >/proc/sys/vm/drop_caches; cat /root/file /opt/file /dev/shm/file";
        env.sh("m", script).code(0).prints(&lines.repeat(3));
    };
    for i in [1, 5, 3] {
        env.ok(&format!("vm snapshot restore m s{i}"));
        reads(i);
    }
    // Snapshots of what was restored, and then without all of what it came from.
    env.sh("m", "echo 4 | tee -a /root/file /opt/file /dev/shm/file")
        .code(0);
    env.ok("vm snapshot create m last");
    env.ok("vm snapshot delete m s1 s3 s5");
    reads(4);
    env.ok("vm snapshot restore m last");
    reads(4);
    env.ok("vm snapshot delete m last");
    env.ok("vm stop m");
    env.ok("vm start m");
    env.sh("m", "cat /root/file; ls /dev/shm")
        .code(0)
        .prints("1\n2\n3\n4\n");
    env.close();
}

fn restored_from_every_state() {
    let env = machine("snap-states");
    env.sh("m", "echo held >/dev/shm/held").code(0);
    env.ok("vm snapshot create m s");
    for put in ["vm pause m", "vm suspend m", "vm kill m"] {
        env.ok(put);
        env.ok("vm snapshot restore m s");
        assert_eq!(env.machine_state("m"), "running", "after {put}");
        env.sh("m", "cat /dev/shm/held").code(0).prints("held\n");
        assert_eq!(env.engines().len(), 1, "after {put}");
        finished(&env, "m", &format!("after {put}"));
    }
    env.close();
}

fn damage_is_told_before_anything_ends() {
    use std::os::unix::fs::FileExt;
    let env = machine("snap-damage");
    let boot = env.boot_id("m");
    let place = home(&env, "m").join("snapshots");
    for (file, cut) in [("memory", false), ("memory", true), ("state", false), ("state", true)] {
        env.ok("vm snapshot create m s");
        let path = place.join("s").join(file);
        let open = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        let middle = open.metadata().unwrap().len() / 2;
        if cut {
            open.set_len(middle).unwrap();
        } else {
            open.write_all_at(b"these bytes are not what was written here", middle)
                .unwrap();
        }
        env.run("vm snapshot restore m s").fails().says(&[file, "memory"]);
        // It runs as before, and its snapshot can be removed.
        assert_eq!(
            (env.boot_id("m"), env.machine_state("m").as_str()),
            (boot.clone(), "running")
        );
        finished(&env, "m", "after a refusal");
        env.ok("vm snapshot delete m s");
    }
    for file in ["memory", "state", "disks", "manifest.json"] {
        env.ok("vm snapshot create m s");
        let path = place.join("s").join(file);
        let removed = if path.is_dir() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        removed.unwrap();
        env.run("vm snapshot restore m s").fails();
        assert_eq!(
            (env.boot_id("m"), env.machine_state("m").as_str()),
            (boot.clone(), "running"),
            "without {file}"
        );
        let _ = env.run("vm snapshot delete m s");
        // What is no snapshot any more does not hold its name.
        let _ = std::fs::remove_dir_all(place.join("s"));
    }
    env.close();
}

fn a_disk_that_is_full() {
    need::require(&[Need::MountNamespace]);
    let env = TestEnv::new("snap-full");
    // Where a snapshot and a fork are written there is no room: in a mount namespace in which daemon and engine are as well.
    let script = "
        $B vm create --name m >/dev/null || exit 90
        id=$($B vm list --quiet); boot=$($B vm exec m -- cat /proc/sys/kernel/random/boot_id)
        s=$S/machines/$id/snapshots; f=$S/forks; mkdir -p $s $f
        mount -t tmpfs -o size=4m,mode=700 none $s && mount -t tmpfs -o size=4m,mode=700 none $f || exit 91
        $B vm snapshot create m full; echo snapshot: $?
        $B vm fork m --name full; echo fork: $?
        ls -A $s $f | grep -v :; $B vm snapshot list m --quiet
        ls $S/machines/$id $S/machines/$id/disks | grep -e new -e next -e freeze
        test \"$($B vm exec m -- cat /proc/sys/kernel/random/boot_id)\" = \"$boot\" && echo the same
        $B vm list --quiet | wc -l
        umount $s; umount $f
        $B vm snapshot create m fits; $B vm snapshot restore m fits
        $B vm delete --force m >/dev/null; $B daemon stop >/dev/null 2>&1";
    let done = env
        .program("unshare")
        .args(need::namespace_flags())
        .args(["sh", "-c", script])
        .env("B", banger_testkit::binaries::program("banger"))
        .env("S", env.state())
        .deadline(90)
        .run()
        .code(0);
    let lines: Vec<String> = done
        .out()
        .lines()
        .filter(|l| !l.is_empty())
        .map(str::to_owned)
        .collect();
    assert_eq!(
        lines,
        ["snapshot: 8", "fork: 8", "the same", "1", "fits", "m"],
        "{}",
        done.err()
    );
    done.says(&["space"]);
    env.close();
}

fn a_daemon_dies_while_one_is_taken() {
    let env = machine("snap-die");
    count(&env, "m");
    let boot = env.boot_id("m");
    let points = [
        "snapshot.begun",
        "save.frozen",
        "save.saved",
        "snapshot.saved",
        "snapshot.committed",
    ];
    for point in points {
        daemon_with(&env, &format!("{point}=abort"));
        env.run("vm snapshot create m s").fails();
        // It runs, all of it, and what was begun is done or undone.
        goes_on_counting(&env, "m");
        assert_eq!(
            (env.boot_id("m"), env.machine_state("m").as_str()),
            (boot.clone(), "running"),
            "{point}"
        );
        finished(&env, "m", point);
        let there = names(&env, "m");
        assert_eq!(
            there,
            if point == "snapshot.committed" {
                vec!["s"]
            } else {
                vec![]
            },
            "{point}"
        );
    }
    env.ok("vm snapshot restore m s");
    goes_on_counting(&env, "m");
    env.ok("vm snapshot create m again");
    env.ok("vm snapshot restore m again");
    goes_on_counting(&env, "m");
    env.close();
}

fn a_daemon_dies_while_one_is_restored() {
    let env = machine("rollback-die");
    env.sh("m", "echo then >/dev/shm/when; echo then >/root/when").code(0);
    env.ok("vm snapshot create m s");
    env.sh("m", "echo now >/dev/shm/when; echo now >/root/when; sync")
        .code(0);
    env.ok("vm snapshot create m now");
    let points = [
        // Undone: the machine runs on as it was.
        ("rollback.prepared", "running"),
        ("rollback.journaled", "running"),
        // Carried out by the next daemon.
        ("rollback.stopping", "running"),
        ("rollback.killed", "running"),
        ("rollback.stopped", "running"),
        ("rollback.exchanged", "running"),
        ("rollback.memory", "running"),
        ("rollback.row", "running"),
        // All of it is in its place but the wake.
        ("rollback.placed", "suspended"),
        ("start.launched", "suspended"),
        ("wake.launched", "suspended"),
        ("wake.spent", "running"),
    ];
    for (point, expected) in points {
        daemon_with(&env, &format!("{point}=abort"));
        env.run("vm snapshot restore m s").fails();
        env.ok("vm list");
        processes::until(
            &format!("m to be {expected} after {point}"),
            Duration::from_secs(60),
            || env.machine_state("m") == expected,
        );
        let state = env.machine_state("m");
        assert_eq!(env.engines().len(), usize::from(state == "running"), "{point}: {state}");
        finished(&env, "m", point);
        // What it is now is either as before or as wanted, never a mixture.
        env.ok("vm start m");
        let seen = env.sh("m", "cat /root/when /dev/shm/when 2>/dev/null").out();
        let whole = ["now\nnow\n", "then\nthen\n", "now\n", "then\n"];
        assert!(whole.contains(&seen.as_str()), "{point}: {seen:?}");
        let before = ["rollback.prepared", "rollback.journaled"].contains(&point);
        assert_eq!(seen.starts_with("now"), before, "{point}: {seen:?}");
        if state != "stopped" {
            assert_eq!(seen.lines().count(), 2, "{point}: memory was lost: {seen:?}");
        }
        env.ok("vm snapshot restore m now");
        env.sh("m", "cat /root/when /dev/shm/when").code(0).prints("now\nnow\n");
    }
    env.close();
}

fn an_image_of_a_machine() {
    let env = machine("commit");
    env.sh("m", "echo kept >/opt/kept; echo gone >/root/gone; sync").code(0);
    env.run("vm commit m mine").fails().says(&["running", "stopped"]);
    env.ok("vm snapshot create m s");
    env.sh("m", "echo later >/opt/later").code(0);
    let from = |image: &str, name: &str| {
        env.banger(["vm", "create", "--cold", "--name", name, "--image", image])
            .deadline(120)
            .ok();
        env.sh(name, "hostname; ls /opt; ls /root | grep -v lost; cat /opt/kept")
            .code(0)
            .out()
    };
    env.ok("vm commit m of-snapshot --snapshot s").prints("of-snapshot\n");
    assert_eq!(from("of-snapshot", "a"), "a\nkept\nkept\n");
    env.ok("vm stop m");
    env.ok("vm commit m mine").prints("mine\n");
    assert!(
        env.json("image show mine")["size_bytes"]
            .as_u64()
            .is_some_and(|b| b > 100 << 20)
    );
    assert_eq!(from("mine", "b"), "b\nkept\nlater\nkept\n");
    env.run("vm commit m mine").fails().says(&["mine", "hint:"]);
    env.ok("vm commit m mine --force");
    env.run("vm commit m debian-slim").fails();
    for bad in ["", "a b", "../x", "Upper"] {
        env.banger(["vm", "commit", "m", "--", bad]).run().fails();
    }
    env.run("vm commit m x --snapshot nosuch").fails().says(&["nosuch"]);
    env.run("vm commit nosuch x").fails().says(&["nosuch"]);
    // The machine and its snapshot are as they were; what was made of it needs neither.
    env.ok("vm start m");
    env.sh("m", "cat /opt/later /root/gone").code(0).prints("later\ngone\n");
    env.ok("vm delete m --force");
    env.sh("a", "cat /opt/kept").code(0).prints("kept\n");
    env.ok("vm delete a b --force");
    create(&env, "c", "mine");
    env.sh("c", "cat /opt/kept").code(0).prints("kept\n");
    env.close();
}
