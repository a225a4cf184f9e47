//! Block devices of machines, with the kernel's own device-mapper.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde_json::json;

use crate::harness::scenarios;
use crate::lab::sh;
use crate::root_helper::{Helper, disk, read, sparse, state, write};

scenarios! {
    a_disk_is_its_base_and_what_was_changed: 60,
    a_base_has_one_loop_for_all_machines: 60,
    a_full_disk_of_the_host_concerns_one_machine: 60,
    what_is_not_bangers_is_left_alone: 60,
    a_disk_in_use_is_not_removed: 60,
    a_kept_descriptor_leads_to_no_other_device: 60,
}

const ONE: &str = "00112233aabbccdd";
const TWO: &str = "ffeeddccbbaa9988";
const MIB: u64 = 1 << 20;

/// A base of 64 MiB that says so at every MiB.
fn base() -> PathBuf {
    let path = state("base");
    sparse(&path, 64 * MIB);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    for n in 0..64 {
        file.write_all_at(b"base", n * MIB).unwrap();
    }
    path
}

fn changes(name: &str) -> PathBuf {
    let path = state(name);
    sparse(&path, 600 * MIB);
    path
}

/// Four bytes of a device, past all caches.
fn at(node: &Path, offset: u64) -> Result<String, std::io::Error> {
    let file = OpenOptions::new().read(true).open(node)?;
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn put(node: &Path, offset: u64, text: &[u8]) -> std::io::Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(0o4_010_000).open(node)?;
    file.write_all_at(text, offset)
}

/// Nothing of banger's is on this host.
#[track_caller]
fn nothing_left(helper: &Helper) {
    assert_eq!(helper.inventory(), []);
    let left = sh("dmsetup ls; losetup --noheadings --list; ls /b/dev/banger 2>/dev/null || true");
    assert_eq!(left.out().trim(), "No devices found");
}

fn a_disk_is_its_base_and_what_was_changed() {
    let helper = Helper::start();
    let (base, changes) = (base(), changes("cow"));
    let node = helper.attach(ONE, &base, &changes);
    let meta = std::fs::metadata(&node).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (1000, 0o600));
    assert_eq!(
        sh(&format!("blockdev --getsize64 {}", node.display())).out().trim(),
        (512 * MIB).to_string()
    );
    assert_eq!(at(&node, 63 * MIB).unwrap(), "base");
    assert_eq!(at(&node, 64 * MIB).unwrap(), "\0\0\0\0", "behind the base's end");
    put(&node, 3 * MIB, b"mine").unwrap();
    put(&node, 500 * MIB, b"mine").unwrap();
    let status = helper.status(ONE);
    assert!(
        status["used"].as_u64().unwrap() < MIB && status["invalid"] == false,
        "{status}"
    );
    helper.detach(ONE);
    helper.detach(ONE);
    nothing_left(&helper);
    assert!(std::fs::metadata(&changes).unwrap().blocks() * 512 < MIB, "sparse");

    let node = helper.attach(ONE, &base, &changes);
    for (offset, text) in [(2, "base"), (3, "mine"), (500, "mine")] {
        assert_eq!(at(&node, offset * MIB).unwrap(), text, "{offset} MiB");
    }
    helper.remove(ONE);
    nothing_left(&helper);
    assert_eq!(at(&base, 3 * MIB).unwrap(), "base", "the base is as it was");
}

fn a_base_has_one_loop_for_all_machines() {
    let helper = Helper::start();
    let base = base();
    let nodes: Vec<PathBuf> = [ONE, TWO]
        .map(|machine| helper.attach(machine, &base, &changes(machine)))
        .into();
    let loops = || sh("losetup --noheadings --list --output BACK-FILE,RO").out();
    let over = |text: &str| {
        text.lines()
            .filter(|l| l.contains("/base ") && l.trim().ends_with('1'))
            .count()
    };
    assert_eq!(over(&loops()), 1, "{}", loops());
    put(&nodes[0], 0, b"mine").unwrap();
    assert_eq!(
        at(&nodes[1], 0).unwrap(),
        "base",
        "what one writes, the other does not see"
    );
    helper.detach(ONE);
    assert_eq!(over(&loops()), 1, "{}", loops());
    assert_eq!(at(&nodes[1], 0).unwrap(), "base");
    helper.detach(TWO);
    nothing_left(&helper);
}

fn a_full_disk_of_the_host_concerns_one_machine() {
    let helper = Helper::start();
    sh("truncate --size=48M /tmp/small.img; mkfs.ext4 -q /tmp/small.img; mkdir -p /tmp/small; mount -o loop /tmp/small.img /tmp/small")
        .code(0);
    let full = Path::new("/tmp/small/cow");
    sparse(full, 600 * MIB);
    let base = base();
    let one = helper.attach(ONE, &base, full);
    let two = helper.attach(TWO, &base, &changes("two"));
    put(&one, 0, b"mine").unwrap();
    sh(&format!(
        "! dd if=/dev/zero of={} bs=1M seek=1 count=100 oflag=direct",
        one.display()
    ))
    .code(0);
    let status = helper.status(ONE);
    assert_eq!(status["invalid"], true, "{status}");
    sh(&format!(
        "! dd if={} of=/dev/null bs=4k count=1 iflag=direct",
        one.display()
    ))
    .code(0);
    put(&two, 0, b"mine").unwrap();
    assert_eq!(helper.status(TWO)["invalid"], false);
    helper.detach(ONE);
    // With room again, and the mark of the kernel taken back, what was written before is there.
    sh(
        "umount /tmp/small; e2fsck -fp /tmp/small.img; truncate --size=200M /tmp/small.img; resize2fs /tmp/small.img; \
        mount -o loop /tmp/small.img /tmp/small",
    )
    .code(0);
    helper.attach(ONE, &base, full);
    assert_eq!(helper.status(ONE)["invalid"], true, "it stays so");
    helper.detach(ONE);
    OpenOptions::new()
        .write(true)
        .open(full)
        .unwrap()
        .write_all_at(&[1], 4)
        .unwrap();
    let one = helper.attach(ONE, &base, full);
    assert_eq!(
        (at(&one, 0).unwrap().as_str(), helper.status(ONE)["invalid"].as_bool()),
        ("mine", Some(false))
    );
    helper.detach(ONE);
    helper.detach(TWO);
    sh("umount /tmp/small; rm /tmp/small.img").code(0);
    nothing_left(&helper);
}

fn what_is_not_bangers_is_left_alone() {
    let helper = Helper::start();
    let (base, changes) = (base(), changes("cow"));
    sh(&format!("dmsetup create fc-{ONE}-root --table '0 8 zero'")).code(0);
    let refused = helper.call("disks_detach", json!({"machine": ONE}), &[]).unwrap_err();
    assert!(refused.contains("is not banger's"), "{refused}");
    let fds = || [read(&base), write(&changes)];
    let refused = helper
        .call("disk_attach", disk(ONE, json!("owner")), &fds())
        .unwrap_err();
    assert!(refused.contains("conflict"), "{refused}");
    assert_eq!(helper.inventory(), []);
    sh(&format!("dmsetup remove fc-{ONE}-root")).code(0);
    // Somebody else's loop over the same base is not used, and stays.
    sh(&format!("losetup --read-only /dev/loop7 {}", base.display())).code(0);
    helper.attach(ONE, &base, &changes);
    assert!(!sh("dmsetup table").out().contains(" 7:7 "));
    helper.remove(ONE);
    assert!(sh("losetup --noheadings --list").out().contains("/dev/loop7"));
    sh("losetup --detach /dev/loop7").code(0);
    nothing_left(&helper);
}

fn a_disk_in_use_is_not_removed() {
    let helper = Helper::start();
    let node = helper.attach(ONE, &base(), &changes("cow"));
    let held = OpenOptions::new().read(true).open(&node).unwrap();
    let refused = helper.call("disks_detach", json!({"machine": ONE}), &[]).unwrap_err();
    assert!(refused.contains("is still in use"), "{refused}");
    assert_eq!(at(&node, 0).unwrap(), "base", "a refusal changes nothing");
    drop(held);
    helper.detach(ONE);
    nothing_left(&helper);
}

/// The owner keeps a descriptor of the node. The number of the device that is gone is the next device's: that one stays closed.
fn a_kept_descriptor_leads_to_no_other_device() {
    let helper = Helper::start();
    let node = helper.attach(ONE, &base(), &changes("cow"));
    let number = std::fs::metadata(&node).unwrap().rdev();
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let place = as_dev(|| rustix::fs::open(&node, flags, Mode::empty())).unwrap();
    let again = format!("/proc/self/fd/{}", place.as_raw_fd());
    as_dev(|| rustix::fs::open(&again, OFlags::RDWR, Mode::empty())).unwrap();
    helper.detach(ONE);
    // Numbers are given out from the lowest that is free, and the disk's base had one too.
    sh("for n in 0 1; do dmsetup create secret$n --table '0 8 zero'; done; dmsetup mknodes").code(0);
    let secrets = sh("stat --dereference --format=%Hr:%Lr /dev/mapper/secret*").out();
    let old = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    assert!(
        secrets.lines().any(|secret| secret == old),
        "else this says nothing: {secrets}"
    );
    for flags in [OFlags::RDONLY, OFlags::RDWR] {
        let opened = as_dev(|| rustix::fs::open(&again, flags, Mode::empty()));
        assert_eq!(opened.map(drop), Err(rustix::io::Errno::ACCESS));
    }
    sh("dmsetup remove secret0 secret1").code(0);
    nothing_left(&helper);
}

/// Does something as the owner.
fn as_dev<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    use rustix::process::{Gid, Uid};
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    std::thread::scope(|scope| {
        let as_them = || {
            let (user, group) = (Uid::from_raw(1000), Gid::from_raw(1000));
            set_thread_groups(&[]).unwrap();
            set_thread_res_gid(group, group, group).unwrap();
            set_thread_res_uid(user, user, user).unwrap();
            work()
        };
        scope.spawn(as_them).join().unwrap()
    })
}
