//! A real Firecracker, where `BANGER_TEST_FIRECRACKER`, `BANGER_TEST_KERNEL`, `BANGER_TEST_INITRD` and `BANGER_TEST_ROOT` name files
//! and there is a KVM that runs guests: outside of a jail, with the real agent in the guest.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use banger_core::host::Accel;
use banger_core::plan::{Board, DiskRole, Saved, cmdline};
use banger_proto::hello::{Greeting, GreetingKind, Scanner};
use banger_vmm::firecracker::Firecracker;
use banger_vmm::{AfterSave, Engine, EngineError, Handles, Liveness, SavePlan, Steps, Still, VcpuState, exit_record};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::bed::{Bed, KILL, driver, raw, saved, skip, tests, until};

tests!(a_real_machine_from_boot_to_end);

fn file(name: &str) -> PathBuf {
    let Some(path) = std::env::var_os(name) else {
        skip(&format!("{name} names no file"));
    };
    path.into()
}

/// How long something took.
struct Clock(Instant);

impl Clock {
    fn lap(&mut self, what: &str) {
        eprintln!("{:>8.3} s  {what}", self.0.elapsed().as_secs_f64());
        self.0 = Instant::now();
    }
}

/// Calls the agent until it answers.
async fn agent_answers(driver: &Firecracker, bed: &Bed, handles: &Handles, limit: Duration) {
    let end = Instant::now() + limit;
    let mut silent = 0;
    loop {
        match driver.connect_agent(handles).await {
            Ok(mut stream) => {
                let call = Greeting::new(GreetingKind::Call, *b"0123456789abcdef").encode();
                stream.write_all(&call).await.unwrap();
                let mut scanner = Scanner::new();
                let answer = async {
                    loop {
                        if let Some(greeting) = scanner.push(stream.read_u8().await.unwrap()) {
                            return greeting;
                        }
                    }
                };
                let answer = tokio::time::timeout(Duration::from_secs(30), answer).await.unwrap();
                assert_eq!(
                    (answer.kind, &answer.nonce),
                    (GreetingKind::Answer, b"0123456789abcdef")
                );
                eprintln!("            (answered after {silent} calls that nobody took)");
                return;
            }
            Err(EngineError::Silent { .. } | EngineError::Timeout { .. }) => silent += 1,
            Err(e) => panic!("{e:?}"),
        }
        assert!(
            Instant::now() < end,
            "the agent did not answer within {limit:?}:\n{}",
            bed.console()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn describe(saved: &Saved) -> String {
    let memory = fs::metadata(&saved.memory).unwrap();
    format!(
        "memory {} MiB, {} MiB on disk; state {} bytes",
        memory.len() >> 20,
        (memory.blocks() * 512) >> 20,
        fs::metadata(&saved.state).unwrap().len()
    )
}

fn disks(bed: &mut Bed, root: &Path) {
    let path = bed.plan.paths.disks().join("root.raw");
    let copied = std::process::Command::new("cp")
        .arg("--sparse=always")
        .args([root, &path])
        .status();
    assert!(copied.unwrap().success());
    let writable = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o600);
    fs::set_permissions(&path, writable).unwrap();
    let work = bed.plan.paths.disks().join("work.raw");
    fs::File::create(&work).unwrap().set_len(64 << 20).unwrap();
    let made = std::process::Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(&work)
        .status();
    assert!(made.unwrap().success());
    bed.plan.disks = vec![raw(DiskRole::Root, path), raw(DiskRole::Work, work)];
}

async fn a_real_machine_from_boot_to_end() {
    let (binary, kernel) = (file("BANGER_TEST_FIRECRACKER"), file("BANGER_TEST_KERNEL"));
    let (initrd, root) = (file("BANGER_TEST_INITRD"), file("BANGER_TEST_ROOT"));
    if !Path::new("/dev/kvm").exists() {
        skip("there is no /dev/kvm");
    }
    let driver = driver(&binary, |options| {
        options.launch_timeout = Duration::from_secs(120);
        options.answer_timeout = Duration::from_secs(6);
    });
    eprintln!("firecracker {} ({:?})", driver.capabilities().version, driver.warning());
    let mut bed = Bed::new();
    bed.plan.memory_mib = 512;
    (bed.plan.kernel, bed.plan.initrd) = (kernel, initrd);
    bed.plan.cmdline = cmdline(Board::Firecracker, Accel::Kvm, None);
    disks(&mut bed, &root);
    let (id, paths) = (&bed.plan.id, &bed.plan.paths);

    let mut clock = Clock(Instant::now());
    let handles = bed.launch(&driver).await;
    clock.lap("launched");
    assert_eq!(driver.vcpu_state(&handles).await.unwrap(), VcpuState::Running);
    agent_answers(&driver, &bed, &handles, Duration::from_secs(180)).await;
    clock.lap("booted: the agent answers");
    eprintln!("{}", bed.console());

    for kept in [Some(&handles), None] {
        let found = driver.find(id, paths, kept).await;
        assert_eq!(found, Liveness::Alive(handles.clone()));
    }
    clock.lap("found twice");
    let metrics = driver.metrics(&handles, paths).await.unwrap().unwrap();
    eprintln!("metrics of {} groups", metrics.as_object().unwrap().len());
    assert!(metrics.get("block").is_some(), "{metrics}");
    let files = driver.writes_to(&handles).await.unwrap();
    assert_eq!(files, [bed.plan.disks[0].path.clone(), bed.plan.disks[1].path.clone()]);
    clock.lap("metrics and disks");

    let first = saved(bed.dir.path(), "first");
    let plan = |saved: &Saved, base: Option<&Saved>, then| SavePlan {
        memory: Some(saved.clone()),
        base: base.map(|b| b.memory.clone()),
        layers: Vec::new(),
        then,
    };
    let report = driver
        .save(&handles, &plan(&first, None, AfterSave::AsBefore), Steps::none())
        .await
        .unwrap();
    clock.lap(&format!("saved, paused for {:?}: {}", report.paused, describe(&first)));
    assert_eq!(driver.vcpu_state(&handles).await.unwrap(), VcpuState::Running);
    agent_answers(&driver, &bed, &handles, Duration::from_secs(60)).await;
    clock.lap("goes on after it was saved");

    // Another machine goes on with it, beside it.
    let mut copy = Bed::of(&first);
    let root = bed.plan.disks[0].path.clone();
    disks(&mut copy, &root);
    clock.lap("disks copied");
    let second = copy.launch(&driver).await;
    clock.lap("launched from what was saved");
    assert_eq!(driver.vcpu_state(&second).await.unwrap(), VcpuState::Paused);
    driver.resume(&second, Still::Loaded).await.unwrap();
    agent_answers(&driver, &copy, &second, Duration::from_secs(60)).await;
    clock.lap("a copy: the agent answers");
    agent_answers(&driver, &bed, &handles, Duration::from_secs(60)).await;

    // And is saved itself.
    let wrong = saved(copy.dir.path(), "wrong");
    let error = driver
        .save(&second, &plan(&wrong, None, AfterSave::AsBefore), Steps::none())
        .await
        .unwrap_err();
    eprintln!("{error}: {:?}", std::error::Error::source(&error));
    let again = saved(copy.dir.path(), "again");
    let report = driver
        .save(&second, &plan(&again, Some(&first), AfterSave::Stopped), Steps::none())
        .await
        .unwrap();
    clock.lap(&format!(
        "a copy saved, paused for {:?}: {}",
        report.paused,
        describe(&again)
    ));
    assert_eq!(driver.vcpu_state(&second).await.unwrap(), VcpuState::Paused);
    driver.signal(&second, KILL).await.unwrap();
    driver.wait_exit(&second).await;
    until("the exit record", || exit_record(&copy.plan.paths).is_some()).await;
    assert_eq!(exit_record(&copy.plan.paths).unwrap().signal, Some(9));
    clock.lap("ended");

    // The same machine, again.
    copy.plan.resume = Some(again);
    let third = copy.launch(&driver).await;
    driver.resume(&third, Still::Loaded).await.unwrap();
    agent_answers(&driver, &copy, &third, Duration::from_secs(60)).await;
    clock.lap("woken: the agent answers");
    // Paused and let go on, without a save.
    driver.pause(&third).await.unwrap();
    assert_eq!(driver.vcpu_state(&third).await.unwrap(), VcpuState::Paused);
    assert!(driver.connect_agent(&third).await.is_err());
    driver.resume(&third, Still::Paused).await.unwrap();
    assert_eq!(driver.vcpu_state(&third).await.unwrap(), VcpuState::Running);
    agent_answers(&driver, &copy, &third, Duration::from_secs(60)).await;
    clock.lap("paused, called in vain, and let go on");
    driver.press_ctrl_alt_del(&third).await.unwrap();
    for (bed, handles) in [(&copy, &third), (&bed, &handles)] {
        let _ = driver.signal(handles, KILL).await;
        driver.wait_exit(handles).await;
        let gone = driver.find(&bed.plan.id, &bed.plan.paths, Some(handles)).await;
        assert!(matches!(gone, Liveness::Gone(_)), "{gone:?}");
    }
    clock.lap("all ended");
    eprintln!("{}", copy.console());
}
