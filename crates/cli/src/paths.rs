//! Where things are on this host: which daemon is meant, its directories, and how a path of the user is read.
//!
//! Where banger is installed for us in system mode (`/etc/banger/install.toml` names our uid), the daemon is that of the installation.
//! Everybody else has a daemon of their own. `BANGER_MODE=user` or `system` decides otherwise; `BANGER_ROOT` is the root directory
//! below which the installation is looked for.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use banger_system::install::{Layout, Record};

use crate::error::{Error, Kind, Result};

/// Longest record of an installation that is read.
const MAX_RECORD: u64 = 64 * 1024;

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
    /// `$BANGER_ROOT`; `/` when absent.
    pub(crate) root: Option<PathBuf>,
    /// `$BANGER_MODE`.
    pub(crate) mode: Option<OsString>,
}

/// An installation in system mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Installation {
    /// Where everything is.
    pub(crate) layout: Layout,
    /// What it is.
    pub(crate) record: Record,
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
            root: absolute("BANGER_ROOT"),
            mode: std::env::var_os("BANGER_MODE").filter(|v| !v.is_empty()),
        }
    }

    /// Where an installation is, if there is one.
    pub(crate) fn layout(&self) -> Layout {
        self.root.clone().map_or_else(Layout::default, Layout::below)
    }

    /// The installation on this host, whoever owns it.
    pub(crate) fn installation(&self) -> Result<Option<Installation>> {
        let layout = self.layout();
        let path = layout.record();
        let mut text = String::new();
        let read = std::fs::File::open(&path).and_then(|f| f.take(MAX_RECORD).read_to_string(&mut text));
        match read {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", &path, error)),
        }
        let record = Record::parse(&text)
            .map_err(|e| Error::new(Kind::Invalid, format!("{} is not usable: {e}", path.display())))?;
        Ok(Some(Installation { layout, record }))
    }

    /// The installation whose daemon is meant. None: a daemon of our own.
    pub(crate) fn system(&self) -> Result<Option<Installation>> {
        let wanted = match self.mode.as_deref() {
            None => None,
            Some(mode) if mode == "user" => return Ok(None),
            Some(mode) if mode == "system" => Some(()),
            Some(mode) => {
                let mode = mode.to_string_lossy().escape_default().to_string();
                return Err(Error::usage(format!(
                    "BANGER_MODE is `{mode}`; `user` and `system` are possible"
                )));
            }
        };
        let found = self.installation().map_err(|e| {
            e.hint("`sudo banger system install` writes it anew; BANGER_MODE=user uses a daemon of your own meanwhile")
        })?;
        match (found, wanted) {
            (Some(found), _) if found.record.owner.uid == self.uid => Ok(Some(found)),
            (_, None) => Ok(None),
            (Some(found), Some(())) => {
                let owner = &found.record.owner.user;
                Err(
                    Error::unavailable(format!("the installation on this host is {owner}'s, not yours"))
                        .hint("without BANGER_MODE=system you have a daemon of your own"),
                )
            }
            (None, Some(())) => Err(
                Error::unavailable("banger is not installed in system mode on this host")
                    .hint("install it with `sudo banger system install`"),
            ),
        }
    }

    /// The directory of our own daemon's socket, and whether it is the fallback in `/tmp`, which has to be checked before it is trusted.
    fn runtime_dir(&self) -> (PathBuf, bool) {
        match &self.runtime {
            Some(dir) => (dir.join("banger"), false),
            None => (PathBuf::from(format!("/tmp/banger-runtime-{}", self.uid)), true),
        }
    }

    /// The API socket; refuses a fallback directory that somebody else could have made.
    pub(crate) fn socket(&self) -> Result<PathBuf> {
        if let Some(system) = self.system()? {
            return Ok(system.layout.socket());
        }
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

    /// Directory of what lasts: the installation's, else `$XDG_STATE_HOME/banger`.
    pub(crate) fn state_dir(&self) -> Result<PathBuf> {
        if let Some(system) = self.system()? {
            return Ok(system.layout.state());
        }
        self.below_home(self.state.as_ref(), ".local/state")
    }

    /// Directory of what belongs to the user in either mode: `$XDG_CONFIG_HOME/banger`.
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
            root: Some("/nonexistent".into()),
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

    #[test]
    fn the_installation_is_its_owners() {
        let dir = tempfile::tempdir().unwrap();
        let of = |uid: u32, mode: Option<&str>| Places {
            home: Some("/h".into()),
            uid,
            root: Some(dir.path().to_owned()),
            mode: mode.map(OsString::from),
            ..Places::default()
        };
        // Nothing is installed.
        assert_eq!(of(7, None).system().unwrap(), None);
        let error = of(7, Some("system")).system().unwrap_err();
        assert!(error.hint.unwrap().contains("sudo banger system install"));
        let layout = Layout::below(dir.path());
        std::fs::create_dir_all(layout.etc()).unwrap();
        let text = "version = 1\n[owner]\nuser = 'dev'\nuid = 7\ngid = 7\nhome = '/home/dev'\n\
                    [installed]\nat = 'x'\nversion = '1'\ncommit = 'c'\n";
        std::fs::write(layout.record(), text).unwrap();
        for mode in [None, Some("system")] {
            let places = of(7, mode);
            assert_eq!(places.socket().unwrap(), layout.socket());
            assert_eq!(places.state_dir().unwrap(), layout.state());
            assert_eq!(places.config_dir().unwrap(), Path::new("/h/.config/banger"));
        }
        // Who is not the owner, or wants none of it, has a daemon of their own. Root is no exception.
        for (uid, mode) in [(7, Some("user")), (8, None), (0, None), (8, Some("user"))] {
            assert_eq!(of(uid, mode).system().unwrap(), None, "{uid} {mode:?}");
        }
        for uid in [0, 8] {
            let error = of(uid, Some("system")).system().unwrap_err();
            assert!(error.message.contains("is dev's"), "{error}");
        }
        assert_eq!(of(7, Some("both")).system().unwrap_err().kind, Kind::Usage);
        std::fs::write(layout.record(), "version = 9\n").unwrap();
        let error = of(7, None).system().unwrap_err();
        assert!(error.message.contains("install.toml") && error.hint.unwrap().contains("BANGER_MODE=user"));
        assert_eq!(of(7, Some("user")).system().unwrap(), None);
    }
}
