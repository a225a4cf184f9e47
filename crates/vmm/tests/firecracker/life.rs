//! A machine's life with a Firecracker that does as documented.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use banger_core::plan::{DiskFormat, Saved};
use banger_vmm::firecracker::Firecracker;
use banger_vmm::identity::Stat;
use banger_vmm::{
    AfterSave, Engine, EngineError, Handles, Liveness, SavePlan, Steps, Still, VcpuState, console_tail, exit_record,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::bed::{Bed, KILL, driver, saved, tests, until};
use crate::fake;

tests!(
    from_launch_to_end,
    what_was_saved_goes_on_elsewhere,
    a_save_has_its_steps_in_order,
    a_caller_who_goes_away,
    a_guest_is_reached_after_every_resume,
    disks_alone,
    a_disk_in_one_file,
);

/// What the guest answers.
pub async fn ask(driver: &Firecracker, handles: &Handles, request: &[u8]) -> u8 {
    let mut stream = driver.connect_agent(handles).await.unwrap();
    stream.write_all(request).await.unwrap();
    stream.read_u8().await.unwrap()
}

pub fn plan(saved: &Saved, base: Option<&Saved>) -> SavePlan {
    SavePlan {
        memory: Some(saved.clone()),
        base: base.map(|base| base.memory.clone()),
        layers: Vec::new(),
        then: AfterSave::AsBefore,
    }
}

/// Calls that the engine got.
pub fn calls(bed: &Bed) -> Vec<String> {
    let text = fs::read_to_string(bed.plan.paths.state.join("calls.log")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn of(calls: &[String], call: &str) -> Vec<String> {
    calls.iter().filter(|c| c.starts_with(call)).cloned().collect()
}

async fn from_launch_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let driver = driver(&fake::install(dir.path()), |_| {});
    assert_eq!(
        (driver.capabilities().version.as_str(), driver.warning()),
        ("1.16.1", None)
    );
    let bed = Bed::new();
    let (id, paths) = (&bed.plan.id, &bed.plan.paths);
    let handles = bed.launch(&driver).await;
    assert_eq!(driver.vcpu_state(&handles).await.unwrap(), VcpuState::Running);
    let order: Vec<String> = calls(&bed)
        .iter()
        .map(|c| c.split(" {").next().unwrap().to_owned())
        .collect();
    assert_eq!(
        order[..10],
        [
            "GET / null",
            "PUT /logger",
            "PUT /metrics",
            "PUT /machine-config",
            "PUT /boot-source",
            "PUT /drives/root",
            "PUT /drives/work",
            "PUT /vsock",
            "PUT /entropy",
            "PUT /actions",
        ]
    );
    until("the console", || bed.console().contains("the guest's console")).await;
    assert_eq!(console_tail(paths, 1), ["the guest's console"]);
    let stat = Stat::read(Path::new("/proc"), handles.pid).unwrap().unwrap();
    assert_eq!(stat.comm, "firecracker");
    let cwd = fs::read_link(format!("/proc/{}/cwd", handles.pid)).unwrap();
    assert_eq!(cwd, paths.state);
    assert_eq!(
        fs::metadata(paths.state.join("engine")).unwrap().permissions().mode() & 0o777,
        0o700
    );

    assert_eq!(ask(&driver, &handles, b"e").await, b'e');
    assert_eq!(ask(&driver, &handles, &[b'p', 3, 77]).await, b'P');
    assert_eq!(ask(&driver, &handles, &[b'g', 3]).await, 77);
    let files = driver.writes_to(&handles).await.unwrap();
    assert_eq!(files, [bed.plan.disks[0].path.clone(), bed.plan.disks[1].path.clone()]);
    let metrics = driver.metrics(&handles, paths).await.unwrap().unwrap();
    assert_eq!(metrics["vmm"]["panic_count"], 0);
    driver.metrics(&handles, paths).await.unwrap().unwrap();

    // With handles, without them, and with those of an earlier start.
    let alive = Liveness::Alive(handles.clone());
    assert_eq!(driver.find(id, paths, Some(&handles)).await, alive);
    assert_eq!(driver.find(id, paths, None).await, alive);
    let mut stale = handles.clone();
    stale.host_boot_id = "00000000-0000-0000-0000-000000000000".to_owned();
    assert_eq!(driver.find(id, paths, Some(&stale)).await, alive);
    stale = handles.clone();
    stale.start_time += 1;
    assert!(matches!(
        driver.signal(&stale, KILL).await,
        Err(EngineError::NotOurs { .. })
    ));
    assert!(matches!(driver.pause(&stale).await, Err(EngineError::NotOurs { .. })));

    driver.pause(&handles).await.unwrap();
    assert_eq!(driver.vcpu_state(&handles).await.unwrap(), VcpuState::Paused);
    driver.resume(&handles, Still::Paused).await.unwrap();
    driver.press_ctrl_alt_del(&handles).await.unwrap();
    // A second start of the same machine is refused and harms nobody.
    assert!(matches!(
        driver.launch(&bed.plan).await,
        Err(EngineError::Unsupported { .. })
    ));
    assert_eq!(ask(&driver, &handles, b"x").await, b'x');

    assert_eq!(exit_record(paths), None);
    driver.signal(&handles, KILL).await.unwrap();
    driver.wait_exit(&handles).await;
    driver.wait_exit(&handles).await;
    until("the exit record", || exit_record(paths).is_some()).await;
    assert_eq!(exit_record(paths).unwrap().signal, Some(9));
    assert!(matches!(
        driver.find(id, paths, Some(&handles)).await,
        Liveness::Gone(_)
    ));
    assert!(matches!(driver.find(id, paths, None).await, Liveness::Gone(_)));
    assert!(driver.connect_agent(&handles).await.is_err());
    until("the shim to go", || bed.processes().is_empty()).await;
    // Again, over what the killed one left.
    let again = bed.launch(&driver).await;
    assert_eq!(driver.find(id, paths, Some(&handles)).await, Liveness::Alive(again));
}

async fn what_was_saved_goes_on_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let driver = driver(&fake::install(dir.path()), |_| {});
    let bed = Bed::new();
    let handles = bed.launch(&driver).await;
    ask(&driver, &handles, &[b'p', 1, 11]).await;
    ask(&driver, &handles, &[b'p', 2, 0]).await;
    let first = saved(dir.path(), "first");
    driver.save(&handles, &plan(&first, None), Steps::none()).await.unwrap();
    assert_eq!(driver.vcpu_state(&handles).await.unwrap(), VcpuState::Running);
    let memory = fs::metadata(&first.memory).unwrap();
    assert_eq!((memory.len(), memory.mode() & 0o777), (2 << 20, 0o600));
    assert!(
        memory.blocks() * 512 <= 8192,
        "only what is not zero: {} blocks",
        memory.blocks()
    );
    let swaps = fs::read_to_string("/proc/swaps").unwrap().lines().count() > 1;
    let kind = if swaps { "\"Full\"" } else { "\"Diff\"" };
    assert!(of(&calls(&bed), "PUT /snapshot/create")[0].contains(kind));

    let copy = Bed::of(&first);
    let second = copy.launch(&driver).await;
    assert_eq!(driver.vcpu_state(&second).await.unwrap(), VcpuState::Paused);
    driver.resume(&second, Still::Loaded).await.unwrap();
    assert_eq!(ask(&driver, &second, &[b'g', 1]).await, 11);
    assert_eq!(of(&calls(&copy), "PUT /boot-source"), Vec::<String>::new());
    // What it was told of disks and sockets is its own.
    assert_eq!(driver.writes_to(&second).await.unwrap()[0], copy.plan.disks[0].path);
    ask(&driver, &second, &[b'p', 5, 55]).await;
    assert_eq!(ask(&driver, &handles, &[b'g', 5]).await, 0);

    // A save of the copy is whole, and that of a wrong base is none.
    let wrong = saved(dir.path(), "wrong");
    for base in [None, Some(&wrong)] {
        if base.is_some() {
            fs::write(&wrong.memory, vec![0; 2 << 20]).unwrap();
        }
        let to = saved(dir.path(), if base.is_some() { "to2" } else { "to1" });
        let error = driver.save(&second, &plan(&to, base), Steps::none()).await.unwrap_err();
        assert!(matches!(error, EngineError::Io { .. }), "{error:?}");
        assert!(!to.memory.exists() && !to.state.exists());
        assert_eq!(driver.vcpu_state(&second).await.unwrap(), VcpuState::Running);
    }
    let again = saved(dir.path(), "again");
    driver
        .save(&second, &plan(&again, Some(&first)), Steps::none())
        .await
        .unwrap();
    let third = Bed::of(&again);
    let handles = third.launch(&driver).await;
    driver.resume(&handles, Still::Loaded).await.unwrap();
    assert_eq!(ask(&driver, &handles, &[b'g', 1]).await, 11);
    assert_eq!(ask(&driver, &handles, &[b'g', 5]).await, 55);
}

async fn a_save_has_its_steps_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let driver = driver(&fake::install(dir.path()), |_| {});
    let bed = Bed::new();
    let handles = bed.launch(&driver).await;
    let to = saved(dir.path(), "to");
    // The states in which the caller's steps find the machine, and whether memory is there.
    let look = |driver: Firecracker, handles: Handles, memory: std::path::PathBuf, state, there: bool| {
        Box::pin(async move {
            assert_eq!(driver.vcpu_state(&handles).await?, state);
            assert_eq!(memory.exists(), there);
            Ok(())
        })
    };
    let steps = Steps {
        hold_still: look(
            driver.clone(),
            handles.clone(),
            to.memory.clone(),
            VcpuState::Running,
            false,
        ),
        while_still: look(
            driver.clone(),
            handles.clone(),
            to.memory.clone(),
            VcpuState::Paused,
            true,
        ),
    };
    let mut save = plan(&to, None);
    save.then = AfterSave::Stopped;
    driver.save(&handles, &save, steps).await.unwrap();
    assert_eq!(driver.vcpu_state(&handles).await.unwrap(), VcpuState::Paused);
    // One that is paused already is saved and stays as it is.
    let to = saved(dir.path(), "again");
    driver.save(&handles, &plan(&to, None), Steps::none()).await.unwrap();
    assert_eq!(driver.vcpu_state(&handles).await.unwrap(), VcpuState::Paused);
    driver.resume(&handles, Still::Paused).await.unwrap();

    // A step that fails ends it, and nothing is left of it.
    for late in [false, true] {
        let to = saved(dir.path(), if late { "late" } else { "early" });
        let fail = || Box::pin(std::future::ready(Err(EngineError::Silent { engine: "test" })));
        let mut steps = Steps::none();
        match late {
            false => steps.hold_still = fail(),
            true => steps.while_still = fail(),
        }
        let error = driver.save(&handles, &plan(&to, None), steps).await.unwrap_err();
        assert!(matches!(error, EngineError::Silent { .. }), "{error:?}");
        assert!(!to.memory.exists() && !to.state.exists());
        assert_eq!(driver.vcpu_state(&handles).await.unwrap(), VcpuState::Running);
    }
    // What is there already is not overwritten, and fresh layers are not for it.
    let error = driver
        .save(&handles, &plan(&to, None), Steps::none())
        .await
        .unwrap_err();
    assert!(
        matches!(error, EngineError::Io { .. }) && to.memory.exists(),
        "{error:?}"
    );
    assert_eq!(driver.vcpu_state(&handles).await.unwrap(), VcpuState::Running);
}

async fn a_caller_who_goes_away() {
    let dir = tempfile::tempdir().unwrap();
    let driver = driver(&fake::install(dir.path()), |_| {});
    // While it starts: nothing is left.
    let bed = Bed::new();
    bed.script(fake::Script {
        listens_after: 300,
        ..Default::default()
    });
    let started = tokio::time::timeout(std::time::Duration::from_millis(100), driver.launch(&bed.plan)).await;
    assert!(started.is_err());
    bed.assert_nothing_left().await;
    // While it is saved: it runs on, and no half files are left.
    let bed = Bed::new();
    bed.script(fake::Script::with("PUT /snapshot/create", fake::Fault::Delay(300)));
    let handles = bed.launch(&driver).await;
    for then in [AfterSave::AsBefore, AfterSave::Stopped] {
        let to = saved(dir.path(), &format!("{then:?}"));
        let mut save = plan(&to, None);
        save.then = then;
        let saving = driver.save(&handles, &save, Steps::none());
        assert!(
            tokio::time::timeout(std::time::Duration::from_millis(100), saving)
                .await
                .is_err()
        );
        until("the save to be undone", || !to.memory.exists() && !to.state.exists()).await;
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while driver.vcpu_state(&handles).await.unwrap() != VcpuState::Running {
            assert!(std::time::Instant::now() < end, "the machine is left paused");
        }
        assert!(!to.memory.exists() && !to.state.exists());
    }
}

/// Firecracker 1.16 cuts its guest off when it is resumed without having been saved.
async fn a_guest_is_reached_after_every_resume() {
    let dir = tempfile::tempdir().unwrap();
    let driver = driver(&fake::install(dir.path()), |_| {});
    for (version, resets) in [
        ("1.14.4", 0),
        ("1.15.1", 0),
        ("1.16.0", 1),
        ("1.16.1", 1),
        ("1.17.0", 0),
    ] {
        let bed = Bed::new();
        bed.script(fake::Script {
            version: Some(version.to_owned()),
            ..Default::default()
        });
        let handles = bed.launch(&driver).await;
        let saves = || of(&calls(&bed), "PUT /snapshot/create").len();
        for round in 1..=2 {
            driver.pause(&handles).await.unwrap();
            driver.resume(&handles, Still::Paused).await.unwrap();
            assert_eq!(ask(&driver, &handles, b"a").await, b'a', "{version}");
            assert_eq!(saves(), resets * round, "{version}");
            // One that runs is not resumed again.
            driver.resume(&handles, Still::Paused).await.unwrap();
            assert_eq!(ask(&driver, &handles, b"b").await, b'b', "{version}");
        }
        // Disks alone, a step that fails before anything is saved, and a save that fails in the engine.
        let no_memory = SavePlan {
            memory: None,
            base: None,
            layers: Vec::new(),
            then: AfterSave::AsBefore,
        };
        driver.save(&handles, &no_memory, Steps::none()).await.unwrap();
        assert_eq!(ask(&driver, &handles, b"c").await, b'c', "{version}");
        let mut steps = Steps::none();
        steps.while_still = Box::pin(std::future::ready(Err(EngineError::Silent { engine: "test" })));
        driver.save(&handles, &no_memory, steps).await.unwrap_err();
        assert_eq!(ask(&driver, &handles, b"d").await, b'd', "{version}");
        let to = saved(dir.path(), version);
        driver.save(&handles, &plan(&to, None), Steps::none()).await.unwrap();
        assert_eq!(ask(&driver, &handles, b"e").await, b'e', "{version}");
        // A machine that goes on with it needs no other reset than the saved one.
        let copy = Bed::of(&to);
        copy.script(fake::Script {
            version: Some(version.to_owned()),
            ..Default::default()
        });
        let second = copy.launch(&driver).await;
        driver.resume(&second, Still::Loaded).await.unwrap();
        assert_eq!(ask(&driver, &second, b"f").await, b'f', "{version}");
        assert!(of(&calls(&copy), "PUT /snapshot/create").is_empty());
    }
}

async fn disks_alone() {
    let dir = tempfile::tempdir().unwrap();
    let driver = driver(&fake::install(dir.path()), |_| {});
    let bed = Bed::new();
    let handles = bed.launch(&driver).await;
    let save = SavePlan {
        memory: None,
        base: None,
        layers: Vec::new(),
        then: AfterSave::AsBefore,
    };
    driver.save(&handles, &save, Steps::none()).await.unwrap();
    let calls = calls(&bed);
    // But for the one into nowhere, which resets the guest channel.
    let saves = of(&calls, "PUT /snapshot");
    assert!(
        saves.len() == 1 && saves[0].contains(r#""snapshot_path":"""#),
        "{saves:?}"
    );
    assert_eq!(of(&calls, "PATCH /vm").len(), 2);
}

async fn a_disk_in_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let driver = driver(&fake::install(dir.path()), |_| {});
    let mut disk = Bed::new().plan.disks.remove(0);
    disk.path = dir.path().join("disk");
    let file = fs::File::create(&disk.path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"content", 1 << 20).unwrap();
    file.set_len(8 << 20).unwrap();
    let target = dir.path().join("copy");
    driver.flatten(&disk, &target).await.unwrap();
    assert_eq!(fs::read(&target).unwrap(), fs::read(&disk.path).unwrap());
    assert!(fs::metadata(&target).unwrap().blocks() * 512 < 1 << 20);
    assert!(driver.flatten(&disk, &target).await.is_err(), "it is there");
    disk.format = DiskFormat::Device;
    let error = driver.flatten(&disk, &dir.path().join("other")).await.unwrap_err();
    assert!(matches!(error, EngineError::Unsupported { .. }));
}
