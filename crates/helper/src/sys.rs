//! What the program does to itself before anything else, as far as only the C library can: descriptors, environment, signals.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

/// Closes every descriptor but the first three.
///
/// # Errors
/// When the kernel does not know the call; nothing has been closed then.
pub(crate) fn close_inherited() -> std::io::Result<()> {
    // SAFETY: the first thing that runs; nothing of this program owns a descriptor above 2 yet.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// Empties the environment.
pub(crate) fn clear_environment() {
    // SAFETY: the program has one thread yet, and nothing holds a pointer into the environment.
    unsafe {
        libc::clearenv();
    }
}

/// Where a signal to end is told; -1 before that.
static STOP: AtomicI32 = AtomicI32::new(-1);

/// Has SIGTERM and SIGINT write to the event descriptor, so that calls can be finished, and SIGHUP do nothing. Handlers, unlike
/// ignored signals, are not handed down to programs that are started.
pub(crate) fn tell_stop(event: OwnedFd) {
    STOP.store(event.as_raw_fd(), Ordering::SeqCst);
    // It is open for as long as the program runs.
    std::mem::forget(event);
    let told: extern "C" fn(libc::c_int) = told;
    let nothing: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: both handlers call only what may be called in one.
    unsafe {
        libc::signal(libc::SIGTERM, told as libc::sighandler_t);
        libc::signal(libc::SIGINT, told as libc::sighandler_t);
        libc::signal(libc::SIGHUP, nothing as libc::sighandler_t);
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
}

extern "C" fn told(_: libc::c_int) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: `write` may be called in a handler; the bytes live until it returns. errno is not used by what was interrupted in a
    // way that this could change: the program's calls take it at once, and a full event counter is impossible.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(STOP.load(Ordering::SeqCst), one.as_ptr().cast(), one.len());
        *libc::__errno_location() = errno;
    }
}

extern "C" fn nothing(_: libc::c_int) {}
