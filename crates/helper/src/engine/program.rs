//! The programs that root starts: nobody but root may be able to change them, nor the way to them.

use std::path::{Component, Path, PathBuf};

use banger_system::helper::{HelperCode, HelperError};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::ctx::{error, failed};

/// Checks a program: a regular, executable file, no link anywhere on the way to it, and all of it root's alone.
pub(super) fn check(path: &Path) -> Result<(), HelperError> {
    check_for(path, 0)
}

fn check_for(path: &Path, root: u32) -> Result<(), HelperError> {
    let denied = |at: &Path, why: &str| {
        error(
            HelperCode::Denied,
            format!("{} is refused: {} {why}", path.display(), at.display()),
        )
    };
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = PathBuf::from("/");
    let mut here = rustix::fs::open("/", flags, Mode::empty()).map_err(|e| failed("open /", e))?;
    let mut parts = path.components().peekable();
    if parts.next() != Some(Component::RootDir) {
        return Err(denied(path, "is not an absolute path"));
    }
    while let Some(part) = parts.next() {
        let Component::Normal(name) = part else {
            return Err(denied(path, "is not a plain path"));
        };
        at.push(name);
        here = rustix::fs::openat(&here, name, flags, Mode::empty()).map_err(|e| match e {
            Errno::NOENT => error(HelperCode::NotFound, format!("{} is not there", at.display())),
            e => failed(format!("open {}", at.display()), e),
        })?;
        let stat = rustix::fs::fstat(&here).map_err(|e| failed(format!("look at {}", at.display()), e))?;
        let last = parts.peek().is_none();
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => return Err(denied(&at, "is a symbolic link")),
            FileType::Directory if !last => {}
            FileType::RegularFile if last => {}
            _ if last => return Err(denied(&at, "is not a regular file")),
            _ => return Err(denied(&at, "is not a directory")),
        }
        if stat.st_uid != root {
            return Err(denied(&at, &format!("belongs to user {}, not to root", stat.st_uid)));
        }
        if stat.st_mode & 0o022 != 0 {
            return Err(denied(&at, "can be written to by others than root"));
        }
        if last && stat.st_mode & 0o100 == 0 {
            return Err(denied(&at, "is not executable"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn only_what_root_alone_can_change() {
        let me = rustix::process::geteuid().as_raw();
        // Somewhere all of whose parents are root's alone: a temporary directory is not.
        let tmp = tempfile::tempdir().unwrap();
        let program = tmp.path().join("firecracker");
        std::fs::write(&program, "x").unwrap();
        mode(&program, 0o755);
        let refused = check_for(&program, me).unwrap_err();
        assert_eq!(refused.code, HelperCode::Denied);
        assert!(refused.message.contains("can be written to by others"), "{refused}");

        if me != 0 {
            return;
        }
        let Ok(base) = tempfile::Builder::new().prefix(".banger-test").tempdir_in("/root") else {
            return;
        };
        let program = base.path().join("firecracker");
        std::fs::write(&program, "x").unwrap();
        let code = |path: &Path| check(path).map_err(|e| e.message);
        mode(&program, 0o755);
        assert_eq!(code(&program), Ok(()));
        for bad in [0o775, 0o757, 0o644, 0o777] {
            mode(&program, bad);
            assert!(code(&program).is_err(), "{bad:o}");
        }
        mode(&program, 0o755);
        std::os::unix::fs::chown(&program, Some(1000), None).unwrap();
        assert!(code(&program).unwrap_err().contains("user 1000"));
        std::os::unix::fs::chown(&program, Some(0), None).unwrap();
        let link = base.path().join("link");
        symlink(&program, &link).unwrap();
        assert!(code(&link).unwrap_err().contains("symbolic link"));
        let way = base.path().join("way");
        symlink(base.path(), &way).unwrap();
        assert!(code(&way.join("firecracker")).unwrap_err().contains("symbolic link"));
        mode(base.path(), 0o777);
        assert!(code(&program).unwrap_err().contains("can be written to by others"));
        mode(base.path(), 0o755);
        assert!(code(base.path()).unwrap_err().contains("not a regular file"));
        assert!(code(&base.path().join("../x")).is_err() && code(Path::new("firecracker")).is_err());
        assert_eq!(check(&base.path().join("none")).unwrap_err().code, HelperCode::NotFound);
    }
}
