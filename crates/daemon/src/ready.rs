//! The daemon's place among the programs that start it: it keeps nothing of what they have open, and tells them that it serves,
//! through a descriptor or systemd's socket. The only place of the crate that takes a bare number for a descriptor.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::fcntl_dupfd_cloexec;

/// Closes every inherited descriptor above standard error but `keep`: a daemon lives longer than the locks and pipes of the
/// program that started it. Must be called first, before anything else opens one.
pub fn close_inherited(keep: Option<RawFd>) {
    let keep = keep.and_then(|fd| u32::try_from(fd).ok()).filter(|fd| *fd > 2);
    match keep {
        Some(keep) => {
            close_range(3, keep - 1);
            close_range(keep + 1, u32::MAX);
        }
        None => close_range(3, u32::MAX),
    }
}

fn close_range(first: u32, last: u32) {
    if first > last {
        return;
    }
    // SAFETY: the system call takes three numbers. The caller calls before anything in this process owns a descriptor above 2.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0_u32) } == 0 {
        return;
    }
    // A kernel before 5.9.
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else {
        return;
    };
    let open: Vec<RawFd> = entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for fd in open {
        if u32::try_from(fd).is_ok_and(|fd| (first..=last).contains(&fd)) {
            // SAFETY: as above; the directory that listed them is closed again, closing its number once more does no harm.
            unsafe { libc::close(fd) };
        }
    }
}

/// Takes over an inherited descriptor, which no child shall inherit again. Must be called first, before anything else opens
/// one. Standard output may be the one; nothing is left of it then.
pub fn take(number: RawFd) -> Option<OwnedFd> {
    if number < 1 {
        return None;
    }
    // SAFETY: a borrow of the bare number, only to duplicate it; the kernel refuses a number that is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let taken = fcntl_dupfd_cloexec(borrowed, 3).ok()?;
    if number == 1 {
        // Whoever waits for the end of the pipe must not wait for the end of the daemon.
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok()?;
        rustix::stdio::dup2_stdout(null).ok()?;
    } else if number > 2 {
        // SAFETY: the descriptor is open (it was duplicated), was inherited for this use, and the caller calls before anything
        // else in this process owns a descriptor above 2.
        drop(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(number) });
    }
    Some(taken)
}

/// Tells systemd that the daemon serves, where systemd has started it and wants to know (`sd_notify(3)`).
pub fn notify() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let bytes = std::os::unix::ffi::OsStrExt::as_bytes(name.as_os_str());
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&name),
    };
    let told = address.and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        socket.send_to_addr(b"READY=1\n", &address)
    });
    if let Err(e) = told {
        tracing::warn!(error = %e, "systemd is not told that the daemon serves");
    }
}
