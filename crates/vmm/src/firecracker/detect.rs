//! Which Firecracker is there, and whether machines may be trusted to it.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::config::unsupported;
use super::{BINARY, ENGINE};
use crate::engine::EngineError;
use crate::program;
use crate::start::io_error;

/// The newest version that was tried.
const NEWEST: (u32, u32) = (1, 16);
/// What is wrong with versions before.
const WHY: &str = "it has the flaws CVE-2026-1386 and CVE-2026-5747: 1.14.4 (of 1.14) or 1.15.1 and later are needed";

/// A Firecracker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) binary: PathBuf,
    pub(super) version: String,
    pub(super) warning: Option<String>,
}

/// Finds the binary and asks it. `trusted`: it is started as root, so nobody but root may have a say in what it is.
pub(super) fn detect(binary: Option<&Path>, trusted: bool) -> Result<Found, EngineError> {
    let binary = program::find(ENGINE, binary, BINARY)?;
    if trusted {
        check_file(&binary)?;
    }
    let fits = |name: &std::ffi::OsStr| name.to_str().is_some_and(|name| name.starts_with(BINARY));
    if !binary.file_name().is_some_and(fits) {
        // Its processes are told by their name.
        return Err(unsupported(format!(
            "be started as {}: the file's name must begin with `{BINARY}`",
            binary.display()
        )));
    }
    let said = program::ask(&binary, &["--version"])?;
    let (version, numbers) =
        version(&said).ok_or_else(|| unsupported(format!("tell the version of {}", binary.display())))?;
    let warning = judge(numbers).map_err(|why| unsupported(format!("be used in version {version}: {why}")))?;
    Ok(Found {
        binary,
        version,
        warning,
    })
}

/// A file that only root can have made and only root can change.
pub(super) fn check_file(binary: &Path) -> Result<(), EngineError> {
    let meta = std::fs::symlink_metadata(binary).map_err(|e| io_error(format!("look at {}", binary.display()), e))?;
    trusted(meta.is_file(), meta.uid(), meta.permissions().mode())
        .map_err(|why| unsupported(format!("be started from {}: {why}", binary.display())))
}

fn trusted(regular: bool, uid: u32, mode: u32) -> Result<(), &'static str> {
    if !regular {
        Err("it must be a regular file, not a link")
    } else if uid != 0 {
        Err("it must be root's")
    } else if mode & 0o022 != 0 {
        Err("others than root can write to it (chmod go-w)")
    } else if mode & 0o111 == 0 {
        Err("it is not executable")
    } else {
        Ok(())
    }
}

/// `Firecracker v1.16.1` in any line → `1.16.1`.
fn version(said: &str) -> Option<(String, (u32, u32, u32))> {
    said.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("Firecracker ")?;
        let word = rest.split_ascii_whitespace().next()?;
        let word = word.strip_prefix('v').unwrap_or(word);
        Some((word.to_owned(), numbers(word)?))
    })
}

/// `1.16.1-dirty` → 1, 16, 1.
fn numbers(word: &str) -> Option<(u32, u32, u32)> {
    let plain = word.split(['-', '+']).next()?;
    let mut parts = plain.split('.').map(|part| part.parse().ok());
    let numbers = (parts.next()??, parts.next()??, parts.next()??);
    parts.next().is_none().then_some(numbers)
}

/// The versions of which a plain resume cuts the guest channel off: from the first to before the second. From 1.16.0 on the vsock device
/// delivers nothing after a resume until the guest has acknowledged a reset, and only saving sends that reset. Mended upstream after
/// 1.16.1, on the way to 1.17.
const RESUME_CUTS_CHANNEL: [(u32, u32, u32); 2] = [(1, 16, 0), (1, 17, 0)];

/// Whether an engine of this version needs a reset of its guest channel before it is resumed. An unknown version does: a reset more only
/// closes the connections that were open.
pub(super) fn resume_cuts_channel(version: &str) -> bool {
    let [first, mended] = RESUME_CUTS_CHANNEL;
    numbers(version).is_none_or(|numbers| (first..mended).contains(&numbers))
}

/// What speaks against a version, or what is to be said about it.
fn judge((major, minor, patch): (u32, u32, u32)) -> Result<Option<String>, String> {
    let good = match (major, minor) {
        (1, 14) => patch >= 4,
        (1, 15) => patch >= 1,
        newer => newer > (1, 15),
    };
    if !good {
        return Err(WHY.to_owned());
    }
    Ok(((major, minor) > NEWEST).then(|| {
        format!(
            "firecracker {major}.{minor}.{patch} is newer than {}.{}, the newest that was tested with this banger",
            NEWEST.0, NEWEST.1
        )
    }))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn versions_are_read_from_what_it_prints() {
        for (said, expected) in [
            ("Firecracker v1.16.1\n", Some("1.16.1")),
            (
                "Firecracker v1.14.4\n\nSupported snapshot data format versions: v8.0.0\n",
                Some("1.14.4"),
            ),
            (
                "2026-04-01T10:00:00.1 [anonymous-instance:main] Running Firecracker v1.1.1\nFirecracker v1.15.1-dirty\n",
                Some("1.15.1-dirty"),
            ),
            ("Firecracker 1.15.1", Some("1.15.1")),
            ("Firecracker v1.15", None),
            ("Firecracker v1.15.1.2", None),
            ("Firecracker vx.y.z", None),
            ("Jailer v1.16.1", None),
            ("", None),
        ] {
            assert_eq!(version(said).map(|v| v.0).as_deref(), expected, "{said}");
        }
    }

    #[test]
    fn versions_that_cut_the_guest_off_are_known() {
        for flawed in ["1.16.0", "1.16.1", "1.16.1-dirty", "1.16.9", "main", ""] {
            assert!(resume_cuts_channel(flawed), "{flawed}");
        }
        for good in ["1.14.4", "1.15.1", "1.17.0", "2.0.0"] {
            assert!(!resume_cuts_channel(good), "{good}");
        }
    }

    #[test]
    fn versions_with_known_flaws_are_refused() {
        for old in [(0, 25, 0), (1, 5, 0), (1, 13, 9), (1, 14, 1), (1, 14, 3), (1, 15, 0)] {
            assert!(judge(old).unwrap_err().contains("CVE-2026-1386"), "{old:?}");
        }
        for good in [(1, 14, 4), (1, 14, 9), (1, 15, 1), (1, 16, 0), (1, 16, 9)] {
            assert_eq!(judge(good), Ok(None), "{good:?}");
        }
        for new in [(1, 17, 0), (2, 0, 0)] {
            assert!(judge(new).unwrap().unwrap().contains("newer"), "{new:?}");
        }
    }

    #[test]
    fn root_starts_only_what_is_roots() {
        assert_eq!(trusted(true, 0, 0o100_755), Ok(()));
        for (regular, uid, mode) in [
            (false, 0, 0o755),
            (true, 1000, 0o755),
            (true, 0, 0o775),
            (true, 0, 0o757),
            (true, 0, 0o644),
        ] {
            assert!(trusted(regular, uid, mode).is_err(), "{regular} {uid} {mode:o}");
        }
    }

    #[test]
    fn what_is_no_firecracker_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        assert!(matches!(
            detect(Some(Path::new("/nonexistent")), false),
            Err(EngineError::Missing { .. })
        ));
        let good = script("firecracker-v1.16.1", "echo Firecracker v1.16.1");
        let found = detect(Some(&good), false).unwrap();
        assert_eq!((found.version.as_str(), found.warning), ("1.16.1", None));
        let old = script("firecracker-old", "echo Firecracker v1.14.1");
        let error = detect(Some(&old), false).unwrap_err().to_string();
        assert!(error.contains("1.14.1") && error.contains("CVE-2026-5747"), "{error}");
        let other = script("fc", "echo Firecracker v1.16.1");
        assert!(matches!(
            detect(Some(&other), false),
            Err(EngineError::Unsupported { .. })
        ));
        let link = dir.path().join("firecracker");
        std::os::unix::fs::symlink(&good, &link).unwrap();
        assert!(detect(Some(&link), false).is_ok());
        let error = detect(Some(&link), true).unwrap_err().to_string();
        assert!(error.contains("not a link"), "{error}");
    }
}
