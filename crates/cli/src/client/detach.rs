//! Starting a program in a session of its own: the only unsafe code of this crate.
#![allow(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes the program the leader of a new session, so that neither the terminal's signals nor its end reach it.
pub(crate) fn in_new_session(command: &mut Command) -> &mut Command {
    let new_session = || rustix::process::setsid().map(|_| ()).map_err(std::io::Error::from);
    // SAFETY: between fork and exec only async-signal-safe functions may be called. The closure makes one system call, does
    // not allocate (the error is a bare number) and touches no lock.
    unsafe { command.pre_exec(new_session) }
}
