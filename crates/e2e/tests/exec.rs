//! Commands in a running machine.

use std::io::Read;
use std::process::Stdio;

use banger_testkit::binaries;
use rustix::process::Signal;

use crate::harness::{MACHINES, noise, sha256, slim, tests};

tests! { MACHINES;
    streams_are_kept_apart,
    statuses_come_out,
    environment_directory_and_user,
    twenty_megabytes_each_way,
    input_is_a_conversation,
    without_input_there_is_end_of_file,
    signals_pass_through,
    a_closed_pipe_is_no_error,
    a_full_disk_is_an_error,
    a_long_command_line,
    many_at_once,
    what_a_fresh_machine_looks_like,
    a_command_outlives_nothing_it_should_not,
    secrets_stay_out_of_logs_and_arguments,
}

fn streams_are_kept_apart() {
    let (env, m) = slim();
    let done = env
        .banger(["vm", "exec", m, "--", "sh", "-c", "cat; echo problem >&2; exit 3"])
        .stdin("input\0\n")
        .run()
        .code(3);
    assert_eq!(
        (done.stdout.as_slice(), done.err().as_str()),
        (b"input\0\n".as_slice(), "problem\n")
    );
}

fn statuses_come_out() {
    let (env, m) = slim();
    env.ok(&format!("vm exec {m} -- true"));
    env.sh(m, "exit 42").code(42);
    env.sh(m, "exit 255").code(255);
    env.sh(m, "kill -TERM $$").code(143);
    env.sh(m, "kill -KILL $$").code(137);
    env.run(&format!("vm exec {m} -- no-such-command"))
        .code(127)
        .says(&["no-such-command"]);
    env.run(&format!("vm exec {m} -- /etc/passwd")).code(126);
    env.run(&format!("vm exec {m} -- /etc")).code(126);
    // A status of a program in the guest never comes with words of ours.
    assert_eq!(env.sh(m, "exit 42").err(), "");
}

fn environment_directory_and_user() {
    let (env, m) = slim();
    let exec = |flags: &[&str], script: &str| {
        env.banger(["vm", "exec"])
            .args(flags)
            .args([m, "--", "sh", "-c", script])
            .env("FROM_HOST", "inherited value")
            .run()
    };
    assert_eq!(
        exec(&["-e", "A=x y=z", "--env", "FROM_HOST"], "echo \"$A|$FROM_HOST\"")
            .code(0)
            .out(),
        "x y=z|inherited value\n"
    );
    assert_eq!(exec(&[], "echo \"[$FROM_HOST]\"").code(0).out(), "[]\n");
    assert_eq!(exec(&["--workdir", "/usr/lib"], "pwd").code(0).out(), "/usr/lib\n");
    assert_eq!(exec(&[], "pwd; echo $HOME; id -u").code(0).out(), "/root\n/root\n0\n");
    assert_eq!(
        exec(&["--user", "nobody"], "id -un; id -g").code(0).out(),
        "nobody\n65534\n"
    );
    assert_eq!(exec(&["--user", "65534"], "id -u").code(0).out(), "65534\n");
    exec(&["--user", "nosuchuser"], "true").fails().says(&["nosuchuser"]);
    exec(&["--workdir", "/nowhere"], "true").fails().says(&["/nowhere"]);
    exec(&["-e", "=x"], "true").code(125);
    exec(&["-e", "NOT_SET_HERE"], "true").code(125).says(&["NOT_SET_HERE"]);
}

fn twenty_megabytes_each_way() {
    let (env, m) = slim();
    let bytes = noise(20_000_000);
    let sum = sha256(&bytes);
    let up = env
        .banger(["vm", "exec", m, "--", "sh", "-c", "tee /tmp/exec-bytes | sha256sum"])
        .stdin(bytes)
        .deadline(120)
        .ok();
    assert_eq!(up.out(), format!("{sum}  -\n"));
    let down = env
        .banger(["vm", "exec", m, "--", "cat", "/tmp/exec-bytes"])
        .deadline(120)
        .ok();
    assert_eq!(down.stdout.len(), 20_000_000);
    assert_eq!(sha256(&down.stdout), sum);
    env.sh(m, "rm /tmp/exec-bytes").code(0);
}

fn input_is_a_conversation() {
    let (env, m) = slim();
    let mut running = env
        .banger([
            "vm",
            "exec",
            m,
            "--",
            "sh",
            "-c",
            "while read line; do echo got $line; done; echo end",
        ])
        .stdin_held()
        .spawn();
    running.write("one\n");
    running.expect("got one");
    running.write("two\n");
    running.expect("got two");
    running.close_stdin();
    assert!(running.wait().code(0).out().ends_with("end\n"));
}

fn without_input_there_is_end_of_file() {
    let (env, m) = slim();
    assert_eq!(env.banger(["vm", "exec", m, "--", "cat"]).run().code(0).out(), "");
    assert_eq!(
        env.banger(["vm", "exec", m, "--", "wc", "-c"])
            .stdin("")
            .run()
            .code(0)
            .out(),
        "0\n"
    );
}

fn signals_pass_through() {
    let (env, m) = slim();
    let script = "trap 'echo int; exit 7' INT; trap 'echo term; exit 8' TERM; trap 'echo hup; exit 9' HUP; echo ready; while :; do :; done";
    for (signal, word, status) in [
        (Signal::INT, "int", 7),
        (Signal::TERM, "term", 8),
        (Signal::HUP, "hup", 9),
    ] {
        let running = env
            .banger(["vm", "exec", m, "--", "sh", "-c", script])
            .deadline(20)
            .spawn();
        running.expect("ready");
        running.signal(signal);
        let done = running.wait().code(status);
        assert!(done.out().contains(word), "{}", done.out());
    }
    let running = env
        .banger(["vm", "exec", m, "--", "sh", "-c", "echo ready; exec sleep 60"])
        .deadline(20)
        .spawn();
    running.expect("ready");
    running.signal(Signal::TERM);
    running.wait().code(143);
}

fn a_closed_pipe_is_no_error() {
    let (env, m) = slim();
    // As in `banger vm exec m -- yes | head -1`.
    let mut command = std::process::Command::new(binaries::program("banger"));
    env.prepare(&mut command);
    command
        .args(["vm", "exec", m, "--", "yes"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut first = [0; 2];
    let mut pipe = child.stdout.take().unwrap();
    pipe.read_exact(&mut first).unwrap();
    drop(pipe);
    assert_eq!(&first, b"y\n");
    let begun = std::time::Instant::now();
    let ended = banger_testkit::processes::reached(std::time::Duration::from_secs(20), || {
        child.try_wait().unwrap().is_some()
    });
    if !ended {
        child.kill().unwrap();
    }
    let output = child.wait_with_output().unwrap();
    assert!(ended, "`vm exec | head -1` hung for {:?}", begun.elapsed());
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(!err.contains("panicked") && !err.contains("rror"), "{err}");
    // The command in the guest does not run on for ever either.
    banger_testkit::processes::until("`yes` to end in the guest", std::time::Duration::from_secs(20), || {
        env.sh(
            m,
            "for p in /proc/[0-9]*/comm; do cat $p; done 2>/dev/null | grep -cx yes",
        )
        .out()
        .trim()
            == "0"
    });
}

fn a_full_disk_is_an_error() {
    let (env, m) = slim();
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for terminal in ["-T", "-t"] {
        env.banger(["vm", "exec", terminal, m, "--", "seq", "1", "100000"])
            .stdout_file(full())
            .run()
            .code(125)
            .says(&["cannot write output", "no space left"]);
    }
    // One that fails just before its program ends.
    env.banger(["vm", "exec", m, "--", "echo", "word"])
        .stdout_file(full())
        .run()
        .code(125);
}

/// Longer than a frame, a message, a request and a list may be.
fn a_long_command_line() {
    let (env, m) = slim();
    let words: Vec<String> = (0..100_000).map(|n| format!("w{n}")).collect();
    let last = words.concat();
    let script = "echo $#; printf %s \"$@\" | sha256sum; sleep 2; exit 7";
    let running = env
        .banger(["vm", "exec", m, "--", "sh", "-c", script, "longword"])
        .args(&words)
        .spawn();
    running.expect("100000\n");
    running.expect(&sha256(last.as_bytes()));
    let listed = env.json(&format!("vm sessions {m}"));
    assert!(listed.to_string().contains("longword"), "{listed}");
    running.wait().code(7);
    // The longest word there is, and one that is too long for Linux is this host's to refuse.
    let longest = "a".repeat(128 * 1024 - 1);
    env.banger(["vm", "exec", m, "--", "sh", "-c", "echo ${#1}", "sh", &longest])
        .run()
        .code(0)
        .prints("131071\n");
}

fn many_at_once() {
    let (env, m) = slim();
    let running: Vec<_> = (0..12)
        .map(|i| {
            (
                i,
                env.banger([
                    "vm",
                    "exec",
                    m,
                    "--",
                    "sh",
                    "-c",
                    &format!("head -c 300000 /dev/zero; exit {i}"),
                ])
                .spawn(),
            )
        })
        .collect();
    for (i, running) in running {
        let done = running.wait().code(i);
        assert_eq!(done.stdout.len(), 300_000);
    }
}

fn what_a_fresh_machine_looks_like() {
    let (env, m) = slim();
    let sh = |script: &str| env.sh(m, script).code(0).out();
    assert_eq!(sh("hostname").trim(), m);
    // B13: an inode mode without its type damaged the root of the file system.
    assert_eq!(
        sh("stat -c '%F %a %u' / /root /tmp"),
        "directory 755 0\ndirectory 755 0\ndirectory 1777 0\n"
    );
    // B26: /root was empty where the image had files in it.
    assert_eq!(sh("test -f /root/.bashrc && echo there").trim(), "there");
    // B9: the file system has the size that was asked for, 4 GiB less what it needs itself.
    let kib: u64 = sh("df -k / | tail -1 | awk '{print $2}'").trim().parse().unwrap();
    assert!((3_500_000..=4_194_304).contains(&kib), "/ has {kib} KiB");
    assert_eq!(sh("nproc").trim(), "1");
    let mib: u64 = sh("awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo")
        .trim()
        .parse()
        .unwrap();
    assert!((420..=512).contains(&mib), "{mib} MiB of memory");
    // The clock is the host's.
    let guest: i64 = sh("date +%s").trim().parse().unwrap();
    let host = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs()
        .cast_signed();
    assert!(
        (guest - host).abs() <= 2,
        "the guest's clock is off by {} s",
        guest - host
    );
    assert_eq!(
        sh("readlink /proc/1/exe; cat /proc/1/comm").lines().last(),
        Some("init")
    );
    assert!(sh("ip -4 addr show 2>/dev/null || cat /proc/net/dev").contains("eth0"));
    assert!(!sh("cat /etc/resolv.conf").is_empty());
    assert!(sh("grep \" $(hostname)\" /etc/hosts").contains("127."));
    // Nothing is lost when an orphan ends: process 1 reaps it.
    sh("sh -c 'sh -c \"sleep 0.2\" & exit 0'; sleep 1");
    assert_eq!(
        sh("grep -l 'State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l").trim(),
        "0"
    );
}

fn a_command_outlives_nothing_it_should_not() {
    let (env, m) = slim();
    // A background child that holds the streams open does not hold the client for ever: it ends with the command.
    let done = env
        .banger(["vm", "exec", m, "--", "sh", "-c", "sleep 30 & echo $!"])
        .deadline(25)
        .run()
        .code(0);
    let pid = done.out().trim().to_owned();
    env.sh(m, &format!("kill {pid}"));
}

fn secrets_stay_out_of_logs_and_arguments() {
    let (env, m) = slim();
    let secret = "s3cr3t-0f-th3-t3st";
    let running = env
        .banger([
            "vm",
            "exec",
            "-e",
            "TOKEN",
            m,
            "--",
            "sh",
            "-c",
            "echo ready; sleep 3; echo $TOKEN",
        ])
        .env("TOKEN", secret)
        .spawn();
    running.expect("ready");
    let everything: Vec<String> = banger_testkit::processes::all()
        .into_iter()
        .map(|p| p.command)
        .collect();
    assert!(
        !everything.iter().any(|c| c.contains(secret)),
        "the secret stands in an argument"
    );
    assert!(running.wait().code(0).out().contains(secret));
    let log = env.daemon_log();
    assert!(!log.is_empty(), "the daemon has no log");
    assert!(!log.contains(secret), "the secret stands in the daemon's log");
    assert!(!log.contains("PRIVATE KEY") && !everything.iter().any(|c| c.contains("PRIVATE KEY")));
    assert!(!env.ok(&format!("vm show {m}")).out().contains("PRIVATE KEY"));
}
