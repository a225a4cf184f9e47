//! The stages before and after the monitor.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::fs::Mode;
use rustix::process::{PTracer, Resource, Rlimit, set_ptracer, setrlimit, setsid, umask};

use crate::{fds, rights};

/// This program, even when its file has been replaced meanwhile.
pub(crate) const SELF: &str = "/proc/self/exe";

/// First stage: cuts all ties and starts the stage that stays. `tag` names the machine in the process list.
pub(crate) fn start(next: &str, tag: Option<OsString>) -> Result<(), String> {
    fds::close_inherited();
    // Fails only for a process group leader, which then is no session's member by accident but by its caller's choice.
    let _ = setsid();
    umask(Mode::from_raw_mode(0o077));
    std::env::set_current_dir("/").map_err(|e| format!("cannot enter /: {e}"))?;
    Command::new(SELF)
        .arg0("banger-shim")
        .arg(next)
        .args(tag)
        .env_clear()
        .stdin(Stdio::inherit())
        .stdout(Stdio::inherit())
        .stderr(Stdio::null())
        .spawn()
        .map(drop)
        .map_err(|e| format!("cannot start the {next}: {e}"))
}

/// Last stage: becomes the engine. Its own messages go where the engine's go.
pub(crate) fn exec(mut args: impl Iterator<Item = OsString>) -> Result<(), String> {
    let engine = args.next().ok_or("no engine was named")?;
    setsid().map_err(|e| format!("cannot open a session: {e}"))?;
    // The memory of a guest must not end up in a core file.
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none).map_err(|e| format!("cannot turn off core files: {e}"))?;
    // Guest memory is saved by reading it from outside, as the same user. Where Yama lets only ancestors do that (`ptrace_scope` 1)
    // this permits it; it stays over the change of program. Without Yama there is nothing to permit.
    let _ = set_ptracer(PTracer::Any);
    rights::give_up()?;
    let error = Command::new(&engine).args(args).exec();
    Err(format!("cannot start {}: {error}", engine.display()))
}

/// Prints the version.
pub(crate) fn version() -> Result<(), String> {
    writeln!(std::io::stdout(), "banger-shim v{}", env!("CARGO_PKG_VERSION")).map_err(|e| e.to_string())
}

/// Says what went wrong on standard error, if anybody listens.
pub(crate) fn complain(message: &str) {
    let _ = writeln!(std::io::stderr(), "banger-shim: {message}");
}
