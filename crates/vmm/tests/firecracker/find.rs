//! Finding an engine again, one test per case, over a `/proc` of the test's own.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use banger_core::id::MachineId;
use banger_core::plan::MachinePaths;
use banger_vmm::firecracker::Firecracker;
use banger_vmm::firecracker::find::{NotFound, Seek, seek};
use banger_vmm::host::Roots;
use banger_vmm::{Engine, Handles, Liveness};

use crate::bed::{driver, tests};
use crate::fake;

tests!(
    happy_path,
    missing_pidfile,
    empty_pidfile,
    garbage_in_pidfile,
    whitespace_around_the_number,
    dead_pid,
    ended_but_not_waited_for,
    wrong_comm,
    start_time_changed,
    recycled_pid_with_the_command_line_of_another_machine,
    recycled_pid_in_the_control_group_of_another_machine,
    recycled_pid_whose_api_answers_another_id,
    api_socket_is_no_symlink,
    api_socket_is_not_there,
    api_socket_leads_elsewhere,
    link_and_pidfile_are_lost,
    several_bear_the_id,
    direct_launch_by_command_line,
    two_of_them,
    no_proc,
    the_api_must_answer_with_this_machine,
);

const ID: &str = "0123456789abcdef";
const OTHER: &str = "fedcba9876543210";
const PID: u32 = 4242;
const START: u64 = 777;
const BOOT: &str = "6b4db22b-3ca2-4fa1-af1d-b71352e1e73c";

/// A host with a machine in a jail.
struct Host {
    dir: tempfile::TempDir,
    paths: MachinePaths,
    proc: PathBuf,
    chroot: PathBuf,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths = MachinePaths {
            state: dir.path().join("state"),
            run: dir.path().join("m").join(ID),
        };
        let (proc, chroot) = (
            dir.path().join("proc"),
            dir.path().join("jail/firecracker").join(ID).join("root"),
        );
        for dir in [
            &paths.state,
            &paths.run,
            &chroot,
            &proc.join("self"),
            &proc.join("sys/kernel/random"),
        ] {
            fs::create_dir_all(dir).unwrap();
        }
        fs::write(proc.join("sys/kernel/random/boot_id"), format!("{BOOT}\n")).unwrap();
        symlink(chroot.join("firecracker.socket"), paths.control_socket()).unwrap();
        let host = Self {
            dir,
            paths,
            proc,
            chroot,
        };
        host.process(
            PID,
            "firecracker",
            START,
            &["./firecracker", "--id", ID, "--api-sock", "/firecracker.socket"],
        );
        host.pidfile(&PID.to_string());
        host
    }

    fn process(&self, pid: u32, comm: &str, start: u64, args: &[&str]) {
        self.in_state(pid, comm, 'S', start, args);
    }

    fn in_state(&self, pid: u32, comm: &str, state: char, start: u64, args: &[&str]) {
        let dir = self.proc.join(pid.to_string());
        fs::create_dir_all(&dir).unwrap();
        let stat = format!("{pid} ({comm}) {state} 1 2 3 0 -1 4194560 1 0 0 0 5 6 0 0 20 0 4 0 {start} 1000 200 9\n");
        fs::write(dir.join("stat"), stat).unwrap();
        fs::write(dir.join("comm"), format!("{comm}\n")).unwrap();
        let line: Vec<u8> = args.iter().flat_map(|a| [a.as_bytes(), b"\0"].concat()).collect();
        fs::write(dir.join("cmdline"), line).unwrap();
        fs::write(dir.join("cgroup"), "0::/system.slice/bangerd-root.service\n").unwrap();
    }

    /// The process does not say whose it is, so that link and file alone tell.
    fn unnamed(&self) {
        self.process(PID, "firecracker", START, &["firecracker"]);
    }

    fn pidfile(&self, text: &str) {
        fs::write(self.chroot.join("firecracker.pid"), text).unwrap();
    }

    fn seek(&self, kept: Option<(u32, u64)>) -> Result<(u32, u64), Seek> {
        let id = MachineId::parse(ID).unwrap();
        seek(&self.proc, &id, &self.paths.control_socket(), Some(&self.chroot), kept).map(|s| (s.pid, s.start_time))
    }

    fn not_found(&self) -> NotFound {
        match self.seek(None) {
            Err(Seek::NotFound(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    /// Somebody who answers on the machine's API socket as a machine: this process.
    fn api(&self, id: &str) {
        let listener = UnixListener::bind(self.chroot.join("firecracker.socket")).unwrap();
        let body = format!(r#"{{"app_name":"Firecracker","id":"{id}","state":"Running","vmm_version":"1.16.1"}}"#);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut request = [0; 1024];
                let _ = stream.read(&mut request);
                let head = format!("HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n", body.len());
                let _ = stream.write_all(format!("{head}{body}").as_bytes());
            }
        });
    }

    /// The driver over this `/proc`.
    fn driver(&self) -> Firecracker {
        let dir = self.dir.path().join("bin");
        fs::create_dir(&dir).unwrap();
        driver(&fake::install(&dir), |options| {
            options.roots = Roots {
                proc: self.proc.clone(),
                dev: "/dev".into(),
            };
        })
    }

    async fn find(&self, handles: Option<&Handles>) -> Liveness {
        self.driver()
            .find(&MachineId::parse(ID).unwrap(), &self.paths, handles)
            .await
    }
}

async fn happy_path() {
    let host = Host::new();
    assert_eq!(host.seek(None), Ok((PID, START)));
    assert_eq!(host.seek(Some((PID, START))), Ok((PID, START)));
    // Handles of an earlier process say nothing against it.
    assert_eq!(host.seek(Some((PID - 1, 5))), Ok((PID, START)));
}

async fn missing_pidfile() {
    let host = Host::new();
    host.unnamed();
    fs::remove_file(host.chroot.join("firecracker.pid")).unwrap();
    assert_eq!(
        host.not_found(),
        NotFound::NoPidFile(host.chroot.join("firecracker.pid"))
    );
    fs::remove_dir_all(&host.chroot).unwrap();
    assert!(matches!(host.not_found(), NotFound::NoPidFile(_)));
}

async fn empty_pidfile() {
    let host = Host::new();
    host.unnamed();
    for text in ["", " ", "\n \t\n"] {
        host.pidfile(text);
        assert!(matches!(host.not_found(), NotFound::EmptyPidFile(_)), "{text:?}");
    }
}

async fn garbage_in_pidfile() {
    let host = Host::new();
    host.unnamed();
    for text in [
        "x",
        "0",
        "-1",
        "+4242",
        "42 42",
        "4242x",
        "4294967296",
        "99999999999999999999",
        "\0\0",
        "４２",
    ] {
        host.pidfile(text);
        assert!(matches!(host.not_found(), NotFound::BadPidFile(_)), "{text:?}");
    }
}

async fn whitespace_around_the_number() {
    let host = Host::new();
    for text in ["4242\n", " 4242", "\n\t4242 \r\n"] {
        host.pidfile(text);
        assert_eq!(host.seek(None), Ok((PID, START)), "{text:?}");
    }
}

async fn dead_pid() {
    let host = Host::new();
    fs::remove_dir_all(host.proc.join(PID.to_string())).unwrap();
    assert_eq!(host.not_found(), NotFound::Dead(PID));
    assert!(matches!(host.find(None).await, Liveness::Gone(why) if why.contains("no process 4242")));
}

async fn ended_but_not_waited_for() {
    let host = Host::new();
    host.in_state(PID, "firecracker", 'Z', START, &[]);
    assert_eq!(host.not_found(), NotFound::Dead(PID));
}

async fn wrong_comm() {
    let host = Host::new();
    for comm in ["bash", "firecracker2", "firecracke", "Firecracker", " firecracker", ""] {
        host.process(PID, comm, START, &["x"]);
        let expected = NotFound::OtherProgram {
            pid: PID,
            comm: comm.to_owned(),
        };
        assert_eq!(host.not_found(), expected);
    }
}

async fn start_time_changed() {
    let host = Host::new();
    host.unnamed();
    assert_eq!(host.seek(Some((PID, START + 1))), Err(NotFound::OtherStart(PID).into()));
}

async fn recycled_pid_with_the_command_line_of_another_machine() {
    let host = Host::new();
    for args in [
        ["firecracker", "--id", OTHER],
        ["firecracker", "x", &format!("--id={OTHER}")],
    ] {
        host.process(PID, "firecracker", START, &args);
        assert!(matches!(host.not_found(), NotFound::OtherMachine { pid: PID, why } if why.contains(OTHER)));
    }
}

async fn recycled_pid_in_the_control_group_of_another_machine() {
    let host = Host::new();
    host.process(PID, "firecracker", START, &["firecracker"]);
    for path in [
        format!("0::/banger.slice/banger-machine-{OTHER}.scope\n"),
        format!("12:cpu:/x\n0::/firecracker/{OTHER}\n"),
    ] {
        fs::write(host.proc.join("4242/cgroup"), &path).unwrap();
        assert!(matches!(host.not_found(), NotFound::OtherMachine { .. }), "{path}");
    }
    for path in [
        format!("0::/banger.slice/banger-machine-{ID}.scope\n"),
        "0::/\n".to_owned(),
    ] {
        fs::write(host.proc.join("4242/cgroup"), &path).unwrap();
        assert_eq!(host.seek(None), Ok((PID, START)), "{path}");
    }
}

async fn recycled_pid_whose_api_answers_another_id() {
    let host = Host::new();
    // This process is what answers, so it is what the file names.
    let me = std::process::id();
    host.process(me, "firecracker", START, &["firecracker"]);
    host.pidfile(&me.to_string());
    host.api(OTHER);
    let found = host.find(None).await;
    assert!(
        matches!(&found, Liveness::Gone(why) if why.contains("another machine")),
        "{found:?}"
    );
}

async fn api_socket_is_no_symlink() {
    let host = Host::new();
    host.unnamed();
    let control = host.paths.control_socket();
    fs::remove_file(&control).unwrap();
    let _socket = UnixListener::bind(&control).unwrap();
    assert_eq!(host.not_found(), NotFound::NoLink(control));
}

async fn api_socket_is_not_there() {
    let host = Host::new();
    host.unnamed();
    fs::remove_file(host.paths.control_socket()).unwrap();
    // Where it led is known.
    assert_eq!(host.seek(None), Ok((PID, START)));
    // But not to a driver without jails.
    assert!(matches!(host.find(None).await, Liveness::Gone(_)));
}

/// One loss after the other, and two at once: a process that bears the machine's id is found without link and file.
async fn link_and_pidfile_are_lost() {
    let lose: [fn(&Host); 4] = [
        |host| drop(fs::remove_file(host.paths.control_socket())),
        |host| drop(fs::remove_dir_all(&host.paths.run)),
        |host| host.pidfile("garbage"),
        |host| drop(fs::remove_file(host.chroot.join("firecracker.pid"))),
    ];
    for (one, first) in lose.iter().enumerate() {
        for (two, second) in lose.iter().enumerate() {
            let host = Host::new();
            first(&host);
            second(&host);
            assert_eq!(host.seek(None), Ok((PID, START)), "{one} {two}");
            assert_eq!(
                host.seek(Some((PID, START + 1))),
                Ok((PID, START)),
                "{one} {two}, and handles"
            );
            // What bears another id, or has ended, is not it.
            host.process(PID, "firecracker", START, &["firecracker", "--id", OTHER]);
            assert!(matches!(host.seek(None), Err(Seek::NotFound(_))), "{one} {two}");
        }
    }
}

async fn several_bear_the_id() {
    let host = Host::new();
    fs::remove_file(host.paths.control_socket()).unwrap();
    host.pidfile("garbage");
    // What was started outside of a jail, with a socket of its own, is not meant.
    host.process(
        PID + 1,
        "firecracker",
        9,
        &["firecracker", "--id", ID, "--api-sock", "/x/control.sock"],
    );
    assert_eq!(host.seek(None), Ok((PID, START)));
    host.process(
        PID + 1,
        "firecracker",
        9,
        &["firecracker", "--id", ID, "--api-sock=/firecracker.socket"],
    );
    assert!(matches!(host.seek(None), Err(Seek::Unclear(_))));
}

async fn api_socket_leads_elsewhere() {
    let host = Host::new();
    host.unnamed();
    let control = host.paths.control_socket();
    for target in [
        host.dir
            .path()
            .join("jail/firecracker")
            .join(OTHER)
            .join("root/firecracker.socket"),
        "x".into(),
    ] {
        fs::remove_file(&control).unwrap();
        symlink(&target, &control).unwrap();
        assert!(matches!(host.not_found(), NotFound::OtherJail { .. }), "{target:?}");
    }
}

async fn direct_launch_by_command_line() {
    let host = Host::new();
    host.unnamed();
    let control = host.paths.control_socket();
    fs::remove_file(&control).unwrap();
    let socket = control.to_str().unwrap();
    for args in [
        ["firecracker", "--api-sock", socket, "--id", ID].to_vec(),
        vec![
            "firecracker",
            "--id=0123456789abcdef",
            Box::leak(format!("--api-sock={socket}").into_boxed_str()),
        ],
    ] {
        host.process(77, "firecracker-v1.", 9, &args);
        assert_eq!(host.seek(None), Ok((77, 9)));
    }
    // It wins over what a file in a jail says.
    symlink(host.chroot.join("firecracker.socket"), &control).unwrap();
    assert_eq!(host.seek(None), Ok((77, 9)));
    fs::remove_file(&control).unwrap();
    fs::remove_dir_all(&host.chroot).unwrap();
    // Whoever only mentions it is not it.
    for args in [
        ["curl", "--unix-socket", socket, "--id", ID],
        ["firecracker", "--api-sock", socket, "--id", OTHER],
        ["firecracker", "--api-sock", &format!("{socket}2"), "--id", ID],
    ] {
        host.process(77, "firecracker", 9, &args);
        assert!(matches!(host.not_found(), NotFound::NoPidFile(_)), "{args:?}");
    }
    host.process(77, "bash", 9, &["firecracker", "--api-sock", socket, "--id", ID]);
    assert!(matches!(host.not_found(), NotFound::NoPidFile(_)));
    host.in_state(
        77,
        "firecracker",
        'Z',
        9,
        &["firecracker", "--api-sock", socket, "--id", ID],
    );
    assert!(matches!(host.not_found(), NotFound::NoPidFile(_)));
}

async fn two_of_them() {
    let host = Host::new();
    let control = host.paths.control_socket();
    for pid in [77, 78] {
        host.process(
            pid,
            "firecracker",
            9,
            &["firecracker", "--api-sock", control.to_str().unwrap(), "--id", ID],
        );
    }
    assert!(matches!(host.seek(None), Err(Seek::Unclear(_))));
    assert!(matches!(host.find(None).await, Liveness::Unclear(_)));
}

async fn no_proc() {
    let host = Host::new();
    fs::remove_dir_all(&host.proc).unwrap();
    assert!(matches!(host.seek(None), Err(Seek::Unclear(_))));
    assert!(matches!(host.find(None).await, Liveness::Unclear(_)));
}

async fn the_api_must_answer_with_this_machine() {
    let host = Host::new();
    let me = std::process::id();
    host.process(
        me,
        "firecracker",
        START,
        &["./firecracker", "--id", ID, "--api-sock", "/firecracker.socket"],
    );
    host.pidfile(&format!("{me}\n"));
    // Nobody answers: it is not touched.
    let found = host.find(None).await;
    assert!(
        matches!(&found, Liveness::Silent { handles, .. } if handles.pid == me),
        "{found:?}"
    );
    fs::remove_dir_all(host.dir.path().join("bin")).unwrap();
    host.api(ID);
    let expected = Handles {
        engine: "firecracker".to_owned(),
        pid: me,
        start_time: START,
        host_boot_id: BOOT.to_owned(),
        control: host.paths.control_socket(),
        agent: host.paths.agent_socket(),
    };
    assert_eq!(host.find(None).await, Liveness::Alive(expected.clone()));
    fs::remove_dir_all(host.dir.path().join("bin")).unwrap();
    assert_eq!(host.find(Some(&expected)).await, Liveness::Alive(expected.clone()));
    // Handles of before a restart of the host, and of another process.
    for change in [
        |h: &mut Handles| h.host_boot_id = "x".to_owned(),
        |h: &mut Handles| h.pid = 1,
    ] {
        let mut old = expected.clone();
        change(&mut old);
        fs::remove_dir_all(host.dir.path().join("bin")).unwrap();
        assert_eq!(host.find(Some(&old)).await, Liveness::Alive(expected.clone()));
    }
    fs::remove_dir_all(host.dir.path().join("bin")).unwrap();
    let mut old = expected.clone();
    old.start_time += 1;
    // The process says whose it is, so it is the handles that are wrong.
    assert_eq!(host.find(Some(&old)).await, Liveness::Alive(expected.clone()));
    // What answers is another process than the one that was found.
    fs::remove_dir_all(host.dir.path().join("bin")).unwrap();
    host.process(PID, "firecracker", START, &["./firecracker", "--id", ID]);
    host.pidfile(&PID.to_string());
    let found = host.find(None).await;
    assert!(!matches!(found, Liveness::Alive(_)), "{found:?}");
}
