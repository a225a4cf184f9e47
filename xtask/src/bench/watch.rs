//! Clearing up after a benchmark that was ended in the middle, however it was.
//!
//! A second process of this program waits for the end of the first one, in a process group of its own, so that an interrupt from
//! the terminal does not reach it. It holds the other end of a pipe: nothing needs to be told.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use banger_testkit::{TestEnv, processes};
use rustix::process::Signal;

/// The chore of the second process.
pub(crate) const CHORE: &str = "clear-up-after";

/// Ends, and has nothing to do, when this is dropped.
pub(super) struct Watch(Child);

/// Starts the second process.
pub(super) fn start() -> Result<Watch, String> {
    let me = std::env::current_exe().map_err(|e| format!("cannot tell where this program is: {e}"))?;
    Command::new(&me)
        .args([CHORE, &std::process::id().to_string()])
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .map(Watch)
        .map_err(|e| format!("cannot run {}: {e}", me.display()))
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It takes a word for a regular end, so that it need not look.
        if let Some(mut pipe) = self.0.stdin.take() {
            let _ = std::io::Write::write_all(&mut pipe, b".");
        }
        let _ = self.0.wait();
    }
}

/// The second process: waits, and clears up.
pub(crate) fn run(watched: &str) -> Result<(), String> {
    let watched: i32 = watched.parse().map_err(|_| format!("`{watched}` is no process"))?;
    let mut word = Vec::new();
    let _ = std::io::stdin().read_to_end(&mut word);
    if !word.is_empty() {
        return Ok(());
    }
    eprintln!("interrupted: clearing up");
    let gone = processes::reached(Duration::from_secs(10), || processes::read(watched).is_none());
    if !gone {
        return Err(format!("process {watched} closed its pipe and does not end"));
    }
    // It may have been making the images that all environments share.
    let base = PathBuf::from(format!("/tmp/btb{watched}"));
    for process in processes::naming(&[Path::new(&base)]) {
        processes::signal(&process, Signal::KILL);
    }
    let _ = std::fs::remove_dir_all(&base);
    // The first environment of a process clears those whose owners are gone.
    TestEnv::bare("bench-clear-up").close();
    Ok(())
}
