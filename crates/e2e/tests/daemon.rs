//! The daemon itself: its start, its end, its files.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use banger_testkit::{Running, TestEnv, http, processes};

use crate::harness::{PROGRAMS, tests};

tests! { PROGRAMS;
    ten_clients_start_one_daemon,
    files_are_private,
    a_stale_socket_and_lock,
    a_socket_that_is_somebody_elses,
    errors_of_the_configuration,
    a_corrupt_database,
    status_start_and_stop,
    it_ends_when_idle,
    its_log_is_bounded,
    commands_that_need_none_start_none,
    a_runtime_directory_that_cannot_be_trusted,
    strangers_on_the_socket,
    without_a_runtime_directory,
    it_outlives_its_terminal,
}

fn ten_clients_start_one_daemon() {
    let env = TestEnv::bare("race");
    let clients: Vec<Running> = (0..10).map(|_| env.banger(["vm", "list", "--json"]).spawn()).collect();
    for client in clients {
        assert_eq!(client.wait().code(0).json(), serde_json::json!([]));
    }
    let daemons = env.processes().into_iter().filter(|p| p.name == "bangerd").count();
    assert_eq!(daemons, 1);
    env.close();
}

// B18: sockets were open to everybody for a moment.
fn files_are_private() {
    let env = TestEnv::bare("private");
    env.ok("vm list");
    let mode = |path: &std::path::Path| std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&env.socket()), 0o600);
    // Nobody gets at the socket even before its mode is set.
    assert_eq!(mode(&env.runtime()), 0o700);
    assert_eq!(mode(&env.state()), 0o700);
    for entry in std::fs::read_dir(env.state()).unwrap().flatten() {
        assert_eq!(
            mode(&entry.path()) & 0o077,
            0,
            "{} is open to others",
            entry.path().display()
        );
    }
    let mut todo = vec![env.state().join("ssh")];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            assert_eq!(
                mode(&entry.path()) & 0o077,
                0,
                "{} is open to others",
                entry.path().display()
            );
        }
    }
    env.close();
}

fn a_stale_socket_and_lock() {
    let env = TestEnv::bare("stale");
    env.ok("vm list");
    env.kill_daemon();
    assert!(
        env.socket().exists(),
        "a killed daemon leaves its socket; this test rests on it"
    );
    env.ok("vm list");
    env.kill_daemon();
    // A lock file whose holder is gone, with anything in it.
    for entry in std::fs::read_dir(env.runtime()).unwrap().flatten() {
        if entry.file_name().to_string_lossy().contains("lock") {
            std::fs::write(entry.path(), "999999999\n").unwrap();
        }
    }
    env.ok("vm list");
    env.close();
}

fn a_socket_that_is_somebody_elses() {
    let env = TestEnv::bare("other-socket");
    std::fs::create_dir_all(env.runtime()).unwrap();
    std::fs::set_permissions(env.runtime(), std::fs::Permissions::from_mode(0o700)).unwrap();
    // Something listens there and never says a word.
    let listener = UnixListener::bind(env.socket()).unwrap();
    let begun = Instant::now();
    let done = env.banger(["vm", "list"]).deadline(90).run();
    drop(listener);
    assert_ne!(done.status, 0);
    assert!(begun.elapsed() < Duration::from_secs(80), "no deadline of its own");
    std::fs::remove_file(env.socket()).unwrap();
    // A file that is no socket.
    std::fs::write(env.socket(), "").unwrap();
    env.ok("vm list");
    env.close();
}

fn errors_of_the_configuration() {
    let env = TestEnv::bare("config");
    for (text, line, part) in [
        ("log_level = \"info\"\nlog_levle = 1\n", "line 2", "log_levle"),
        ("[vm_defaults]\nvcpu = 0\n", "line 2", "CPU"),
        ("[vm_defaults]\n\ndisk_size = \"8\"\n", "line 3", "unit"),
        ("this is no toml\n", "line 1", ""),
        ("[daemon]\nidle_exit = \"soon\"\n", "line 2", "soon"),
    ] {
        env.config(text);
        let done = env.run("vm list").fails().says(&["config.toml", line, part]);
        assert_eq!(
            done.err().matches(line).count(),
            1,
            "said more than once: {}",
            done.err()
        );
    }
    assert!(env.processes().is_empty());
    std::fs::remove_file(env.config_file()).unwrap();
    env.ok("vm list");
    env.close();
}

fn a_corrupt_database() {
    let env = TestEnv::bare("database");
    env.ok("vm list");
    env.ok("daemon stop");
    let file = env.state().join("banger.db");
    let good = std::fs::read(&file).unwrap();
    for damage in [
        b"this is no database, by far not, but it is long enough to look at".repeat(100),
        good[..good.len() / 2].to_vec(),
    ] {
        std::fs::write(&file, &damage).unwrap();
        for beside in ["banger.db-wal", "banger.db-shm"] {
            let _ = std::fs::remove_file(env.state().join(beside));
        }
        let done = env.run("vm list").fails().says(&["banger.db", "hint:"]);
        assert!(done.err().lines().count() < 10, "{}", done.err());
        assert!(
            std::fs::read(&file).unwrap() == damage,
            "a damaged database was changed"
        );
        assert!(env.processes().is_empty(), "{:?}", env.processes());
    }
    // B24: `doctor` migrated the database. It looks and changes nothing.
    let before = std::fs::metadata(&file).unwrap();
    let _ = env.run("doctor");
    let after = std::fs::metadata(&file).unwrap();
    assert_eq!(
        (before.mtime(), before.mtime_nsec(), before.size()),
        (after.mtime(), after.mtime_nsec(), after.size())
    );
    std::fs::write(&file, good).unwrap();
    env.ok("vm list");
    env.close();
}

fn status_start_and_stop() {
    let env = TestEnv::bare("status");
    let down = env.run("daemon status");
    assert_ne!(down.status, 0, "a daemon that does not run has a status");
    env.ok("daemon stop");
    env.ok("daemon start");
    env.ok("daemon start");
    let status = env.json("daemon status");
    assert_eq!(status["pid"].as_i64(), env.daemon().map(|p| i64::from(p.pid)));
    assert_eq!(status["state_dir"].as_str(), env.state().to_str());
    assert_eq!(status["socket"].as_str(), env.socket().to_str());
    assert!(status["resident_bytes"].as_u64().is_some_and(|b| b > 1_000_000));
    let log = env.ok("daemon logs").out();
    assert!(!log.is_empty());
    let daemon = env.daemon().unwrap();
    env.ok("daemon stop");
    assert!(!processes::alive(&daemon));
    // Told by a signal, it ends as well.
    env.ok("daemon start");
    let daemon = env.daemon().unwrap();
    processes::signal(&daemon, rustix::process::Signal::TERM);
    processes::until("the daemon to end", Duration::from_secs(10), || {
        !processes::alive(&daemon)
    });
    assert!(!env.socket().exists());
    env.close();
}

fn it_ends_when_idle() {
    let env = TestEnv::bare("idle");
    env.config("[daemon]\nidle_exit = \"1s\"\n");
    env.ok("vm list");
    processes::until("the idle daemon to end", Duration::from_secs(15), || {
        env.daemon().is_none()
    });
    env.ok("vm list");
    env.close();
}

fn its_log_is_bounded() {
    let env = TestEnv::bare("log");
    env.config("log_level = \"debug\"\n");
    env.ok("vm list");
    // Some ten thousand requests, each with a line or more.
    let long = "x".repeat(2000);
    let answers = (0..8000)
        .filter(|_| http::request(&env.socket(), "GET", &format!("/v1/machines/{long}"), None).is_ok())
        .count();
    assert!(answers > 7000, "{answers}");
    let size: u64 = std::fs::read_dir(env.state())
        .unwrap()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with("daemon.log"))
        .map(|e| e.metadata().unwrap().len())
        .sum();
    assert!(size < 24 << 20, "{size} bytes of log");
    for line in env.daemon_log().lines().rev().take(20) {
        assert!(
            serde_json::from_str::<serde_json::Value>(line).is_ok(),
            "no JSON: {line}"
        );
    }
    env.close();
}

fn commands_that_need_none_start_none() {
    let env = TestEnv::bare("none-needed");
    for line in [
        "--version",
        "version",
        "--help",
        "vm --help",
        "vm run --help",
        "completion bash",
        "daemon stop",
        "ssh-config",
    ] {
        env.ok(line);
    }
    assert!(env.processes().is_empty(), "{:?}", env.processes());
    env.close();
}

// B20: a path was trusted by its look, though a link stood in it.
fn a_runtime_directory_that_cannot_be_trusted() {
    let env = TestEnv::bare("untrusted");
    let elsewhere = env.work().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, env.runtime()).unwrap();
    env.run("vm list").fails().says(&["symbolic link"]);
    assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);
    std::fs::remove_file(env.runtime()).unwrap();
    // One that is open to others is closed before anything is put there.
    std::fs::create_dir(env.runtime()).unwrap();
    std::fs::set_permissions(env.runtime(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let done = env.run("vm list");
    assert!(done.status != 0 || std::fs::metadata(env.runtime()).unwrap().mode() & 0o077 == 0);
    env.close();
}

fn strangers_on_the_socket() {
    let env = TestEnv::bare("strangers");
    env.ok("vm list");
    let socket = env.socket();
    // Nonsense, half a request, a huge one: each gets its answer or its end, and the daemon goes on.
    for bytes in [
        b"\0\0\0\0\r\n\r\n".to_vec(),
        b"GET /v1/machines HTTP/9.9\r\n\r\n".to_vec(),
        vec![b'A'; 2 << 20],
    ] {
        let _ = http::raw(&socket, &bytes);
    }
    let huge = serde_json::json!({"name": "x".repeat(1 << 20)});
    let answer = http::request(&socket, "POST", "/v1/machines", Some(&huge)).unwrap();
    assert!((400..500).contains(&answer.status), "{}", answer.status);
    let unknown = http::request(&socket, "POST", "/v1/machines", Some(&serde_json::json!({"nmae": "x"}))).unwrap();
    assert_eq!(unknown.status, 400);
    assert!(
        unknown.json()["error"]["message"]
            .as_str()
            .is_some_and(|m| m.contains("nmae")),
        "{}",
        unknown.json()
    );
    for path in [
        "/",
        "/v1",
        "/v1/nowhere",
        "/v1/machines/../../etc",
        "/v1/machines/%2e%2e",
        "/v1/machines/%00",
    ] {
        let answer = http::request(&socket, "GET", path, None).unwrap();
        assert!((400..500).contains(&answer.status), "{path}: {}", answer.status);
        assert!(answer.json()["error"]["code"].is_string(), "{path}");
    }
    let document = env.api("GET", "/v1/openapi.json", None);
    assert!(document["openapi"].as_str().is_some_and(|v| v.starts_with('3')));
    let curl = env
        .program("curl")
        .args(["--silent", "--fail", "--unix-socket"])
        .arg(&socket)
        .arg("http://banger/v1/daemon")
        .run();
    assert_eq!(
        curl.code(0).json()["pid"].as_i64(),
        env.daemon().map(|p| i64::from(p.pid))
    );
    // Another user is refused by the peer's credentials, even where the mode would let him in.
    if rustix::process::getuid().is_root() {
        for path in [&socket, &env.runtime(), &env.runtime().parent().unwrap().to_owned()] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
        }
        let done = env
            .program("setpriv")
            .args([
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "curl",
                "--silent",
                "--show-error",
                "--unix-socket",
            ])
            .arg(&socket)
            .arg("http://banger/v1/machines")
            .cwd("/")
            .run();
        assert!(
            !done.out().contains("machines"),
            "another user got an answer: {}",
            done.out()
        );
    }
    env.ok("vm list");
    env.close();
}

fn without_a_runtime_directory() {
    let env = TestEnv::bare("no-runtime");
    // A path that leaves no room for the address of a socket.
    let long = format!("/tmp/{}", "x".repeat(100));
    env.banger(["vm", "list"])
        .env("XDG_RUNTIME_DIR", long)
        .run()
        .fails()
        .says(&["too long"]);
    env.banger(["vm", "list"])
        .env("HOME", "")
        .env("XDG_STATE_HOME", "")
        .run()
        .fails()
        .says(&["HOME"]);
    env.close();
}

fn it_outlives_its_terminal() {
    let env = TestEnv::bare("terminal-gone");
    let mut terminal = env.terminal(["vm", "list"]);
    assert_eq!(terminal.wait(), 0);
    drop(terminal);
    let daemon = env.daemon().expect("the daemon runs on");
    let open: Vec<_> = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid))
        .unwrap()
        .flatten()
        .filter_map(|e| std::fs::read_link(e.path()).ok())
        .filter(|p| p.starts_with("/dev/pts"))
        .collect();
    assert!(open.is_empty(), "the daemon holds the terminal: {open:?}");
    env.close();
}
