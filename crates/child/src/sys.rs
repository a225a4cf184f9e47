//! What has to be done between fork and exec.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::Signal;

/// Lets the kernel send a program this signal when the thread that starts it ends.
pub(crate) fn end_with_parent(command: &mut Command, signal: Signal) {
    let number = signal.as_raw();
    let parent = std::process::id();
    let before_exec = move || {
        // SAFETY: both calls take and return plain numbers.
        let (set, now) = unsafe {
            let set = libc::prctl(libc::PR_SET_PDEATHSIG, number as libc::c_ulong);
            (set, libc::getppid())
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
        // It may have ended before the kernel knew of the wish.
        if u32::try_from(now) != Ok(parent) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: the closure calls nothing but prctl and getppid, which are safe between fork and exec, and allocates nothing.
    unsafe { command.pre_exec(before_exec) };
}
