//! The course of the daemon: directories, locks, configuration, database, socket, machines, service, end.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use banger_core::config::{Config, ConfigError};
use banger_system::install::{Layout, Record};
use rustix::fs::{FlockOperation, Mode as Bits, OFlags};

use crate::db::{self, Db, DbError};
use crate::error::{self, chain};
use crate::host::Host;
use crate::ops::Ops;
use crate::paths::{PathError, Paths};
use crate::services::Services;
use crate::stock::Stock;
use crate::{audit, failpoint, log, memory, provision, recover, server, version};

/// Exit status of a daemon that finds another one in its place.
pub const EXIT_RUNNING: u8 = 11;
/// Exit status of a daemon that finds no space for what it has to write; that of the command line.
pub const EXIT_FULL: u8 = 8;

/// Most bytes of a configuration.
const MAX_CONFIG: u64 = 1024 * 1024;

/// Why the daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A directory.
    #[error(transparent)]
    Path(#[from] PathError),
    /// There is one already.
    #[error("another daemon holds {}", .0.display())]
    Running(PathBuf),
    /// A daemon with another runtime directory works on the same state.
    #[error("another daemon (process {holder}) works on the state in {}", state.display())]
    StateInUse {
        /// Directory of the state.
        state: PathBuf,
        /// Process id of that daemon.
        holder: String,
    },
    /// The configuration cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The configuration is wrong.
    #[error("the configuration {} is wrong", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: ConfigError,
    },
    /// The database.
    #[error(transparent)]
    Db(#[from] DbError),
    /// A file or socket.
    #[error("cannot {what}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// System mode without an installation, or with a broken record of it.
    #[error("the record of the installation {} cannot be used: {why}", path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// It is somebody else's installation.
    #[error("the installation in system mode belongs to {owner} (uid {uid}), not to uid {me}")]
    NotOwner {
        /// The owner's name.
        owner: String,
        /// The owner.
        uid: u32,
        /// Who asks.
        me: u32,
    },
    /// The failpoints.
    #[error("BANGER_FAILPOINT: {0}")]
    Failpoint(String),
}

impl StartError {
    /// Whether the disk is full.
    fn is_full(&self) -> bool {
        matches!(self, Self::Db(e) if e.is_full()) || error::is_full(self)
    }

    /// The process's exit status.
    pub fn exit_status(&self) -> u8 {
        match self {
            _ if self.is_full() => EXIT_FULL,
            Self::Running(_) => EXIT_RUNNING,
            Self::Config { .. } | Self::ConfigFile { .. } | Self::Failpoint(_) => 2,
            Self::Record { .. } | Self::NotOwner { .. } => 2,
            _ => 1,
        }
    }

    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Db(e) => e.hint(),
            Self::StateInUse { .. } => Some(
                "use the XDG_RUNTIME_DIR of that daemon, or give this one a state of its own with XDG_STATE_HOME"
                    .to_owned(),
            ),
            Self::Record { .. } => Some("install it anew: sudo banger system install".to_owned()),
            Self::NotOwner { owner, .. } => Some(format!(
                "it is started by systemd, as {owner}: systemctl status bangerd"
            )),
            Self::Config { path, .. } => Some(format!(
                "correct {}, or move it away to use the defaults",
                path.display()
            )),
            _ if self.is_full() => Some(db::FREE.to_owned()),
            _ => None,
        }
    }

    /// What a person or the command line reads: the error, and what to do about it on a line of its own.
    pub fn words(&self) -> String {
        let hint = self.hint().map(|h| format!("\nhint: {h}"));
        format!("error: {}{}", chain(self), hint.unwrap_or_default())
    }

    /// All of it in one line.
    pub fn line(&self) -> String {
        match self.hint() {
            Some(hint) => format!("{}; hint: {hint}", chain(self)),
            None => chain(self),
        }
    }
}

/// How long an ending daemon may hold the state's lock longer than that of its runtime directory.
const STATE_LOCK: std::time::Duration = std::time::Duration::from_secs(1);

/// What is there before the first thread: locks, socket, configuration.
#[derive(Debug)]
pub struct Prepared {
    paths: Paths,
    config: Config,
    hosting: Host,
    socket: std::os::unix::net::UnixListener,
    _locks: [OwnedFd; 2],
}

/// As which daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// That of the user who starts it.
    User,
    /// That of the installation.
    System,
}

/// The directory below which everything of system mode is; `/` but in tests.
pub fn layout() -> Layout {
    let root = std::env::var_os("BANGER_ROOT").map(PathBuf::from);
    root.filter(|root| root.is_absolute())
        .map(Layout::below)
        .unwrap_or_default()
}

/// The record of the installation, which must be this user's.
fn installation(layout: Layout, uid: u32) -> Result<(Layout, Record), StartError> {
    let path = layout.record();
    let failed = |why: String| StartError::Record {
        path: path.clone(),
        why,
    };
    let text = read_text(&path).map_err(|e| failed(e.to_string()))?;
    let record = Record::parse(&text).map_err(|e| failed(e.to_string()))?;
    if record.owner.uid != uid {
        return Err(StartError::NotOwner {
            owner: record.owner.user,
            uid: record.owner.uid,
            me: uid,
        });
    }
    Ok((layout, record))
}

/// Does everything that must be done before there are threads.
pub fn prepare(mode: Mode) -> Result<Prepared, StartError> {
    memory::limit();
    rustix::process::umask(Bits::from_raw_mode(0o077));
    let uid = rustix::process::geteuid().as_raw();
    let installed = match mode {
        Mode::User => None,
        Mode::System => Some(installation(layout(), uid)?),
    };
    let paths = match &installed {
        None => Paths::from_env(|name| std::env::var_os(name), uid)?,
        Some((layout, _)) => Paths::system(layout)?,
    };
    paths.prepare(uid)?;
    let runtime = lock(&paths.runtime_lock())?;
    let locks = [runtime, lock_state(&paths)?];
    let config = read_config(&paths.config)?;
    let level = std::env::var("BANGER_LOG_LEVEL").unwrap_or_else(|_| config.log_level.as_str().to_owned());
    log::init(&paths.log(), &level).map_err(|source| io_error("open the log", &paths.log(), source))?;
    failpoint::init(std::env::var("BANGER_FAILPOINT").ok().as_deref()).map_err(StartError::Failpoint)?;
    let socket =
        server::bind(&paths.socket()).map_err(|source| io_error("bind the socket", &paths.socket(), source))?;
    let hosting = match installed {
        None => Host::user(),
        Some((layout, record)) => Host::system(layout, record, &config.network),
    };
    Ok(Prepared {
        paths,
        config,
        hosting,
        socket,
        _locks: locks,
    })
}

fn io_error(what: &str, path: &Path, source: io::Error) -> StartError {
    StartError::Io {
        what: format!("{what} {}", path.display()),
        source,
    }
}

fn lock(path: &Path) -> Result<OwnedFd, StartError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(path, flags, Bits::RUSR | Bits::WUSR)
        .map_err(|e| io_error("open the lock", path, e.into()))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(StartError::Running(path.to_owned())),
        Err(e) => return Err(io_error("lock", path, e.into())),
    }
    // For people who look: whose lock it is.
    let mut file = File::from(file);
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file.into())
}

/// The state's lock. With the runtime directory's own in hand, whoever holds this one has another runtime directory, or is a
/// daemon that is just ending: that one is waited for.
fn lock_state(paths: &Paths) -> Result<OwnedFd, StartError> {
    let end = std::time::Instant::now() + STATE_LOCK;
    loop {
        match lock(&paths.state_lock()) {
            Err(StartError::Running(_)) if std::time::Instant::now() < end => {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            Err(StartError::Running(lock)) => {
                let holder = std::fs::read_to_string(&lock).unwrap_or_default();
                return Err(StartError::StateInUse {
                    state: paths.state.clone(),
                    holder: holder.trim().chars().filter(char::is_ascii_digit).collect(),
                });
            }
            other => return other,
        }
    }
}

fn read_text(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    File::open(path)?.take(MAX_CONFIG).read_to_string(&mut text)?;
    Ok(text)
}

fn read_config(path: &Path) -> Result<Config, StartError> {
    let failed = |source| StartError::ConfigFile {
        path: path.to_owned(),
        source,
    };
    let text = match read_text(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Config::default()),
        Err(e) => return Err(failed(e)),
    };
    Config::parse(&text).map_err(|source| StartError::Config {
        path: path.to_owned(),
        source,
    })
}

/// Where `banger-shim` and `banger-agent` are: beside the daemon, or in `../lib/banger`, or where `BANGER_LIBEXEC` says.
pub fn libexec() -> PathBuf {
    if let Some(dir) = std::env::var_os("BANGER_LIBEXEC") {
        return PathBuf::from(dir);
    }
    let own = std::env::current_exe().unwrap_or_default();
    // A running binary that was replaced by an update still knows its place.
    let own = own
        .to_str()
        .map_or(own.clone(), |p| PathBuf::from(p.trim_end_matches(" (deleted)")));
    let beside = own.parent().map(Path::to_owned).unwrap_or_default();
    let installed = beside.join("../lib/banger");
    if !beside.join("banger-shim").is_file() && installed.join("banger-shim").is_file() {
        installed
    } else {
        beside
    }
}

/// Runs the daemon to its end. `listening` is called once clients are served.
pub async fn run(prepared: Prepared, listening: impl FnOnce()) -> Result<(), StartError> {
    let Prepared {
        paths,
        mut config,
        hosting,
        socket,
        _locks,
    } = prepared;
    if hosting.get().is_some() {
        // Nobody but systemd would start it again.
        config.daemon.idle_exit = Default::default();
    }
    tracing::info!(version = version::VERSION, commit = version::COMMIT, mode = hosting.mode(), state = %paths.state.display(), "daemon starts");
    banger_child::own(&paths.state);
    audit::end_workers(&paths.state);
    let db = Db::open(&paths.database())?;
    let ops = Arc::new(Ops::open(db.clone()).await?);
    let libexec = libexec();
    let stock = Stock::open(&paths, db.clone(), ops.clone(), &libexec)
        .map_err(|source| io_error("open the store", &paths.store(), source))?;
    let socket_path = paths.socket();
    let services = Arc::new(Services::new(paths, config, db, ops, stock, hosting, libexec));
    // A row that can't be read is told to whoever starts the daemon.
    let known = provision::load(&services).await?;
    recover::tell(&services);
    crate::forwards::restore(&services);
    tokio::spawn(signals(services.clone()));
    tokio::spawn(crate::idle::watch(services.clone()));
    tokio::spawn(crate::space::watch(services.clone()));
    tokio::spawn(crate::clock::watch(services.clone()));
    // Every machine that may run has its tap before the rules are made.
    provision::seat(&services, &services.machines());
    tokio::spawn(crate::host::watch(services.clone()));
    if services.hosting.get().is_some() {
        tokio::spawn(crate::dns::serve(services.clone()));
    }
    let reconciling = services.clone();
    tokio::spawn(async move {
        reconciling.host().await;
        crate::machine::fork::sweep(&reconciling);
        reconciling.templates.sweep(&reconciling).await;
        provision::reconcile(&reconciling, known).await;
        tracing::info!(machines = reconciling.machines().len(), "reconciled");
        reconciling.ready.send_replace(true);
    });
    listening();
    let served = server::serve(socket, services.clone()).await;
    services.stopping.cancel();
    let _ = std::fs::remove_file(&socket_path);
    if let Some(system) = services.hosting.get() {
        system.forget_names().await;
    }
    services.db.checkpoint().await;
    tracing::info!("daemon ends, machines run on");
    served.map_err(|source| io_error("serve", &socket_path, source))
}

async fn signals(services: Arc<Services>) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        tracing::error!("signals cannot be handled");
        return;
    };
    tokio::select! {
        _ = term.recv() => tracing::info!("SIGTERM"),
        _ = int.recv() => tracing::info!("SIGINT"),
        () = services.stopping.cancelled() => {}
    }
    services.stopping.cancel();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_by_one() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("lock");
        let held = lock(&path).unwrap();
        assert!(matches!(lock(&path), Err(StartError::Running(_))));
        drop(held);
        lock(&path).unwrap();
    }

    #[test]
    fn a_wrong_configuration_names_its_place() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("config.toml");
        std::fs::write(&path, "log_level = \"info\"\nnonsense = 1\n").unwrap();
        let error = read_config(&path).unwrap_err();
        assert!(error.line().contains("line 2, column 1"), "{}", error.line());
        assert!(error.line().contains("config.toml"));
        assert_eq!(error.exit_status(), 2);
        assert_eq!(read_config(&tmp.path().join("none")).unwrap(), Config::default());
    }
}
