//! `banger-helper`: root's part of system mode.
//!
//! The daemon thinks, as the owner; this program does the few things that only root can do, for nobody but the owner
//! (`SO_PEERCRED`). It is synchronous, keeps no state of its own (what it needs to know it reads from the kernel) and derives every
//! name, path and rule from identifiers and numbers: see `banger_system::helper` for what can be asked, `docs/privileges.md` for the
//! gates.
//!
//! * [`ctx`]: the installation it serves, and where the kernel's file systems are,
//! * [`dispatch`]: from a call to the module that carries it out,
//! * [`net`], [`disk`], [`engine`]: the three kinds of work,
//! * [`inventory`]: what of all this there is.

mod ctx;
mod disk;
mod dispatch;
mod engine;
mod inventory;
mod net;

fn main() -> std::process::ExitCode {
    let _ = (dispatch::dispatch, dispatch::Locks::default);
    std::process::ExitCode::from(2)
}
