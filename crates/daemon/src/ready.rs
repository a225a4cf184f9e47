//! The descriptor that whoever starts the daemon waits on. The only place of the crate that takes a bare number for a
//! descriptor.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::fcntl_dupfd_cloexec;

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
