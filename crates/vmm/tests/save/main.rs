//! Saving machines, going on with what was saved, and disks in layers: with a real QEMU and a guest that answers.
#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod faults;
mod figures;
mod flatten;
#[path = "../support/mod.rs"]
mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use banger_core::plan::{Disk, DiskFormat, DiskRole, Saved};
use banger_vmm::qemu::Qemu;
use banger_vmm::{AfterSave, Engine, EngineError, FreshLayer, Handles, SavePlan, Steps, Still, VcpuState};
use support::{Bed, KILL, answering_kernel, ask, disk, exchange, qemu, until};

const MIB: u64 = 1 << 20;

/// Where a machine is saved to.
fn saved(dir: &Path, name: &str) -> Saved {
    Saved {
        memory: dir.join(format!("{name}.memory")),
        state: dir.join(format!("{name}.state")),
    }
}

fn plan(saved: &Saved) -> SavePlan {
    SavePlan {
        memory: Some(saved.clone()),
        base: None,
        layers: Vec::new(),
        then: AfterSave::AsBefore,
    }
}

fn none_there(saved: &Saved) -> bool {
    !saved.memory.exists() && !saved.state.exists()
}

/// A machine that goes on with what was saved.
async fn go_on(qemu: &Qemu, source: &Bed, saved: &Saved, disks: Vec<Disk>) -> (Bed, Handles) {
    let bed = waiting(source, saved, disks);
    let handles = bed.launch(qemu).await;
    assert_eq!(qemu.vcpu_state(&handles).await.unwrap(), VcpuState::Paused);
    qemu.resume(&handles, Still::Loaded).await.unwrap();
    assert_eq!(qemu.vcpu_state(&handles).await.unwrap(), VcpuState::Running);
    (bed, handles)
}

fn waiting(source: &Bed, saved: &Saved, disks: Vec<Disk>) -> Bed {
    let mut bed = Bed::new(&answering_kernel());
    bed.plan.memory_mib = source.plan.memory_mib;
    bed.plan.disks = disks;
    bed.plan.resume = Some(saved.clone());
    bed
}

async fn end(qemu: &Qemu, handles: &Handles) {
    qemu.signal(handles, KILL).await.unwrap();
    qemu.wait_exit(handles).await;
}

async fn counter(qemu: &Qemu, handles: &Handles) -> u32 {
    u32::from_le_bytes(ask(qemu, handles, b"c", 4).await.try_into().unwrap())
}

async fn fill(qemu: &Qemu, handles: &Handles, mib: u8, value: u8) {
    assert_eq!(ask(qemu, handles, &[b'm', mib, value], 1).await, b"M");
}

async fn filled(qemu: &Qemu, handles: &Handles, mib: u8) -> u8 {
    let ends = ask(qemu, handles, &[b'g', mib], 8).await;
    assert!(ends.iter().all(|byte| *byte == ends[0]), "{ends:?}");
    ends[0]
}

async fn put(qemu: &Qemu, handles: &Handles, sector: u8, value: u8, disk: u8) {
    assert_eq!(ask(qemu, handles, &[b'w', sector, value, disk], 1).await, [0]);
}

async fn get(qemu: &Qemu, handles: &Handles, sector: u8, disk: u8) -> u8 {
    let content = ask(qemu, handles, &[b'r', sector, disk], 512).await;
    assert!(content.iter().all(|byte| *byte == content[0]));
    content[0]
}

fn bytes(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

#[tokio::test]
async fn copies_go_on_where_the_machine_was() {
    let Some(qemu) = qemu() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let image = at("image.ext4");
    fs::write(&image, vec![1; 1 << 20]).unwrap();
    let bed = Bed::new(&answering_kernel())
        .with_disk(disk(DiskRole::Root, at("root.qcow2"), &[], &image))
        .with_disk(disk(DiskRole::Work, at("work.qcow2"), &[], &image));
    let source = bed.launch(&qemu).await;
    assert_eq!(qemu.vcpu_state(&source).await.unwrap(), VcpuState::Running);
    assert_eq!(ask(&qemu, &source, b"e echo", 6).await, b"e echo");
    assert_eq!(
        qemu.writes_to(&source).await.unwrap(),
        [at("root.qcow2"), at("work.qcow2")]
    );
    for (mib, value) in [(1, 0xab), (2, 0xcd), (3, 0)] {
        fill(&qemu, &source, mib, value).await;
    }
    for disk in [0, 1] {
        assert_eq!(get(&qemu, &source, 3, disk).await, 1);
        put(&qemu, &source, 3, 7 + disk, disk).await;
    }

    // Memory and both disks at once.
    let first = saved(dir.path(), "first");
    let mut save = plan(&first);
    for (serial, name) in [(DiskRole::Root, "root-a.qcow2"), (DiskRole::Work, "work-a.qcow2")] {
        let fresh = disk(serial, at(name), &[], &image);
        save.layers.push(FreshLayer {
            serial,
            path: fresh.path,
        });
    }
    let before = counter(&qemu, &source).await;
    let report = qemu.save(&source, &save, Steps::none()).await.unwrap();
    eprintln!("paused {:?}", report.paused);
    assert_eq!(qemu.vcpu_state(&source).await.unwrap(), VcpuState::Running);
    assert!(counter(&qemu, &source).await > before);
    assert_eq!(
        qemu.writes_to(&source).await.unwrap(),
        [at("root-a.qcow2"), at("work-a.qcow2")]
    );
    for path in [&first.memory, &first.state] {
        assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o600, "{}", path.display());
    }
    let meta = fs::metadata(&first.memory).unwrap();
    assert_eq!(meta.len(), 64 * MIB);
    assert!(meta.blocks() * 512 < 12 * MIB, "{} blocks", meta.blocks());
    for disk in [0, 1] {
        put(&qemu, &source, 3, 20 + disk, disk).await;
    }
    fill(&qemu, &source, 1, 0x11).await;

    // Several at once from one memory, each with disks of its own.
    let memory = bytes(&first.memory);
    let copy = |n: usize| {
        let above =
            |serial, name: &str, below: &str| disk(serial, at(&format!("{name}{n}.qcow2")), &[&at(below)], &image);
        let disks = vec![
            above(DiskRole::Root, "root", "root.qcow2"),
            above(DiskRole::Work, "work", "work.qcow2"),
        ];
        go_on(&qemu, &bed, &first, disks)
    };
    let copies = [tokio::join!(copy(0), copy(1), copy(2))];
    let [(a, b, c)] = &copies;
    for (n, (_, handles)) in [a, b, c].into_iter().enumerate() {
        let value = u8::try_from(n).unwrap() + 50;
        assert_eq!(ask(&qemu, handles, b"e again", 7).await, b"e again");
        assert!(counter(&qemu, handles).await > before);
        assert_eq!(filled(&qemu, handles, 1).await, 0xab);
        assert_eq!(filled(&qemu, handles, 3).await, 0);
        for disk in [0, 1] {
            assert_eq!(get(&qemu, handles, 3, disk).await, 7 + disk);
            put(&qemu, handles, 3, value, disk).await;
        }
        fill(&qemu, handles, 2, value).await;
        fill(&qemu, handles, 4, value).await;
    }
    for (n, (_, handles)) in [a, b, c].into_iter().enumerate() {
        let value = u8::try_from(n).unwrap() + 50;
        assert_eq!(
            (filled(&qemu, handles, 2).await, filled(&qemu, handles, 4).await),
            (value, value)
        );
        assert_eq!(
            (get(&qemu, handles, 3, 0).await, get(&qemu, handles, 3, 1).await),
            (value, value)
        );
        assert_eq!(get(&qemu, handles, 4, 0).await, 1);
    }
    assert!(bytes(&first.memory) == memory, "the memory file has been written to");
    assert_eq!(filled(&qemu, &source, 1).await, 0x11);
    assert_eq!(
        (get(&qemu, &source, 3, 0).await, get(&qemu, &source, 3, 1).await),
        (20, 21)
    );

    // A copy of a copy: what it began with and what it has written since. What it has emptied is empty.
    fill(&qemu, &a.1, 1, 0).await;
    let second = saved(dir.path(), "second");
    let mut save = plan(&second);
    save.base = Some(first.memory.clone());
    let fresh = disk(DiskRole::Root, at("root0-a.qcow2"), &[], &image);
    save.layers.push(FreshLayer {
        serial: DiskRole::Root,
        path: fresh.path,
    });
    save.then = AfterSave::Stopped;
    qemu.save(&a.1, &save, Steps::none()).await.unwrap();
    assert_eq!(qemu.vcpu_state(&a.1).await.unwrap(), VcpuState::Paused);
    assert_eq!(
        qemu.writes_to(&a.1).await.unwrap(),
        [at("root0-a.qcow2"), at("work0.qcow2")]
    );
    end(&qemu, &a.1).await;
    let disks = vec![
        disk(
            DiskRole::Root,
            at("root9.qcow2"),
            &[&at("root0.qcow2"), &at("root.qcow2")],
            &image,
        ),
        disk(
            DiskRole::Work,
            at("work9.qcow2"),
            &[&at("work0.qcow2"), &at("work.qcow2")],
            &image,
        ),
    ];
    let (_bed, again) = go_on(&qemu, &bed, &second, disks).await;
    let now = [1, 2, 3, 4].map(|mib| filled(&qemu, &again, mib));
    let [one, two, three, four] = now;
    assert_eq!((one.await, two.await, three.await, four.await), (0, 50, 0, 50));
    assert_eq!(
        (get(&qemu, &again, 3, 0).await, get(&qemu, &again, 4, 1).await),
        (50, 1)
    );
    let used = |saved: &Saved| fs::metadata(&saved.memory).unwrap().blocks();
    assert!(used(&second) <= used(&first) + 64, "{} {}", used(&second), used(&first));

    // The source once more: its nodes have other names by now.
    let fresh = disk(DiskRole::Work, at("work-b.qcow2"), &[], &image);
    let save = SavePlan {
        memory: None,
        base: None,
        layers: vec![FreshLayer {
            serial: DiskRole::Work,
            path: fresh.path,
        }],
        then: AfterSave::AsBefore,
    };
    qemu.save(&source, &save, Steps::none()).await.unwrap();
    assert_eq!(
        qemu.writes_to(&source).await.unwrap(),
        [at("root-a.qcow2"), at("work-b.qcow2")]
    );
    assert_eq!(get(&qemu, &source, 3, 1).await, 21);
    put(&qemu, &source, 5, 33, 1).await;
    assert_eq!(
        (get(&qemu, &source, 5, 1).await, get(&qemu, &source, 3, 1).await),
        (33, 21)
    );
}

#[tokio::test]
async fn a_paused_machine_stays_paused() {
    let Some(qemu) = qemu() else { return };
    let dir = tempfile::tempdir().unwrap();
    let bed = Bed::new(&answering_kernel());
    let handles = bed.launch(&qemu).await;
    fill(&qemu, &handles, 1, 5).await;
    qemu.pause(&handles).await.unwrap();
    for (n, then) in [AfterSave::AsBefore, AfterSave::Stopped].into_iter().enumerate() {
        let saved = saved(dir.path(), &n.to_string());
        let mut save = plan(&saved);
        save.then = then;
        qemu.save(&handles, &save, Steps::none()).await.unwrap();
        assert_eq!(qemu.vcpu_state(&handles).await.unwrap(), VcpuState::Paused);
        let (_bed, copy) = go_on(&qemu, &bed, &saved, Vec::new()).await;
        assert_eq!(filled(&qemu, &copy, 1).await, 5);
    }
    // So it does when saving fails.
    let mut save = plan(&saved(dir.path(), "missing/x"));
    assert!(qemu.save(&handles, &save, Steps::none()).await.is_err());
    save = plan(&saved(dir.path(), "x"));
    save.layers.push(FreshLayer {
        serial: DiskRole::Root,
        path: dir.path().join("no-disk"),
    });
    assert!(qemu.save(&handles, &save, Steps::none()).await.is_err());
    assert_eq!(qemu.vcpu_state(&handles).await.unwrap(), VcpuState::Paused);
    qemu.resume(&handles, Still::Paused).await.unwrap();
    assert_eq!(filled(&qemu, &handles, 1).await, 5);
}

#[tokio::test]
async fn a_channel_in_use_does_not_spoil_what_is_saved() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let Some(qemu) = qemu() else { return };
    let dir = tempfile::tempdir().unwrap();
    let bed = Bed::new(&answering_kernel());
    let handles = bed.launch(&qemu).await;
    assert_eq!(ask(&qemu, &handles, b"e", 1).await, b"e");
    let (mut reader, mut writer) = qemu.connect_agent(&handles).await.unwrap().into_split();
    let writing = tokio::spawn(async move { while writer.write_all(&[b'e'; 700]).await.is_ok() {} });
    let reading = tokio::spawn(async move {
        let mut buffer = [0; 4096];
        while reader.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
    });
    let mut files = Vec::new();
    for n in 0..10 {
        let saved = saved(dir.path(), &n.to_string());
        qemu.save(&handles, &plan(&saved), Steps::none()).await.unwrap();
        files.push(saved);
    }
    writing.abort();
    reading.abort();
    for saved in files {
        let (_bed, copy) = go_on(&qemu, &bed, &saved, Vec::new()).await;
        // What was under way when it was saved comes first.
        let answer = async {
            let mut stream = qemu.connect_agent(&copy).await.unwrap();
            stream.write_all(b"e the end").await.unwrap();
            let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
            while !seen.ends_with(b"the end") {
                let count = stream.read(&mut buffer).await.unwrap();
                assert!(count > 0);
                seen.extend_from_slice(&buffer[..count]);
            }
            exchange(&mut stream, b"e x", 3).await
        };
        assert_eq!(
            tokio::time::timeout(Duration::from_secs(20), answer).await.unwrap(),
            b"e x"
        );
        end(&qemu, &copy).await;
    }
}
