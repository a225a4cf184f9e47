//! Several users and daemons on one host, and a guest that is not to be trusted.

use banger_testkit::TestEnv;

use crate::harness::{MACHINES, slim, tests};

tests! { MACHINES;
    two_daemons_side_by_side,
    two_daemons_of_one_state,
    the_engine_is_on_its_own,
    images_are_never_written,
    builds_of_one_name_are_one,
}

fn two_daemons_side_by_side() {
    let (one, two) = (TestEnv::new("side-a"), TestEnv::new("side-b"));
    for env in [&one, &two] {
        env.ok("vm create --name same --no-start");
    }
    one.ok("vm start same");
    assert_ne!(one.machine("same")["id"], two.machine("same")["id"]);
    assert_eq!(two.machine_state("same"), "stopped");
    let boot = one.boot_id("same");
    two.ok("vm prune --force");
    assert!(two.machine_names().is_empty());
    two.kill_daemon();
    two.ok("vm list");
    assert_eq!(one.boot_id("same"), boot);
    two.close();
    assert_eq!(one.boot_id("same"), boot);
    one.close();
}

fn two_daemons_of_one_state() {
    let env = TestEnv::bare("one-state");
    env.ok("vm list");
    // Another runtime directory, the same state: the second daemon must not touch it.
    let other = format!("/tmp/bt{}-other", std::process::id());
    std::fs::create_dir_all(&other).unwrap();
    let done = env.banger(["vm", "list"]).env("XDG_RUNTIME_DIR", &other).run();
    std::fs::remove_dir_all(&other).unwrap();
    done.fails().says(&["state"]);
    assert_eq!(env.processes().iter().filter(|p| p.name == "bangerd").count(), 1);
    env.close();
}

fn the_engine_is_on_its_own() {
    let (env, m) = slim();
    let engine = env.engine(m);
    let daemon = env.daemon().unwrap();
    let stat = |pid: i32, field: usize| -> i32 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .nth(field - 3)
            .unwrap()
            .parse()
            .unwrap()
    };
    // A session and process group apart from the daemon's, so that no signal to either reaches both.
    assert_ne!(stat(engine.pid, 6), stat(daemon.pid, 6));
    assert_ne!(stat(engine.pid, 5), stat(daemon.pid, 5));
    // Its sandbox is on.
    assert!(engine.command.contains("-sandbox on"), "{}", engine.command);
    let status = std::fs::read_to_string(format!("/proc/{}/status", engine.pid)).unwrap();
    assert!(
        status
            .lines()
            .any(|l| l.starts_with("Seccomp:") && l.trim().ends_with('2')),
        "{status}"
    );
    // It inherits neither the daemon's files nor anybody's environment.
    let environment = std::fs::read(format!("/proc/{}/environ", engine.pid)).unwrap();
    assert!(!String::from_utf8_lossy(&environment).contains("GIT_CONFIG_NOSYSTEM"));
    for entry in std::fs::read_dir(format!("/proc/{}/fd", engine.pid)).unwrap().flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        let target = target.to_string_lossy();
        for foreign in ["banger.db", "daemon.log", "bangerd.lock"] {
            assert!(!target.contains(foreign), "the engine holds {target}");
        }
    }
}

fn images_are_never_written() {
    let (env, m) = slim();
    env.sh(m, "echo x >/opt/written-by-a-machine; sync").code(0);
    let engine = env.engine(m);
    let mut seen = 0;
    for entry in std::fs::read_dir(format!("/proc/{}/fd", engine.pid)).unwrap().flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        if target.to_string_lossy().contains("/images/") {
            let info = std::fs::read_to_string(format!(
                "/proc/{}/fdinfo/{}",
                engine.pid,
                entry.file_name().to_string_lossy()
            ))
            .unwrap();
            let flags = info
                .lines()
                .find_map(|l| l.strip_prefix("flags:"))
                .unwrap()
                .trim()
                .to_owned();
            let flags = u32::from_str_radix(&flags, 8).unwrap();
            assert_eq!(flags & 3, 0, "the image {} is open for writing", target.display());
            seen += 1;
        }
    }
    assert!(seen > 0, "the engine has no image open");
}

// B14: requests for the same thing at once did the work twice and tore each other's result.
fn builds_of_one_name_are_one() {
    let env = TestEnv::new("one-flight");
    let before = env.json("image show debian-slim")["digest"].clone();
    let builds: Vec<_> = (0..3)
        .map(|_| env.banger(["image", "build", "debian-slim"]).deadline(300).spawn())
        .collect();
    for build in builds {
        build.wait().code(0);
    }
    let imports: Vec<_> = (0..3)
        .map(|_| env.banger(["kernel", "import"]).deadline(300).spawn())
        .collect();
    for import in imports {
        import.wait().code(0);
    }
    assert_eq!(
        env.json("image show debian-slim")["digest"],
        before,
        "an image that was there was built again"
    );
    env.close();
}
