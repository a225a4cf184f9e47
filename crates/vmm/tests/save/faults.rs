//! What cannot be saved, and what cannot be gone on with.

use super::*;

/// What a failed start said; nothing may be left of it.
async fn fails(qemu: &Qemu, bed: &Bed) -> EngineError {
    let error = qemu.launch(&bed.plan).await.map(|h| panic!("{h:?}")).unwrap_err();
    eprintln!("{error:?}");
    bed.assert_nothing_left().await;
    error
}

#[tokio::test]
async fn damaged_files_end_the_start() {
    let Some(qemu) = qemu() else { return };
    let dir = tempfile::tempdir().unwrap();
    let bed = Bed::new(&answering_kernel());
    let handles = bed.launch(&qemu).await;
    assert_eq!(ask(&qemu, &handles, b"e", 1).await, b"e");
    let good = saved(dir.path(), "good");
    qemu.save(&handles, &plan(&good), Steps::none()).await.unwrap();

    let bad = |name: &str| {
        let bad = saved(dir.path(), name);
        fs::copy(&good.memory, &bad.memory).unwrap();
        fs::copy(&good.state, &bad.state).unwrap();
        bad
    };
    let start = async |saved: &Saved| fails(&qemu, &waiting(&bed, saved, Vec::new())).await;
    let short = bad("short");
    OpenOptions::new()
        .write(true)
        .open(&short.memory)
        .unwrap()
        .set_len(63 * MIB)
        .unwrap();
    let error = start(&short).await;
    assert!(
        matches!(&error, EngineError::Io { what, .. } if what.contains("short.memory")),
        "{error:?}"
    );
    fs::remove_file(&short.memory).unwrap();
    assert!(matches!(start(&short).await, EngineError::Io { .. }));

    let state = bytes(&good.state);
    let half = bad("half");
    fs::write(&half.state, &state[..state.len() / 2]).unwrap();
    let garbage = bad("garbage");
    fs::write(&garbage.state, vec![0x5a; 100_000]).unwrap();
    let flipped = bad("flipped");
    let mut other = state.clone();
    for byte in &mut other[20..60] {
        *byte ^= 0xff;
    }
    fs::write(&flipped.state, other).unwrap();
    for saved in [&half, &garbage, &flipped] {
        let error = start(saved).await;
        let said = matches!(&error, EngineError::Died { last_words, .. } if !last_words.is_empty())
            || matches!(&error, EngineError::Refused { .. });
        assert!(said, "{error:?}");
    }
    fs::write(&garbage.state, b"").unwrap();
    assert!(matches!(start(&garbage).await, EngineError::Io { .. }));
    // A machine of another shape.
    let mut other = waiting(&bed, &good, Vec::new());
    other.plan.network = None;
    assert!(matches!(
        fails(&qemu, &other).await,
        EngineError::Died { .. } | EngineError::Refused { .. }
    ));
    // And the good one still is.
    let (_bed, copy) = go_on(&qemu, &bed, &good, Vec::new()).await;
    assert_eq!(ask(&qemu, &copy, b"e", 1).await, b"e");
}

#[tokio::test]
async fn a_save_that_fails_leaves_nothing_and_the_machine_runs() {
    let Some(qemu) = qemu() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let image = at("image.ext4");
    fs::write(&image, vec![1; 1 << 20]).unwrap();
    let bed = Bed::new(&answering_kernel())
        .with_disk(disk(DiskRole::Root, at("root.qcow2"), &[], &image))
        .with_disk(disk(DiskRole::Work, at("work.qcow2"), &[], &image));
    let handles = bed.launch(&qemu).await;
    assert_eq!(ask(&qemu, &handles, b"e", 1).await, b"e");
    let target = saved(dir.path(), "x");
    let refused = async |save: &SavePlan| {
        let error = qemu
            .save(&handles, save, Steps::none())
            .await
            .map(|r| panic!("{r:?}"))
            .unwrap_err();
        eprintln!("{error:?}");
        assert_eq!(qemu.vcpu_state(&handles).await.unwrap(), VcpuState::Running);
        assert_eq!(ask(&qemu, &handles, b"e", 1).await, b"e");
        assert_eq!(
            qemu.writes_to(&handles).await.unwrap(),
            [at("root.qcow2"), at("work.qcow2")]
        );
        error
    };
    // A base that is not the one, or where there is none.
    let other = at("other");
    File::create(&other).unwrap().set_len(64 * MIB).unwrap();
    let mut save = plan(&target);
    save.base = Some(other.clone());
    refused(&save).await;
    assert!(none_there(&target));
    // What is there is left alone.
    fs::write(&target.state, b"mine").unwrap();
    refused(&plan(&target)).await;
    assert_eq!(bytes(&target.state), b"mine");
    fs::remove_file(&target.state).unwrap();
    assert!(none_there(&target));
    // A layer that is none: the good one before it is free again afterwards.
    let fresh = |serial, name: &str| FreshLayer {
        serial,
        path: disk(serial, at(name), &[], &image).path,
    };
    let mut save = plan(&target);
    save.layers = vec![
        fresh(DiskRole::Root, "root-a.qcow2"),
        FreshLayer {
            serial: DiskRole::Work,
            path: other.clone(),
        },
    ];
    let error = refused(&save).await;
    assert!(
        matches!(&error, EngineError::Refused { command, .. } if command == "blockdev-add"),
        "{error:?}"
    );
    assert!(none_there(&target));
    // Files that cannot be made.
    refused(&plan(&saved(&at("missing"), "x"))).await;
    let mut apart = plan(&target);
    apart.memory = Some(Saved {
        memory: target.memory.clone(),
        state: at("missing/x.state"),
    });
    let error = refused(&apart).await;
    assert!(
        matches!(&error, EngineError::Refused { command, .. } if command == "xen-save-devices-state"),
        "{error:?}"
    );
    assert!(none_there(&target));
    save.layers[1] = fresh(DiskRole::Work, "work-a.qcow2");
    qemu.save(&handles, &save, Steps::none()).await.unwrap();
    assert_eq!(
        qemu.writes_to(&handles).await.unwrap(),
        [at("root-a.qcow2"), at("work-a.qcow2")]
    );

    // One that was started from a file says so.
    let disks = vec![
        disk(DiskRole::Root, at("root-c.qcow2"), &[&at("root.qcow2")], &image),
        disk(DiskRole::Work, at("work-c.qcow2"), &[&at("work.qcow2")], &image),
    ];
    let (_bed, copy) = go_on(&qemu, &bed, &target, disks).await;
    let again = saved(dir.path(), "y");
    for base in [None, Some(other)] {
        let mut save = plan(&again);
        save.base = base;
        let error = qemu.save(&copy, &save, Steps::none()).await.unwrap_err();
        eprintln!("{error:?}");
        assert!(none_there(&again));
    }
    assert_eq!(ask(&qemu, &copy, b"e", 1).await, b"e");
}

/// Either the machine was saved and both files are there, or it was not and neither is.
#[tokio::test]
async fn whoever_goes_away_leaves_the_machine_running() {
    let Some(qemu) = qemu() else { return };
    let dir = tempfile::tempdir().unwrap();
    let bed = Bed::new(&answering_kernel());
    let handles = bed.launch(&qemu).await;
    for mib in 1..40 {
        fill(&qemu, &handles, mib, mib).await;
    }
    let mut complete = 0;
    for n in 0..20_u64 {
        let saved = saved(dir.path(), &n.to_string());
        let mut save = plan(&saved);
        if n % 2 == 1 {
            save.then = AfterSave::Stopped;
        }
        let limit = Duration::from_millis(n * 3);
        let outcome = tokio::time::timeout(limit, qemu.save(&handles, &save, Steps::none())).await;
        if outcome.is_ok() && save.then == AfterSave::Stopped {
            qemu.resume(&handles, Still::Paused).await.unwrap();
        }
        // Asked for as long as it takes: what was begun is still being taken back.
        let end = Instant::now() + Duration::from_secs(20);
        while qemu.vcpu_state(&handles).await.ok() != Some(VcpuState::Running)
            || saved.memory.exists() != saved.state.exists()
        {
            assert!(Instant::now() < end, "save {n} was not taken back");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(filled(&qemu, &handles, 7).await, 7);
        complete += usize::from(saved.memory.exists());
        if outcome.is_ok() {
            assert!(saved.memory.exists());
        }
    }
    eprintln!("{complete} of 20 were complete");
}

#[tokio::test]
async fn an_engine_that_is_killed_meanwhile_leaves_no_half_files() {
    let Some(qemu) = qemu() else { return };
    let dir = tempfile::tempdir().unwrap();
    for n in 0..8_u64 {
        let bed = Bed::new(&answering_kernel());
        let handles = bed.launch(&qemu).await;
        for mib in 1..30 {
            fill(&qemu, &handles, mib, mib).await;
        }
        let saved = saved(dir.path(), &n.to_string());
        let save = plan(&saved);
        let (outcome, ()) = tokio::join!(qemu.save(&handles, &save, Steps::none()), async {
            tokio::time::sleep(Duration::from_millis(n * 4)).await;
            end(&qemu, &handles).await;
        });
        match outcome {
            Ok(_) => assert!(saved.memory.exists() && saved.state.exists()),
            Err(error) => {
                assert!(matches!(error, EngineError::NotOurs { .. }), "{error:?}");
                assert!(none_there(&saved));
            }
        }
    }
}

/// Runs in a mount namespace of its own, started by the test below.
#[tokio::test]
#[ignore = "needs a small file system, which another test makes for it"]
async fn inside_of_a_full_file_system() {
    let Some(qemu) = qemu() else { return };
    let small = PathBuf::from(std::env::var_os("BANGER_TEST_SMALL").unwrap());
    let bed = Bed::new(&answering_kernel());
    let handles = bed.launch(&qemu).await;
    for mib in 1..20 {
        fill(&qemu, &handles, mib, mib).await;
    }
    let runs = async || {
        assert_eq!(qemu.vcpu_state(&handles).await.unwrap(), VcpuState::Running);
        assert_eq!(filled(&qemu, &handles, 3).await, 3);
        assert_eq!(fs::read_dir(&small).unwrap().count(), 0);
    };
    let target = saved(&small, "x");
    let error = qemu.save(&handles, &plan(&target), Steps::none()).await.unwrap_err();
    eprintln!("{error:?}");
    let full = |e: &EngineError| matches!(e, EngineError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull);
    assert!(full(&error), "{error:?}");
    runs().await;
    // Memory fits elsewhere, and the state does not.
    let filler = small.join("filler");
    fs::write(&filler, vec![1; 4 << 20]).ok();
    let dir = tempfile::tempdir().unwrap();
    let apart = Saved {
        memory: dir.path().join("memory"),
        state: target.state.clone(),
    };
    let error = qemu.save(&handles, &plan(&apart), Steps::none()).await.unwrap_err();
    assert!(full(&error), "{error:?}");
    assert!(none_there(&apart));
    fs::remove_file(&filler).unwrap();
    runs().await;
    // A disk's content does not fit either.
    let image = dir.path().join("image");
    fs::write(&image, vec![1; 8 << 20]).unwrap();
    let disk = disk(DiskRole::Root, dir.path().join("root.qcow2"), &[], &image);
    let error = qemu.flatten(&disk, &small.join("flat")).await.unwrap_err();
    assert!(full(&error), "{error:?}");
    runs().await;
}

#[test]
fn a_full_file_system_leaves_nothing_and_the_machine_runs() {
    if qemu().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let me = std::env::current_exe().unwrap();
    let script = r#"mount -t tmpfs -o size=4m,mode=700 small "$1" || exit 77
        BANGER_TEST_SMALL=$1 exec "$0" --exact faults::inside_of_a_full_file_system --ignored --nocapture"#;
    let map = if rustix::process::getuid().is_root() {
        "-m"
    } else {
        "-rm"
    };
    let output = std::process::Command::new("unshare")
        .args([map, "sh", "-c", script])
        .arg(me)
        .arg(dir.path())
        .output();
    let Ok(output) = output else {
        eprintln!("skipped: there is no `unshare`");
        return;
    };
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    eprintln!("{said}");
    let possible = std::env::var_os("CI").is_some_and(|v| v == "true") || said.contains("running 1 test");
    if possible {
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{:?}",
            output.status
        );
    } else {
        eprintln!("skipped: no mount namespace can be made here");
    }
}
