//! The parsers of hostile input: what they make of good input, and that they survive any other.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Cursor, Read, Write};
use std::process::{Command, Stdio};

use banger_image::initramfs::{self, Node};
use banger_image::kernel::bzimage::{self, BzImageError};
use banger_image::kernel::deb::{self, DebError, Item};
use banger_image::kernel::decompress::{self, Compression};
use banger_image::kernel::modules::{self, ModuleError, ModuleInfo, Wanted};
use banger_image::tar::{Kind, Limits, Reader, TarError, policy};
use common::{config, maybe, path};
use proptest::prelude::*;

// ---- tar ---------------------------------------------------------------------------------------------------------------------

/// A tar entry as bytes.
fn tar_entry(name: &str, kind: u8, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = vec![0u8; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, b"0004755\0");
    put(108, b"0001750\0");
    put(116, b"0000144\0");
    put(124, format!("{:011o}\0", content.len()).as_bytes());
    put(136, b"14371573000\0");
    put(148, b"        ");
    put(156, &[kind]);
    put(157, link.as_bytes());
    put(257, b"ustar\x0000");
    put(329, b"0000005\0");
    put(337, b"0000001\0");
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header.extend(content);
    header.resize(header.len().next_multiple_of(512), 0);
    header
}

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut data = Vec::new();
    for (key, value) in records {
        let body = key.len() + value.len() + 3;
        let mut len = body + 1;
        while len != body + len.to_string().len() {
            len = body + len.to_string().len();
        }
        data.extend(format!("{len} {key}=").as_bytes());
        data.extend(*value);
        data.push(b'\n');
    }
    tar_entry("pax", b'x', "", &data)
}

fn end() -> Vec<u8> {
    vec![0; 1024]
}

fn read_all(bytes: &[u8], limits: Limits) -> Result<Vec<(String, Kind, Vec<u8>)>, TarError> {
    let mut reader = Reader::new(bytes, limits);
    let mut out = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let mut content = Vec::new();
        reader.read_to_end(&mut content)?;
        out.push((String::from_utf8_lossy(&entry.path).into_owned(), entry.kind, content));
    }
    Ok(out)
}

#[test]
fn tar_kinds_and_extensions() {
    let long = "long/".repeat(60) + "name";
    let bytes = [
        tar_entry("./", b'5', "", b""),
        tar_entry("file", b'0', "", b"content"),
        tar_entry("old-dir/", 0, "", b""),
        tar_entry("hard", b'1', "file", b""),
        tar_entry("soft", b'2', "../anywhere", b""),
        tar_entry("console", b'3', "", b""),
        tar_entry("disk", b'4', "", b""),
        tar_entry("fifo", b'6', "", b""),
        pax(&[
            ("path", long.as_bytes()),
            ("mtime", b"-1.5"),
            ("uid", b"3000000000"),
            ("SCHILY.xattr.user.a", b"1\n=2"),
            ("comment", b"x"),
        ]),
        tar_entry("short", b'0', "", b"1"),
        tar_entry("././@LongLink", b'L', "", format!("{long}2\0").as_bytes()),
        tar_entry("././@LongLink", b'K', "", format!("{long}3\0").as_bytes()),
        tar_entry("short", b'2', "short", b""),
        tar_entry(
            "pax_global_header",
            b'g',
            "",
            b"52 comment=0123456789012345678901234567890123456789\n",
        ),
        tar_entry("last", b'0', "", b""),
        end(),
    ]
    .concat();
    let mut reader = Reader::new(bytes.as_slice(), Limits::default());
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry().unwrap() {
        entries.push(entry);
    }
    let kinds: Vec<&Kind> = entries.iter().map(|e| &e.kind).collect();
    assert_eq!(kinds[2], &Kind::Directory);
    assert_eq!(kinds[3], &Kind::HardLink(b"file".to_vec()));
    assert_eq!(kinds[4], &Kind::Symlink(b"../anywhere".to_vec()));
    assert_eq!(kinds[5], &Kind::Char(5, 1));
    assert_eq!(kinds[6], &Kind::Block(5, 1));
    assert_eq!(kinds[7], &Kind::Fifo);
    assert_eq!(
        (entries[1].mode, entries[1].uid, entries[1].gid, entries[1].mtime),
        (0o4755, 1000, 100, 1_676_080_640)
    );
    assert_eq!(entries[8].path, long.as_bytes());
    assert_eq!(
        (entries[8].mtime, entries[8].mtime_nsec, entries[8].uid),
        (-2, 500_000_000, 3_000_000_000)
    );
    assert_eq!(entries[8].xattrs, [(b"user.a".to_vec(), b"1\n=2".to_vec())]);
    assert_eq!(entries[9].path, (long.clone() + "2").as_bytes());
    assert_eq!(entries[9].kind, Kind::Symlink((long + "3").into_bytes()));
    assert_eq!(entries[10].path, b"last");
    assert_eq!(entries.len(), 11);
}

#[test]
fn tar_faults_are_named() {
    let good = [tar_entry("a", b'0', "", b"0123456789"), end()].concat();
    assert_eq!(read_all(&good, Limits::default()).unwrap()[0].2, b"0123456789");
    assert_eq!(read_all(&good[..700], Limits::default()), Err(TarError::Truncated));
    assert_eq!(read_all(&good[..1024], Limits::default()), Err(TarError::Truncated));
    assert_eq!(read_all(b"", Limits::default()), Err(TarError::Truncated));
    let mut flipped = good.clone();
    flipped[0] ^= 1;
    assert!(matches!(
        read_all(&flipped, Limits::default()),
        Err(TarError::Malformed { entry: 1, .. })
    ));
    let few = Limits {
        entries: 1,
        file_bytes: 9,
        total_bytes: 15,
        extension_bytes: 100,
    };
    assert!(matches!(read_all(&good, few), Err(TarError::TooLarge { limit: 9, .. })));
    let two = [
        tar_entry("a", b'0', "", b"01234567"),
        tar_entry("b", b'0', "", b"01234567"),
        end(),
    ]
    .concat();
    assert!(matches!(read_all(&two, few), Err(TarError::TooLarge { limit: 1, .. })));
    assert!(matches!(
        read_all(&two, Limits { entries: 9, ..few }),
        Err(TarError::TooLarge { limit: 15, .. })
    ));
    let named = [pax(&[("path", &[b'x'; 200])]), tar_entry("a", b'0', "", b""), end()].concat();
    assert!(matches!(
        read_all(&named, few),
        Err(TarError::TooLarge { limit: 100, .. })
    ));
    for kind in [b'S', b'M', b'V', b'?', 0xff] {
        let bytes = [tar_entry("a", kind, "", b""), end()].concat();
        assert!(
            matches!(read_all(&bytes, Limits::default()), Err(TarError::Unsupported { .. })),
            "{kind}"
        );
    }
    for records in [
        [("GNU.sparse.major", b"1".as_slice())],
        [("size", b"-1")],
        [("uid", b"4294967296")],
        [("mtime", b"soon")],
    ] {
        let bytes = [pax(&records), tar_entry("a", b'0', "", b""), end()].concat();
        assert!(read_all(&bytes, Limits::default()).is_err(), "{records:?}");
    }
    let global = [tar_entry("g", b'g', "", b"12 path=abc\n"), end()].concat();
    assert!(matches!(
        read_all(&global, Limits::default()),
        Err(TarError::Unsupported { .. })
    ));
}

proptest! {
    #![proptest_config(config(256))]

    /// Any bytes give entries or an error: no panic, no memory beyond the bounds.
    #[test]
    fn tar_survives_noise(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let _ = read_all(&bytes, Limits { extension_bytes: 1024, ..Limits::default() });
    }

    /// The same for archives that are nearly right.
    #[test]
    fn tar_survives_damage(name in "[a-z./]{1,90}", content in proptest::collection::vec(any::<u8>(), 0..1500), kind in any::<u8>(), damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4), fix_sum in any::<bool>()) {
        let mut bytes = [pax(&[("path", &content[..content.len().min(80)])]), tar_entry(&name, kind, "l", &content), end()].concat();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if fix_sum {
            for start in (0..bytes.len() - 511).step_by(512) {
                let sum: u32 = bytes[start..start + 512].iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum();
                bytes[start + 148..start + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        let _ = read_all(&bytes, Limits { extension_bytes: 4096, ..Limits::default() });
    }

    /// What goes in comes out.
    #[test]
    fn tar_round_trip(files in proptest::collection::vec(("[a-z]{1,20}", proptest::collection::vec(any::<u8>(), 0..2000)), 0..10)) {
        let mut bytes: Vec<u8> = files.iter().flat_map(|(name, content)| tar_entry(name, b'0', "", content)).collect();
        bytes.extend(end());
        let read = read_all(&bytes, Limits::default()).unwrap();
        prop_assert_eq!(read.into_iter().map(|(n, _, c)| (n, c)).collect::<Vec<_>>(), files);
    }

    /// An accepted path has only plain names, and taking it again changes nothing.
    #[test]
    fn accepted_paths_stay_inside(path in proptest::collection::vec(prop_oneof![Just(b'/'), Just(b'.'), Just(0u8), any::<u8>()], 0..60)) {
        if let Ok(names) = policy::components(&path) {
            for name in &names {
                prop_assert!(!name.is_empty() && name != b"." && name != b".." && !name.contains(&b'/') && !name.contains(&0) && name.len() <= policy::MAX_NAME);
            }
            if !names.is_empty() {
                prop_assert_eq!(policy::components(&names.join(&b'/')).unwrap(), names);
            }
        }
    }
}

// ---- Debian packages ---------------------------------------------------------------------------------------------------------

fn ar_member(name: &str, content: &[u8]) -> Vec<u8> {
    let mut out = format!(
        "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n",
        0,
        0,
        0,
        100_644,
        content.len()
    )
    .into_bytes();
    out.extend(content);
    if out.len() % 2 == 1 {
        out.push(b'\n');
    }
    out
}

fn package(data_name: &str, data: &[u8]) -> Vec<u8> {
    [
        b"!<arch>\n".to_vec(),
        ar_member("debian-binary", b"2.0\n"),
        ar_member("control.tar.xz", b"odd"),
        ar_member(data_name, data),
    ]
    .concat()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    liblzma::read::XzEncoder::new(bytes, 1).read_to_end(&mut out).unwrap();
    out
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn zst(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

fn lz4_legacy(bytes: &[u8]) -> Vec<u8> {
    let mut out = b"\x02\x21\x4c\x18".to_vec();
    for block in bytes.chunks(8 << 20) {
        let packed = lz4_flex::block::compress(block);
        out.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
        out.extend(packed);
    }
    out
}

#[test]
fn packages_in_every_compression() {
    let content = b"a tar file, more or less".repeat(1000);
    for (name, data) in [
        ("data.tar", content.clone()),
        ("data.tar.gz", gz(&content)),
        ("data.tar.xz", xz(&content)),
        ("data.tar.zst", zst(&content)),
    ] {
        let mut out = Vec::new();
        deb::data_tar(Cursor::new(package(name, &data)))
            .unwrap()
            .read_to_end(&mut out)
            .unwrap();
        assert!(out == content, "{name}");
    }
    let error = |bytes: Vec<u8>| deb::data_tar(Cursor::new(bytes)).err().unwrap();
    assert!(matches!(
        error(package("data.tar.bz2", b"")),
        DebError::UnknownCompression(_)
    ));
    assert!(matches!(
        error(b"PK\x03\x04 not an archive".to_vec()),
        DebError::NotAPackage(_)
    ));
    assert!(matches!(error(Vec::new()), DebError::NotAPackage(_)));
    assert!(matches!(
        error([b"!<arch>\n".to_vec(), ar_member("hello.o", b"x")].concat()),
        DebError::NotAPackage(_)
    ));
    assert!(matches!(
        error([b"!<arch>\n".to_vec(), ar_member("debian-binary", b"2.0\n")].concat()),
        DebError::NotAPackage(_)
    ));
}

#[test]
fn items_of_a_kernel_package() {
    let is = |p: &str| deb::classify(&path(p)).unwrap();
    let module = |file: &str| Item::Module {
        release: "6.1.0-1-cloud-amd64".into(),
        file: file.into(),
    };
    assert_eq!(
        is("boot/vmlinuz-6.1.0-1-cloud-amd64"),
        Item::Kernel("6.1.0-1-cloud-amd64".into())
    );
    assert_eq!(
        is("lib/modules/6.1.0-1-cloud-amd64/kernel/fs/ext4/ext4.ko"),
        module("ext4.ko")
    );
    assert_eq!(
        is("usr/lib/modules/6.1.0-1-cloud-amd64/kernel/fs/ext4/ext4.ko.xz"),
        module("ext4.ko.xz")
    );
    assert_eq!(
        is("lib/modules/6.1.0-1-cloud-amd64/modules.builtin"),
        Item::Builtin("6.1.0-1-cloud-amd64".into())
    );
    for other in [
        "boot/config-6.1",
        "lib/modules",
        "lib/modules/6.1/modules.order",
        "usr/share/doc/x",
        "lib/modules/6.1/x.ko.txt",
    ] {
        assert_eq!(is(other), Item::Other, "{other}");
    }
    for bad in [
        "boot/vmlinuz-",
        "boot/vmlinuz--x",
        "boot/vmlinuz-a b",
        "boot/vmlinuz-a\u{7f}",
    ] {
        assert!(
            matches!(deb::classify(&path(bad)), Err(DebError::BadRelease(_))),
            "{bad}"
        );
    }
}

proptest! {
    #![proptest_config(config(256))]

    #[test]
    fn packages_survive_noise(bytes in proptest::collection::vec(any::<u8>(), 0..400), damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..5), kind in 0usize..4) {
        let name = ["data.tar", "data.tar.gz", "data.tar.xz", "data.tar.zst"][kind];
        let mut damaged = package(name, &[bytes.clone(), xz(b"abc")].concat());
        for (at, byte) in damage {
            let at = at.index(damaged.len());
            damaged[at] = byte;
        }
        for input in [bytes, damaged] {
            if let Ok(reader) = deb::data_tar(Cursor::new(input)) {
                let _ = reader.take(1 << 20).read_to_end(&mut Vec::new());
            }
        }
    }
}

// ---- kernels -----------------------------------------------------------------------------------------------------------------

fn elf() -> Vec<u8> {
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(16, 0);
    out.extend([2, 0, 62, 0]);
    out.resize(5000, 7);
    out
}

fn bz_image(payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0u8; 512 * 4];
    out[0x1f1] = 3;
    out[0x202..0x206].copy_from_slice(b"HdrS");
    out[0x206..0x208].copy_from_slice(&[15, 2]);
    out[0x248..0x24c].copy_from_slice(&100u32.to_le_bytes());
    out[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
    out.extend([0xcc; 100]);
    out.extend(payload);
    out.extend([0xcc; 50]);
    out
}

#[test]
fn kernels_in_every_compression() {
    let size = u32::try_from(elf().len()).unwrap().to_le_bytes();
    for (name, payload) in [
        ("lz4", lz4_legacy(&elf())),
        ("gzip", gz(&elf())),
        ("zstd", zst(&elf())),
        ("xz", xz(&elf())),
        ("none", elf()),
    ] {
        assert!(
            bzimage::extract(&bz_image(&payload)).unwrap()[..5000] == elf(),
            "{name}"
        );
        // The kernel's build appends the size to all but gzip.
        assert!(
            bzimage::extract(&bz_image(&[payload, size.to_vec()].concat())).unwrap()[..5000] == elf(),
            "{name} with its size"
        );
    }
    assert_eq!(bzimage::extract(&elf()).unwrap(), elf());
}

#[test]
fn a_large_lz4_payload_spans_blocks() {
    let mut large = elf();
    large.resize(20 << 20, 1);
    assert!(bzimage::extract(&bz_image(&lz4_legacy(&large))).unwrap() == large);
}

#[test]
fn kernel_faults_are_named() {
    let error = |bytes: &[u8]| bzimage::extract(bytes).unwrap_err();
    assert!(matches!(error(b""), BzImageError::NotBzImage));
    assert!(matches!(error(&[0; 4096]), BzImageError::NotBzImage));
    assert!(matches!(
        error(&bz_image(&gz(b"not an ELF image"))),
        BzImageError::NotElf
    ));
    assert!(matches!(
        error(&bz_image(b"BZh91AY")),
        BzImageError::UnknownCompression(_)
    ));
    assert!(matches!(
        error(&bz_image(&gz(&elf())[..50])),
        BzImageError::Decompress(_)
    ));
    let image = bz_image(&elf());
    assert!(matches!(error(&image[..image.len() - 100]), BzImageError::OutOfBounds));
    let mut old = image.clone();
    old[0x206] = 7;
    old[0x207] = 2;
    assert!(matches!(error(&old), BzImageError::TooOld { major: 2, minor: 7 }));
    let mut other = elf();
    other[18] = 183;
    assert!(matches!(error(&other), BzImageError::NotElf));
}

proptest! {
    #![proptest_config(config(256))]

    #[test]
    fn kernels_survive_noise(bytes in proptest::collection::vec(any::<u8>(), 0..3000), kind in 0usize..4, damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6)) {
        let packed = match kind { 0 => lz4_legacy(&bytes), 1 => gz(&bytes), 2 => zst(&bytes), _ => xz(&bytes) };
        let mut image = bz_image(&packed);
        for (at, byte) in damage {
            let at = at.index(image.len());
            image[at] = byte;
        }
        let _ = bzimage::extract(&image);
        let _ = bzimage::extract(&bytes);
        let _ = bzimage::extract(&[b"\x7fELF".to_vec(), bytes].concat());
    }

    #[test]
    fn decompression_is_bounded(zeros in 0usize..3_000_000, kind in 0usize..4) {
        let bytes = vec![0; zeros];
        let (compression, packed) = match kind {
            0 => (Compression::Lz4Legacy, lz4_legacy(&bytes)),
            1 => (Compression::Gzip, gz(&bytes)),
            2 => (Compression::Zstd, zst(&bytes)),
            _ => (Compression::Xz, xz(&bytes)),
        };
        let limit = 1_000_000;
        match decompress::to_vec(compression, &packed, limit) {
            Ok(out) => prop_assert!(out == bytes && zeros <= limit),
            Err(_) => prop_assert!(zeros > limit),
        }
    }
}

// ---- modules -----------------------------------------------------------------------------------------------------------------

/// A module's ELF file with this `.modinfo` section.
fn ko(modinfo: &[u8]) -> Vec<u8> {
    let names = b"\0.shstrtab\0.modinfo\0";
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(64, 0);
    let names_at = out.len();
    out.extend(names);
    let info_at = out.len();
    out.extend(modinfo);
    let table = out.len();
    let mut section = |name: u32, at: usize, len: usize| {
        let mut header = [0u8; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
        header[0x20..0x28].copy_from_slice(&(len as u64).to_le_bytes());
        out.extend(header);
    };
    section(0, 0, 0);
    section(1, names_at, names.len());
    section(11, info_at, modinfo.len());
    out[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
    out[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
    out[0x3c..0x3e].copy_from_slice(&3u16.to_le_bytes());
    out[0x3e..0x40].copy_from_slice(&1u16.to_le_bytes());
    out
}

#[test]
fn modinfo() {
    let info = modules::parse(
        "x.ko",
        &ko(b"license=GPL\0depends=virtio,virtio-ring\0name=x\0softdep=pre: crc32c aes post: late\0"),
    )
    .unwrap();
    assert_eq!(
        info,
        ModuleInfo {
            depends: vec!["virtio".into(), "virtio_ring".into()],
            soft_before: vec!["crc32c".into(), "aes".into()]
        }
    );
    assert_eq!(
        modules::parse("x.ko", &ko(b"depends=\0")).unwrap(),
        ModuleInfo::default()
    );
    assert!(matches!(
        modules::parse("x.ko", &ko(b"depends=../../etc\0")),
        Err(ModuleError::Malformed { .. })
    ));
    assert!(modules::parse("x.ko", &ko(format!("depends={}\0", "a,".repeat(1000)).as_bytes())).is_err());
    assert!(modules::parse("x.ko", b"\x7fELF").is_err());
    assert_eq!(modules::module_name("virtio-rng.ko.xz").as_deref(), Some("virtio_rng"));
    assert_eq!(modules::module_name("virtio.txt"), None);
    assert_eq!(modules::module_name("a b.ko"), None);
    assert!(modules::builtin_names("kernel/fs/ext4/ext4.ko\nkernel/lib/crc-t10dif.ko\n").contains("crc_t10dif"));
}

fn graph(edges: &[(&str, &[&str])]) -> BTreeMap<String, ModuleInfo> {
    edges
        .iter()
        .map(|(name, needs)| {
            (
                (*name).to_owned(),
                ModuleInfo {
                    depends: needs.iter().map(|n| (*n).to_owned()).collect(),
                    soft_before: Vec::new(),
                },
            )
        })
        .collect()
}

#[test]
fn closures() {
    let modules = graph(&[
        ("virtio", &["virtio_ring"]),
        ("virtio_ring", &[]),
        ("virtio_blk", &["virtio", "virtio_ring"]),
        ("broken", &["missing"]),
        ("a", &["b"]),
        ("b", &["a"]),
    ]);
    let builtin: BTreeSet<String> = ["ext4".to_owned()].into();
    let want = |name, required| Wanted { name, required };
    let order = modules::closure(
        &[
            want("virtio_blk", true),
            want("ext4", true),
            want("nothing", false),
            want("broken", false),
        ],
        &modules,
        &builtin,
    )
    .unwrap();
    assert_eq!(order, ["virtio_ring", "virtio", "virtio_blk"]);
    assert!(
        matches!(modules::closure(&[want("nothing", true)], &modules, &builtin), Err(ModuleError::Missing { name }) if name == "nothing")
    );
    assert!(
        matches!(modules::closure(&[want("broken", true)], &modules, &builtin), Err(ModuleError::Missing { name }) if name == "missing")
    );
    assert!(matches!(
        modules::closure(&[want("a", true)], &modules, &builtin),
        Err(ModuleError::Circle { .. })
    ));
}

const NAMES: [&str; 8] = ["m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7"];

proptest! {
    #![proptest_config(config(256))]

    #[test]
    fn modinfo_survives_noise(modinfo in proptest::collection::vec(any::<u8>(), 0..300), damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8), noise in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut elf = ko(&modinfo);
        for (at, byte) in damage {
            let at = at.index(elf.len());
            elf[at] = byte;
        }
        let _ = modules::parse("x.ko", &elf);
        let _ = modules::parse("x.ko", &noise);
        let _ = modules::parse("x.ko", &[b"\x7fELF\x02\x01".to_vec(), noise].concat());
    }

    /// In every order of loading, all that a module needs comes before it, and nothing comes twice.
    #[test]
    fn closure_is_in_order(edges in proptest::collection::vec((0usize..8, 0usize..8, any::<bool>()), 0..24)) {
        let mut modules: BTreeMap<String, ModuleInfo> = NAMES.iter().map(|n| ((*n).to_owned(), ModuleInfo::default())).collect();
        for (from, to, soft) in edges {
            let info = modules.get_mut(NAMES[from]).unwrap();
            let list = if soft { &mut info.soft_before } else { &mut info.depends };
            list.push(NAMES[to].to_owned());
        }
        let wanted = NAMES.map(|name| Wanted { name, required: true });
        match modules::closure(&wanted, &modules, &BTreeSet::new()) {
            Ok(order) => {
                let at = |name: &str| order.iter().position(|n| n == name).unwrap();
                prop_assert_eq!(order.len(), NAMES.len());
                for (name, info) in &modules {
                    for need in &info.depends {
                        prop_assert!(at(need) < at(name), "{} before {}", need, name);
                    }
                }
            }
            Err(error) => {
                let circle = matches!(error, ModuleError::Circle { .. });
                prop_assert!(circle, "{}", error);
            }
        }
    }
}

// ---- initramfs ---------------------------------------------------------------------------------------------------------------

type CpioEntry = (String, u32, (u32, u32), Vec<u8>);

/// A reader of cpio archives as simple as they are: name, mode, device, content.
fn read_cpio(mut bytes: &[u8]) -> Vec<CpioEntry> {
    let mut out = Vec::new();
    loop {
        assert_eq!(&bytes[..6], b"070701");
        let field =
            |i: usize| u32::from_str_radix(std::str::from_utf8(&bytes[6 + 8 * i..14 + 8 * i]).unwrap(), 16).unwrap();
        let (mode, mtime, size, device, name_len) = (
            field(1),
            field(5),
            field(6) as usize,
            (field(9), field(10)),
            field(11) as usize,
        );
        assert_eq!(mtime, 0);
        let name = String::from_utf8(bytes[110..110 + name_len - 1].to_vec()).unwrap();
        let start = (110 + name_len).next_multiple_of(4);
        if name == "TRAILER!!!" {
            assert!(bytes[start..].iter().all(|b| *b == 0));
            return out;
        }
        out.push((name, mode, device, bytes[start..start + size].to_vec()));
        bytes = &bytes[(start + size).next_multiple_of(4)..];
    }
}

#[test]
fn initramfs_content() {
    let modules = BTreeMap::from([("b.ko".to_owned(), vec![1; 7]), ("a.ko".to_owned(), vec![2; 5])]);
    let archive = initramfs::archive(&initramfs::nodes(b"agent", &modules, &[b"b.ko\n", b"a.ko\n"]));
    assert_eq!(
        archive,
        initramfs::archive(&initramfs::nodes(b"agent", &modules, &[b"b.ko\n", b"a.ko\n"]))
    );
    let entries = read_cpio(&archive);
    let names: Vec<&str> = entries.iter().map(|e| e.0.as_str()).collect();
    assert_eq!(
        names,
        [
            "dev",
            "dev/console",
            "init",
            "modules",
            "modules/a.ko",
            "modules/b.ko",
            "modules/later",
            "modules/order",
            "newroot",
            "proc",
            "sys"
        ]
    );
    let get = |name: &str| entries.iter().find(|e| e.0 == name).unwrap();
    assert_eq!(
        (get("init").1, get("init").3.as_slice()),
        (0o100_755, b"agent".as_slice())
    );
    assert_eq!((get("dev/console").1, get("dev/console").2), (0o020_600, (5, 1)));
    assert_eq!(
        (get("modules/order").3.as_slice(), get("modules/later").3.as_slice()),
        (b"b.ko\n".as_slice(), b"a.ko\n".as_slice())
    );
    assert_eq!(initramfs::list(&["x".into(), "y".into()]), "x.ko\ny.ko\n");
    assert_eq!(get("newroot").1, 0o040_755);

    if let Some(bsdtar) = maybe("bsdtar").or_else(|| maybe("cpio")) {
        let args: &[&str] = if bsdtar.ends_with("cpio") {
            &["-it", "--quiet"]
        } else {
            &["-tf", "-"]
        };
        let mut child = Command::new(bsdtar)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&archive).unwrap();
        let out = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&out.stdout).lines().collect::<Vec<_>>(), names);
    }
}

proptest! {
    #![proptest_config(config(256))]

    #[test]
    fn initramfs_round_trip(files in proptest::collection::btree_map("[a-z_]{1,30}", proptest::collection::vec(any::<u8>(), 0..100), 0..10)) {
        let nodes: BTreeMap<String, Node<'_>> = files.iter().map(|(n, c)| (n.clone(), Node::File(0o644, c.as_slice()))).collect();
        let read: BTreeMap<String, Vec<u8>> = read_cpio(&initramfs::archive(&nodes)).into_iter().map(|(n, _, _, c)| (n, c)).collect();
        prop_assert_eq!(read, files);
    }
}
