//! The default image: Debian with systemd.

use banger_testkit::{Repository, TestEnv};

use crate::harness::{MACHINES, create, debian, shared, tests};

tests! { MACHINES;
    the_system_comes_up,
    what_a_developer_expects_is_there,
    freed_space_returns_to_the_host,
    machines_are_individuals,
    the_main_job_on_the_default_image,
    git_in_the_guest_agrees_with_the_host,
    an_orderly_stop,
}

fn the_system_comes_up() {
    let (env, m) = debian();
    let state = env.machine(m)["guest"]["system"].clone();
    assert!(state == "running" || state == "degraded", "{state}");
    let sh = |script: &str| env.sh(m, script).code(0).out();
    let failed = sh("systemctl --failed --no-legend --plain");
    assert_eq!(failed, "", "units failed");
    assert_eq!(sh("cat /proc/1/comm").trim(), "systemd");
    assert_eq!(
        sh("hostname; hostnamectl --static 2>/dev/null || cat /etc/hostname")
            .lines()
            .next(),
        Some(m)
    );
    assert_eq!(
        sh("for p in git gcc make curl sudo sshd; do command -v $p >/dev/null || echo no $p; done"),
        ""
    );
    // B12: masked units made the mount of the work disk hang; units are masked for the boot, not in the image.
    assert!(sh("findmnt -no SOURCE /root").contains("/dev/"));
    assert_eq!(sh("find /etc/systemd/system -lname /dev/null"), "");
    assert_eq!(sh("stat -c %a /root").trim(), "755");
    // B13: the root of the file system is a directory as any other.
    assert_eq!(sh("stat -c '%F %a' /").trim(), "directory 755");
    // The agent is not the system's business: it is alive though systemd knows nothing of it.
    assert!(
        sh("systemctl list-units --no-legend --plain --type=service")
            .lines()
            .all(|l| !l.contains("banger"))
    );
    // Nothing waits for connections that can't come: `vm ssh` starts an sshd of its own. Who wants the unit can have it.
    assert_eq!(sh("systemctl is-active ssh.service || true").trim(), "inactive");
    assert_eq!(sh("systemctl is-enabled ssh.service").trim(), "enabled");
    assert_eq!(
        sh("systemctl start ssh.service && systemctl is-active ssh.service").trim(),
        "active"
    );
}

fn what_a_developer_expects_is_there() {
    let (env, m) = debian();
    let sh = |script: &str| env.sh(m, script).code(0).out();
    let tools = "bzip2 cron crontab curl file g++ git jq less locale-gen make nano patch pip3 pkg-config ps python3 rsync ssh sudo unzip vi \
                 wget xz zip";
    assert_eq!(
        sh(&format!(
            "for p in {tools}; do command -v $p >/dev/null || echo no $p; done"
        )),
        ""
    );
    // Python with its whole library: a server, and an environment with a pip of its own.
    sh("cd /tmp && python3 -c 'import http.server, ssl, sqlite3, lzma, ctypes, venv'");
    sh(
        "python3 -m ensurepip --version && python3 -m venv --without-pip /tmp/venv && /tmp/venv/bin/python -V && rm -rf /tmp/venv",
    );
    let locales = sh("locale -a");
    assert!(
        ["C.utf8", "en_US.utf8"]
            .iter()
            .all(|l| locales.lines().any(|have| have == *l)),
        "{locales}"
    );
    assert_eq!(sh("LC_ALL=en_US.UTF-8 locale charmap").trim(), "UTF-8");
    for terminal in ["xterm-256color", "tmux-256color", "alacritty", "xterm-kitty"] {
        sh(&format!("infocmp {terminal} >/dev/null"));
    }
    assert_eq!(sh("systemctl is-active cron.service").trim(), "active");
    // Manual pages are left out; whoever asks for one is told how to get them.
    assert!(env.sh(m, "man ls").err().contains("unminimize"));
    sh("command -v unminimize && sh -n $(command -v unminimize)");
    assert_eq!(sh("ls /root"), "", "the home directory is empty");
}

/// What the guest deletes is given up by the disk's file, on the root disk and on the work disk, without a command.
fn freed_space_returns_to_the_host() {
    let (env, m) = debian();
    let id = env.machine(m)["id"].as_str().unwrap().to_owned();
    let directory = env.state().join("machines").join(id);
    for place in ["/var/tmp/freed", "/root/freed"] {
        let before = allocated(&directory);
        env.sh(m, &format!("head -c 100000000 /dev/urandom >{place} && sync"))
            .code(0);
        let full = allocated(&directory);
        assert!(full > before + 90_000_000, "{place}: {before}, {full}");
        env.sh(m, &format!("rm {place} && sync")).code(0);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        loop {
            let now = allocated(&directory);
            if now + 80_000_000 < full {
                break;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "{place}: {now} of {full} bytes are still allocated 60 s after the file was deleted"
            );
            // The kernel discards after it has written its journal, which `sync` asks for.
            env.sh(m, "sync").code(0);
        }
    }
}

/// Bytes that the files in a directory occupy.
fn allocated(directory: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(directory).unwrap().flatten();
    entries
        .filter_map(|entry| Some((entry.path(), std::fs::symlink_metadata(entry.path()).ok()?)))
        .map(|(path, meta)| {
            if meta.is_dir() {
                allocated(&path)
            } else {
                meta.blocks() * 512
            }
        })
        .sum()
}

fn machines_are_individuals() {
    let (env, first) = debian();
    create(env, "deb2", "debian");
    let of = |m: &str| {
        env.sh(
            m,
            "cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id; hostname; head -c 8 /dev/urandom | od -An -tx1",
        )
        .code(0)
        .out()
    };
    // The host key, as it is pinned; ssh refuses any other (see the tests of ssh).
    let key = |m: &str| {
        let known = std::fs::read_to_string(env.state().join("ssh/known_hosts")).unwrap();
        let pin = known
            .lines()
            .find(|l| l.split([' ', ',']).any(|w| w == format!("{m}.vm")));
        pin.unwrap_or_else(|| panic!("no pin of {m} in {known}"))
            .rsplit(' ')
            .next()
            .map(str::to_owned)
    };
    let (one, two) = (of(first), of("deb2"));
    assert_eq!(one.lines().count(), 4, "{one}");
    for (a, b) in one.lines().zip(two.lines()) {
        assert_ne!(a, b, "two machines share {a:?}");
    }
    let pinned = key("deb2");
    assert_ne!(key(first), pinned, "two machines share a host key");
    // The machine id stays over a restart, the boot id does not.
    env.banger(["vm", "restart", "deb2"]).deadline(180).ok();
    let again = of("deb2");
    assert_eq!(again.lines().next(), two.lines().next(), "the machine id changed");
    assert_ne!(again.lines().nth(1), two.lines().nth(1), "the boot id stayed");
    assert_eq!(key("deb2"), pinned, "the host key changed");
    env.ok("vm delete deb2");
}

fn the_main_job_on_the_default_image() {
    let env = TestEnv::new("default");
    // Nothing is configured: sizes come from the host, the image is Debian.
    env.config("");
    let repository = Repository::typical(env.work().join("repo"));
    let done = env
        .banger([
            "vm",
            "run",
            "--rm",
            "./repo",
            "--",
            "sh",
            "-c",
            "git log -1 --format=%H; git status --porcelain; cat /etc/debian_version; systemctl is-system-running",
        ])
        .deadline(180)
        .run()
        .code(0);
    let out = done.out();
    let mut lines = out.lines();
    assert_eq!(lines.next(), Some(repository.head().as_str()));
    assert!(lines.next().is_some_and(|l| l.starts_with("12.")), "{out}");
    assert!(done.err().contains("spec:"), "{}", done.err());
    assert!(env.machine_names().is_empty());
    env.close();
}

fn git_in_the_guest_agrees_with_the_host() {
    let env = shared();
    let repository = Repository::typical(env.work().join("agree"));
    repository.write("README", "changed\n");
    repository.write("new", "staged\n");
    repository.git(&["add", "new"]);
    std::fs::remove_file(repository.path().join("run.sh")).unwrap();
    std::fs::remove_file(repository.path().join("link")).unwrap();
    std::os::unix::fs::symlink("elsewhere", repository.path().join("link")).unwrap();
    repository.make_executable("src/deep/main.c");
    let done = env
        .banger([
            "vm",
            "run",
            "--rm",
            "--wait",
            "agent",
            "debian",
            "./agree",
            "--",
            "sh",
            "-c",
            "git status --porcelain; git diff HEAD | sha256sum; git log -1 --format=%s",
        ])
        .deadline(180)
        .run()
        .code(0);
    let diff = repository.git(&["diff", "HEAD"]);
    assert_eq!(
        done.out(),
        format!(
            "{}{}  -\nsecond\n",
            repository.status(),
            crate::harness::sha256(diff.as_bytes())
        )
    );
}

fn an_orderly_stop() {
    let env = TestEnv::new("orderly");
    create(&env, "m", "debian");
    // A service that leaves a word when it is stopped in order.
    let unit = "[Service]\\nExecStart=/bin/sleep infinity\\nExecStop=/bin/sh -c \\\"echo stopped >/var/lib/word\\\"\\n";
    env.sh(
        "m",
        &format!("printf \"{unit}\" >/run/systemd/system/word.service; systemctl daemon-reload; systemctl start word"),
    )
    .code(0);
    env.sh("m", "echo fresh >/root/fresh").code(0);
    env.banger(["vm", "stop", "m"]).deadline(120).ok();
    env.banger(["vm", "start", "m"]).deadline(180).ok();
    // B2: what was just written was lost.
    assert_eq!(
        env.sh("m", "cat /var/lib/word /root/fresh").code(0).out(),
        "stopped\nfresh\n"
    );
    // The guest's own reboot ends as a machine that is stopped, or up again; never as a lost one.
    let _ = env.run("vm exec m -- systemctl poweroff");
    env.banger(["vm", "wait", "m", "--state", "stopped"]).deadline(90).ok();
    env.close();
}
