//! What one takes for granted of a machine: its console, its clock, its locale, a directory to be in, an image of it that runs.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use banger_testkit::TestEnv;
use banger_testkit::repository::Repository;

use crate::harness::{MACHINES, create, debian, machine, slim, tests};

tests! { MACHINES;
    the_console_is_kept_over_all_starts,
    the_journal_of_a_machine_with_an_init,
    a_clock_that_is_wrong_is_corrected,
    the_locale_is_utf8_unless_the_image_says_otherwise,
    a_directory_that_is_gone_is_no_end,
    an_image_of_a_grown_machine_runs,
}

fn the_console_is_kept_over_all_starts() {
    let env = machine("console");
    let first = env.ok("vm logs m").out();
    let template = "[banger: the boot of the template that this machine starts from]\n";
    assert!(first.starts_with(template), "{first}");
    assert!(
        first.contains("\n[banger: from here on it is this machine]\n"),
        "{first}"
    );
    assert_eq!(first.matches("[banger: the engine starts]").count(), 1, "{first}");
    env.sh("m", "echo marked >/dev/console").code(0);
    env.ok("vm suspend m");
    env.sh("m", "true").code(0);
    let woken = env.ok("vm logs m").out();
    assert!(woken.contains("\nmarked"), "{woken}");
    assert!(woken.starts_with(&first), "what was there before is gone: {woken}");
    assert_eq!(woken.matches("[banger: the engine starts]").count(), 2, "{woken}");
    env.banger(["vm", "restart", "m"]).deadline(120).ok();
    let again = env.ok("vm logs m").out();
    assert!(again.starts_with(&woken), "what was there before is gone: {again}");
    assert_eq!(again.matches("[banger: the engine starts]").count(), 3, "{again}");
    // A copy begins with what its source had.
    env.banger(["vm", "fork", "m", "--name", "copy"]).deadline(120).ok();
    let copy = env.ok("vm logs copy").out();
    assert!(
        copy.starts_with("[banger: the console of m, up to the copy]\n"),
        "{copy}"
    );
    // Without an init there is no journal.
    env.run("vm logs m --journal")
        .code(6)
        .says(&["keeps no journal", "systemd"]);
    env.close();
}

fn the_journal_of_a_machine_with_an_init() {
    let (env, m) = debian();
    env.sh(m, "echo 'said by a test' | systemd-cat -t journal-test").code(0);
    let begun = Instant::now();
    let journal = || env.ok(&format!("vm logs {m} --journal")).out();
    while !journal().contains("said by a test") {
        assert!(begun.elapsed() < Duration::from_secs(30), "{}", journal());
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(journal().contains("journal-test"));
    assert_eq!(env.ok(&format!("vm logs {m} --journal -n 3")).out().lines().count(), 3);
    let follow = env.banger(["vm", "logs", m, "--journal", "-f", "-n", "1"]).spawn();
    follow.expect("\n");
    env.sh(m, "echo 'said later' | systemd-cat -t journal-test").code(0);
    follow.expect("said later");
    follow.signal(rustix::process::Signal::INT);
    follow.wait();
}

/// Seconds that the guest's clock differs from ours.
fn difference(env: &TestEnv) -> u64 {
    let guest: u64 = env.sh("m", "date +%s").code(0).out().trim().parse().unwrap();
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
        .abs_diff(guest)
}

fn a_clock_that_is_wrong_is_corrected() {
    let env = machine("clock");
    for wrong in ["-1 hour", "+3 days", "+2 seconds"] {
        env.sh("m", &format!("date -s \"$(date -d '{wrong}')\"")).code(0);
        assert!(difference(&env) >= 1, "the clock could not be set");
        let begun = Instant::now();
        while difference(&env) > 0 {
            assert!(
                begun.elapsed() < Duration::from_secs(90),
                "{wrong}: still wrong after {:?}",
                begun.elapsed()
            );
            std::thread::sleep(Duration::from_millis(500));
        }
    }
    env.close();
}

fn the_locale_is_utf8_unless_the_image_says_otherwise() {
    let (env, m) = slim();
    assert_eq!(
        env.sh(m, "echo $LANG; locale charmap").code(0).out(),
        "C.UTF-8\nUTF-8\n"
    );
    let env = machine("locale");
    env.sh("m", "mkdir -p /etc/default; echo LANG=POSIX >/etc/default/locale")
        .code(0);
    assert_eq!(env.sh("m", "echo $LANG").code(0).out(), "POSIX\n");
    env.banger([
        "vm",
        "exec",
        "-e",
        "LANG=de_DE.UTF-8",
        "m",
        "--",
        "sh",
        "-c",
        "echo $LANG",
    ])
    .ok()
    .prints("de_DE.UTF-8\n");
    env.close();
}

fn a_directory_that_is_gone_is_no_end() {
    let env = TestEnv::new("gone");
    Repository::typical(env.work().join("repo"));
    env.banger(["vm", "run", "./repo", "-d", "--name", "m", "--image", "debian-slim"])
        .deadline(180)
        .ok();
    env.ok("vm exec m -- pwd").prints("/root/repo\n");
    env.ok("vm exec m -- rm -rf /root/repo");
    let done = env.ok("vm exec m -- pwd");
    assert_eq!(done.out(), "/root\n");
    assert!(
        done.err().contains("/root/repo any more; this runs in /root"),
        "{}",
        done.err()
    );
    assert_eq!(done.err().lines().count(), 1, "{}", done.err());
    // One that was asked for is an error.
    env.run("vm exec --workdir /root/repo m -- pwd")
        .code(125)
        .says(&["/root/repo", "hint:"]);
    env.close();
}

fn an_image_of_a_grown_machine_runs() {
    let env = TestEnv::new("grown");
    env.banger([
        "vm",
        "create",
        "--name",
        "big",
        "--image",
        "debian-slim",
        "--disk-size",
        "9G",
    ])
    .deadline(180)
    .ok();
    env.banger(["vm", "stop", "big"]).deadline(120).ok();
    env.banger(["vm", "commit", "big", "grown"]).deadline(120).ok();
    create(&env, "n", "grown");
    assert_eq!(env.machine("n")["spec"]["disk_bytes"], 9_u64 << 30);
    env.sh("n", "true").code(0);
    env.run("vm create --name o --image grown --disk-size 8G")
        .code(5)
        .says(&["8G", "9G"]);
    env.banger(["template", "build", "grown"]).deadline(180).ok();
    env.close();
}
