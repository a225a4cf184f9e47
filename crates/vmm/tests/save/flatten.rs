//! All layers of a disk in one file.

use super::*;

#[tokio::test]
async fn all_layers_in_one_file() {
    let Some(qemu) = qemu() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let image = at("image.ext4");
    let file = File::create(&image).unwrap();
    file.set_len(64 * MIB).unwrap();
    file.write_all_at(&[1; 8192], 0).unwrap();
    file.write_all_at(&vec![0; 4 << 20], 16 * MIB).unwrap();
    file.write_all_at(&[2; 512], 64 * MIB - 512).unwrap();
    let root = disk(DiskRole::Root, at("root.qcow2"), &[], &image);
    let bed = Bed::new(&answering_kernel()).with_disk(root.clone());
    let handles = bed.launch(&qemu).await;
    put(&qemu, &handles, 1, 10, 0).await;
    put(&qemu, &handles, 2, 11, 0).await;
    let upper = disk(DiskRole::Root, at("upper.qcow2"), &[&at("root.qcow2")], &image);
    let save = SavePlan {
        memory: None,
        base: None,
        layers: vec![FreshLayer {
            serial: DiskRole::Root,
            path: upper.path.clone(),
        }],
        then: AfterSave::AsBefore,
    };
    qemu.save(&handles, &save, Steps::none()).await.unwrap();
    put(&qemu, &handles, 2, 12, 0).await;
    // What a machine writes to is not copied, and what it only reads is.
    let flat = at("flat");
    let error = qemu.flatten(&upper, &flat).await.unwrap_err();
    assert!(
        matches!(&error, EngineError::Died { last_words, .. } if last_words.join(" ").contains("lock")),
        "{error:?}"
    );
    assert!(!flat.exists());
    qemu.flatten(&root, &at("lower")).await.unwrap();
    end(&qemu, &handles).await;
    let started = Instant::now();
    qemu.flatten(&upper, &flat).await.unwrap();
    eprintln!("flattened in {:?}", started.elapsed());
    let mut expected = bytes(&image);
    expected[512..1024].fill(10);
    expected[1024..1536].fill(11);
    assert!(bytes(&at("lower")) == expected);
    expected[1024..1536].fill(12);
    assert!(bytes(&flat) == expected);
    let meta = fs::metadata(&flat).unwrap();
    assert_eq!(meta.mode() & 0o777, 0o600);
    assert!(meta.blocks() * 512 < MIB, "{} KiB", meta.blocks() / 2);
    // A raw disk as well; nothing is overwritten; what is missing is named.
    let raw = Disk {
        serial: DiskRole::Work,
        path: image.clone(),
        format: DiskFormat::Raw,
        layers: Vec::new(),
        base: None,
    };
    qemu.flatten(&raw, &at("raw")).await.unwrap();
    assert!(bytes(&at("raw")) == bytes(&image));
    assert!(matches!(qemu.flatten(&raw, &flat).await, Err(EngineError::Io { .. })));
    assert!(bytes(&flat) == expected);
    let mut gone = upper.clone();
    gone.layers = vec![at("gone.qcow2")];
    let error = qemu.flatten(&gone, &at("x")).await.unwrap_err();
    assert!(
        matches!(&error, EngineError::Died { last_words, .. } if last_words.join(" ").contains("gone.qcow2")),
        "{error:?}"
    );
    fs::write(at("garbage"), [0x5a; 70_000]).unwrap();
    gone.layers = vec![at("garbage")];
    assert!(qemu.flatten(&gone, &at("x")).await.is_err());
    // Whoever goes away leaves neither file nor process.
    for n in 0..8 {
        let limit = Duration::from_millis(n * 10);
        if tokio::time::timeout(limit, qemu.flatten(&upper, &at("x")))
            .await
            .is_ok()
        {
            fs::remove_file(at("x")).unwrap();
        }
        assert!(!at("x").exists());
    }
    let working = || {
        let me = format!("/proc/{0}/task/{0}/children", std::process::id());
        let children = fs::read_to_string(me).unwrap_or_default();
        let mut pids = children.split_whitespace().map(str::to_owned);
        pids.any(|pid| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(dir.path().to_str().unwrap()))
        })
    };
    until("those that copied to be gone", || !working()).await;
}
