//! Who may call: root, and the owner that root has registered.

use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;

use banger_system::install::Record;
use rustix::fs::{FileType, Mode, OFlags, fstat, open, openat};

/// Longest record.
const MAX_RECORD: u64 = 64 << 10;

/// Why there is no record to go by.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AuthError {
    /// A file or directory cannot be opened.
    #[error("cannot open `{0}`: {1}")]
    Open(String, std::io::Error),
    /// Somebody but root could have written it.
    #[error("`{0}` is not a {1} that only root can write")]
    Unsafe(String, &'static str),
    /// Its content.
    #[error("`{0}`: {1}")]
    Record(String, banger_system::install::RecordError),
}

/// Reads the record. Neither it nor its directory may be anybody's but root's.
pub(crate) fn record(path: &Path) -> Result<Record, AuthError> {
    let shown = path.display().to_string();
    let cannot = |e: rustix::io::Errno| AuthError::Open(path.display().to_string(), e.into());
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(cannot(rustix::io::Errno::INVAL));
    };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = open(parent, flags | OFlags::DIRECTORY, Mode::empty()).map_err(cannot)?;
    if !roots_own(&directory, FileType::Directory) {
        return Err(AuthError::Unsafe(parent.display().to_string(), "directory"));
    }
    let file = openat(&directory, name, flags | OFlags::NONBLOCK, Mode::empty()).map_err(cannot)?;
    if !roots_own(&file, FileType::RegularFile) {
        return Err(AuthError::Unsafe(shown, "file"));
    }
    let mut text = String::new();
    std::fs::File::from(file)
        .take(MAX_RECORD)
        .read_to_string(&mut text)
        .map_err(|e| AuthError::Open(shown.clone(), e))?;
    Record::parse(&text).map_err(|e| AuthError::Record(shown, e))
}

/// Whether it is of that type, root's, and only root may write it.
pub(crate) fn roots_own(file: impl AsFd, kind: FileType) -> bool {
    fstat(file).is_ok_and(|stat| {
        FileType::from_raw_mode(stat.st_mode) == kind && stat.st_uid == 0 && stat.st_mode & 0o022 == 0
    })
}

/// Whether a caller may call: by number, never by name.
pub(crate) fn admitted(uid: u32, record: &Record) -> bool {
    uid == 0 || uid == record.owner.uid
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    const TEXT: &str = "version = 1\n[owner]\nuser = \"dev\"\nuid = 1000\ngid = 1000\nhome = \"/home/dev\"\n\
        [installed]\nat = \"2026-11-22T10:00:00Z\"\nversion = \"0.1.0\"\ncommit = \"unknown\"\n";

    #[test]
    fn only_a_record_of_roots_is_read() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("install.toml");
        std::fs::write(&path, TEXT).unwrap();
        let mode = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        mode(&path, 0o644);
        let record = super::record(&path).unwrap();
        assert!(admitted(0, &record) && admitted(1000, &record));
        assert!(!admitted(1001, &record) && !admitted(u32::MAX, &record));
        for bad in [0o664, 0o646] {
            mode(&path, bad);
            assert!(matches!(super::record(&path), Err(AuthError::Unsafe(..))), "{bad:o}");
        }
        mode(&path, 0o644);
        mode(dir.path(), 0o777);
        assert!(matches!(super::record(&path), Err(AuthError::Unsafe(..))));
        mode(dir.path(), 0o755);
        chown(&path, Some(1000), None).unwrap();
        assert!(matches!(super::record(&path), Err(AuthError::Unsafe(..))));
        chown(&path, Some(0), None).unwrap();
        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(matches!(super::record(&link), Err(AuthError::Open(..))));
        assert!(matches!(super::record(dir.path()), Err(AuthError::Unsafe(..))));
    }
}
