//! Where things are on this host: runtime, state and configuration directories, and how a path of the user is read.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Longest path that fits a Unix socket's address, its final zero left out.
const SOCKET_PATH_MAX: usize = 107;

/// What of the environment decides about paths; a value, so that tests can make one up.
#[derive(Debug, Clone, Default)]
pub(crate) struct Places {
    /// `$HOME`.
    pub(crate) home: Option<PathBuf>,
    /// `$XDG_RUNTIME_DIR`.
    pub(crate) runtime: Option<PathBuf>,
    /// `$XDG_STATE_HOME`.
    pub(crate) state: Option<PathBuf>,
    /// `$XDG_CONFIG_HOME`.
    pub(crate) config: Option<PathBuf>,
    /// Our user id.
    pub(crate) uid: u32,
}

impl Places {
    /// Those of this process. Variables that are empty or relative count as unset, as the XDG specification says.
    pub(crate) fn of_process() -> Self {
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        Self {
            home: absolute("HOME"),
            runtime: absolute("XDG_RUNTIME_DIR"),
            state: absolute("XDG_STATE_HOME"),
            config: absolute("XDG_CONFIG_HOME"),
            uid: rustix::process::getuid().as_raw(),
        }
    }

    /// The directory of the socket, and whether it is the fallback in `/tmp`, which has to be checked before it is trusted.
    pub(crate) fn runtime_dir(&self) -> (PathBuf, bool) {
        match &self.runtime {
            Some(dir) => (dir.join("banger"), false),
            None => (PathBuf::from(format!("/tmp/banger-runtime-{}", self.uid)), true),
        }
    }

    /// The API socket; refuses a fallback directory that somebody else could have made.
    pub(crate) fn socket(&self) -> Result<PathBuf> {
        let (dir, fallback) = self.runtime_dir();
        if fallback {
            check_private(&dir, self.uid)?;
        }
        let socket = dir.join("bangerd.sock");
        let length = socket.as_os_str().len();
        if length > SOCKET_PATH_MAX {
            return Err(Error::unavailable(format!(
                "the runtime directory {} is too long for the address of a socket ({length} bytes, {SOCKET_PATH_MAX} are possible)",
                dir.display()
            ))
            .hint("set XDG_RUNTIME_DIR to a shorter path"));
        }
        Ok(socket)
    }

    /// Directory of what lasts: `$XDG_STATE_HOME/banger`.
    pub(crate) fn state_dir(&self) -> Result<PathBuf> {
        self.below_home(self.state.as_ref(), ".local/state")
    }

    /// Directory of configuration: `$XDG_CONFIG_HOME/banger`.
    pub(crate) fn config_dir(&self) -> Result<PathBuf> {
        self.below_home(self.config.as_ref(), ".config")
    }

    /// The home directory.
    pub(crate) fn home(&self) -> Result<&Path> {
        self.home
            .as_deref()
            .ok_or_else(|| Error::failed("there is no home directory").hint("set HOME to an absolute path"))
    }

    /// A path as the user wrote it, `~` and `~/…` expanded (a shell does not do that behind every flag).
    pub(crate) fn expand(&self, path: &str) -> Result<PathBuf> {
        match path.strip_prefix('~') {
            Some("") => Ok(self.home()?.to_owned()),
            Some(rest) if rest.starts_with('/') => Ok(self.home()?.join(rest.trim_start_matches('/'))),
            Some(_) => Err(Error::usage(format!(
                "cannot read path `{path}`: only `~/…` is known, not `~user`"
            ))),
            None => Ok(PathBuf::from(path)),
        }
    }

    fn below_home(&self, chosen: Option<&PathBuf>, default: &str) -> Result<PathBuf> {
        match chosen {
            Some(dir) => Ok(dir.join("banger")),
            None => Ok(self.home()?.join(default).join("banger")),
        }
    }
}

/// A directory in `/tmp` is only ours when we own it, nobody else may enter it, and it is no link.
fn check_private(dir: &Path, uid: u32) -> Result<()> {
    let found = match std::fs::symlink_metadata(dir) {
        Ok(found) => found,
        // The daemon will make it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("look at", dir, error)),
    };
    let fault = if !found.is_dir() {
        "is not a directory"
    } else if found.uid() != uid {
        "belongs to another user"
    } else if found.mode() & 0o077 != 0 {
        "is open to other users"
    } else {
        return Ok(());
    };
    Err(
        Error::unavailable(format!("runtime directory {} {fault}", dir.display()))
            .hint("remove it, or set XDG_RUNTIME_DIR to a directory of your own"),
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn tilde_is_home_and_nothing_else() {
        let places = Places {
            home: Some("/home/u".into()),
            ..Places::default()
        };
        assert_eq!(places.expand("~/a").unwrap(), Path::new("/home/u/a"));
        assert_eq!(places.expand("~").unwrap(), Path::new("/home/u"));
        assert_eq!(places.expand("./~").unwrap(), Path::new("./~"));
        assert!(places.expand("~root/x").is_err());
    }

    #[test]
    fn a_foreign_fallback_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let uid = rustix::process::getuid().as_raw();
        let target = dir.path().join("r");
        assert!(check_private(&target, uid).is_ok(), "absent");
        std::fs::create_dir(&target).unwrap();
        std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o700)).unwrap();
        assert!(check_private(&target, uid).is_ok());
        assert!(check_private(&target, uid + 1).is_err());
        let link = dir.path().join("l");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(check_private(&link, uid).is_err());
        std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(check_private(&target, uid).is_err());
    }

    #[test]
    fn directories_follow_xdg() {
        let places = Places {
            home: Some("/h".into()),
            uid: 7,
            ..Places::default()
        };
        assert_eq!(places.state_dir().unwrap(), Path::new("/h/.local/state/banger"));
        assert_eq!(places.runtime_dir(), (PathBuf::from("/tmp/banger-runtime-7"), true));
        let places = Places {
            config: Some("/c".into()),
            runtime: Some("/r".into()),
            ..places
        };
        assert_eq!(places.config_dir().unwrap(), Path::new("/c/banger"));
        assert_eq!(places.socket().unwrap(), Path::new("/r/banger/bangerd.sock"));
    }
}
