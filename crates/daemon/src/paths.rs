//! Where the daemon keeps what: runtime, state and configuration, and whether those directories can be trusted.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use banger_core::id::MachineId;
use banger_core::plan::MachinePaths;
use banger_system::install::Layout;
use rustix::fs::{Mode, OFlags};

/// Longest path that fits a Unix socket's address, its final zero left out.
const SOCKET_PATH_MAX: usize = 107;

/// Longest name of a socket below the runtime directory: `/m/<id>/control.sock`.
const SOCKET_TAIL: usize = "/m/0123456789abcdef/control.sock".len();

/// The daemon's directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// Sockets and locks, gone with the login: `$XDG_RUNTIME_DIR/banger`, else `/tmp/banger-runtime-<uid>`.
    pub runtime: PathBuf,
    /// What lasts: `$XDG_STATE_HOME/banger`.
    pub state: PathBuf,
    /// The configuration file: `$XDG_CONFIG_HOME/banger/config.toml`.
    pub config: PathBuf,
}

/// What is wrong with a directory.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// No home, and no variable that says where instead.
    #[error("cannot tell where to keep {what}: neither {variable} nor HOME is an absolute path")]
    NoHome {
        /// What has no place.
        what: &'static str,
        /// The variable that would say.
        variable: &'static str,
    },
    /// The runtime directory is too deep for socket addresses.
    #[error("the runtime directory {} is too long for socket addresses ({length} bytes, {max} are possible)", path.display())]
    TooLong {
        /// The directory.
        path: PathBuf,
        /// Its length.
        length: usize,
        /// What fits.
        max: usize,
    },
    /// Not ours, or not a directory.
    #[error("the directory {} cannot be trusted: {why}", path.display())]
    Untrusted {
        /// The directory.
        path: PathBuf,
        /// What does not fit.
        why: String,
    },
    /// An operating system call failed.
    #[error("cannot make the directory {}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl Paths {
    /// Directories as the environment says. Relative values are ignored, as the XDG specification asks.
    pub fn from_env(var: impl Fn(&str) -> Option<OsString>, uid: u32) -> Result<Self, PathError> {
        let absolute = |name: &str| var(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let home = |variable: &'static str, below: &str, what: &'static str| {
            absolute(variable)
                .or_else(|| absolute("HOME").map(|h| h.join(below)))
                .ok_or(PathError::NoHome { what, variable })
        };
        let runtime = match absolute("XDG_RUNTIME_DIR") {
            Some(dir) => dir.join("banger"),
            None => PathBuf::from(format!("/tmp/banger-runtime-{uid}")),
        };
        check_length(&runtime)?;
        Ok(Self {
            runtime,
            state: home("XDG_STATE_HOME", ".local/state", "state")?.join("banger"),
            config: home("XDG_CONFIG_HOME", ".config", "the configuration")?.join("banger/config.toml"),
        })
    }

    /// The directories of system mode.
    pub fn system(layout: &Layout) -> Result<Self, PathError> {
        let paths = Self {
            runtime: layout.run(),
            state: layout.state(),
            config: layout.config(),
        };
        check_length(&paths.runtime)?;
        Ok(paths)
    }

    /// The API socket.
    pub fn socket(&self) -> PathBuf {
        self.runtime.join("bangerd.sock")
    }

    /// The lock that makes the daemon the only one of its runtime directory.
    pub fn runtime_lock(&self) -> PathBuf {
        self.runtime.join("bangerd.lock")
    }

    /// The lock that keeps a daemon with another runtime directory off the same state.
    pub fn state_lock(&self) -> PathBuf {
        self.state.join("bangerd.lock")
    }

    /// The log.
    pub fn log(&self) -> PathBuf {
        self.state.join("daemon.log")
    }

    /// The database.
    pub fn database(&self) -> PathBuf {
        self.state.join("banger.db")
    }

    /// Frequency of the host's time stamp counter, in kHz.
    pub fn tsc(&self) -> PathBuf {
        self.state.join("tsc-khz")
    }

    /// Images and kernels.
    pub fn store(&self) -> PathBuf {
        self.state.join("store")
    }

    /// Keys and known hosts.
    pub fn ssh(&self) -> PathBuf {
        self.state.join("ssh")
    }

    /// Directory of all machines' lasting files.
    pub fn machines(&self) -> PathBuf {
        self.state.join("machines")
    }

    /// Templates.
    pub fn templates(&self) -> PathBuf {
        self.state.join("templates")
    }

    /// Machines that are saved for the copies that are being made of them.
    pub fn forks(&self) -> PathBuf {
        self.state.join("forks")
    }

    /// Directory of all machines' sockets.
    pub fn machines_run(&self) -> PathBuf {
        self.runtime.join("m")
    }

    /// Files of one machine.
    pub fn machine(&self, id: &MachineId) -> MachinePaths {
        MachinePaths {
            state: self.machines().join(id.as_str()),
            run: self.machines_run().join(id.as_str()),
        }
    }

    /// Makes the directories. The runtime directory must be ours alone; it may stand in `/tmp`.
    pub fn prepare(&self, uid: u32) -> Result<(), PathError> {
        if let Some(parent) = self.runtime.parent()
            && parent != Path::new("/tmp")
        {
            make_all(parent)?;
        }
        private_dir(&self.runtime, uid)?;
        make_all(&self.state)?;
        private_dir(&self.state, uid)?;
        for dir in [self.machines_run(), self.machines(), self.ssh(), self.store()] {
            private_dir(&dir, uid)?;
        }
        Ok(())
    }
}

fn check_length(runtime: &Path) -> Result<(), PathError> {
    let length = runtime.as_os_str().len();
    let max = SOCKET_PATH_MAX - SOCKET_TAIL;
    if length > max {
        return Err(PathError::TooLong {
            path: runtime.to_owned(),
            length,
            max,
        });
    }
    Ok(())
}

/// Makes a directory and those above it, with the process's umask.
fn make_all(path: &Path) -> Result<(), PathError> {
    std::fs::create_dir_all(path).map_err(|source| PathError::Io {
        path: path.to_owned(),
        source,
    })
}

/// Makes a directory that only its owner can enter, or makes sure that an existing one is that: a real directory, owned by
/// `uid`. Looser permissions of an own directory are tightened. Everything is decided on the open descriptor.
pub fn private_dir(path: &Path, uid: u32) -> Result<OwnedFd, PathError> {
    let io = |source: rustix::io::Errno| PathError::Io {
        path: path.to_owned(),
        source: source.into(),
    };
    let untrusted = |why: String| PathError::Untrusted {
        path: path.to_owned(),
        why,
    };
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(e) => return Err(io(e)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
            return Err(untrusted("it is a symbolic link or not a directory".to_owned()));
        }
        Err(e) => return Err(io(e)),
    };
    let stat = rustix::fs::fstat(&fd).map_err(io)?;
    if stat.st_uid != uid {
        return Err(untrusted(format!("it belongs to uid {}, not to {uid}", stat.st_uid)));
    }
    if stat.st_mode & 0o077 != 0 {
        rustix::fs::fchmod(&fd, Mode::RWXU).map_err(io)?;
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn env<'a>(pairs: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<OsString> + 'a {
        |name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v))
    }

    #[test]
    fn xdg_variables_win_and_relative_ones_do_not_count() {
        let paths = Paths::from_env(
            env(&[("HOME", "/h"), ("XDG_RUNTIME_DIR", "/run/u"), ("XDG_STATE_HOME", "rel")]),
            7,
        )
        .unwrap();
        assert_eq!(paths.socket(), Path::new("/run/u/banger/bangerd.sock"));
        assert_eq!(paths.state, Path::new("/h/.local/state/banger"));
        assert_eq!(paths.config, Path::new("/h/.config/banger/config.toml"));
    }

    #[test]
    fn without_a_runtime_directory_there_is_one_of_the_user_in_tmp() {
        let paths = Paths::from_env(env(&[("HOME", "/h")]), 7).unwrap();
        assert_eq!(paths.runtime, Path::new("/tmp/banger-runtime-7"));
        assert!(matches!(Paths::from_env(env(&[]), 7), Err(PathError::NoHome { .. })));
    }

    #[test]
    fn a_runtime_directory_too_long_for_sockets_is_refused() {
        let long = format!("/{}", "x".repeat(90));
        assert!(matches!(
            Paths::from_env(env(&[("HOME", "/h"), ("XDG_RUNTIME_DIR", &long)]), 7),
            Err(PathError::TooLong { .. })
        ));
    }

    #[test]
    fn a_private_directory_is_ours_and_closed() {
        let tmp = tempfile::tempdir().unwrap();
        let uid = rustix::process::getuid().as_raw();
        let dir = tmp.path().join("d");
        std::fs::create_dir(&dir).unwrap();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).unwrap();
        private_dir(&dir, uid).unwrap();
        assert_eq!(std::fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        let link = tmp.path().join("l");
        std::os::unix::fs::symlink(&dir, &link).unwrap();
        assert!(matches!(private_dir(&link, uid), Err(PathError::Untrusted { .. })));
        assert!(matches!(private_dir(&dir, uid + 1), Err(PathError::Untrusted { .. })));
    }
}
