//! Disks of machines: overlays and work disks.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::common::{config, debugfs, fsck, maybe, need, path};
use banger_core::plan::DiskFormat;
use banger_image::disk::qcow2::{self, CLUSTER, Qcow2Error};
use banger_image::ext4::tree::Meta;
use banger_image::ext4::writer::{Finish, Limits, Size, Writer};
use banger_image::{Error, disk};
use proptest::prelude::*;

fn image(at: &Path) -> u64 {
    let mut w = Writer::new(
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(at)
            .unwrap(),
        Limits::default(),
    )
    .unwrap();
    w.file(
        &path("etc/hello"),
        Meta {
            mode: 0o644,
            ..Meta::default()
        },
        6,
        &mut b"hello\n".as_slice(),
    )
    .unwrap();
    w.file(
        &path("big"),
        Meta {
            mode: 0o644,
            ..Meta::default()
        },
        150 << 20,
        &mut std::io::repeat(3),
    )
    .unwrap();
    let finish = Finish {
        size: Size::Fit { slack: 1 << 20 },
        journal_blocks: 4096,
        uuid: [1; 16],
        hash_seed: [2; 16],
        label: "root",
        time: 0,
    };
    w.finish(&finish).unwrap().size_bytes
}

/// Reads an overlay as an engine would, and writes what the guest would see to a sparse file.
fn flatten(overlay: &Path, to: &Path) {
    let file = File::open(overlay).unwrap();
    let at = |offset: u64, len: usize| {
        let mut out = vec![0; len];
        file.read_exact_at(&mut out, offset).unwrap();
        out
    };
    let long = |b: &[u8]| u64::from_be_bytes(b[..8].try_into().unwrap());
    let word = |b: &[u8]| u32::from_be_bytes(b[..4].try_into().unwrap());
    let header = at(0, 104);
    assert_eq!(
        (&header[..4], word(&header[4..]), word(&header[20..])),
        (b"QFI\xfb".as_slice(), 3, 16)
    );
    let name = at(long(&header[8..]), word(&header[16..]) as usize);
    let size = long(&header[24..]);
    std::fs::copy(std::str::from_utf8(&name).unwrap(), to).unwrap();
    std::fs::set_permissions(to, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let out = OpenOptions::new().write(true).open(to).unwrap();
    out.set_len(size).unwrap();
    let l1 = at(long(&header[40..]), word(&header[36..]) as usize * 8);
    for (i, entry) in l1.chunks(8).enumerate() {
        let table = long(entry) & !(1 << 63);
        if table == 0 {
            continue;
        }
        for (j, entry) in at(table, 65536).chunks(8).enumerate() {
            let cluster = long(entry) & !(1 << 63);
            if cluster != 0 {
                let guest = (i as u64 * 8192 + j as u64) * CLUSTER;
                let bytes = at(cluster, 65536);
                let fits = (size - guest).min(CLUSTER) as usize;
                out.write_all_at(&bytes[..fits], guest).unwrap();
            }
        }
    }
}

#[test]
fn root_disks_are_grown_file_systems() {
    let (Some(e2fsck), Some(_)) = (need("e2fsck"), need("debugfs")) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.ext4");
    let smallest = image(&base);
    for size in [
        smallest,
        smallest + 512,
        1 << 30,
        8 << 30,
        8_000_000_000,
        17 << 30,
        200 << 30,
    ] {
        let overlay = dir.path().join(format!("{size}.qcow2"));
        let start = Instant::now();
        disk::create_root(&base, &overlay, size).unwrap();
        let meta = std::fs::metadata(&overlay).unwrap();
        eprintln!(
            "{} MiB: {:?}, {} KiB on the disk",
            size >> 20,
            start.elapsed(),
            meta.blocks() / 2
        );
        assert_eq!(meta.mode() & 0o777, 0o600);
        let flat = dir.path().join("flat");
        flatten(&overlay, &flat);
        fsck(&e2fsck, &flat);
        assert_eq!(std::fs::metadata(&flat).unwrap().len(), size / 512 * 512);
        assert_eq!(debugfs(&flat, "cat /etc/hello"), "hello\n");
        std::fs::remove_file(&flat).unwrap();
        if let Some(qemu_img) = maybe("qemu-img") {
            let check = Command::new(&qemu_img)
                .args(["check", "-f", "qcow2"])
                .arg(&overlay)
                .output()
                .unwrap();
            assert!(
                check.status.success(),
                "{}{}",
                String::from_utf8_lossy(&check.stdout),
                String::from_utf8_lossy(&check.stderr)
            );
            let info = Command::new(&qemu_img)
                .args(["info", "--output=json"])
                .arg(&overlay)
                .output()
                .unwrap();
            let info = String::from_utf8_lossy(&info.stdout).into_owned();
            assert!(
                info.contains("\"backing-filename-format\": \"raw\"") && info.contains(base.to_str().unwrap()),
                "{info}"
            );
            assert!(
                info.contains(&format!("\"virtual-size\": {}", size / 512 * 512)),
                "{info}"
            );
        }
        disk::grow_root(&overlay, size + (3 << 30)).unwrap();
        let mut header = [0; qcow2::HEADER_BYTES];
        File::open(&overlay).unwrap().read_exact_at(&mut header, 0).unwrap();
        assert_eq!(qcow2::virtual_size(&header), Some((size + (3 << 30)) / 512 * 512));
        assert!(
            matches!(disk::grow_root(&overlay, 1 << 20), Err(Error::DiskSize { .. })),
            "disks never shrink"
        );
        if let Some(qemu_img) = maybe("qemu-img") {
            assert!(
                Command::new(&qemu_img)
                    .args(["check", "-f", "qcow2"])
                    .arg(&overlay)
                    .output()
                    .unwrap()
                    .status
                    .success()
            );
        }
    }
    let refused = disk::create_root(&base, &dir.path().join("x"), smallest - 4096).unwrap_err();
    assert!(matches!(refused, Error::DiskSize { .. }) && refused.hint().is_some());
    assert!(disk::create_root(&dir.path().join("missing"), &dir.path().join("x"), 1 << 30).is_err());
    std::fs::write(dir.path().join("noise"), vec![9; 10_000]).unwrap();
    assert!(matches!(
        disk::create_root(&dir.path().join("noise"), &dir.path().join("x"), 1 << 30),
        Err(Error::FileSystem { .. })
    ));
    assert!(!dir.path().join("x").exists());
}

#[test]
fn whole_disks_are_grown_copies() {
    let dir = tempfile::tempdir().unwrap();
    let (from, disk_file) = (dir.path().join("image.ext4"), dir.path().join("root.raw"));
    let smallest = image(&from);
    assert!(matches!(
        disk::create_whole(&from, &disk_file, smallest - 4096),
        Err(Error::DiskSize { .. })
    ));
    assert!(!disk_file.exists());
    disk::create_whole(&from, &disk_file, 1 << 30).unwrap();
    let meta = std::fs::metadata(&disk_file).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o777), (1 << 30, 0o600));
    assert!(meta.blocks() * 512 <= smallest + (1 << 20), "the rest is holes");
    if let Some(e2fsck) = need("e2fsck") {
        fsck(&e2fsck, &disk_file);
    }
    assert!(
        disk::create_whole(&from, &disk_file, 1 << 30).is_err(),
        "nothing is overwritten"
    );
    assert!(disk_file.exists());
}

#[test]
fn work_disks() {
    let Some(e2fsck) = need("e2fsck") else { return };
    let dir = tempfile::tempdir().unwrap();
    for size in [
        disk::MIN_WORK_BYTES,
        100 << 20,
        1 << 30,
        8 << 30,
        8_000_000_000,
        100 << 30,
    ] {
        let target = dir.path().join(format!("{size}.ext4"));
        let start = Instant::now();
        disk::create_work(&target, size, "work").unwrap();
        let meta = std::fs::metadata(&target).unwrap();
        eprintln!(
            "{} MiB: {:?}, {} KiB on the disk",
            size >> 20,
            start.elapsed(),
            meta.blocks() / 2
        );
        assert_eq!(meta.len(), size / 512 * 512);
        fsck(&e2fsck, &target);
        disk::grow_work(&target, size + (1 << 30)).unwrap();
        assert!(matches!(disk::grow_work(&target, size), Err(Error::DiskSize { .. })));
    }
    let two = [dir.path().join("1"), dir.path().join("2")];
    for target in &two {
        disk::create_work(target, 1 << 30, "work").unwrap();
    }
    let uuid = |p: &Path| {
        let mut out = [0; 16];
        File::open(p).unwrap().read_exact_at(&mut out, 1024 + 0x68).unwrap();
        out
    };
    assert_ne!(uuid(&two[0]), uuid(&two[1]));
    for size in [0, 1 << 20, 17 << 40] {
        assert!(
            matches!(
                disk::create_work(&dir.path().join("x"), size, "work"),
                Err(Error::DiskSize { .. })
            ),
            "{size}"
        );
        assert!(!dir.path().join("x").exists());
    }
    assert!(
        disk::create_work(&two[0], 1 << 30, "work").is_err(),
        "an existing disk is never overwritten"
    );
}

proptest! {
    #![proptest_config(config(64))]

    /// No cluster of an overlay is used twice, all are counted, and every table entry leads to the right content.
    #[test]
    fn overlays_are_consistent(size in 1u64..(64 << 30) / 512, numbers in proptest::collection::btree_set(0u64..1 << 20, 0..12), backing in "/[a-z/]{1,1022}") {
        let size = size * 512;
        let clusters: BTreeMap<u64, Vec<u8>> = numbers.iter().map(|n| (*n, vec![u8::try_from(n % 255).unwrap(); 65536])).collect();
        let inside = numbers.iter().all(|n| n * CLUSTER < size);
        match qcow2::overlay(backing.as_bytes(), size, &clusters) {
            Err(error) => prop_assert!(!inside && error == Qcow2Error::Size(size)),
            Ok(made) => {
                prop_assert!(inside);
                let mut file = vec![0; usize::try_from(made.length).unwrap()];
                for (at, bytes) in &made.pieces {
                    let at = usize::try_from(*at).unwrap();
                    prop_assert!(file[at..at + bytes.len()].iter().all(|b| *b == 0), "pieces overlap");
                    file[at..at + bytes.len()].copy_from_slice(bytes);
                }
                let long = |at: usize| u64::from_be_bytes(file[at..at + 8].try_into().unwrap());
                prop_assert_eq!(qcow2::virtual_size(&file), Some(size));
                let l1 = usize::try_from(long(40)).unwrap();
                let mut seen = 4;
                for (n, content) in &clusters {
                    let l2 = long(l1 + usize::try_from(n / 8192 * 8).unwrap());
                    prop_assert_ne!(l2, 0);
                    let at = long(usize::try_from((l2 & !(1 << 63)) + n % 8192 * 8).unwrap());
                    let at = usize::try_from(at & !(1 << 63)).unwrap();
                    prop_assert!(&file[at..at + 65536] == content.as_slice());
                    seen += 1;
                }
                seen += numbers.iter().map(|n| n / 8192).collect::<std::collections::BTreeSet<_>>().len();
                prop_assert_eq!(made.length, seen as u64 * CLUSTER);
                let refcounts = &file[2 * 65536..3 * 65536];
                prop_assert_eq!(refcounts.chunks(2).filter(|c| c == &[0, 1]).count(), seen);
                prop_assert!(file.starts_with(b"QFI\xfb") && file[..65536].windows(backing.len()).any(|w| w == backing.as_bytes()));
            }
        }
    }

    #[test]
    fn growing_survives_noise(mut start in proptest::collection::vec(any::<u8>(), 0..200), size in any::<u64>(), real in any::<bool>()) {
        if real && start.len() >= 8 {
            start[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        }
        let _ = qcow2::grown(&start, size);
        let _ = qcow2::virtual_size(&start);
    }
}

#[test]
fn layers_over_anything() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (base, elsewhere) = (at("base.ext4"), at("elsewhere"));
    std::fs::create_dir(&elsewhere).unwrap();
    let content = File::create(&base).unwrap();
    content.set_len((5 << 20) + 100).unwrap();
    content.write_all_at(b"below", 1 << 20).unwrap();
    disk::create_layer(&base, DiskFormat::Raw, &at("one.qcow2")).unwrap();
    disk::create_layer(&at("one.qcow2"), DiskFormat::Qcow2, &at("two.qcow2")).unwrap();
    disk::create_layer(&at("one.qcow2"), DiskFormat::Qcow2, &elsewhere.join("three.qcow2")).unwrap();
    let size = (5 << 20) + 512;
    let header = |path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        assert_eq!(qcow2::virtual_size(&bytes), Some(size));
        assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o777, 0o600);
        let place = |from: usize| u32::from_be_bytes(bytes[from..from + 4].try_into().unwrap()) as usize;
        let name = &bytes[place(12)..place(12) + place(16)];
        let format = &bytes[112..112 + place(108)];
        (
            String::from_utf8(name.to_vec()).unwrap(),
            String::from_utf8(format.to_vec()).unwrap(),
        )
    };
    let real = std::fs::canonicalize(at("one.qcow2")).unwrap().display().to_string();
    let said = |name: &str, format: &str| (name.to_owned(), format.to_owned());
    assert_eq!(header(&at("one.qcow2")), said("base.ext4", "raw"));
    assert_eq!(header(&at("two.qcow2")), said("one.qcow2", "qcow2"));
    assert_eq!(header(&elsewhere.join("three.qcow2")), said(&real, "qcow2"));
    // A chain that is moved as a whole still is one.
    if let Some(qemu_img) = maybe("qemu-img") {
        let run = |args: &[&str], path: &Path| {
            let out = Command::new(&qemu_img).args(args).arg(path).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        };
        for name in ["one.qcow2", "two.qcow2"] {
            std::fs::hard_link(at(name), elsewhere.join(name)).unwrap();
        }
        std::fs::hard_link(&base, elsewhere.join("base.ext4")).unwrap();
        run(&["check", "-f", "qcow2"], &elsewhere.join("two.qcow2"));
        run(&["info", "--backing-chain"], &elsewhere.join("two.qcow2"));
    }
    // Larger, what is below stays what it is, and what is made over it is as large.
    disk::grow_root(&at("two.qcow2"), 64 << 20).unwrap();
    disk::create_layer(&at("two.qcow2"), DiskFormat::Qcow2, &at("four.qcow2")).unwrap();
    let start = std::fs::read(at("four.qcow2")).unwrap();
    assert_eq!(qcow2::virtual_size(&start), Some(64 << 20));
    assert!(matches!(
        disk::grow_root(&at("two.qcow2"), 1 << 20),
        Err(Error::DiskSize { .. })
    ));
    // Nothing is overwritten, and nothing is left of what cannot be made.
    assert!(disk::create_layer(&base, DiskFormat::Raw, &at("one.qcow2")).is_err());
    assert!(disk::create_layer(&base, DiskFormat::Qcow2, &at("x")).is_err());
    assert!(disk::create_layer(&at("missing"), DiskFormat::Raw, &at("x")).is_err());
    std::fs::write(at("empty"), b"").unwrap();
    assert!(matches!(
        disk::create_layer(&at("empty"), DiskFormat::Raw, &at("x")),
        Err(Error::DiskSize { .. })
    ));
    assert!(!at("x").exists());
}
