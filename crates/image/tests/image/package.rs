//! Kernel packages: archive, kernel image, modules. What the parsers make of good ones, and that they survive any other.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Cursor, Read, Write};

use banger_image::kernel::bzimage::{self, BzImageError};
use banger_image::kernel::deb::{self, DebError, Item};
use banger_image::kernel::decompress::{self, Compression};
use banger_image::kernel::modules::{self, ModuleError, ModuleInfo, Wanted};
use proptest::prelude::*;

use crate::common::{config, path};

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
