//! Tar streams: what the reader makes of good ones, and that it survives any other.

use std::io::Read;

use banger_image::tar::{Kind, Limits, Reader, TarError, policy};
use proptest::prelude::*;

use crate::common::config;

/// A tar entry as bytes.
pub(crate) fn tar_entry(name: &str, kind: u8, link: &str, content: &[u8]) -> Vec<u8> {
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

pub(crate) fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
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

pub(crate) fn end() -> Vec<u8> {
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
