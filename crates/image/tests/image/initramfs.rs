//! The archive that starts a machine.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use banger_image::initramfs::{self, Node};
use proptest::prelude::*;

use crate::common::{config, maybe};

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
