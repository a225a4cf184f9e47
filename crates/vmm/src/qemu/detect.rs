//! Which QEMU is there.

use std::path::{Path, PathBuf};

use super::args::unsupported;
use super::{BINARY, ENGINE};
use crate::engine::EngineError;
use crate::program::{self, ask};

/// The oldest version with everything that the driver uses.
const OLDEST: (u32, u32) = (6, 0);
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
    let binary = program::find(ENGINE, binary, BINARY)?;
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
    use std::os::unix::fs::PermissionsExt;

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
}
