//! Disks with the kernel's own loops, where this is root and there are any.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use super::*;
use crate::engine::tests::{OWNER, as_user, context, is_root, kept, may_open};

fn id() -> MachineId {
    MachineId::parse("00112233aabbccdd").unwrap()
}

struct Files {
    dir: tempfile::TempDir,
    ctx: Ctx,
}

impl Files {
    /// None where there are no loops to be had.
    fn new() -> Option<Self> {
        if !is_root() || File::open("/dev/loop-control").is_err() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let ctx = context(dir.path());
        Some(Self { dir, ctx })
    }

    fn file(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.dir.path().join(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        chown(&path, Some(OWNER), Some(OWNER)).unwrap();
        path
    }

    fn checked(&self, path: &Path, access: Access) -> Checked {
        let write = access == Access::ReadWrite;
        let file = OpenOptions::new().read(true).write(write).open(path).unwrap();
        gate::regular(file.into(), "file", access, &[OWNER]).unwrap()
    }
}

fn backing(number: u32) -> Option<String> {
    let path = format!("/sys/block/loop{number}/loop/backing_file");
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

fn gone(number: u32, path: &Path) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while backing(number).as_deref() == path.to_str() {
        assert!(
            std::time::Instant::now() < deadline,
            "loop{number} is still bound after 10 s"
        );
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn a_base_has_one_loop_however_many_want_it() {
    let Some(files) = Files::new() else { return };
    let base = files.file("base", 4 << 20);
    let one = loops::base(&files.ctx, &files.checked(&base, Access::Read)).unwrap();
    let two = loops::base(&files.ctx, &files.checked(&base, Access::Read)).unwrap();
    assert_eq!(one.number, two.number);
    assert_eq!(backing(one.number).as_deref(), base.to_str());
    assert!(
        std::fs::write(format!("/dev/loop{}", one.number), [1; 512]).is_err(),
        "read-only"
    );
    let other = files.file("other", 4 << 20);
    let three = loops::base(&files.ctx, &files.checked(&other, Access::Read)).unwrap();
    assert_ne!(one.number, three.number);
    let marked: Vec<u32> = loops::marked(&files.ctx)
        .into_iter()
        .map(|(number, _)| number)
        .collect();
    assert!(marked.contains(&one.number) && marked.contains(&three.number));
    let number = one.number;
    drop(one);
    assert_eq!(backing(number).as_deref(), base.to_str(), "still held");
    drop(two);
    gone(number, &base);
}

#[test]
fn a_base_that_was_replaced_is_another() {
    let Some(files) = Files::new() else { return };
    let base = files.file("base", 1 << 20);
    let one = loops::base(&files.ctx, &files.checked(&base, Access::Read)).unwrap();
    std::fs::remove_file(&base).unwrap();
    files.file("spare", 1 << 20);
    let again = files.file("base", 1 << 20);
    let two = loops::base(&files.ctx, &files.checked(&again, Access::Read)).unwrap();
    assert_ne!(one.number, two.number);
}

#[test]
fn many_at_once_share_a_loop() {
    let Some(files) = Files::new() else { return };
    let base = files.file("base", 1 << 20);
    let loops: Vec<loops::Loop> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..6)
            .map(|_| scope.spawn(|| loops::base(&files.ctx, &files.checked(&base, Access::Read)).unwrap()))
            .collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(loops.iter().all(|l| l.number == loops[0].number));
}

#[test]
fn changes_belong_to_one_disk() {
    let Some(files) = Files::new() else { return };
    let cow = files.file("cow", 4 << 20);
    let one = loops::changes(&files.ctx, &files.checked(&cow, Access::ReadWrite), "x").unwrap();
    let again = loops::changes(&files.ctx, &files.checked(&cow, Access::ReadWrite), "y").unwrap_err();
    assert_eq!(again.code, HelperCode::Conflict);
    std::fs::write(format!("/dev/loop{}", one.number), vec![7; 4096]).unwrap();
    drop(one);
    let bytes = std::fs::read(&cow).unwrap();
    assert_eq!((bytes.len(), bytes[4095], bytes[4096]), (4 << 20, 7, 0));
}

#[test]
fn sizes_make_sense_or_are_refused() {
    let good = 1 << 20;
    assert!(check_sizes(good, good, good).is_ok() && check_sizes(512, 3 * CHUNK, 1024).is_ok());
    for (base, changes, disk) in [
        (0, good, good),
        (good, good, 0),
        (good, good, good - 512),
        (good + 1, good, good + 2),
        (good, good, good + 1),
        (good, 0, good),
        (good, CHUNK, good),
        (good, good, u64::MAX - 511),
        (good, u64::MAX - 511, good),
    ] {
        let refused = check_sizes(base, changes, disk).map_err(|e| e.code);
        assert_eq!(refused, Err(HelperCode::BadRequest), "{base} {changes} {disk}");
    }
}

#[test]
fn what_is_not_the_owners_is_refused_before_anything_is_made() {
    let Some(files) = Files::new() else { return };
    let (base, cow) = (files.file("base", 1 << 20), files.file("cow", 1 << 20));
    let open = |path: &Path, write| OwnedFd::from(OpenOptions::new().read(true).write(write).open(path).unwrap());
    let before = loops::marked(&files.ctx).len();
    let attach = |base: OwnedFd, cow: OwnedFd| {
        let user = EngineUser::Owner;
        attach(&files.ctx, &id(), DiskRole::Root, 1 << 20, user, vec![base, cow]).map_err(|e| e.code)
    };
    let refused = Err(HelperCode::Denied);
    assert_eq!(attach(open(&base, true), open(&cow, true)), refused);
    assert_eq!(attach(open(&base, false), open(&cow, false)), refused);
    assert_eq!(attach(open(Path::new("/dev/null"), false), open(&cow, true)), refused);
    chown(&cow, Some(0), Some(0)).unwrap();
    assert_eq!(
        attach(open(&base, false), open(&cow, true)),
        refused,
        "root's file is not written to"
    );
    chown(&base, Some(OWNER + 1), None).unwrap();
    assert_eq!(
        attach(open(&base, false), open(&cow, true)),
        refused,
        "another's is not read"
    );
    assert_eq!(loops::marked(&files.ctx).len(), before);
}

#[test]
fn without_device_mapper_nothing_is_left() {
    let Some(files) = Files::new() else { return };
    if Path::new("/dev/mapper/control").exists() {
        return;
    }
    let (base, cow) = (files.file("base", 1 << 20), files.file("cow", 1 << 20));
    let fds = vec![
        File::open(&base).unwrap().into(),
        OpenOptions::new().read(true).write(true).open(&cow).unwrap().into(),
    ];
    let result = attach(&files.ctx, &id(), DiskRole::Root, 1 << 20, EngineUser::Owner, fds);
    assert_eq!(result.map_err(|e| e.code), Err(HelperCode::Unsupported));
    assert!(detach(&files.ctx, &id()).is_ok());
    assert_eq!(status(&files.ctx, &id()), Ok(Vec::new()));
    assert!(inventory(&files.ctx).is_ok());
}

#[test]
fn nodes_are_the_owners_and_go_with_their_directory() {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let Some(files) = Files::new() else { return };
    let made = nodes::make(&files.ctx, &id(), DiskRole::Work, rustix::fs::makedev(7, 200)).unwrap();
    let meta = std::fs::symlink_metadata(&made).unwrap();
    assert!(meta.file_type().is_block_device());
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (OWNER, OWNER, 0o600));
    assert_eq!(meta.rdev(), rustix::fs::makedev(7, 200));
    nodes::make(&files.ctx, &id(), DiskRole::Work, rustix::fs::makedev(7, 201)).unwrap();
    let listed = inventory(&files.ctx).unwrap();
    assert!(
        listed
            .iter()
            .any(|o| o.kind == ObjectKind::Node && o.machine == Some(id()))
    );
    nodes::remove(&files.ctx, &id()).unwrap();
    nodes::remove(&files.ctx, &id()).unwrap();
    assert!(!made.parent().unwrap().exists());
}

/// The owner keeps all that can be kept of a node: a descriptor, another name, an access control list. None leads to the device that
/// gets its number next.
#[test]
fn a_node_that_is_gone_is_worthless() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711)).unwrap();
    let ctx = context(dir.path());
    let mine = dir.path().join("mine");
    std::fs::create_dir(&mine).unwrap();
    chown(&mine, Some(OWNER), Some(OWNER)).unwrap();
    let node = nodes::make(&ctx, &id(), DiskRole::Root, rustix::fs::makedev(240, 255)).unwrap();
    let work = nodes::make(&ctx, &id(), DiskRole::Work, rustix::fs::makedev(240, 254)).unwrap();
    let (place, other) = (kept(OWNER, &node), kept(OWNER, &work));
    assert!(
        may_open(OWNER, &place) && may_open(OWNER, &other),
        "else this test says nothing"
    );
    let name = mine.join("name");
    as_user(OWNER, || std::fs::hard_link(&node, &name)).unwrap();
    // user::rw-, user:OWNER:rw-, group::---, mask::rw-, other::---
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, bits, id) in [
        (1u16, 6u16, u32::MAX),
        (2, 6, OWNER),
        (4, 0, u32::MAX),
        (0x10, 6, u32::MAX),
        (0x20, 0, u32::MAX),
    ] {
        list.extend(tag.to_le_bytes());
        list.extend(bits.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    as_user(OWNER, || {
        // Where the file system has no such lists there is nothing to keep.
        let _ = rustix::fs::setxattr(&name, "system.posix_acl_access", &list, rustix::fs::XattrFlags::empty());
    });
    nodes::remove_one(&ctx, &id(), DiskRole::Root).unwrap();
    assert!(may_open(OWNER, &other), "the other disk's node is another's");
    assert!(!may_open(OWNER, &place));
    assert!(!may_open(OWNER, &kept(OWNER, &name)), "another name, or a list");
    let meta = std::fs::symlink_metadata(&name).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o707), (0, 0, 0));
    nodes::remove(&ctx, &id()).unwrap();
    assert!(!may_open(OWNER, &other));
    // What is made in place of another is so after that one was made worthless.
    nodes::make(&ctx, &id(), DiskRole::Root, rustix::fs::makedev(240, 255)).unwrap();
    let old = kept(OWNER, &node);
    nodes::make(&ctx, &id(), DiskRole::Root, rustix::fs::makedev(240, 253)).unwrap();
    assert!(!may_open(OWNER, &old) && may_open(OWNER, &kept(OWNER, &node)));
}

#[test]
fn a_node_whose_device_another_program_removed_goes() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let ctx = context(dir.path());
    let number = rustix::fs::makedev(240, 255);
    let node = nodes::make(&ctx, &id(), DiskRole::Root, number).unwrap();
    nodes::remove_stale(&ctx, &id(), DiskRole::Root, Some(number)).unwrap();
    nodes::remove_stale(&ctx, &id(), DiskRole::Work, None).unwrap();
    assert!(node.exists(), "it is its device's");
    remove_stale_nodes(&ctx).unwrap();
    assert!(!node.exists(), "there is no such device");
}
