//! The layout of an installation in system mode, and its record, `install.toml`.
//!
//! ```text
//!   /etc/banger/install.toml              root 0644   who the owner is; the network; which firecracker and jailer
//!   /etc/banger/config.toml               root 0644   configuration of the daemon
//!   /etc/systemd/system/{bangerd.service,bangerd-root.service,banger.slice,banger-build.socket,banger-build@.service}
//!   /usr/local/bin/{banger,bangerd}, /usr/local/lib/banger/{banger-helper,banger-shim,banger-agent}
//!   /run/banger/                          owner 0700  bangerd.sock (0600), sockets of the machines
//!   /run/banger-build.sock                owner 0600  where the daemon has images bootstrapped (banger-build.socket)
//!   /run/banger-root/                     root 0711   bangerd-root.sock (0600, the owner's)
//!   /var/lib/banger/                      root 0711
//!   /var/lib/banger/state/                owner 0700  database, store, disks
//!   /var/lib/banger/jail/                 root 0711   chroots of the engines
//!   /dev/banger/<id>/{root,work}          owner 0600  disks of engines that run outside a jail
//! ```
//!
//! What root writes to lies in directories that only root can change, so that the owner can put no link into its way.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::net::Network;

/// Everything below one root directory: `/`, or one of a test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    root: PathBuf,
}

impl Default for Layout {
    fn default() -> Self {
        Self::below("/")
    }
}

impl Layout {
    /// The layout below a directory.
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Directory of the configuration.
    pub fn etc(&self) -> PathBuf {
        self.at("etc/banger")
    }

    /// The record of the installation.
    pub fn record(&self) -> PathBuf {
        self.at("etc/banger/install.toml")
    }

    /// Configuration of the daemon.
    pub fn config(&self) -> PathBuf {
        self.at("etc/banger/config.toml")
    }

    /// Directory of the units.
    pub fn units(&self) -> PathBuf {
        self.at("etc/systemd/system")
    }

    /// Directory of `banger` and `bangerd`.
    pub fn bin(&self) -> PathBuf {
        self.at("usr/local/bin")
    }

    /// Directory of the programs that nobody calls by hand.
    pub fn libexec(&self) -> PathBuf {
        self.at("usr/local/lib/banger")
    }

    /// The daemon's runtime directory.
    pub fn run(&self) -> PathBuf {
        self.at("run/banger")
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.at("run/banger/bangerd.sock")
    }

    /// The helper's runtime directory.
    pub fn helper_run(&self) -> PathBuf {
        self.at("run/banger-root")
    }

    /// The helper's socket.
    pub fn helper_socket(&self) -> PathBuf {
        self.at("run/banger-root/bangerd-root.sock")
    }

    /// The socket behind which images are built.
    pub fn build_socket(&self) -> PathBuf {
        self.at("run/banger-build.sock")
    }

    /// What lasts, root's part: state and jails are in it.
    pub fn lib(&self) -> PathBuf {
        self.at("var/lib/banger")
    }

    /// The owner's state.
    pub fn state(&self) -> PathBuf {
        self.at("var/lib/banger/state")
    }

    /// Base directory of the jails, as the jailer is told: it makes `firecracker/<id>/root` below.
    pub fn jails(&self) -> PathBuf {
        self.at("var/lib/banger/jail")
    }

    /// A machine's chroot.
    pub fn chroot(&self, id: &crate::id::MachineId) -> PathBuf {
        self.jails()
            .join(crate::names::FIRECRACKER)
            .join(id.as_str())
            .join("root")
    }

    /// Nodes of the disks of engines that run outside a jail.
    pub fn nodes(&self) -> PathBuf {
        self.at("dev/banger")
    }

    /// The node of one disk.
    pub fn node(&self, id: &crate::id::MachineId, role: crate::helper::DiskRole) -> PathBuf {
        self.nodes().join(id.as_str()).join(role.as_str())
    }
}

/// Version of `install.toml`.
pub const RECORD_VERSION: u32 = 1;

/// `install.toml`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// See [`RECORD_VERSION`].
    pub version: u32,
    /// Whose daemon it is.
    pub owner: Owner,
    /// Which programs were installed, and when.
    pub installed: Installed,
    /// The network of the machines. The root helper goes by this one, whatever it is asked for; one that an older banger wrote has none.
    #[serde(default)]
    pub network: Network,
    /// Firecracker, where it is used.
    #[serde(default)]
    pub firecracker: Firecracker,
}

/// The registered owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// Name.
    pub user: String,
    /// User id: this is what counts.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Home directory.
    pub home: PathBuf,
}

/// What was installed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Installed {
    /// When, RFC 3339.
    pub at: String,
    /// Version.
    pub version: String,
    /// Commit.
    pub commit: String,
}

/// Where Firecracker's programs are. Root starts them, so only root may say where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Firecracker {
    /// The engine.
    pub firecracker: PathBuf,
    /// The jailer.
    pub jailer: PathBuf,
}

impl Default for Firecracker {
    fn default() -> Self {
        Self {
            firecracker: "/usr/local/bin/firecracker".into(),
            jailer: "/usr/local/bin/jailer".into(),
        }
    }
}

/// Why a record is refused.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It is no such file.
    #[error("it cannot be read: {0}")]
    Form(String),
    /// A version of another banger.
    #[error("it has version {0}; this banger reads version {RECORD_VERSION}")]
    Version(u32),
    /// The owner.
    #[error("root cannot be the owner: machines would run as root")]
    Root,
    /// A program's path.
    #[error("the path `{}` is not absolute", .0.display())]
    Relative(PathBuf),
}

impl Record {
    /// Reads and checks a record.
    pub fn parse(text: &str) -> Result<Self, RecordError> {
        let record: Self = toml::from_str(text).map_err(|e| RecordError::Form(e.message().replace('\n', " ")))?;
        if record.version != RECORD_VERSION {
            return Err(RecordError::Version(record.version));
        }
        if record.owner.uid == 0 {
            return Err(RecordError::Root);
        }
        for path in [
            &record.firecracker.firecracker,
            &record.firecracker.jailer,
            &record.owner.home,
        ] {
            if !path.is_absolute() {
                return Err(RecordError::Relative(path.clone()));
            }
        }
        Ok(record)
    }

    /// The text of the file.
    pub fn text(&self) -> String {
        toml::to_string(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            version: RECORD_VERSION,
            owner: Owner {
                user: "dev".into(),
                uid: 1000,
                gid: 1000,
                home: "/home/dev".into(),
            },
            installed: Installed {
                at: "2026-11-22T10:00:00Z".into(),
                version: "0.1.0".into(),
                commit: "unknown".into(),
            },
            network: Network::parse("br-fc-x", "10.1.0.1/20").unwrap(),
            firecracker: Firecracker::default(),
        }
    }

    #[test]
    fn a_record_survives_its_file() {
        assert_eq!(Record::parse(&record().text()).unwrap(), record());
        let without = record().text().split("[network]").next().unwrap().to_owned();
        let old = Record {
            network: Network::default(),
            ..record()
        };
        assert_eq!(Record::parse(&without).unwrap(), old);
        let wrong = record().text().replace("10.1.0.1", "8.8.8.8");
        assert!(matches!(Record::parse(&wrong), Err(RecordError::Form(_))));
    }

    #[test]
    fn what_is_not_a_record_is_refused() {
        let with = |change: fn(&mut Record)| {
            let mut record = record();
            change(&mut record);
            Record::parse(&record.text())
        };
        assert!(matches!(with(|r| r.version = 2), Err(RecordError::Version(2))));
        assert!(matches!(with(|r| r.owner.uid = 0), Err(RecordError::Root)));
        assert!(matches!(
            with(|r| r.firecracker.jailer = "jailer".into()),
            Err(RecordError::Relative(_))
        ));
        assert!(matches!(Record::parse("owner = 3"), Err(RecordError::Form(_))));
        let unknown = format!("surprise = 1\n{}", record().text());
        assert!(matches!(Record::parse(&unknown), Err(RecordError::Form(_))));
    }
}
