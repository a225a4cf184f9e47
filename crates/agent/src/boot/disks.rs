//! Finding the disks by their serials, or by their order where the engine does not let us choose those.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink};

use super::BootError;
use crate::system::left;

/// A disk by its virtio-blk serial, and where it is when the engine gives its disks serials of its own, or none.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    serial: &'static str,
    fallback: &'static str,
}

pub(super) const ROOT: Wanted = Wanted {
    serial: "root",
    fallback: "vda",
};
pub(super) const WORK: Wanted = Wanted {
    serial: "work",
    fallback: "vdb",
};

/// How long a disk may take to appear once the drivers are loaded.
const DEADLINE: Duration = Duration::from_secs(10);

/// Waits for a disk.
pub(super) fn find(wanted: Wanted) -> Result<PathBuf, BootError> {
    let deadline = Instant::now() + DEADLINE;
    let mut events = None;
    loop {
        let disks = disks(Path::new("/sys/block"));
        if let Some(name) = choose(&disks, wanted) {
            let device = Path::new("/dev").join(name);
            if device.exists() {
                return Ok(device);
            }
        }
        let left = left(deadline);
        if left.is_zero() {
            let seen = disks
                .iter()
                .map(|(name, serial)| format!("{name} (`{serial}`)"))
                .collect::<Vec<_>>()
                .join(", ");
            let seen = if seen.is_empty() { "none".to_owned() } else { seen };
            return Err(BootError::NoDisk {
                serial: wanted.serial,
                seconds: DEADLINE.as_secs(),
                seen,
            });
        }
        // The first look comes before the listening starts, so there is a second one right behind it.
        match &events {
            None => events = Some(listen()),
            Some(socket) => wait(socket.as_ref(), left),
        }
    }
}

/// The disks that are there, with their serials.
fn disks(sys_block: &Path) -> Vec<(String, String)> {
    let Ok(entries) = std::fs::read_dir(sys_block) else {
        return Vec::new();
    };
    let mut disks: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry
                .file_name()
                .into_string()
                .ok()
                .filter(|name| name.starts_with("vd"))?;
            let serial = std::fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
            Some((name, serial.trim_matches(['\0', '\n', ' ']).to_owned()))
        })
        .collect();
    disks.sort();
    disks
}

/// The disk of that serial; where no disk has a serial of ours, the one in its place.
fn choose(disks: &[(String, String)], wanted: Wanted) -> Option<&str> {
    let ours = |serial: &str| serial == ROOT.serial || serial == WORK.serial;
    let named = disks.iter().any(|(_, serial)| ours(serial));
    let disk = disks.iter().find(|(name, serial)| {
        if named {
            serial == wanted.serial
        } else {
            name == wanted.fallback
        }
    });
    disk.map(|(name, _)| name.as_str())
}

/// The kernel's announcements of devices.
fn listen() -> Option<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        flags,
        Some(netlink::KOBJECT_UEVENT),
    )
    .ok()?;
    rustix::net::bind(&socket, &netlink::SocketAddrNetlink::new(0, 1)).ok()?;
    Some(socket)
}

/// Waits for an announcement, or half a second in case one was missed.
fn wait(events: Option<&OwnedFd>, left: Duration) {
    let left = left.min(Duration::from_millis(500));
    let timeout = rustix::time::Timespec::try_from(left).ok();
    let mut fds: Vec<PollFd<'_>> = events.into_iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    let _ = rustix::event::poll(&mut fds, timeout.as_ref());
    if let Some(socket) = events {
        let mut buffer = [0; 4096];
        while rustix::net::recv(socket, &mut buffer, RecvFlags::DONTWAIT).is_ok_and(|(_, n)| n > 0) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(disks: &[(&str, &str)]) -> Vec<(String, String)> {
        disks.iter().map(|(n, s)| ((*n).to_owned(), (*s).to_owned())).collect()
    }

    #[test]
    fn serials_come_before_places() {
        let swapped = list(&[("vda", "work"), ("vdb", "root")]);
        assert_eq!(choose(&swapped, ROOT), Some("vdb"));
        assert_eq!(choose(&swapped, WORK), Some("vda"));
        let bare = list(&[("vda", ""), ("vdb", "")]);
        assert_eq!((choose(&bare, ROOT), choose(&bare, WORK)), (Some("vda"), Some("vdb")));
        let firecracker = list(&[("vda", "2050:1572878"), ("vdb", "2050:1572879")]);
        assert_eq!(choose(&firecracker, ROOT), Some("vda"));
        assert_eq!(choose(&firecracker, WORK), Some("vdb"));
        // The other one is on its way.
        assert_eq!(choose(&list(&[("vda", "work")]), ROOT), None);
        assert_eq!(choose(&list(&[("vda", "other")]), WORK), None);
    }

    #[test]
    fn disks_are_read_from_sysfs() {
        let sys = tempfile::tempdir().unwrap();
        for (name, serial) in [("vdb", Some("work\n")), ("vda", None), ("sr0", Some("root"))] {
            std::fs::create_dir(sys.path().join(name)).unwrap();
            if let Some(serial) = serial {
                std::fs::write(sys.path().join(name).join("serial"), serial).unwrap();
            }
        }
        assert_eq!(disks(sys.path()), list(&[("vda", ""), ("vdb", "work")]));
        assert_eq!(disks(&sys.path().join("nope")), []);
    }
}
