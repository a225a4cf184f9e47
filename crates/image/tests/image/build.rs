//! From packages to images and kernels, with the distribution's own tools and packages.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::common::{debugfs, fsck, need};
use banger_image::{Error, Progress, Step, Store, disk, recipe};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// Steps that were reported, with done and total.
type Seen = Arc<Mutex<Vec<(Step, u64, u64)>>>;

fn recorder() -> (Progress, Seen) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let to = seen.clone();
    (
        Progress::new(move |s| to.lock().unwrap().push((s.step, s.done, s.total))),
        seen,
    )
}

/// A kernel package by the distribution's client, or why there is none.
fn kernel_package(dir: &Path) -> Option<PathBuf> {
    need("apt-get")?;
    let found = runtime().block_on(banger_image::kernel::fetch::download(dir, &Progress::none()));
    match found {
        Ok(found) => Some(found.path),
        Err(error) => {
            assert!(
                std::env::var("CI").as_deref() != Ok("true"),
                "no kernel package: {error}"
            );
            eprintln!("skipped: no kernel package: {error}");
            None
        }
    }
}

#[test]
fn kernel_of_the_distribution() {
    let dir = tempfile::tempdir().unwrap();
    let Some(package) = kernel_package(dir.path()) else {
        return;
    };
    let store = Store::open(dir.path().join("state")).unwrap();
    let (progress, seen) = recorder();
    let start = Instant::now();
    // Two importers at once: both get the same kernel.
    let (a, b) = runtime().block_on(async {
        tokio::join!(
            store.import_kernel_deb(&package, Some("test"), &progress),
            store.import_kernel_deb(&package, None, &progress)
        )
    });
    let (a, b) = (a.unwrap(), b.unwrap());
    eprintln!("two imports at once: {:?}", start.elapsed());
    assert_eq!(a.digest, b.digest);
    assert_eq!(store.kernels().unwrap().len(), 1);
    assert!(
        seen.lock()
            .unwrap()
            .iter()
            .any(|(step, ..)| *step == Step::ExtractKernel)
    );

    let files = store.kernel(&a.digest).unwrap().unwrap();
    let elf = std::fs::read(&files.vmlinux).unwrap();
    assert!(elf.starts_with(b"\x7fELF\x02\x01") && banger_image::Digest::of(&elf) == a.digest);
    eprintln!("{}: {} bytes, modules {:?}", a.release, elf.len(), a.modules);
    let at = |name: &str| {
        a.modules
            .iter()
            .position(|m| m == name)
            .unwrap_or_else(|| panic!("{name} is missing"))
    };
    assert!(
        at("virtio_ring") < at("virtio") && at("virtio") < at("virtio_mmio") && at("net_failover") < at("virtio_net")
    );
    at("virtio_blk");
    at("virtio_console");

    let agent = dir.path().join("agent");
    std::fs::write(&agent, b"\x7fELF agent").unwrap();
    let first = runtime().block_on(store.initramfs(&a.digest, &agent)).unwrap();
    let start = Instant::now();
    assert_eq!(runtime().block_on(store.initramfs(&a.digest, &agent)).unwrap(), first);
    eprintln!("initramfs again: {:?}", start.elapsed());
    std::fs::write(&agent, b"\x7fELF another agent").unwrap();
    assert_ne!(runtime().block_on(store.initramfs(&a.digest, &agent)).unwrap(), first);

    store.delete_kernel(&a.digest).unwrap();
    store.delete_kernel(&a.digest).unwrap();
    assert!(store.kernel(&a.digest).unwrap().is_none() && !first.exists());
    assert!(matches!(
        runtime().block_on(store.initramfs(&a.digest, &agent)),
        Err(Error::NoKernel(_))
    ));
    assert_eq!(std::fs::read_dir(dir.path().join("state/staging")).unwrap().count(), 0);
}

#[test]
fn slim_image_of_the_distribution() {
    let (Some(_), Some(e2fsck), Some(_)) = (need("mmdebstrap"), need("e2fsck"), need("debugfs")) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let (progress, seen) = recorder();
    let start = Instant::now();
    let info = runtime()
        .block_on(store.build_image(recipe::find("debian-slim").unwrap(), &progress))
        .unwrap();
    eprintln!("debian-slim in {:?}: {info:?}", start.elapsed());
    assert_eq!(info.init, None);
    let seen = seen.lock().unwrap();
    for step in [
        Step::DownloadPackages,
        Step::InstallPackages,
        Step::WriteImage,
        Step::Store,
    ] {
        assert!(seen.iter().any(|(s, ..)| *s == step), "{step:?} was not reported");
    }
    assert!(
        seen.iter()
            .any(|(s, done, total)| *s == Step::InstallPackages && *done > 10 && done <= total)
    );

    let image = store.image(&info.digest).unwrap().unwrap();
    fsck(&e2fsck, &image.rootfs);
    let stat = |p: &str| debugfs(&image.rootfs, &format!("stat {p}"));
    assert!(stat("/usr/bin/su").contains("Mode:  04755"));
    for gone in [
        "/etc/resolv.conf",
        "/etc/hostname",
        "/etc/apt/apt.conf.d/99mmdebstrap",
        "/var/log/dpkg.log",
        "/dev/null",
    ] {
        assert!(!stat(gone).contains("Inode:"), "{gone} is in the image");
    }
    let lists = debugfs(&image.rootfs, "ls -p /var/lib/apt/lists");
    assert!(!lists.contains("Release") && !lists.contains("Packages"), "{lists}");

    let disk = dir.path().join("root.qcow2");
    disk::create_root(&image.rootfs, &disk, 8 << 30).unwrap();
    assert!(matches!(
        disk::create_root(&image.rootfs, &dir.path().join("small"), 64 << 20),
        Err(Error::DiskSize { .. })
    ));
    assert!(!dir.path().join("small").exists());
    assert!(
        disk::create_root(&image.rootfs, &disk, 8 << 30).is_err(),
        "an existing disk is never overwritten"
    );

    store.delete_image(&info.digest).unwrap();
    assert!(store.image(&info.digest).unwrap().is_none());
    assert_eq!(std::fs::read_dir(dir.path().join("staging")).unwrap().count(), 0);
}

#[test]
fn a_cancelled_build_leaves_nothing() {
    let Some(_) = need("mmdebstrap") else { return };
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let (progress, seen) = recorder();
    runtime().block_on(async {
        let building = store.clone();
        let task = tokio::spawn(async move {
            building
                .build_image(recipe::find("debian-slim").unwrap(), &progress)
                .await
        });
        let deadline = Instant::now() + std::time::Duration::from_secs(120);
        while !seen
            .lock()
            .unwrap()
            .iter()
            .any(|(step, done, _)| *step == Step::DownloadPackages && *done > 0)
        {
            assert!(
                Instant::now() < deadline && !task.is_finished(),
                "the build did not begin to download"
            );
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert_eq!(store.sweep_staging().unwrap(), 0, "work in progress is not swept");
        task.abort();
        let staging = dir.path().join("staging");
        let deadline = Instant::now() + std::time::Duration::from_secs(30);
        while std::fs::read_dir(&staging).unwrap().count() > 0 {
            assert!(Instant::now() < deadline, "staging was not removed");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    });
    assert!(store.images().unwrap().is_empty());
}

#[test]
fn leftovers_of_a_crash_are_swept() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    std::fs::create_dir_all(dir.path().join("staging/work-dead/image")).unwrap();
    std::fs::write(dir.path().join("staging/work-dead/image/rootfs.ext4"), "half").unwrap();
    let precious = dir.path().join("precious");
    std::fs::create_dir(&precious).unwrap();
    // A damaged note must not lead the sweep elsewhere.
    std::fs::write(dir.path().join("staging/work-dead/outside"), precious.to_str().unwrap()).unwrap();
    assert_eq!(store.sweep_staging().unwrap(), 1);
    assert!(precious.exists());
    assert_eq!(std::fs::read_dir(dir.path().join("staging")).unwrap().count(), 0);
}
