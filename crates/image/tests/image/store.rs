//! The store: what it makes of archives, concurrent writers, damage.

use std::path::Path;

use banger_image::tar::{Limits, Reader};
use banger_image::{Digest, Error, Progress, Store, disk};
use proptest::prelude::*;

use crate::common::{config, debugfs, fsck, need};
use crate::tar::{end, pax, tar_entry};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .build()
        .unwrap()
}

fn archive() -> Vec<u8> {
    [
        tar_entry("./", b'5', "", b""),
        tar_entry("./usr/lib/systemd/systemd", b'0', "", b"init"),
        tar_entry("./sbin/init", b'2', "/lib/systemd/systemd", b""),
        pax(&[(
            "SCHILY.xattr.security.capability",
            &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        )]),
        tar_entry("./bin/ping", b'0', "", b"ping"),
        tar_entry("./bin/ping4", b'1', "./bin/ping", b""),
        tar_entry("./etc/machine-id", b'0', "", b"0123"),
        tar_entry("./dev/console", b'3', "", b""),
        end(),
    ]
    .concat()
}

fn staging_is_empty(state: &Path) {
    assert_eq!(std::fs::read_dir(state.join("staging")).unwrap().count(), 0);
}

#[test]
fn archives_become_images() {
    let (Some(e2fsck), Some(_)) = (need("e2fsck"), need("debugfs")) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let tar = dir.path().join("image.tar");
    std::fs::write(&tar, archive()).unwrap();
    let store = Store::open(dir.path().join("state")).unwrap();
    // Several writers of one thing, and a second store of the same directory.
    let other = Store::open(dir.path().join("state")).unwrap();
    let quiet = Progress::none();
    let (a, b, c) = runtime().block_on(async {
        tokio::join!(
            store.import_tar(&tar, None, &quiet),
            store.import_tar(&tar, None, &quiet),
            other.import_tar(&tar, Some("x"), &quiet)
        )
    });
    let (a, b, c) = (a.unwrap(), b.unwrap(), c.unwrap());
    assert!(a.digest == b.digest && b.digest == c.digest);
    assert_eq!(
        (a.init.as_deref(), store.images().unwrap().len()),
        (Some("/lib/systemd/systemd"), 1)
    );
    staging_is_empty(&dir.path().join("state"));

    let image = store.image(&a.digest).unwrap().unwrap();
    fsck(&e2fsck, &image.rootfs);
    assert_eq!(debugfs(&image.rootfs, "cat /bin/ping4"), "ping");
    assert_eq!(debugfs(&image.rootfs, "cat /etc/machine-id"), "0123");
    assert!(debugfs(&image.rootfs, "ea_list /bin/ping4").contains("security.capability (20)"));
    assert!(
        debugfs(&image.rootfs, "stat /dev/console").contains("05:01"),
        "{}",
        debugfs(&image.rootfs, "stat /dev/console")
    );

    // Another content, another name.
    std::fs::write(&tar, [tar_entry("a", b'0', "", b"1"), end()].concat()).unwrap();
    let d = runtime().block_on(store.import_tar(&tar, None, &quiet)).unwrap();
    assert!(d.digest != a.digest && d.init.is_none() && store.images().unwrap().len() == 2);

    disk::create_root(&image.rootfs, &dir.path().join("disk"), 4 << 30).unwrap();
    store.delete_image(&a.digest).unwrap();
    store.delete_image(&a.digest).unwrap();
    assert!(store.image(&a.digest).unwrap().is_none());
    staging_is_empty(&dir.path().join("state"));
}

#[test]
fn bad_archives_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("state")).unwrap();
    let good = archive();
    let bad = [
        Vec::new(),
        good[..good.len() - 1024].to_vec(),
        good[..1200].to_vec(),
        [tar_entry("../../etc/passwd", b'0', "", b"x"), end()].concat(),
        [tar_entry("a", b'1', "/etc/passwd", b""), end()].concat(),
        [
            tar_entry("a", b'2', "/etc", b""),
            tar_entry("a/passwd", b'0', "", b"x"),
            end(),
        ]
        .concat(),
        [tar_entry("a", b'0', "", b""), tar_entry("a", b'5', "", b""), end()].concat(),
    ];
    for (i, bytes) in bad.iter().enumerate() {
        let tar = dir.path().join("bad.tar");
        std::fs::write(&tar, bytes).unwrap();
        let error = runtime()
            .block_on(store.import_tar(&tar, None, &Progress::none()))
            .unwrap_err();
        assert!(
            matches!(error, Error::Tar { .. } | Error::FileSystem { .. }),
            "{i}: {error:?}"
        );
        staging_is_empty(&dir.path().join("state"));
    }
    assert!(store.images().unwrap().is_empty());
    let missing = runtime().block_on(store.import_tar(&dir.path().join("missing"), None, &Progress::none()));
    assert!(matches!(missing, Err(Error::Io { .. })));
}

#[test]
fn damaged_objects_are_named_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let tar = dir.path().join("image.tar");
    std::fs::write(&tar, archive()).unwrap();
    let store = Store::open(dir.path().join("state")).unwrap();
    let info = runtime()
        .block_on(store.import_tar(&tar, None, &Progress::none()))
        .unwrap();
    let json = dir
        .path()
        .join("state/images")
        .join(info.digest.hex())
        .join("image.json");
    std::fs::write(&json, "{").unwrap();
    let error = store.image(&info.digest).unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }) && error.hint().is_some());
    let again = runtime()
        .block_on(store.import_tar(&tar, None, &Progress::none()))
        .unwrap();
    assert_eq!(again.digest, info.digest);
    assert!(store.image(&info.digest).unwrap().is_some());
    // Kernels of another format are imported again.
    let digest = Digest::of(b"kernel");
    let kernel = dir.path().join("state/kernels").join(digest.hex());
    std::fs::create_dir(&kernel).unwrap();
    std::fs::write(kernel.join("kernel.json"), r#"{"format": 0, "other": true}"#).unwrap();
    assert!(store.kernel(&digest).unwrap().is_none() && store.kernels().unwrap().is_empty());
    std::fs::create_dir(dir.path().join("state/kernels/not-a-digest")).unwrap();
    assert!(store.kernels().unwrap().is_empty());
}

#[test]
fn the_store_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    Store::open(dir.path().join("a/b")).unwrap();
    for path in ["a", "a/b", "a/b/images", "a/b/staging"] {
        assert_eq!(
            std::fs::metadata(dir.path().join(path)).unwrap().permissions().mode() & 0o777,
            0o700,
            "{path}"
        );
    }
}

fn names() -> impl Strategy<Value = String> {
    prop_oneof![4 => "[a-c](/[a-c]){0,2}/?", 1 => "(\\.\\./|/|\\./){0,2}[a-c]", 1 => Just(".".to_owned()), 1 => Just("lost+found".to_owned())]
}

proptest! {
    #![proptest_config(config(48))]

    /// Whatever entries an archive has: it is refused, or the image is a clean file system.
    #[test]
    fn any_archive_is_refused_or_clean(entries in proptest::collection::vec((names(), prop_oneof![Just(b'0'), Just(b'5'), b'0'..b'7', any::<u8>()], names(), 0usize..9000), 0..20)) {
        let Some(e2fsck) = need("e2fsck") else { return Ok(()) };
        let mut bytes: Vec<u8> = entries
            .iter()
            .flat_map(|(name, kind, link, size)| tar_entry(name, *kind, link, &vec![1; if *kind == b'0' { *size } else { 0 }]))
            .collect();
        bytes.extend(end());
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let made = banger_image::ingest::ingest(bytes.as_slice(), "test", banger_image::tar::Scrub::Nothing, &image, &Progress::none());
        match made {
            Ok(_) => fsck(&e2fsck, &image),
            Err(error) => {
                let named = matches!(error, Error::Tar { .. } | Error::FileSystem { .. });
                prop_assert!(named, "{:?}", error);
            }
        }
        // The reader alone takes all of it or says why not.
        let mut reader = Reader::new(bytes.as_slice(), Limits::default());
        while let Ok(Some(_)) = reader.next_entry() {}
    }
}
