//! What can go wrong with images, kernels and disks, and what a user can do about it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::digest::Digest;
use crate::ext4::Ext4Error;
use crate::kernel::bzimage::BzImageError;
use crate::kernel::deb::DebError;
use crate::kernel::modules::ModuleError;
use crate::tar::TarError;

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operating system call failed.
    #[error("cannot {what}")]
    Io {
        /// What was being done, with its object.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The host's disk is full.
    #[error("no space left while trying to {what}")]
    NoSpace {
        /// What was being done, with its object.
        what: String,
    },
    /// A program that is needed is not installed.
    #[error("`{program}` is not installed, it is needed to {purpose}")]
    ProgramMissing {
        /// The program.
        program: String,
        /// What it is needed for.
        purpose: &'static str,
        /// Package that holds it on Debian and its derivatives.
        package: &'static str,
    },
    /// A program failed.
    #[error("`{program}` failed ({how})")]
    ProgramFailed {
        /// The program and its most telling argument.
        program: String,
        /// `exit status 1`, `signal 9`.
        how: String,
        /// The last lines it wrote to its standard error.
        last_words: Vec<String>,
    },
    /// A program did not end in time, and was ended.
    #[error("`{program}` did not finish within {after:?}")]
    ProgramTimeout {
        /// The program.
        program: String,
        /// How long it was given.
        after: Duration,
        /// The last lines it wrote to its standard error.
        last_words: Vec<String>,
    },
    /// The host has no apt.
    #[error("this host has no apt to fetch a kernel package with")]
    NoApt,
    /// Apt does not know the kernel package.
    #[error("apt knows no package `{package}`")]
    NoKernelPackage {
        /// The package that was looked for.
        package: String,
        /// Apt has no package lists at all.
        lists_missing: bool,
    },
    /// The host does not let this user make user namespaces with several ids.
    #[error("this user has no subordinate user or group ids")]
    NoSubordinateIds {
        /// Name of the user, where known.
        user: String,
    },
    /// The kernel lets no ordinary user make user namespaces.
    #[error("this host lets ordinary users make no user namespaces ({setting} is {value})")]
    NoUserNamespaces {
        /// The setting of the kernel that forbids it.
        setting: &'static str,
        /// Its value.
        value: String,
    },
    /// There is no such recipe.
    #[error("there is no image recipe `{name}`")]
    NoRecipe {
        /// The name asked for.
        name: String,
    },
    /// The store has no such kernel.
    #[error("kernel {0} is not in the store")]
    NoKernel(Digest),
    /// The store has no such image.
    #[error("image {0} is not in the store")]
    NoImage(Digest),
    /// A Debian package cannot be read.
    #[error("cannot read the package {path}")]
    Deb {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: DebError,
    },
    /// A kernel image cannot be read.
    #[error("cannot read the kernel image {name}")]
    Kernel {
        /// Its name in the package.
        name: String,
        /// Why.
        #[source]
        source: BzImageError,
    },
    /// The modules that a machine needs cannot be put together.
    #[error("cannot collect the modules of kernel {release}")]
    Modules {
        /// Kernel release.
        release: String,
        /// Why.
        #[source]
        source: ModuleError,
    },
    /// A tar stream is malformed or holds what must not enter an image.
    #[error("cannot accept the archive of {what}")]
    Tar {
        /// What the archive is of.
        what: String,
        /// Why.
        #[source]
        source: TarError,
    },
    /// The file system cannot be made.
    #[error("cannot make the file system {path}")]
    FileSystem {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Ext4Error,
    },
    /// A disk cannot be made as asked.
    #[error("cannot make a disk of {size_bytes} bytes: {why}")]
    DiskSize {
        /// Size asked for.
        size_bytes: u64,
        /// What is wrong with it.
        why: String,
    },
    /// A file of the store is not what it should be.
    #[error("{path} is damaged: {why}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The work was cancelled.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// What the user can do, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoSpace { .. } => Some("free some space, or delete images and machines that are not needed".to_owned()),
            Self::ProgramMissing { package, .. } => Some(format!("install it: apt-get install {package}")),
            Self::NoApt => Some("import a Debian kernel package from a file: banger kernel import --from FILE.deb".to_owned()),
            Self::NoKernelPackage { lists_missing: true, .. } => Some("apt has no package lists; run: apt-get update".to_owned()),
            Self::NoKernelPackage { lists_missing: false, .. } => {
                Some("run `apt-get update`, or import a Debian kernel package from a file: banger kernel import --from FILE.deb".to_owned())
            }
            Self::NoSubordinateIds { user } => Some(format!("give the user a range: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}")),
            Self::NoUserNamespaces { setting, .. } => Some(match *setting {
                "kernel.apparmor_restrict_unprivileged_userns" => {
                    "allow them to mmdebstrap with a profile in /etc/apparmor.d/mmdebstrap, or to all: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0".to_owned()
                }
                "user.max_user_namespaces" => "raise it: sysctl -w user.max_user_namespaces=10000".to_owned(),
                other => format!("allow them: sysctl -w {other}=1"),
            }),
            Self::NoRecipe { .. } => Some(format!("known recipes: {}", crate::recipe::names().join(", "))),
            Self::ProgramFailed { last_words, .. } => network_hint(last_words),
            Self::DiskSize { .. } => Some("ask for another --disk-size".to_owned()),
            Self::Damaged { .. } => Some("delete the object and make or import it again".to_owned()),
            _ => None,
        }
    }

    /// Lines worth showing as they are: the last words of a program that failed.
    pub fn details(&self) -> &[String] {
        match self {
            Self::ProgramFailed { last_words, .. } | Self::ProgramTimeout { last_words, .. } => last_words,
            _ => &[],
        }
    }

    /// The host's disk is full.
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::NoSpace { .. })
    }

    /// An archive ended too early.
    pub(crate) fn is_truncated(&self) -> bool {
        matches!(
            self,
            Self::Tar {
                source: TarError::Truncated,
                ..
            }
        )
    }

    /// Turns an I/O error into one that says what was being done. A full disk gets its own variant wherever it shows up.
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        if is_full(&source) {
            Self::NoSpace { what }
        } else {
            Self::Io { what, source }
        }
    }
}

/// Whether an I/O error says that there is no room.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn network_hint(last_words: &[String]) -> Option<String> {
    let says = |needle: &str| last_words.iter().any(|line| line.contains(needle));
    if says("No space left on device") {
        return Some("free some space, or set TMPDIR to a place that has more".to_owned());
    }
    if says("Could not resolve")
        || says("Temporary failure resolving")
        || says("Failed to fetch")
        || says("Cannot initiate the connection")
    {
        return Some("the package mirror cannot be reached: check the network and apt's configuration".to_owned());
    }
    if says("NO_PUBKEY") || says("keyring") {
        return Some(
            "the distribution's archive keys are missing; install: apt-get install debian-archive-keyring".to_owned(),
        );
    }
    None
}

/// Adds what was being done to I/O errors.
pub(crate) trait IoContext<T> {
    /// `what` is evaluated on failure only.
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
    /// For an operation on a path: `verb` and the path.
    fn on(self, verb: &str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|source| Error::io(what(), source.into()))
    }

    fn on(self, verb: &str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::io(format!("{verb} {}", path.display()), source.into()))
    }
}
