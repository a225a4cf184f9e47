//! What of a jail others reach: while it is there, and by what they have kept of it when it is gone.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;

use banger_system::helper::{Call, HelperCode, JailFile, Request};
use banger_system::net::jail_uid;

use super::tests::{Host, OWNER, SLOT, as_user_in, id, kept, may_open};
use super::*;

/// A node's number is given to the next device. Who kept a descriptor, or a name, of a node of the jail must get nowhere with it.
#[test]
fn nodes_of_a_jail_that_is_gone_are_worthless() {
    let Some(host) = Host::new() else { return };
    let root = host.running();
    let user = jail_uid(SLOT);
    std::fs::create_dir_all(root.join("dev/net")).unwrap();
    let mut kept_nodes = Vec::new();
    for (name, kind) in [
        ("root", FileType::BlockDevice),
        ("dev/net/tun", FileType::CharacterDevice),
        ("hidden", FileType::BlockDevice),
    ] {
        let path = root.join(name);
        let number = rustix::fs::makedev(240, 255);
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, number).unwrap();
        chown(&path, Some(user), Some(user)).unwrap();
        let place = kept(0, &path);
        assert!(may_open(user, &place), "{name}: else this test says nothing");
        kept_nodes.push((name, place));
    }
    // A link of the owner's file is not the jail's to change.
    let memory = host.file("memory", 0o444, OWNER);
    std::fs::hard_link(&memory, root.join("memory")).unwrap();
    remove_jail(&host.ctx, &id()).unwrap();
    for (name, place) in kept_nodes {
        assert!(!may_open(user, &place), "{name}");
        assert!(!may_open(OWNER, &place), "{name}");
    }
    let meta = std::fs::metadata(&memory).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (OWNER, 0o444));
}

#[test]
fn disks_are_not_detached_while_a_jail_is_there() {
    let Some(host) = Host::new() else { return };
    let root = host.running();
    let detach = || {
        let call = Call {
            version: banger_system::helper::VERSION,
            op: None,
            request: Request::DisksDetach { machine: id() },
        };
        crate::dispatch::dispatch(&host.ctx, &crate::dispatch::Locks::default(), call, Vec::new())
    };
    let refused = detach().unwrap_err();
    assert_eq!(refused.code, HelperCode::Conflict, "{refused}");
    assert!(root.exists());
    remove_jail(&host.ctx, &id()).unwrap();
    assert_eq!(
        detach().map(|(answer, _)| answer),
        Ok(banger_system::helper::Answer::Done)
    );
}

/// The owner's primary group may be that of all users of the host.
#[test]
fn only_the_owner_reaches_what_is_in_a_jail() {
    let Some(host) = Host::new() else { return };
    for dir in [host._dir.path(), &host.ctx.layout.lib()] {
        std::fs::set_permissions(dir, PermissionsExt::from_mode(0o711)).unwrap();
    }
    let memory = host.file("memory", 0o444, OWNER);
    let launch = host.launch(vec![JailFile::Memory]);
    let root = jail::prepare(&host.ctx, &launch, vec![File::open(&memory).unwrap().into()]).unwrap();
    // As the jailer leaves it, and then the engine.
    let uid = jail_uid(SLOT);
    chown(root.path(), Some(uid), Some(uid)).unwrap();
    let api = root.path().join("firecracker.socket");
    let _listener = UnixListener::bind(&api).unwrap();
    chown(&api, Some(uid), Some(uid)).unwrap();
    host.saved(root.path(), "memory.new");
    jail::let_in(&root).unwrap();
    jail::open(&host.ctx, &root).unwrap();
    let reach = |uid, gid| {
        as_user_in(uid, gid, || {
            let names = ["memory", "memory.new", "metrics"];
            let read =
                names.map(|name| rustix::fs::access(root.path().join(name), rustix::fs::Access::READ_OK).is_ok());
            let connected = std::os::unix::net::UnixStream::connect(&api).is_ok();
            let inside = std::fs::read_dir(root.path()).is_ok();
            let changed = std::fs::write(root.path().join("x"), "x").is_ok()
                || std::fs::rename(root.path(), root.path().with_file_name("y")).is_ok();
            (read, connected, inside, changed)
        })
    };
    assert_eq!(reach(OWNER, 100), ([true, false, true], true, true, false), "the owner");
    let nothing = ([false; 3], false, false, false);
    assert_eq!(
        reach(OWNER + 1, OWNER),
        nothing,
        "somebody of the owner's primary group"
    );
    assert_eq!(reach(OWNER + 1, uid), nothing, "somebody of the jail's group");
    assert_eq!(reach(OWNER + 1, OWNER + 1), nothing, "a stranger");
    // One that an older helper made.
    let own = root.path().parent().unwrap();
    let _ = rustix::fs::removexattr(own, "system.posix_acl_access");
    std::fs::set_permissions(own, PermissionsExt::from_mode(0o711)).unwrap();
    assert_ne!(reach(OWNER + 1, OWNER), nothing, "else this says nothing");
    close_jails(&host.ctx).unwrap();
    assert_eq!(reach(OWNER + 1, OWNER), nothing);
    assert_eq!(reach(OWNER, OWNER), ([true, false, true], true, true, false));
}
