//! Jails under hostile hands: the engine's (whatever is in the chroot) and the owner's (whatever is handed over).

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use banger_system::helper::{HelperCode, JailFile};
use banger_system::id::MachineId;
use banger_system::install::{Installed, Layout, Owner, RECORD_VERSION, Record};
use banger_system::net::jail_uid;

use super::*;

/// The owner in tests, where they run as root.
pub(crate) const OWNER: u32 = 4242;
pub(super) const SLOT: u32 = 7;

/// An installation below a directory.
pub(crate) fn context(root: &Path) -> Ctx {
    Ctx {
        layout: Layout::below(root),
        record: Record {
            version: RECORD_VERSION,
            owner: Owner {
                user: "dev".into(),
                uid: OWNER,
                gid: OWNER,
                home: "/home/dev".into(),
            },
            installed: Installed {
                at: String::new(),
                version: String::new(),
                commit: String::new(),
            },
            network: Default::default(),
            firecracker: Default::default(),
        },
        proc: "/proc".into(),
        sys: "/sys".into(),
    }
}

/// Does something as another user: a thread of its own changes its user, the process does not.
pub(crate) fn as_user<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> T {
    as_user_in(uid, uid, work)
}

/// The same with another primary group.
pub(super) fn as_user_in<T: Send>(uid: u32, gid: u32, work: impl FnOnce() -> T + Send) -> T {
    use rustix::fs::{Gid, Uid};
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    std::thread::scope(|scope| {
        let as_them = || {
            let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
            set_thread_groups(&[]).unwrap();
            set_thread_res_gid(group, group, group).unwrap();
            set_thread_res_uid(user, user, user).unwrap();
            work()
        };
        scope.spawn(as_them).join().unwrap()
    })
}

/// A place of a user's, kept (`O_PATH`).
pub(crate) fn kept(uid: u32, path: &Path) -> OwnedFd {
    use rustix::fs::{Mode, OFlags};
    as_user(uid, || {
        rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
    })
}

/// Whether the rights of a kept place let a user open it again. What is behind it does not matter: that is asked afterwards.
pub(crate) fn may_open(uid: u32, place: &OwnedFd) -> bool {
    use rustix::fs::{Mode, OFlags};
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", place.as_raw_fd());
    let flags = [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR];
    let refused = |flags| {
        let opened = as_user(uid, || rustix::fs::open(&path, flags | OFlags::NONBLOCK, Mode::empty()));
        matches!(opened, Err(rustix::io::Errno::ACCESS))
    };
    !flags.into_iter().all(refused)
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub(super) fn id() -> MachineId {
    MachineId::parse("00112233aabbccdd").unwrap()
}

/// An installation with the owner's directory of state.
pub(super) struct Host {
    pub(super) _dir: tempfile::TempDir,
    pub(super) ctx: Ctx,
    state: PathBuf,
}

impl Host {
    /// None without the rights that these tests need.
    pub(super) fn new() -> Option<Self> {
        if !is_root() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let ctx = context(dir.path());
        let state = ctx.layout.state();
        std::fs::create_dir_all(&state).unwrap();
        std::fs::set_permissions(&state, PermissionsExt::from_mode(0o700)).unwrap();
        chown(&state, Some(OWNER), Some(OWNER)).unwrap();
        Some(Self { _dir: dir, ctx, state })
    }

    pub(super) fn file(&self, name: &str, mode: u32, uid: u32) -> PathBuf {
        let path = self.state.join(name);
        std::fs::write(&path, name).unwrap();
        chown(&path, Some(uid), Some(uid)).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    pub(super) fn launch(&self, files: Vec<JailFile>) -> Launch {
        Launch {
            machine: id(),
            slot: SLOT,
            vcpu: 1,
            memory_mib: 128,
            files,
            disks: Vec::new(),
        }
    }

    fn share(&self, fd: impl Into<OwnedFd>) -> Result<Dir, HelperError> {
        jail::prepare(&self.ctx, &self.launch(vec![JailFile::Kernel]), vec![fd.into()])
    }

    /// A jail as it is while its engine runs.
    pub(super) fn running(&self) -> PathBuf {
        let root = jail::prepare(&self.ctx, &self.launch(Vec::new()), Vec::new()).unwrap();
        let uid = jail_uid(SLOT);
        chown(root.path(), Some(uid), Some(OWNER)).unwrap();
        root.path().to_owned()
    }

    pub(super) fn saved(&self, root: &Path, name: &str) {
        std::fs::write(root.join(name), "saved").unwrap();
        // As root's umask has it.
        std::fs::set_permissions(root.join(name), PermissionsExt::from_mode(0o600)).unwrap();
        chown(root.join(name), Some(jail_uid(SLOT)), Some(jail_uid(SLOT))).unwrap();
    }

    fn target(&self) -> PathBuf {
        let dir = self.state.join("into");
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        chown(&dir, Some(OWNER), Some(OWNER)).unwrap();
        dir
    }

    fn collect(&self, into: &Path) -> Result<(), HelperCode> {
        collect(&self.ctx, &id(), vec![File::open(into).unwrap().into()]).map_err(|e| e.code)
    }
}

#[test]
fn a_jail_is_made_and_goes() {
    let Some(host) = Host::new() else { return };
    let kernel = host.file("kernel", 0o444, OWNER);
    let root = host.share(File::open(&kernel).unwrap()).unwrap();
    let there = std::fs::metadata(root.path().join("kernel")).unwrap();
    assert_eq!(
        there.ino(),
        std::fs::metadata(&kernel).unwrap().ino(),
        "linked, not copied"
    );
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!(mode(root.path()), 0o700);
    // The group's bits are the list's mask: who passes is in the test below.
    assert_eq!(mode(root.path().parent().unwrap()), 0o710);
    assert_eq!(mode(&host.ctx.layout.jails()), 0o711);
    let pipe = std::fs::symlink_metadata(root.path().join("metrics")).unwrap();
    assert_eq!(
        (pipe.uid(), pipe.gid(), pipe.mode() & 0o7777),
        (jail_uid(SLOT), jail_uid(SLOT), 0o644)
    );
    assert_eq!(jail::all(&host.ctx).unwrap(), [id()]);
    // Again, over what is there.
    host.share(File::open(&kernel).unwrap()).unwrap();
    remove_jail(&host.ctx, &id()).unwrap();
    remove_jail(&host.ctx, &id()).unwrap();
    assert!(kernel.exists() && jail::all(&host.ctx).unwrap().is_empty());
}

#[test]
fn only_files_that_nobody_can_change_are_shared() {
    let Some(host) = Host::new() else { return };
    let code = |fd: OwnedFd| host.share(fd).map(drop).map_err(|e| e.code);
    let open = |path: &Path| OwnedFd::from(File::open(path).unwrap());
    let refused = Err(HelperCode::Denied);
    assert_eq!(code(open(&host.file("roots", 0o444, 0))), Ok(()));
    for mode in [0o644, 0o4444, 0o400, 0o555] {
        assert_eq!(code(open(&host.file("mode", mode, OWNER))), refused, "{mode:o}");
    }
    assert_eq!(code(open(&host.file("anothers", 0o444, OWNER + 1))), refused);
    let kernel = host.file("kernel", 0o444, OWNER);
    let writable = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&kernel)
        .unwrap();
    assert_eq!(code(writable.into()), refused);
    assert_eq!(code(open(&host.state)), refused, "a directory");
    assert_eq!(code(open(Path::new("/dev/null"))), refused, "a device");
    assert_eq!(code(open(Path::new("/proc/version"))), refused, "another file system");
    // A name that leads elsewhere by now is of no account: the file is the one that was opened.
    let fd = open(&kernel);
    std::fs::rename(&kernel, host.state.join("aside")).unwrap();
    symlink("/etc/passwd", &kernel).unwrap();
    let root = host.share(fd).unwrap();
    assert_eq!(std::fs::read(root.path().join("kernel")).unwrap(), b"kernel");
}

#[test]
fn the_same_file_by_another_mount_is_only_the_same_file() {
    let Some(host) = Host::new() else { return };
    let kernel = host.file("kernel", 0o444, OWNER);
    let fd = OwnedFd::from(File::open(&kernel).unwrap());
    let stat = rustix::fs::fstat(&fd).unwrap();
    let same = |fd: &OwnedFd| jail::same_file(&host.ctx, fd, &stat).unwrap();
    let again = same(&fd).unwrap();
    assert_eq!(rustix::fs::fstat(&again).unwrap().st_ino, stat.st_ino);
    // Gone, replaced by another, replaced by a link: it is not found.
    std::fs::rename(&kernel, host.state.join("aside")).unwrap();
    assert!(same(&fd).is_some(), "the kernel knows its new name");
    std::fs::remove_file(host.state.join("aside")).unwrap();
    assert!(same(&fd).is_none());
}

#[test]
fn sockets_are_opened_and_nothing_else_is() {
    let Some(host) = Host::new() else { return };
    let root = host.running();
    let dir = find::root(&host.ctx, &id()).unwrap();
    let open = || jail::open(&host.ctx, &dir).map_err(|e| e.code);
    assert_eq!(open(), Ok(()), "nothing there yet");
    let api = root.join("firecracker.socket");
    let _listener = UnixListener::bind(&api).unwrap();
    let refused = Err(HelperCode::Denied);
    assert_eq!(open(), refused, "root's, not the engine's");
    chown(&api, Some(jail_uid(SLOT)), Some(jail_uid(SLOT))).unwrap();
    assert_eq!(open(), Ok(()));
    let meta = std::fs::metadata(&api).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (OWNER, 0o600));
    assert_eq!(open(), Ok(()), "once more");
    let second = root.join("second");
    chown(&api, Some(jail_uid(SLOT)), None).unwrap();
    std::fs::hard_link(&api, &second).unwrap();
    assert_eq!(open(), refused, "a second name");
    std::fs::remove_file(&second).unwrap();
    let agent = root.join("agent.sock");
    let secret = host.file("secret", 0o600, 0);
    symlink(&secret, &agent).unwrap();
    assert_eq!(open(), refused, "a link");
    std::fs::remove_file(&agent).unwrap();
    host.saved(&root, "agent.sock");
    assert_eq!(open(), refused, "a file");
    let meta = std::fs::metadata(&secret).unwrap();
    assert_eq!((meta.gid(), meta.mode() & 0o7777), (0, 0o600));
}

#[test]
fn what_was_saved_becomes_the_owners() {
    let Some(host) = Host::new() else { return };
    let (root, into) = (host.running(), host.target());
    assert_eq!(host.collect(&into), Err(HelperCode::NotFound), "nothing saved");
    host.saved(&root, "memory.new");
    host.saved(&root, "state.new");
    assert_eq!(host.collect(&into), Ok(()));
    for name in ["memory", "state"] {
        let meta = std::fs::symlink_metadata(into.join(name)).unwrap();
        assert_eq!(
            (meta.uid(), meta.gid(), meta.mode() & 0o7777),
            (OWNER, OWNER, 0o444),
            "{name}"
        );
    }
    host.saved(&root, "memory.new");
    host.saved(&root, "state.new");
    assert_eq!(host.collect(&into), Err(HelperCode::Conflict), "nothing is overwritten");
}

#[test]
fn what_the_engine_cannot_have_saved_is_refused() {
    let Some(host) = Host::new() else { return };
    let (root, into) = (host.running(), host.target());
    let secret = host.file("secret", 0o600, 0);
    let kernel = host.file("kernel", 0o444, OWNER);
    let refused = Err(HelperCode::Denied);
    let new = root.join("memory.new");
    let before = std::fs::metadata(&secret).unwrap();
    symlink(&secret, &new).unwrap();
    assert_eq!(host.collect(&into), refused, "a link");
    std::fs::hard_link(&kernel, &new).unwrap();
    assert_eq!(host.collect(&into), refused, "the owner's kernel under another name");
    host.saved(&root, "memory.new");
    std::fs::hard_link(&new, root.join("kept")).unwrap();
    assert_eq!(host.collect(&into), refused, "a file that the engine keeps a name of");
    std::fs::create_dir(&new).unwrap();
    assert_eq!(host.collect(&into), refused, "a directory");
    rustix::fs::mkfifoat(rustix::fs::CWD, &new, rustix::fs::Mode::from_raw_mode(0o666)).unwrap();
    assert_eq!(host.collect(&into), refused, "a pipe");
    host.saved(&root, "memory.new");
    assert_eq!(host.collect(Path::new("/root")), refused, "a directory of root's");
    assert_eq!(host.collect(&kernel), refused, "no directory");
    chown(&root, Some(OWNER), None).unwrap();
    assert_eq!(host.collect(&into), refused, "a jail of nobody's");
    let after = std::fs::metadata(&secret).unwrap();
    assert_eq!(
        (before.uid(), before.mode(), before.ctime_nsec()),
        (after.uid(), after.mode(), after.ctime_nsec())
    );
    assert_eq!(std::fs::read_dir(&into).unwrap().count(), 0);
}

/// The engine swaps what it has saved for a link to a file of root's, over and over.
#[test]
fn a_race_for_what_was_saved_gains_nothing() {
    let Some(host) = Host::new() else { return };
    let root = host.running();
    let secret = host.file("secret", 0o600, 0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let hostile = scope.spawn(|| {
            let mut rounds = 0u32;
            while !stop.load(Ordering::Relaxed) {
                for name in ["memory.new", "state.new", "firecracker.socket", "agent.sock"] {
                    let (path, link) = (root.join(name), root.join("link"));
                    // Made anew: this thread is root and would itself write through a link.
                    let _ = std::fs::remove_file(&path);
                    if let Ok(file) = File::create_new(&path) {
                        let _ = std::os::unix::fs::fchown(&file, Some(jail_uid(SLOT)), None);
                    }
                    let _ = symlink(&secret, &link);
                    let _ = std::fs::rename(&link, &path);
                    let _ = std::fs::remove_file(&path);
                    let _ = std::fs::hard_link(&secret, &path);
                }
                rounds += 1;
            }
            rounds
        });
        let dir = find::root(&host.ctx, &id()).unwrap();
        for _ in 0..300 {
            let into = host.target();
            let _ = host.collect(&into);
            let _ = jail::open(&host.ctx, &dir);
            for entry in std::fs::read_dir(&into).unwrap() {
                let meta = std::fs::symlink_metadata(entry.unwrap().path()).unwrap();
                assert!(
                    meta.is_file() && meta.uid() == OWNER && meta.ino() != std::fs::metadata(&secret).unwrap().ino()
                );
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(hostile.join().unwrap() > 10);
    });
    let meta = std::fs::metadata(&secret).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o7777, meta.len()),
        (0, 0, 0o600, 6)
    );
}

/// Somebody replaces directories on the way to the jails. The installation's are root's, so this takes root; were it otherwise, root's
/// files would not go where a link leads.
#[test]
fn a_link_in_place_of_a_jail_is_refused() {
    let Some(host) = Host::new() else { return };
    host.running();
    let own = host.ctx.layout.jails().join("firecracker").join(id().as_str());
    let elsewhere = host.state.join("elsewhere");
    std::fs::create_dir_all(elsewhere.join("root")).unwrap();
    std::fs::write(elsewhere.join("root/file"), "x").unwrap();
    std::fs::remove_dir_all(&own).unwrap();
    symlink(&elsewhere, &own).unwrap();
    assert!(find::root(&host.ctx, &id()).is_none());
    assert_eq!(host.collect(&host.target()), Err(HelperCode::NotFound));
    remove_jail(&host.ctx, &id()).unwrap();
    assert!(elsewhere.join("root/file").exists());
    chown(host.ctx.layout.jails(), Some(OWNER), None).unwrap();
    let refused = jail::prepare(&host.ctx, &host.launch(Vec::new()), Vec::new()).map(drop);
    assert_eq!(
        refused.map_err(|e| e.code),
        Err(HelperCode::Denied),
        "jails that are the owner's"
    );
}

#[test]
fn output_goes_to_a_pipe() {
    let (read, write) = rustix::pipe::pipe().unwrap();
    assert!(check_output(&write).is_ok());
    assert!(check_output(&read).is_err());
    assert!(check_output(&File::open("/dev/null").unwrap().into()).is_err());
    assert!(check_output(&tempfile::tempfile().unwrap().into()).is_err());
}

#[test]
fn the_jailer_is_told_what_follows_from_the_machine() {
    let ctx = context(Path::new("/x"));
    let launch = Launch {
        machine: id(),
        slot: SLOT,
        vcpu: 2,
        memory_mib: 256,
        files: Vec::new(),
        disks: Vec::new(),
    };
    let text = arguments(&ctx, &launch, vec!["--cgroup".into(), "pids.max=66".into()]).join(" ");
    assert_eq!(
        text,
        "--id 00112233aabbccdd --exec-file /usr/local/bin/firecracker --uid 1879048199 --gid 1879048199 \
         --chroot-base-dir /x/var/lib/banger/jail --resource-limit fsize=335544320 --cgroup pids.max=66 -- --api-sock /firecracker.socket --level Warn"
    );
}

#[test]
fn an_engine_of_the_owners_is_what_it_says() {
    let facts = Facts {
        comm: "banger-00112233".into(),
        state: 'S',
        start_time: 9,
        uids: [OWNER; 4],
        cgroup: String::new(),
        mountinfo: String::new(),
    };
    let check = |facts: &Facts| check_owners(facts, OWNER, 9).and_then(|()| check_engine(facts, &id()));
    assert_eq!(check(&facts), Ok(()));
    for other in [
        Facts {
            comm: "banger-ffffffff".into(),
            ..facts.clone()
        },
        Facts {
            comm: "bash".into(),
            ..facts.clone()
        },
        Facts {
            start_time: 10,
            ..facts.clone()
        },
        Facts {
            uids: [0; 4],
            ..facts.clone()
        },
        Facts {
            uids: [OWNER, OWNER, 0, OWNER],
            ..facts.clone()
        },
    ] {
        assert!(check(&other).is_err(), "{other:?}");
    }
}

/// With no engine there, or none that can be verified, nothing is signalled and nothing fails.
#[test]
fn a_signal_for_nobody_is_fine() {
    let Some(host) = Host::new() else { return };
    assert!(signal(&host.ctx, &id(), Signal::Kill).is_ok() && end(&host.ctx, &id()).is_ok());
    let root = host.running();
    let mut other = std::process::Command::new("/bin/sleep").arg("60").spawn().unwrap();
    for pid in [other.id(), std::process::id(), 1] {
        std::fs::write(root.join("firecracker.pid"), pid.to_string()).unwrap();
        assert!(signal(&host.ctx, &id(), Signal::Kill).is_ok() && end(&host.ctx, &id()).is_ok());
    }
    assert!(
        matches!(other.try_wait(), Ok(None)),
        "somebody else's process was killed"
    );
    other.kill().unwrap();
    other.wait().unwrap();
    assert_eq!(open(&host.ctx, &id()).map_err(|e| e.code), Err(HelperCode::NotFound));
}
