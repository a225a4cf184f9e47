//! The descriptor that whoever starts the daemon waits on. The only place of the crate that takes a bare number for a
//! descriptor.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// Takes over an inherited descriptor, which no child shall inherit again. Must be called first, before anything else opens
/// one.
pub fn take(number: RawFd) -> Option<OwnedFd> {
    if number < 3 {
        return None;
    }
    // SAFETY: a borrow of the bare number, to ask the kernel whether it is open; nothing is read, written or closed by it.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    fcntl_getfd(borrowed).ok()?;
    fcntl_setfd(borrowed, FdFlags::CLOEXEC).ok()?;
    // SAFETY: the descriptor is open (checked above), was inherited for this use, and the caller calls before anything else in
    // this process owns a descriptor above 2.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}
