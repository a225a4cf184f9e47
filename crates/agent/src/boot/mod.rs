//! Process 1 of the initramfs: modules, disks, mounts; then over to [`crate::pid1`] on the image's root.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount, mount_move};

use crate::channel::vsock;
use crate::console::{chain, say};
use crate::{pid1, power};

mod disks;
mod grow;
mod modules;
mod work;

/// Where the image's root is mounted before it becomes the root.
const NEW_ROOT: &str = "/newroot";

/// What went wrong on the way to the image's root.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A mount failed.
    #[error("can't mount {what}")]
    Mount {
        /// What was to be mounted, and where.
        what: String,
        /// Why it was not.
        #[source]
        source: io::Error,
    },
    /// A disk is not there.
    #[error("no disk `{serial}` within {seconds} s; there is {seen}")]
    NoDisk {
        /// Its serial.
        serial: &'static str,
        /// How long it was waited for.
        seconds: u64,
        /// The disks that are there.
        seen: String,
    },
    /// Something else that the system refused.
    #[error("can't {what}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn doing<T>(what: impl Into<String>, result: Result<T, impl Into<io::Error>>) -> Result<T, BootError> {
    result.map_err(|e| BootError::Io {
        what: what.into(),
        source: e.into(),
    })
}

/// Boots. Never comes back: it becomes the image's init, stays process 1, or cuts the power.
pub fn run() -> Infallible {
    let reason = match boot() {
        Ok(()) => pid1::run(),
        Err(e) => chain(&e),
    };
    say(&reason);
    power::off()
}

fn boot() -> Result<(), BootError> {
    let none = MountFlags::empty();
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    attach("devtmpfs", "/dev", MountFlags::NOSUID, "mode=0755")?;
    attach("proc", "/proc", safe, "")?;
    attach("sysfs", "/sys", safe, "")?;
    let modules = Path::new("/modules");
    modules::load(modules)?;
    if vsock::is_there(Path::new("/sys")) {
        modules::load_later(modules, modules::VSOCK)?;
    }
    let root = disks::find(disks::ROOT)?;
    mount_disk(&root, NEW_ROOT, none)?;
    grow::fill(&root, Path::new(NEW_ROOT));
    work::mount(&disks::find(disks::WORK)?, Path::new(NEW_ROOT))?;
    for (name, mode) in [
        ("dev", 0o755),
        ("proc", 0o555),
        ("sys", 0o555),
        ("run", 0o755),
        ("tmp", 0o1777),
    ] {
        directory(Path::new(NEW_ROOT), name, mode)?;
    }
    attach(
        "tmpfs",
        "/newroot/run",
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=0755,size=20%,nr_inodes=800k",
    )?;
    for name in ["dev", "proc", "sys"] {
        let to = format!("{NEW_ROOT}/{name}");
        doing(format!("move /{name} to {to}"), mount_move(format!("/{name}"), to))?;
    }
    move_root()?;
    prepare_dev();
    Ok(())
}

fn attach(kind: &str, at: &str, flags: MountFlags, options: &str) -> Result<(), BootError> {
    let options = std::ffi::CString::new(options).unwrap_or_default();
    mount(kind, at, kind, flags, options.as_c_str()).map_err(|e| BootError::Mount {
        what: format!("{kind} at {at}"),
        source: e.into(),
    })
}

fn mount_disk(device: &Path, at: &str, flags: MountFlags) -> Result<(), BootError> {
    // Tables of inodes that were never used lie in holes of the disk, which read as zeros: nothing has to write zeros there, in the
    // background of every machine and into the disk of each. Blocks that are freed are discarded, which returns their space to the host
    // where the engine passes it on; elsewhere the kernel ignores the option with a warning.
    mount(device, at, "ext4", flags, c"noinit_itable,discard").map_err(|e| BootError::Mount {
        what: format!("{} (ext4) at {at}", device.display()),
        source: e.into(),
    })
}

/// A directory of the image's root to mount on: made where it is missing, refused where it is a link.
fn directory(root: &Path, name: &str, mode: u32) -> Result<PathBuf, BootError> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    let path = root.join(name);
    match std::fs::symlink_metadata(&path) {
        Ok(meta) if meta.is_dir() => return Ok(path),
        Ok(_) => {
            return doing(
                format!("mount on /{name}: it is not a directory in the image"),
                Err(io::Error::from(io::ErrorKind::NotADirectory)),
            );
        }
        Err(_) => {}
    }
    doing(
        format!("make /{name}"),
        std::fs::DirBuilder::new().mode(mode).create(&path),
    )?;
    doing(
        format!("make /{name}"),
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)),
    )?;
    Ok(path)
}

/// Makes the image's root the root of this process.
fn move_root() -> Result<(), BootError> {
    // The initramfs stays in memory below the new root, so what is no longer needed of it goes.
    let _ = std::fs::remove_dir_all("/modules");
    doing("enter the root disk", rustix::process::chdir(NEW_ROOT))?;
    doing("move the root disk to /", mount_move(".", "/"))?;
    doing("make the root disk the root", rustix::process::chroot("."))?;
    doing("enter the root", rustix::process::chdir("/"))
}

/// What programs expect below `/dev` and no init has made yet. An init finds it done.
fn prepare_dev() {
    let report = |what: &str, result: io::Result<()>| {
        if let Err(e) = result {
            say(&format!("can't prepare {what}: {e}"));
        }
    };
    let noexec = MountFlags::NOSUID | MountFlags::NOEXEC;
    for (kind, at, flags, options) in [
        ("devpts", "/dev/pts", noexec, c"gid=5,mode=620,ptmxmode=000"),
        (
            "tmpfs",
            "/dev/shm",
            MountFlags::NOSUID | MountFlags::NODEV,
            c"mode=1777",
        ),
    ] {
        let made = std::fs::create_dir_all(at).and_then(|()| Ok(mount(kind, at, kind, flags, options)?));
        report(at, made);
    }
    for (name, target) in [("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        let link = format!("/dev/{name}");
        if std::fs::symlink_metadata(&link).is_err() {
            report(&link, std::os::unix::fs::symlink(format!("/proc/self/{target}"), &link));
        }
    }
    // systemd would start a program for each of these. A kernel without one of them, or an image that wants it otherwise, is
    // no matter.
    let safe = noexec | MountFlags::NODEV;
    for (kind, at, flags) in [
        ("mqueue", "/dev/mqueue", safe),
        ("hugetlbfs", "/dev/hugepages", MountFlags::NOSUID | MountFlags::NODEV),
        ("debugfs", "/sys/kernel/debug", safe),
        ("tracefs", "/sys/kernel/tracing", safe),
    ] {
        if at.starts_with("/dev") {
            let _ = std::fs::create_dir(at);
        }
        let _ = mount(kind, at, kind, flags, None);
    }
    let cgroup = Path::new("/sys/fs/cgroup");
    if cgroup.is_dir() {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        report(
            "/sys/fs/cgroup",
            mount("cgroup2", cgroup, "cgroup2", flags, c"nsdelegate,memory_recursiveprot").map_err(io::Error::from),
        );
    }
}
