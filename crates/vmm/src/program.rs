//! Programs: where they are, and what they say of themselves.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use banger_child::End;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::engine::EngineError;
use crate::start::io_error;

/// How long a question may take.
const ANSWER: Duration = Duration::from_secs(10);

/// The program that was named, or the first of a name in `PATH`.
pub(crate) fn find(engine: &'static str, named: Option<&Path>, name: &str) -> Result<PathBuf, EngineError> {
    let missing = |binary: String| EngineError::Missing { engine, binary };
    match named {
        Some(path) if executable(path) => Ok(path.to_owned()),
        Some(path) => Err(missing(path.display().to_string())),
        None => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            look_up(&path, name).ok_or_else(|| missing(name.to_owned()))
        }
    }
}

/// The first program of a name.
fn look_up(path: &OsStr, name: &str) -> Option<PathBuf> {
    std::env::split_paths(path)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(name))
        .find(|p| executable(p))
}

fn executable(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// What a program prints, bounded in size and time.
pub(crate) fn ask(binary: &Path, args: &[&str]) -> Result<String, EngineError> {
    let failed = |e: std::io::Error| io_error(format!("run {}", binary.display()), e);
    let mut command = Command::new(binary);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = banger_child::bind(&mut command, End::Killed).spawn().map_err(failed)?;
    let mut text = Vec::new();
    let outcome = child.stdout.take().map_or(Ok(()), |out| read(out, &mut text));
    if outcome.is_err() {
        let _ = child.kill();
    }
    let status = child.wait().map_err(failed)?;
    outcome.map_err(failed)?;
    if !status.success() {
        let mut words = Vec::new();
        // It has ended: what it had to say lies in the pipe, unless a child of its own keeps that open.
        let _ = child.stderr.take().map_or(Ok(()), |err| read(err, &mut words));
        let words = String::from_utf8_lossy(&words);
        let last = words.lines().rev().map(str::trim).find(|l| !l.is_empty());
        let why = last.map_or_else(|| status.to_string(), |l| format!("{status}: {}", printable(l)));
        return Err(failed(std::io::Error::other(why)));
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// One line of a program, of bounded length and without control characters.
fn printable(line: &str) -> String {
    line.chars().filter(|c| !c.is_control()).take(300).collect()
}

fn read(mut out: impl Read + std::os::fd::AsFd, text: &mut Vec<u8>) -> std::io::Result<()> {
    let deadline = std::time::Instant::now() + ANSWER;
    let mut buffer = [0; 4096];
    while text.len() < 64 << 10 {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        let left = Timespec::try_from(left).map_err(std::io::Error::other)?;
        if poll(&mut [PollFd::new(&out, PollFlags::IN)], Some(&left))? == 0 {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        match out.read(&mut buffer)? {
            0 => return Ok(()),
            n => text.extend_from_slice(&buffer[..n]),
        }
    }
    Err(std::io::Error::other("it says too much"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn the_path_is_searched_in_order_and_without_relative_places() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        script(b.path(), "some-engine", "");
        let path = std::env::join_paths([Path::new("."), a.path(), b.path()]).unwrap();
        assert_eq!(look_up(&path, "some-engine"), Some(b.path().join("some-engine")));
        assert_eq!(look_up(OsStr::new(""), "some-engine"), None);
    }
}
