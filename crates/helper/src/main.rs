//! `banger-helper`: root's part of system mode.
//!
//! The daemon thinks, as the owner; this program does the few things that only root can do, for nobody but the owner
//! (`SO_PEERCRED`). It is synchronous, keeps no state of its own (what it needs to know it reads from the kernel) and derives every
//! name, path and rule from identifiers and numbers: see `banger_system::helper` for what can be asked, `docs/privileges.md` for the
//! gates.
//!
//! * [`sys`]: what it does to itself first; [`notify`]: telling systemd that it is ready,
//! * [`auth`]: the record, and who may call; [`server`]: socket, frames, threads; [`call`]: from bytes to a call,
//! * [`dispatch`]: from a call to the module that carries it out,
//! * [`net`], [`disk`], [`engine`]: the three kinds of work; [`run`]: the few programs that they start,
//! * [`inventory`]: what of all this there is,
//! * [`ctx`]: the installation it serves, and where the kernel's file systems are.

mod auth;
mod call;
mod ctx;
mod disk;
mod dispatch;
mod engine;
mod inventory;
mod net;
mod notify;
mod run;
mod server;
mod sys;

use std::path::PathBuf;
use std::process::ExitCode;

use banger_system::install::Layout;
use rustix::event::EventfdFlags;

const HELP: &str = "banger-helper: root's part of banger's system mode; bangerd-root.service starts it

usage: banger-helper [--root DIR]

  --root DIR   where the installation is (default: /)
  --version    say the version
  --help       say this
";

/// What the arguments ask for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Serve(PathBuf),
    Version,
    Help,
}

fn main() -> ExitCode {
    let notify = std::env::var_os("NOTIFY_SOCKET");
    if let Err(e) = sys::close_inherited() {
        return end(&format!("cannot close inherited descriptors: {e}"));
    }
    sys::clear_environment();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let root = match arguments(std::env::args_os().skip(1)) {
        Ok(Asked::Serve(root)) => root,
        Ok(Asked::Version) => return say(&format!("banger-helper {}\n", env!("CARGO_PKG_VERSION"))),
        Ok(Asked::Help) => return say(HELP),
        Err(text) => return end(&text),
    };
    match serve(root, notify.as_deref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => end(&text),
    }
}

fn serve(root: PathBuf, notify: Option<&std::ffi::OsStr>) -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("this is root's part of banger; systemd starts it".to_owned());
    }
    let root = std::path::absolute(&root).map_err(|e| format!("`{}`: {e}", root.display()))?;
    std::env::set_current_dir("/").map_err(|e| format!("cannot change to /: {e}"))?;
    let told = |e: rustix::io::Errno| format!("cannot prepare for signals: {e}");
    let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(told)?;
    sys::tell_stop(rustix::io::fcntl_dupfd_cloexec(&stop, 3).map_err(told)?);
    let layout = Layout::below(root);
    let record = auth::record(&layout.record()).map_err(|e| e.to_string())?;
    let served = server::listen(&layout.helper_socket(), &record).map_err(|e| e.to_string())?;
    server::log(&[
        ("level", "info".into()),
        ("msg", "helper serves".into()),
        ("version", env!("CARGO_PKG_VERSION").into()),
        ("owner", record.owner.uid.into()),
    ]);
    let ctx = ctx::Ctx {
        layout,
        record,
        proc: "/proc".into(),
        sys: "/sys".into(),
    };
    for mended in [disk::remove_stale_nodes(&ctx), engine::close_jails(&ctx)] {
        if let Err(e) = mended {
            server::log(&[("level", "error".into()), ("msg", e.to_string().into())]);
        }
    }
    notify::ready(notify);
    server::serve(&served, ctx, &stop).map_err(|e| e.to_string())
}

fn arguments(mut given: impl Iterator<Item = std::ffi::OsString>) -> Result<Asked, String> {
    let mut root = PathBuf::from("/");
    while let Some(argument) = given.next() {
        match argument.to_str() {
            Some("--root") => match given.next() {
                Some(directory) if !directory.is_empty() => root = directory.into(),
                _ => return Err("--root needs a directory".to_owned()),
            },
            Some("--version" | "-V") => return Ok(Asked::Version),
            Some("--help" | "-h") => return Ok(Asked::Help),
            _ => {
                let shown = argument.to_string_lossy().escape_default().to_string();
                return Err(format!("unknown argument `{shown}`; there is --root DIR"));
            }
        }
    }
    Ok(Asked::Serve(root))
}

fn say(text: &str) -> ExitCode {
    let _ = rustix::io::write(rustix::stdio::stdout(), text.as_bytes());
    ExitCode::SUCCESS
}

fn end(text: &str) -> ExitCode {
    server::log(&[("level", "error".into()), ("msg", text.into())]);
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_few() {
        let read = |given: &[&str]| arguments(given.iter().map(Into::into));
        assert_eq!(read(&[]), Ok(Asked::Serve("/".into())));
        assert_eq!(read(&["--root", "/x"]), Ok(Asked::Serve("/x".into())));
        assert_eq!(read(&["--version"]), Ok(Asked::Version));
        assert_eq!(read(&["--root", "/x", "--help"]), Ok(Asked::Help));
        for bad in [&["--root"][..], &["--root", ""], &["serve"], &["--owner", "0"]] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }
}
