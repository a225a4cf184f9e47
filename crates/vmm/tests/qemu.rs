//! The QEMU driver with a real QEMU.
#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use banger_core::plan::{Disk, DiskFormat, DiskRole};
use banger_vmm::identity::Stat;
use banger_vmm::{Engine, EngineError, EngineExit, Liveness, Still, console_tail, exit_record};
use support::{
    Bed, KILL, dying_kernel, flooding_kernel, impostor, qcow2, qemu, qemu_that_answers_within, speaking_kernel, until,
};

fn status(pid: u32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text
        .lines()
        .find(|l| l.split_once(':').is_some_and(|(k, _)| k == key))
        .unwrap();
    line.split_once(':').unwrap().1.trim().to_owned()
}

/// Fields of `/proc/PID/stat` after the name: state, parent, group, session …
fn stat_fields(pid: u32) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    text.rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn a_machine_from_launch_to_its_end() {
    let Some(qemu) = qemu() else { return };
    let bed = Bed::new(&speaking_kernel("hello\n"));
    let handles = bed.launch(&qemu).await;
    let (id, paths) = (&bed.plan.id, &bed.plan.paths);
    until("the console", || bed.console().contains("hello\n")).await;
    assert_eq!(console_tail(paths, 5), ["hello"]);
    assert_eq!(
        fs::metadata(paths.console_log()).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert_eq!(fs::metadata(&paths.run).unwrap().permissions().mode() & 0o777, 0o700);
    let stat = Stat::read(Path::new("/proc"), handles.pid).unwrap().unwrap();
    assert_eq!(stat.comm, format!("banger-{}", id.short()));
    // Nor has root's engine what root may.
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status(handles.pid, set), "0000000000000000", "{set}");
    }
    let bounded = status(handles.pid, "CapBnd") == "0000000000000000";
    assert!(bounded || !rustix::process::getuid().is_root());
    assert_eq!(status(handles.pid, "NoNewPrivs"), "1");

    // With handles, without them, and with those of an earlier start.
    assert_eq!(
        qemu.find(id, paths, Some(&handles)).await,
        Liveness::Alive(handles.clone())
    );
    assert_eq!(qemu.find(id, paths, None).await, Liveness::Alive(handles.clone()));
    let mut stale = handles.clone();
    stale.start_time += 1;
    assert_eq!(
        qemu.find(id, paths, Some(&stale)).await,
        Liveness::Alive(handles.clone())
    );
    assert!(matches!(
        qemu.signal(&stale, KILL).await,
        Err(EngineError::NotOurs { .. })
    ));
    stale = handles.clone();
    stale.host_boot_id = "00000000-0000-0000-0000-000000000000".to_owned();
    assert_eq!(
        qemu.find(id, paths, Some(&stale)).await,
        Liveness::Alive(handles.clone())
    );
    assert!(matches!(qemu.pause(&stale).await, Err(EngineError::NotOurs { .. })));

    qemu.pause(&handles).await.unwrap();
    qemu.resume(&handles, Still::Paused).await.unwrap();
    drop(qemu.connect_agent(&handles).await.unwrap());
    drop(qemu.connect_agent(&handles).await.unwrap());
    assert_eq!(exit_record(paths), None);

    qemu.signal(&handles, KILL).await.unwrap();
    qemu.wait_exit(&handles).await;
    qemu.wait_exit(&handles).await;
    until("the exit record", || exit_record(paths).is_some()).await;
    let record = exit_record(paths).unwrap();
    assert_eq!(
        EngineExit::from(&record),
        EngineExit {
            code: None,
            signal: Some(9)
        }
    );
    assert!(record.at_ms > 0);
    assert!(matches!(qemu.find(id, paths, Some(&handles)).await, Liveness::Gone(_)));
    assert!(matches!(qemu.find(id, paths, None).await, Liveness::Gone(_)));
    assert!(matches!(
        qemu.signal(&handles, KILL).await,
        Err(EngineError::NotOurs { .. })
    ));
    assert!(qemu.connect_agent(&handles).await.is_err());
    until("the shim to go", || bed.processes().is_empty()).await;

    // Again, over what the killed one left.
    assert!(paths.control_socket().exists());
    let again = bed.launch(&qemu).await;
    assert_ne!((again.pid, again.start_time), (handles.pid, handles.start_time));
    assert_eq!(exit_record(paths), None);
    assert_eq!(qemu.find(id, paths, Some(&handles)).await, Liveness::Alive(again));
}

#[tokio::test]
async fn the_engine_is_detached_and_inherits_nothing() {
    let Some(qemu) = qemu() else { return };
    let bed = Bed::new(&speaking_kernel("x"));
    // A descriptor that anybody could inherit.
    let leak = rustix::io::dup(File::open("/etc/passwd").unwrap()).unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    let handles = bed.launch(&qemu).await;
    let pid = handles.pid;
    let fields = stat_fields(pid);
    let (parent, session) = (fields[1].parse::<u32>().unwrap(), fields[3].parse::<u32>().unwrap());
    assert_eq!(session, pid, "a session of its own");
    assert_ne!(parent, std::process::id());
    assert_eq!(fields[4], "0", "no terminal");
    let shim = stat_fields(parent);
    assert_ne!(shim[3], fields[3], "shim and engine in different sessions");
    assert_ne!(
        shim[1],
        std::process::id().to_string(),
        "the shim is no child of its launcher"
    );
    assert!(
        !fs::read_to_string(format!(
            "/proc/{}/task/{}/children",
            std::process::id(),
            std::process::id()
        ))
        .unwrap_or_default()
        .split_whitespace()
        .any(|child| child == parent.to_string())
    );
    for process in [pid, parent] {
        assert_eq!(fs::read_link(format!("/proc/{process}/cwd")).unwrap(), Path::new("/"));
        assert_eq!(status(process, "Umask"), "0077");
        assert!(fs::read(format!("/proc/{process}/environ")).unwrap().is_empty());
        for fd in fs::read_dir(format!("/proc/{process}/fd")).unwrap() {
            let target = fs::read_link(fd.unwrap().path()).unwrap_or_default();
            assert_ne!(target, Path::new("/etc/passwd"), "process {process}");
        }
    }
    assert_eq!(
        fs::read_link(format!("/proc/{pid}/fd/0")).unwrap(),
        Path::new("/dev/null")
    );
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|l| l.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    assert_eq!(status(pid, "Seccomp"), "2", "QEMU's own sandbox");
    let rss: u64 = status(parent, "VmRSS").trim_end_matches(" kB").parse().unwrap();
    eprintln!("resident memory of the shim: {rss} KiB");
    assert!(rss < 4096, "{rss} KiB");
    drop(leak);
}

#[tokio::test]
async fn the_machine_outlives_its_shim() {
    let Some(qemu) = qemu() else { return };
    let bed = Bed::new(&flooding_kernel());
    let handles = bed.launch(&qemu).await;
    until("the flood", || bed.console().contains("flood\nflood\n")).await;
    let shim = stat_fields(handles.pid)[1].parse::<i32>().unwrap();
    // Even stopped: the death of a relative in one session would hang up a stopped process group.
    qemu.signal(&handles, 19).await.unwrap();
    until("the stop", || stat_fields(handles.pid)[0] == "T").await;
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(shim).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    until("the shim to be gone", || {
        !bed.processes().contains(&shim.cast_unsigned())
    })
    .await;
    assert_eq!(stat_fields(handles.pid)[0], "T");
    qemu.signal(&handles, 18).await.unwrap();
    for _ in 0..3 {
        assert_eq!(
            qemu.find(&bed.plan.id, &bed.plan.paths, None).await,
            Liveness::Alive(handles.clone())
        );
        qemu.pause(&handles).await.unwrap();
        qemu.resume(&handles, Still::Paused).await.unwrap();
    }
    qemu.signal(&handles, KILL).await.unwrap();
    qemu.wait_exit(&handles).await;
    // Nobody saw how.
    assert_eq!(exit_record(&bed.plan.paths), None);
}

#[tokio::test]
async fn a_flood_on_the_console_stays_bounded() {
    let Some(qemu) = qemu() else { return };
    let bed = Bed::new(&flooding_kernel());
    let handles = bed.launch(&qemu).await;
    let old = banger_vmm::records::old_console_log(&bed.plan.paths);
    until("the log to be full once", || old.exists()).await;
    assert!(fs::metadata(&old).unwrap().len() <= 1 << 20);
    assert!(fs::metadata(bed.plan.paths.console_log()).is_ok_and(|m| m.len() <= 1 << 20));
    assert_eq!(console_tail(&bed.plan.paths, 40).len(), 40);
    // Both logs, and the space of the exit record.
    assert_eq!(fs::read_dir(&bed.plan.paths.state).unwrap().count(), 3);
    qemu.signal(&handles, KILL).await.unwrap();
}

#[tokio::test]
async fn two_machines_and_two_daemons_do_not_meet() {
    let Some(qemu) = qemu() else { return };
    let (a, mut b) = (Bed::new(&speaking_kernel("a")), Bed::new(&speaking_kernel("b")));
    // The same id below another daemon's directory.
    b.plan.id = a.plan.id.clone();
    let handles = a.launch(&qemu).await;
    assert!(matches!(
        qemu.find(&b.plan.id, &b.plan.paths, None).await,
        Liveness::Gone(_)
    ));
    let other = b.launch(&qemu).await;
    assert_eq!(
        qemu.find(&a.plan.id, &a.plan.paths, None).await,
        Liveness::Alive(handles.clone())
    );
    assert_eq!(
        qemu.find(&b.plan.id, &b.plan.paths, None).await,
        Liveness::Alive(other.clone())
    );
    // Handles that name one machine's process and the other's socket fit nothing.
    let mut mixed = handles.clone();
    mixed.control = other.control;
    assert!(matches!(
        qemu.signal(&mixed, KILL).await,
        Err(EngineError::NotOurs { .. })
    ));
    // A machine that runs is not started again, and not harmed by the attempt.
    let error = qemu.launch(&a.plan).await.unwrap_err();
    assert!(
        matches!(&error, EngineError::Unsupported { what, .. } if what.contains("runs already")),
        "{error}"
    );
    assert_eq!(
        qemu.find(&a.plan.id, &a.plan.paths, None).await,
        Liveness::Alive(handles)
    );
}

#[tokio::test]
async fn one_that_does_not_answer_is_unclear_until_it_does() {
    let Some(qemu) = qemu_that_answers_within(Duration::from_millis(300)) else {
        return;
    };
    let bed = Bed::new(&speaking_kernel("x"));
    let handles = bed.launch(&qemu).await;
    let (id, paths) = (&bed.plan.id, &bed.plan.paths);
    qemu.signal(&handles, 19).await.unwrap();
    for kept in [Some(&handles), None] {
        let found = qemu.find(id, paths, kept).await;
        assert!(
            matches!(&found, Liveness::Silent { handles: found, why } if *found == handles && why.contains("in time")),
            "{found:?}"
        );
    }
    assert!(matches!(qemu.pause(&handles).await, Err(EngineError::Timeout { .. })));
    qemu.signal(&handles, 18).await.unwrap();
    until_alive(&qemu, &bed).await;
}

async fn until_alive(qemu: &banger_vmm::qemu::Qemu, bed: &Bed) {
    for _ in 0..20 {
        if matches!(qemu.find(&bed.plan.id, &bed.plan.paths, None).await, Liveness::Alive(_)) {
            return;
        }
    }
    panic!("the machine did not come back");
}

/// What a failed launch said; nothing may be left of it.
async fn fails(qemu: &banger_vmm::qemu::Qemu, bed: &Bed) -> EngineError {
    let started = std::time::Instant::now();
    let error = qemu.launch(&bed.plan).await.map(|h| panic!("{h:?}")).unwrap_err();
    eprintln!("{:.3} s: {error:?}", started.elapsed().as_secs_f32());
    bed.assert_nothing_left().await;
    error
}

fn last_words(error: &EngineError) -> String {
    match error {
        EngineError::Died { last_words, .. } => last_words.join("\n"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_failed_launch_quotes_the_engine_and_leaves_nothing() {
    let Some(qemu) = qemu() else { return };
    let mut bed = Bed::new(&speaking_kernel("x"));
    bed.plan.kernel = bed.dir.path().join("missing");
    let error = fails(&qemu, &bed).await;
    assert!(last_words(&error).contains("missing"), "{error:?}");
    assert!(
        matches!(&error, EngineError::Died { how, .. } if how == "exit status 1"),
        "{error:?}"
    );

    let bed = Bed::new(b"no kernel at all");
    fails(&qemu, &bed).await;

    let raw = |path: &Path| Disk {
        serial: DiskRole::Work,
        path: path.to_owned(),
        format: DiskFormat::Raw,
        layers: Vec::new(),
        base: None,
    };
    let bed = Bed::new(&speaking_kernel("x"));
    let gone = bed.dir.path().join("gone.ext4");
    let bed = bed.with_disk(raw(&gone));
    assert!(last_words(&fails(&qemu, &bed).await).contains("gone.ext4"));

    // A disk that another machine writes.
    let disk = bed.dir.path().join("work.ext4");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let (first, second) = (
        Bed::new(&speaking_kernel("x")).with_disk(raw(&disk)),
        Bed::new(&speaking_kernel("x")).with_disk(raw(&disk)),
    );
    first.launch(&qemu).await;
    let error = fails(&qemu, &second).await;
    assert!(last_words(&error).contains("lock"), "{error:?}");
}

#[tokio::test]
async fn a_copy_on_write_disk_needs_its_image() {
    let Some(qemu) = qemu() else { return };
    let bed = Bed::new(&speaking_kernel("up\n"));
    let (image, disk) = (bed.dir.path().join("image.ext4"), bed.dir.path().join("root.qcow2"));
    fs::write(&disk, qcow2(&image, 1 << 20)).unwrap();
    let bed = bed.with_disk(Disk {
        serial: DiskRole::Root,
        path: disk.clone(),
        format: DiskFormat::Qcow2,
        layers: Vec::new(),
        base: Some(image.clone()),
    });
    assert!(last_words(&fails(&qemu, &bed).await).contains("image.ext4"));
    // An image that pretends to be a qcow2 file over a file of the host is read as the bytes it is.
    let mut evil = qcow2(Path::new("/etc/passwd"), 1 << 20);
    evil.resize(1 << 20, 0);
    fs::write(&image, &evil).unwrap();
    let handles = bed.launch(&qemu).await;
    until("the guest", || bed.console().contains("up\n")).await;
    for fd in fs::read_dir(format!("/proc/{}/fd", handles.pid)).unwrap() {
        assert_ne!(
            fs::read_link(fd.unwrap().path()).unwrap_or_default(),
            Path::new("/etc/passwd")
        );
    }
    qemu.signal(&handles, KILL).await.unwrap();
    qemu.wait_exit(&handles).await;
    assert_eq!(fs::read(&image).unwrap(), evil);
    fs::write(&disk, b"garbage").unwrap();
    let _ = fs::remove_file(bed.plan.paths.control_socket());
    let _ = fs::remove_file(bed.plan.paths.agent_socket());
    assert!(last_words(&fails(&qemu, &bed).await).contains("qcow2"));
}

#[tokio::test]
async fn a_guest_that_resets_at_once_ends_with_a_record() {
    let Some(qemu) = qemu() else { return };
    let bed = Bed::new(&dying_kernel("last words of the guest\n"));
    // Whether the control socket answers before is a race, and either outcome is right.
    match qemu.launch(&bed.plan).await {
        Ok(handles) => qemu.wait_exit(&handles).await,
        Err(error) => assert!(last_words(&error).contains("last words of the guest"), "{error:?}"),
    }
    until("the exit record", || exit_record(&bed.plan.paths).is_some()).await;
    assert_eq!(exit_record(&bed.plan.paths).unwrap().code, Some(0));
    assert_eq!(console_tail(&bed.plan.paths, 3), ["last words of the guest"]);
}

#[tokio::test]
async fn an_engine_that_never_answers_is_ended_at_the_deadline() {
    if qemu().is_none() {
        return;
    }
    let bed = Bed::new(&speaking_kernel("x"));
    let limit = Duration::from_millis(500);
    let silent = impostor(bed.dir.path(), "while :; do sleep 0.1; done", limit);
    let error = fails(&silent, &bed).await;
    assert!(
        matches!(&error, EngineError::Timeout { after, .. } if *after == limit),
        "{error:?}"
    );

    let chatty = impostor(bed.dir.path(), "echo to the console; echo oh no >&2; exit 7", limit);
    let error = fails(&chatty, &bed).await;
    assert_eq!(last_words(&error), "oh no\nto the console");
    assert!(matches!(&error, EngineError::Died { how, .. } if how == "exit status 7"));

    let suicidal = impostor(bed.dir.path(), "kill -6 $$", limit);
    assert!(matches!(fails(&suicidal, &bed).await, EngineError::Died { how, .. } if how == "signal 6"));
}

#[tokio::test]
async fn a_caller_who_goes_away_leaves_nothing() {
    if qemu().is_none() {
        return;
    }
    let bed = Bed::new(&speaking_kernel("x"));
    let silent = impostor(bed.dir.path(), "while :; do sleep 0.1; done", Duration::from_secs(60));
    for delay in [0, 1, 5, 20, 200] {
        let gone = tokio::time::timeout(Duration::from_millis(delay), silent.launch(&bed.plan)).await;
        assert!(gone.is_err());
        bed.assert_nothing_left_soon().await;
    }
}

impl Bed {
    /// The start may still be on its way when its caller is gone.
    async fn assert_nothing_left_soon(&self) {
        for _ in 0..20 {
            until("all processes of the machine to be gone", || {
                self.processes().is_empty()
            })
            .await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn what_is_no_shim_is_an_error() {
    let Some(real) = qemu() else { return };
    let bed = Bed::new(&speaking_kernel("x"));
    let with = |shim: &str| {
        let mut options = banger_vmm::qemu::Options::new(shim);
        options.binary = Some(real.binary().to_owned());
        banger_vmm::qemu::Qemu::detect(options).unwrap()
    };
    for shim in ["/nonexistent/banger-shim", "/bin/true", "/bin/false", "/bin/echo"] {
        assert!(
            matches!(fails(&with(shim), &bed).await, EngineError::Io { .. }),
            "{shim}"
        );
    }
    // A console log that cannot be written.
    fs::remove_dir_all(&bed.plan.paths.state).unwrap();
    let error = fails(&real, &bed).await;
    assert!(
        matches!(&error, EngineError::Io { source, .. } if source.to_string().contains("console.log")),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_run_directory_that_others_can_read_is_refused() {
    let Some(qemu) = qemu() else { return };
    let bed = Bed::new(&speaking_kernel("x"));
    fs::create_dir(&bed.plan.paths.run).unwrap();
    fs::set_permissions(&bed.plan.paths.run, fs::Permissions::from_mode(0o755)).unwrap();
    let error = fails(&qemu, &bed).await;
    assert!(
        matches!(&error, EngineError::Unsupported { what, .. } if what.contains("0700")),
        "{error:?}"
    );
}

#[test]
fn the_shim_refuses_what_is_no_job() {
    if qemu().is_none() {
        return;
    }
    for job in ["", "{}", "[1", &"x".repeat(1 << 16)] {
        let mut child = std::process::Command::new(support::shim())
            .arg("monitor")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let _ = child.stdin.take().unwrap().write_all(job.as_bytes());
        let mut said = String::new();
        child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(127));
        assert!(
            said.starts_with(r#"{"failed":{"message":"cannot understand the job"#),
            "{said}"
        );
    }
}
