//! Which QEMU is there.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::args::unsupported;
use super::{BINARY, ENGINE, io_error};
use crate::engine::EngineError;

/// The oldest version with everything that the driver uses.
const OLDEST: (u32, u32) = (6, 0);
/// How long a question may take.
const ANSWER: Duration = Duration::from_secs(10);

/// A QEMU.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) binary: PathBuf,
    pub(super) version: String,
    /// It has the small firmware.
    pub(super) qboot: bool,
}

/// Finds the binary and asks it.
pub(super) fn detect(binary: Option<&Path>) -> Result<Found, EngineError> {
    let missing = |name: String| EngineError::Missing {
        engine: ENGINE,
        binary: name,
    };
    let binary = match binary {
        Some(path) if executable(path) => path.to_owned(),
        Some(path) => return Err(missing(path.display().to_string())),
        None => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            look_up(&path, BINARY).ok_or_else(|| missing(BINARY.to_owned()))?
        }
    };
    let said = ask(&binary, &["--version"])?;
    let version = version(&said).ok_or_else(|| unsupported(&format!("tell the version of {}", binary.display())))?;
    if numbers(&version).is_none_or(|v| v < OLDEST) {
        return Err(unsupported(&format!(
            "run machines in version {version}: {}.{} or later is needed",
            OLDEST.0, OLDEST.1
        )));
    }
    let qboot = ask(&binary, &["-L", "help"])?
        .lines()
        .any(|dir| Path::new(dir).join("qboot.rom").is_file());
    Ok(Found { binary, version, qboot })
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
fn ask(binary: &Path, args: &[&str]) -> Result<String, EngineError> {
    let failed = |e: std::io::Error| io_error(format!("run {}", binary.display()), e);
    let mut child = Command::new(binary)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
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

/// `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)` → `7.2.22`.
fn version(said: &str) -> Option<String> {
    let line = said.lines().next()?;
    let rest = &line[line.find("version ")? + "version ".len()..];
    let end = rest
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(rest.len());
    let version = rest[..end].trim_end_matches('.');
    numbers(version).map(|_| version.to_owned())
}

fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn versions_of_all_distributions_are_read() {
        for (said, expected) in [
            (
                "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright",
                Some("7.2.22"),
            ),
            ("QEMU emulator version 10.0.2\n", Some("10.0.2")),
            ("QEMU emulator version 9.1.50 (v9.1.0-1-gabc)", Some("9.1.50")),
            ("QEMU emulator version 8.2.", Some("8.2")),
            ("QEMU emulator version x", None),
            ("qemu", None),
            ("", None),
        ] {
            assert_eq!(version(said).as_deref(), expected, "{said}");
        }
        assert!(numbers("10.0.2") > Some(OLDEST) && numbers("5.2.0") < Some(OLDEST));
    }

    fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn what_is_no_qemu_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().join("plain");
        fs::write(&plain, "x").unwrap();
        assert!(matches!(detect(Some(&plain)), Err(EngineError::Missing { .. })));
        assert!(matches!(
            detect(Some(Path::new("/nonexistent"))),
            Err(EngineError::Missing { .. })
        ));
        let old = script(dir.path(), "old", "echo QEMU emulator version 4.2.1");
        assert!(matches!(detect(Some(&old)), Err(EngineError::Unsupported { .. })));
        let other = script(dir.path(), "other", "echo hello");
        assert!(matches!(detect(Some(&other)), Err(EngineError::Unsupported { .. })));
        let failing = script(dir.path(), "failing", "exit 3");
        assert!(matches!(detect(Some(&failing)), Err(EngineError::Io { .. })));
        let endless = script(dir.path(), "endless", "yes");
        assert!(matches!(detect(Some(&endless)), Err(EngineError::Io { .. })));
        let good = script(dir.path(), "good", "echo QEMU emulator version 7.2.22");
        let found = detect(Some(&good)).unwrap();
        assert_eq!((found.version.as_str(), found.qboot), ("7.2.22", false));
    }

    #[test]
    fn the_path_is_searched_in_order_and_without_relative_places() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        script(b.path(), BINARY, "");
        let path = std::env::join_paths([Path::new("."), a.path(), b.path()]).unwrap();
        assert_eq!(look_up(&path, BINARY), Some(b.path().join(BINARY)));
        assert_eq!(look_up(OsStr::new(""), BINARY), None);
    }
}
