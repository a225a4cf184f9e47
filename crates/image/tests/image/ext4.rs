//! The ext4 writer, with `e2fsck` and `debugfs` as judges.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::common::{config, debugfs, fsck, need, path};
use banger_image::ext4::grow;
use banger_image::ext4::tree::{Meta, Special};
use banger_image::ext4::writer::{Finish, Limits, Size, Summary, Writer};
use banger_image::ext4::{Ext4Error, layout};
use proptest::prelude::*;

fn finish(size: Size) -> Finish {
    Finish {
        size,
        journal_blocks: 1024,
        uuid: *b"0123456789abcdef",
        hash_seed: *b"fedcba9876543210",
        label: "test",
        time: 1_700_000_000,
    }
}

fn writer(image: &Path) -> Writer {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(image)
        .unwrap();
    Writer::new(file, Limits::default()).unwrap()
}

fn meta(mode: u16) -> Meta {
    Meta {
        mode,
        mtime: 1_600_000_000,
        ..Meta::default()
    }
}

fn fit(writer: Writer) -> Summary {
    writer.finish(&finish(Size::Fit { slack: 0 })).unwrap()
}

#[test]
fn everything_that_can_be_in_one() {
    let (Some(e2fsck), Some(_)) = (need("e2fsck"), need("debugfs")) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let mut w = writer(&image);
    w.directory(&[], meta(0o755)).unwrap();
    w.directory(
        &path("bin"),
        Meta {
            uid: 70_000,
            gid: 2_000_000_000,
            ..meta(0o2755)
        },
    )
    .unwrap();
    w.file(&path("bin/su"), meta(0o4755), 5, &mut b"hello".as_slice())
        .unwrap();
    w.hard_link(&path("bin/su2"), &path("bin/su")).unwrap();
    w.file(&path("deep/er/than/declared"), meta(0o600), 0, &mut b"".as_slice())
        .unwrap();
    w.symlink(&path("short"), meta(0o777), b"bin/su").unwrap();
    w.symlink(&path("edge59"), meta(0o777), "e".repeat(59).as_bytes())
        .unwrap();
    w.symlink(&path("edge60"), meta(0o777), "e".repeat(60).as_bytes())
        .unwrap();
    w.symlink(&path("long"), meta(0o777), "x/".repeat(2000).as_bytes())
        .unwrap();
    w.special(&path("dev/null"), meta(0o666), Special::Char(1, 3)).unwrap();
    w.special(&path("dev/far"), meta(0o600), Special::Block(300, 70_000))
        .unwrap();
    w.special(&path("fifo"), meta(0o644), Special::Fifo).unwrap();
    w.file(&path("größe\u{1f600}"), meta(0o644), 3, &mut b"abc".as_slice())
        .unwrap();
    w.file(&[vec![0xff, 0xfe, b' ', b'\n']], meta(0o644), 3, &mut b"abc".as_slice())
        .unwrap();
    w.file(&[vec![b'n'; 255]], meta(0o644), 3, &mut b"abc".as_slice())
        .unwrap();
    let capability = (
        b"security.capability".to_vec(),
        vec![1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    w.file(
        &path("bin/ping"),
        Meta {
            xattrs: vec![capability.clone()],
            ..meta(0o755)
        },
        4,
        &mut b"ping".as_slice(),
    )
    .unwrap();
    let many: Vec<_> = (0..20)
        .map(|i| (format!("user.attribute{i}").into_bytes(), vec![i; usize::from(i) * 5]))
        .chain([capability])
        .collect();
    w.file(
        &path("many"),
        Meta {
            xattrs: many,
            ..meta(0o644)
        },
        4,
        &mut b"many".as_slice(),
    )
    .unwrap();
    w.directory(
        &path("dirattr"),
        Meta {
            xattrs: vec![(b"user.x".to_vec(), b"y".to_vec())],
            ..meta(0o755)
        },
    )
    .unwrap();
    for (name, time) in [
        ("y1901", -(1i64 << 31)),
        ("y1969", -1),
        ("y2040", 2_208_988_800),
        ("y2400", 13_569_465_600),
        ("never", i64::MAX),
        ("ever", i64::MIN),
    ] {
        w.file(
            &path(name),
            Meta {
                mtime: time,
                mtime_nsec: 123_456_789,
                ..meta(0o644)
            },
            0,
            &mut b"".as_slice(),
        )
        .unwrap();
    }
    let summary = fit(w);
    assert_eq!(std::fs::metadata(&image).unwrap().len(), summary.size_bytes);
    fsck(&e2fsck, &image);

    let su = debugfs(&image, "stat /bin/su");
    assert!(
        su.contains("Mode:  04755") && su.contains("Links: 2") && su.contains("Size: 5"),
        "{su}"
    );
    let bin = debugfs(&image, "stat /bin");
    assert!(
        bin.contains("User: 70000") && bin.contains("Group: 2000000000") && bin.contains("Mode:  02755"),
        "{bin}"
    );
    assert_eq!(debugfs(&image, "cat /bin/su2"), "hello");
    assert!(
        debugfs(&image, "ea_get -x /bin/ping security.capability").contains("01 00 00 02 00 20"),
        "{}",
        debugfs(&image, "ea_list /bin/ping")
    );
    assert!(
        debugfs(&image, "ea_list /many").contains("user.attribute19 (95)"),
        "{}",
        debugfs(&image, "ea_list /many")
    );
    assert!(
        debugfs(&image, "stat /dev/far").contains("300:70000"),
        "{}",
        debugfs(&image, "stat /dev/far")
    );
    assert!(debugfs(&image, "stat /long").contains("Size: 4000"));
    assert!(
        debugfs(&image, "stat /y2040").contains("mtime: 0x83aa7e80:1d6f3455"),
        "{}",
        debugfs(&image, "stat /y2040")
    );
    assert!(
        debugfs(&image, "stat /y2400").contains("Mon Jan  1")
            || debugfs(&image, "stat /y2400").contains("2400")
            || debugfs(&image, "stat /y2400").contains("Sat Jan  1")
    );
}

#[test]
fn large_directories_have_a_valid_index() {
    let Some(e2fsck) = need("e2fsck") else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let mut w = writer(&image);
    for i in 0..5_000 {
        w.file(
            &path(&format!("medium/file-{i}-{}", "n".repeat(i % 200))),
            meta(0o644),
            0,
            &mut b"".as_slice(),
        )
        .unwrap();
    }
    // Enough for a second level: names as long as they get.
    w.file(&path("big/0"), meta(0o644), 0, &mut b"".as_slice()).unwrap();
    for i in 1..8_000 {
        w.hard_link(&path(&format!("big/{i:0>255}")), &path("big/0")).unwrap();
    }
    for i in 0..300 {
        w.directory(&path(&format!("many/{i}")), meta(0o755)).unwrap();
    }
    fit(w);
    fsck(&e2fsck, &image);
    if need("debugfs").is_some() {
        let shown = debugfs(&image, "htree_dump /big");
        assert!(
            shown.contains("Number of entries (count)") && shown.contains("Indirect levels: 1"),
            "{}",
            &shown[..500.min(shown.len())]
        );
        assert!(debugfs(&image, &format!("stat /big/{:0>255}", 7_999)).contains("Links: 8000"));
    }
}

#[test]
fn content_crosses_groups_and_comes_out_again() {
    let (Some(e2fsck), Some(_)) = (need("e2fsck"), need("debugfs")) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let mut w = writer(&image);
    // Six groups in one file: more pieces than an inode holds. Mostly zero, so mostly holes on the host.
    let size = 700u64 << 20;
    w.file(&path("large"), meta(0o644), size, &mut Pattern { at: 0, size })
        .unwrap();
    w.file(&path("after"), meta(0o644), 6, &mut b"after\n".as_slice())
        .unwrap();
    let summary = fit(w);
    assert!(summary.size_bytes > size);
    fsck(&e2fsck, &image);
    use std::os::unix::fs::MetadataExt;
    assert!(
        std::fs::metadata(&image).unwrap().blocks() * 512 < 64 << 20,
        "zeros are holes"
    );
    assert_eq!(debugfs(&image, "cat /after"), "after\n");
    let out = dir.path().join("out");
    debugfs(&image, &format!("dump /large {}", out.display()));
    let out = File::open(out).unwrap();
    assert_eq!(out.metadata().unwrap().len(), size);
    for at in (0..size).step_by(16 << 20) {
        let mut got = [0; 8];
        out.read_exact_at(&mut got, at).unwrap();
        assert_eq!(u64::from_le_bytes(got), at + 1, "at {at}");
    }
}

/// A number every 16 MiB, and zeros.
struct Pattern {
    at: u64,
    size: u64,
}

impl std::io::Read for Pattern {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = usize::try_from(
            (self.size - self.at)
                .min(buf.len() as u64)
                .min((16 << 20) - self.at % (16 << 20)),
        )
        .unwrap();
        buf[..n].fill(0);
        if self.at.is_multiple_of(16 << 20) && n >= 8 {
            buf[..8].copy_from_slice(&(self.at + 1).to_le_bytes());
        }
        self.at += n as u64;
        Ok(n)
    }
}

#[test]
fn growth_is_clean_at_every_size() {
    let Some(e2fsck) = need("e2fsck") else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let mut w = writer(&image);
    for i in 0..100 {
        w.file(
            &path(&format!("dir{}/file{i}", i % 7)),
            meta(0o644),
            5000,
            &mut std::io::repeat(7),
        )
        .unwrap();
    }
    let summary = fit(w);
    let group = layout::GROUP_BYTES;
    assert_eq!(summary.size_bytes % group, 0);
    let sizes = [
        summary.size_bytes,
        group * 2,
        group * 2 + 4096 * 100,
        group * 3 + 4096 * 700,
        1 << 30,
        8 << 30,
        group * 127,
        group * 128,
        group * 129,
        group * 130,
        40 << 30,
        (100 << 30) + 12_345,
    ];
    for size in sizes {
        let grown = dir.path().join("grown");
        std::fs::copy(&image, &grown).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&grown).unwrap();
        let mut superblock = [0; grow::SUPER_BYTES];
        file.read_exact_at(&mut superblock, grow::SUPER_OFFSET).unwrap();
        let mut descriptors = [0; 4096];
        file.read_exact_at(&mut descriptors, grow::descriptors_offset(&superblock).unwrap())
            .unwrap();
        let patches = grow::patches(&superblock, &descriptors, size).unwrap();
        file.set_len(size).unwrap();
        for patch in &patches {
            assert!(
                patch.offset / 4096 == (patch.offset + patch.bytes.len() as u64 - 1) / 4096,
                "within a block"
            );
            file.write_all_at(&patch.bytes, patch.offset).unwrap();
        }
        drop(file);
        fsck(&e2fsck, &grown);
    }
    let mut superblock = [0; grow::SUPER_BYTES];
    File::open(&image)
        .unwrap()
        .read_exact_at(&mut superblock, grow::SUPER_OFFSET)
        .unwrap();
    assert!(matches!(
        grow::patches(&superblock, &[0; 4096], group / 2),
        Err(Ext4Error::Size { .. })
    ));
    assert!(grow::patches(&superblock[..100], &[0; 4096], 8 << 30).is_err());
    superblock[0x3a] = 0;
    assert!(matches!(
        grow::patches(&superblock, &[0; 4096], 8 << 30),
        Err(Ext4Error::NotFresh(_))
    ));
}

#[test]
fn many_inodes_make_more_groups() {
    let Some(e2fsck) = need("e2fsck") else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs");
    let mut w = writer(&image);
    for i in 0..20_000 {
        w.file(
            &path(&format!("{}/{}/{i}", i % 10, i % 100)),
            meta(0o644),
            0,
            &mut b"".as_slice(),
        )
        .unwrap();
    }
    assert_eq!(fit(w).size_bytes, 3 * layout::GROUP_BYTES);
    fsck(&e2fsck, &image);
}

#[test]
fn the_same_content_makes_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        let image = dir.path().join(name);
        let mut w = writer(&image);
        for i in 0..50 {
            w.file(&path(&format!("d/{i}")), meta(0o644), 100, &mut std::io::repeat(1))
                .unwrap();
        }
        fit(w);
        banger_image::Digest::of(&std::fs::read(&image).unwrap())
    };
    assert_eq!(make("a"), make("b"));
}

#[test]
fn what_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut w = writer(&dir.path().join("fs"));
    let empty = || b"".as_slice();
    w.file(&path("file"), meta(0o644), 0, &mut empty()).unwrap();
    w.directory(&path("dir"), meta(0o755)).unwrap();
    let conflict =
        |result: Result<(), Ext4Error>| assert!(matches!(result, Err(Ext4Error::Conflict { .. })), "{result:?}");
    conflict(w.file(&path("file/below"), meta(0o644), 0, &mut empty()));
    conflict(w.file(&path("dir"), meta(0o644), 0, &mut empty()));
    conflict(w.directory(&path("file"), meta(0o755)));
    conflict(w.file(&[], meta(0o644), 0, &mut empty()));
    conflict(w.file(&[b"..".to_vec()], meta(0o644), 0, &mut empty()));
    conflict(w.file(&[b"a/b".to_vec()], meta(0o644), 0, &mut empty()));
    conflict(w.file(&[vec![b'x'; 256]], meta(0o644), 0, &mut empty()));
    conflict(w.hard_link(&path("link"), &path("missing")));
    conflict(w.hard_link(&path("link"), &path("dir")));
    conflict(w.hard_link(&path("link"), &[]));
    conflict(w.symlink(&path("link"), meta(0o777), b""));
    conflict(w.symlink(&path("link"), meta(0o777), &[b'x'; 4096]));
    conflict(w.special(&path("dev"), meta(0o600), Special::Char(1 << 12, 0)));
    assert!(matches!(
        w.file(&path("short"), meta(0o644), 10, &mut b"abc".as_slice()),
        Err(Ext4Error::Content { .. })
    ));
    let huge = vec![(b"user.big".to_vec(), vec![1; 5000])];
    w.file(
        &path("attr"),
        Meta {
            xattrs: huge,
            ..meta(0o644)
        },
        0,
        &mut empty(),
    )
    .unwrap();
    assert!(matches!(
        w.finish(&finish(Size::Fit { slack: 0 })),
        Err(Ext4Error::TooMany { .. })
    ));
    assert!(matches!(
        writer(&dir.path().join("fs2")).finish(&finish(Size::Exact(4096 * 300))),
        Err(Ext4Error::Size { .. })
    ));
    let tiny = Limits {
        nodes: 5,
        bytes: 1 << 20,
    };
    let mut w = Writer::new(File::create(dir.path().join("fs3")).unwrap(), tiny).unwrap();
    assert!(matches!(
        w.file(&path("f"), meta(0o644), 1 << 40, &mut std::io::repeat(0)),
        Err(Ext4Error::TooMany { .. })
    ));
    assert!(matches!(
        w.directory(&path("a/b/c/d/e/f"), meta(0o755)),
        Err(Ext4Error::TooMany { .. })
    ));
}

#[derive(Debug, Clone)]
enum Act {
    Dir(Vec<u8>),
    File(Vec<u8>, usize),
    Link(Vec<u8>, Vec<u8>),
    Symlink(Vec<u8>, usize),
    Fifo(Vec<u8>),
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    // Few names, so that entries meet.
    prop_oneof![
        8 => "[a-e](/[a-e]){0,3}".prop_map(String::into_bytes),
        1 => proptest::collection::vec(1u8.., 1..300),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        name().prop_map(Act::Dir),
        (name(), 0usize..20_000).prop_map(|(n, s)| Act::File(n, s)),
        (name(), name()).prop_map(|(a, b)| Act::Link(a, b)),
        (name(), 1usize..200).prop_map(|(n, s)| Act::Symlink(n, s)),
        name().prop_map(Act::Fifo),
    ]
}

proptest! {
    #![proptest_config(config(40))]

    /// Whatever is entered in whatever order, refused or not: what comes out is a clean file system.
    #[test]
    fn any_tree_is_clean(acts in proptest::collection::vec(act(), 0..120), attribute in proptest::collection::vec(any::<u8>(), 0..300)) {
        let Some(e2fsck) = need("e2fsck") else { return Ok(()) };
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("fs");
        let mut w = writer(&image);
        let split = |n: &[u8]| n.split(|b| *b == b'/').map(<[u8]>::to_vec).collect::<Vec<_>>();
        for (i, act) in acts.iter().enumerate() {
            let m = Meta { xattrs: if i % 3 == 0 { vec![(b"user.a".to_vec(), attribute.clone())] } else { Vec::new() }, ..meta(0o644) };
            let _ = match act {
                Act::Dir(n) => w.directory(&split(n), m),
                Act::File(n, size) => w.file(&split(n), m, *size as u64, &mut std::io::repeat(1)),
                Act::Link(n, target) => w.hard_link(&split(n), &split(target)),
                Act::Symlink(n, size) => w.symlink(&split(n), m, &vec![b't'; *size]),
                Act::Fifo(n) => w.special(&split(n), m, Special::Fifo),
            };
        }
        fit(w);
        fsck(&e2fsck, &image);
    }

    /// No superblock makes growth panic.
    #[test]
    fn growth_survives_any_superblock(noise in proptest::collection::vec((0usize..1024, any::<u8>()), 0..40), size in any::<u64>()) {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("fs");
        fit(writer(&image));
        let mut superblock = [0; grow::SUPER_BYTES];
        File::open(&image).unwrap().read_exact_at(&mut superblock, grow::SUPER_OFFSET).unwrap();
        for (at, byte) in noise {
            superblock[at] = byte;
        }
        let _ = grow::size_of(&superblock);
        let _ = grow::descriptors_offset(&superblock);
        let _ = grow::patches(&superblock, &[0; 4096], size % (1 << 42));
    }
}
