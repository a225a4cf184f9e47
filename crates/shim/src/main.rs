//! `banger-shim` keeps one engine process: it starts it, writes its console to a bounded log, and writes down how it ended.
//!
//! It runs in three stages, each a fresh copy of the program, because that needs no `fork` of its own:
//!
//! ```text
//! daemon ──▶ start      new session, nothing inherited but stdin (the job) and stdout (reports); ends at once, so that the
//!              │        daemon has no child left and the next stage no parent that matters
//!              └▶ monitor    reads the job, keeps log and record, waits for the engine
//!                   └▶ exec       a session of its own, no capabilities, then becomes the engine
//! ```
//!
//! An engine that root starts, in a jail, is nobody's child here: `log` cuts all ties as `start` does, and `keep` writes what the
//! engine prints to the bounded log, and its end into the record when nobody can print any more.
//!
//! The engine outlives the shim: it is asked to end by nobody, and its console simply goes nowhere. It has a session of its own
//! so that the shim's end is no event for it either: the kernel hangs up a stopped process group whose last relative *in its
//! session* dies.

mod fds;
mod keep;
mod log;
mod monitor;
mod record;
mod rights;
mod source;
mod start;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let stage = args.next();
    let outcome = match stage.as_deref().and_then(|s| s.to_str()) {
        Some("start") => start::start("monitor", args.next()),
        Some("log") => start::start("keep", args.next()),
        Some("monitor") => monitor::monitor(),
        Some("keep") => keep::keep(),
        Some("exec") => start::exec(args),
        Some("--version" | "version") => start::version(),
        _ => Err("banger-shim is started by bangerd; it has no use of its own".to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            start::complain(&message);
            ExitCode::from(127)
        }
    }
}
