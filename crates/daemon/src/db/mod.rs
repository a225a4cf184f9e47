//! The database: what is intended and must last. One SQLite file in WAL mode, one thread that owns the connection.
//!
//! The world (processes, sockets) is never read from here; see `handles.json` of each machine.

#[cfg(test)]
mod full_tests;
mod machines;
mod operations;
mod reserve;
mod schema;
mod stock;
mod templates;

use std::path::{Path, PathBuf};

use banger_vmm::space;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};
use tokio::sync::{mpsc, oneshot};

#[cfg(test)]
pub(crate) use machines::tests::row as test_row;
pub use machines::{MachineRow, Slots};
pub use schema::VERSION;
pub use stock::{NameTable, NamedObject};
pub use templates::TemplateRow;

/// Jobs that may wait for the connection.
const QUEUE: usize = 64;
/// What to do about a full disk.
pub const FREE: &str = "free some space, or delete images and machines that are not needed";

/// What went wrong with the database.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// The file is not a database, or a damaged one.
    #[error("the database {} is damaged", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What SQLite says.
        #[source]
        source: rusqlite::Error,
    },
    /// Written by a newer daemon.
    #[error("the database {} has schema {found}, this daemon knows {VERSION}", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: i64,
    },
    /// The name of a machine is taken.
    #[error("the name `{0}` is taken")]
    NameTaken(String),
    /// Every slot is taken.
    #[error("every slot up to {0} is taken")]
    NoSlot(u32),
    /// The disk is full, or there would be no space to write down that a machine is removed again.
    #[error("no space left for the database")]
    Full,
    /// A row that cannot be read.
    #[error("a row of table {table} cannot be read: {what}")]
    Row {
        /// The table.
        table: &'static str,
        /// What does not fit.
        what: String,
    },
    /// SQLite failed.
    #[error("the database failed")]
    Sqlite(#[from] rusqlite::Error),
    /// The thread is gone; the daemon is stopping.
    #[error("the database is closed")]
    Closed,
}

impl DbError {
    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Corrupt { path, .. } => {
                let path = path.display();
                Some(format!(
                    "restore it from a backup, or move it away (`mv {path} {path}.bad`) to start with an empty one; machines that are not in the database are not shown"
                ))
            }
            Self::Newer { .. } => Some("use the banger release that wrote it, or a newer one".to_owned()),
            _ if self.is_full() => Some(FREE.to_owned()),
            _ => None,
        }
    }

    /// Whether the disk is full.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Full => true,
            Self::Sqlite(e) => e.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull),
            _ => false,
        }
    }
}

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// A handle to the thread that owns the connection.
#[derive(Debug, Clone)]
pub struct Db {
    jobs: mpsc::Sender<Job>,
    reserve: reserve::Reserve,
}

impl Db {
    /// Opens the database, brings its schema up to date and starts its thread.
    pub fn open(path: &Path) -> Result<Self, DbError> {
        let reserve = reserve::Reserve::of(path);
        let opened = connect(path).map_err(|e| judged(reserve.dir(), e));
        let connection = match opened {
            Err(e) if e.is_full() => {
                reserve.release();
                connect(path).map_err(|e| judged(reserve.dir(), e))?
            }
            opened => opened?,
        };
        reserve.after();
        if let Err(e) = reserve.spare(&connection) {
            tracing::warn!(error = %e, "the database has no space to spare");
        }
        let (jobs, mut queue) = mpsc::channel::<Job>(QUEUE);
        let run = move || {
            let mut connection = connection;
            while let Some(job) = queue.blocking_recv() {
                job(&mut connection);
            }
        };
        std::thread::Builder::new()
            .name("db".to_owned())
            .stack_size(512 * 1024)
            .spawn(run)
            .map_err(|_| DbError::Closed)?;
        Ok(Self { jobs, reserve })
    }

    /// Runs something that ends a machine. It overwrites space that is held for it; where the file system needs other space all the
    /// same, the reserve is given up.
    pub(crate) async fn insist<T, F>(&self, job: F) -> Result<T, DbError>
    where
        T: Send + 'static,
        F: Fn(&mut Connection) -> Result<T, DbError> + Clone + Send + 'static,
    {
        match self.call(job.clone()).await {
            Err(e) if e.is_full() => {
                tracing::warn!("the disk is full: the reserve is given up");
                self.reserve.release();
                self.call(job).await
            }
            result => result,
        }
    }

    /// Takes the space again that the end of machines may have used, and says whether all of it is there.
    pub(crate) async fn keep_room(&self) -> bool {
        let reserve = self.reserve.clone();
        let kept = self.call(move |c| {
            reserve.spare(c)?;
            Ok(reserve.fill())
        });
        kept.await.unwrap_or(false)
    }

    /// Whether the space for the end of machines was there when it was last looked for.
    pub(crate) fn holds_room(&self) -> bool {
        self.reserve.is_held()
    }

    /// Moves the write-ahead log into the database, so that the one file of a stopped daemon has everything.
    pub async fn checkpoint(&self) {
        if let Err(e) = self.call(|c| reserve::checkpoint(c)).await {
            tracing::warn!(error = %e, "the write-ahead log stays for the next daemon");
        }
    }

    /// The schema that the database has now.
    pub async fn version(&self) -> Result<i64, DbError> {
        self.call(|c| Ok(c.query_row("PRAGMA user_version", [], |row| row.get(0))?))
            .await
    }

    /// Runs something with the connection. Jobs run one after the other, in the order they came.
    pub async fn call<T, F>(&self, job: F) -> Result<T, DbError>
    where
        T: Send + 'static,
        F: FnOnce(&mut Connection) -> Result<T, DbError> + Send + 'static,
    {
        let (answer, result) = oneshot::channel();
        let reserve = self.reserve.clone();
        let boxed: Job = Box::new(move |connection| {
            let _ = answer.send(job(connection).map_err(|e| judged(reserve.dir(), e)));
        });
        self.jobs.send(boxed).await.map_err(|_| DbError::Closed)?;
        result.await.map_err(|_| DbError::Closed)?
    }

    /// The same for what changes something and ends no machine: refused where it would take the space that is held for ends.
    pub async fn write<T, F>(&self, job: F) -> Result<T, DbError>
    where
        T: Send + 'static,
        F: FnOnce(&mut Connection) -> Result<T, DbError> + Send + 'static,
    {
        let reserve = self.reserve.clone();
        self.call(move |c| {
            reserve.guard(c)?;
            job(c)
        })
        .await
    }

    /// The same, and the change is on the disk before this comes back. All others are once the log is checkpointed: a host that loses
    /// power may lose the last of them, never a part of one.
    pub async fn call_lasting<T, F>(&self, job: F) -> Result<T, DbError>
    where
        T: Send + 'static,
        F: FnOnce(&mut Connection) -> Result<T, DbError> + Send + 'static,
    {
        self.write(|c| {
            c.execute_batch("PRAGMA synchronous = FULL")?;
            let done = job(c);
            c.execute_batch("PRAGMA synchronous = NORMAL")?;
            done
        })
        .await
    }
}

fn connect(path: &Path) -> Result<Connection, DbError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let judge = |e: rusqlite::Error| judge(path, e);
    let mut connection = Connection::open_with_flags(path, flags).map_err(judge)?;
    // The daemon is alone with it (the state's lock), so that the index of the log can be in memory: as a file it would have to be
    // made at every start, which a full disk does not let happen.
    let pragmas = format!(
        "PRAGMA locking_mode = EXCLUSIVE; PRAGMA busy_timeout = 5000; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
         PRAGMA foreign_keys = ON; PRAGMA cache_size = -512; PRAGMA temp_store = MEMORY;
         PRAGMA journal_size_limit = {}; PRAGMA wal_autocheckpoint = {};",
        reserve::LOG,
        reserve::CHECKPOINT
    );
    connection.execute_batch(&pragmas).map_err(judge)?;
    // Else the log would be removed with the connection, and its blocks be anybody's.
    connection
        .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
        .map_err(judge)?;
    let sound: String = connection
        .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
        .map_err(judge)?;
    if sound != "ok" {
        let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
        let source = rusqlite::Error::SqliteFailure(code, Some(sound));
        return Err(DbError::Corrupt {
            path: path.to_owned(),
            source,
        });
    }
    schema::migrate(&mut connection, path)?;
    Ok(connection)
}

/// Tells a damaged file from other failures.
fn judge(path: &Path, e: rusqlite::Error) -> DbError {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    match e.sqlite_error_code() {
        Some(DatabaseCorrupt | NotADatabase) => DbError::Corrupt {
            path: path.to_owned(),
            source: e,
        },
        _ => DbError::Sqlite(e),
    }
}

/// What SQLite calls a failed call of the system may be a full disk: the file system knows.
fn judged(dir: &Path, e: DbError) -> DbError {
    use rusqlite::ErrorCode::{CannotOpen, SystemIoFailure};
    let DbError::Sqlite(source) = &e else { return e };
    let of_system = matches!(source.sqlite_error_code(), Some(CannotOpen | SystemIoFailure));
    if of_system && space::is_full(dir) {
        return DbError::Full;
    }
    e
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_damaged_file_is_named_and_left_alone() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("banger.db");
        std::fs::write(&path, b"this is not a database, not at all, far from it").unwrap();
        let error = Db::open(&path).unwrap_err();
        assert!(matches!(error, DbError::Corrupt { .. }), "{error:?}");
        assert!(error.to_string().contains("banger.db"));
        assert!(error.hint().unwrap().contains("mv "));
        assert!(std::fs::read(&path).unwrap().starts_with(b"this is not"));
    }

    #[tokio::test]
    async fn a_truncated_database_is_noticed() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("banger.db");
        let connection = connect(&path).unwrap();
        reserve::checkpoint(&connection).unwrap();
        drop(connection);
        std::fs::remove_file(tmp.path().join("banger.db-wal")).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let result = connect(&path);
        assert!(matches!(result, Err(DbError::Corrupt { .. })), "{result:?}");
    }

    #[tokio::test]
    async fn a_newer_schema_is_refused() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("banger.db");
        let connection = connect(&path).unwrap();
        connection.execute_batch("PRAGMA user_version = 999").unwrap();
        drop(connection);
        assert!(matches!(Db::open(&path), Err(DbError::Newer { found: 999, .. })));
    }
}
