//! Space that is held for the end of machines: on a full disk a stop and a removal must still be written down, for a removal is what
//! makes space.
//!
//! What ends a machine is written *over* blocks that are there already, for space that is given up on a full disk is anybody's, and
//! none of it may be this user's:
//!
//! * the write-ahead log has all its blocks from the start, and is written from its beginning again before they are used up
//!   ([`LOG`], [`CHECKPOINT`]),
//! * the database has free pages inside, which are used before it grows ([`Reserve::spare`]); whatever ends no machine leaves the last
//!   of them alone ([`Reserve::guard`]). A database that had to grow and could not would keep the log from beginning again.
//!
//! `banger.reserve` is for file systems that write to another place whatever is overwritten, and for what did not get its blocks
//! before the disk was full: it is given up when nothing else helps, and taken again when there is space.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use banger_vmm::space;
use rusqlite::Connection;
use rustix::fs::{IFlags, Mode, OFlags, ioctl_getflags, ioctl_setflags, open};

use super::DbError;

/// Size of the write-ahead log in bytes: room for the pages after which it is checkpointed, and for the largest transaction.
pub(super) const LOG: u64 = 512 * 1024;
/// Pages in the log after which it is written into the database, and begun again.
pub(super) const CHECKPOINT: u32 = 32;
/// Free pages that the database gets inside. An end takes some three at most, and most take none.
const SPARE: i64 = 64;
/// Free pages that are left to the end of machines.
const KEPT: i64 = 32;
/// Size of the reserve in bytes: more than the log.
const SIZE: u64 = 1024 * 1024;

/// The files that hold space.
#[derive(Debug, Clone)]
pub(super) struct Reserve {
    database: PathBuf,
    log: PathBuf,
    reserve: PathBuf,
    /// The database, to give it blocks. Open for as long as its connection: closing it would let go of the connection's locks.
    file: Option<Arc<File>>,
}

impl Reserve {
    /// Those of a database that is not open yet. It is made if it is not there; a copy of one may have holes, and gets its blocks.
    pub(super) fn of(database: &Path) -> Self {
        let beside = |end: &str| {
            let mut name = database.to_owned().into_os_string();
            name.push(end);
            PathBuf::from(name)
        };
        // The index of the log is in memory; what a release before this one left is of no use.
        let _ = std::fs::remove_file(beside("-shm"));
        if database.exists() {
            tell(space::fill(database, 0), database);
        } else {
            in_place(database);
        }
        Self {
            database: database.to_owned(),
            log: beside("-wal"),
            reserve: database.with_extension("reserve"),
            file: File::options().write(true).open(database).ok().map(Arc::new),
        }
    }

    /// Directory of the files.
    pub(super) fn dir(&self) -> &Path {
        self.database.parent().unwrap_or(Path::new("."))
    }

    /// Once the database is open: the log gets its blocks, those of the reserve where there are no others.
    pub(super) fn after(&self) {
        if !std::fs::metadata(&self.log).is_ok_and(|meta| meta.len() > 0) {
            in_place(&self.log);
        }
        if space::fill(&self.log, LOG).is_err() {
            self.release();
            tell(space::fill(&self.log, LOG), &self.log);
        }
        self.fill();
    }

    /// Takes the space again that may have been used, and says whether all of it is there. To be called only where nothing else
    /// writes to the log.
    pub(super) fn fill(&self) -> bool {
        let filled = space::fill(&self.log, LOG).and_then(|()| space::fill(&self.reserve, SIZE));
        match filled {
            Ok(()) => true,
            Err(e) => {
                tracing::debug!(error = %e, "no space is held for the end of machines");
                // Half of it is of no use, and what it took may be what somebody waits for.
                self.release();
                false
            }
        }
    }

    /// Whether the reserve is there.
    pub(super) fn is_held(&self) -> bool {
        std::fs::metadata(&self.reserve).is_ok_and(|meta| meta.len() >= SIZE)
    }

    /// Gives the reserve up.
    pub(super) fn release(&self) {
        let _ = std::fs::remove_file(&self.reserve);
    }

    /// Before a change that ends no machine: the free pages that are left to those are there, or the change is refused.
    pub(super) fn guard(&self, c: &Connection) -> Result<(), DbError> {
        match free(c)? < KEPT {
            true => self.spare(c),
            false => Ok(()),
        }
    }

    /// Makes sure that the database has free pages inside, with blocks of their own.
    pub(super) fn spare(&self, c: &Connection) -> Result<(), DbError> {
        if free(c)? >= SPARE {
            return Ok(());
        }
        let size = pragma(c, "page_size")?;
        let grow = || {
            c.execute_batch(&format!(
                "BEGIN IMMEDIATE; DROP TABLE IF EXISTS spare; CREATE TABLE spare (space BLOB) STRICT;
                 INSERT INTO spare VALUES (zeroblob({}));",
                (SPARE + 2) * size
            ))?;
            self.extend(pragma(c, "page_count")? * size)?;
            c.execute_batch("COMMIT")?;
            // Nothing in the log is newer than the pages that are free from here on.
            checkpoint(c)?;
            Ok(c.execute_batch("DROP TABLE spare")?)
        };
        grow().inspect_err(|_| {
            if !c.is_autocommit() {
                let _ = c.execute_batch("ROLLBACK");
            }
        })
    }

    /// Gives the database blocks up to this length before it grows to it.
    fn extend(&self, length: i64) -> Result<(), DbError> {
        let Some(file) = &self.file else { return Ok(()) };
        let length = u64::try_from(length).unwrap_or(0);
        let before = file.metadata().map_err(full)?.len();
        let zeros = vec![0; 4096];
        let mut at = before;
        while at < length {
            let count = usize::try_from(length - at).map_or(zeros.len(), |left| left.min(zeros.len()));
            if let Err(e) = file.write_all_at(zeros.get(..count).unwrap_or_default(), at) {
                let _ = file.set_len(before);
                return Err(full(e));
            }
            at += count as u64;
        }
        file.sync_data().map_err(full)
    }
}

fn full(e: std::io::Error) -> DbError {
    tracing::debug!(error = %e, "the database gets no space to spare");
    DbError::Full
}

fn free(c: &Connection) -> Result<i64, DbError> {
    pragma(c, "freelist_count")
}

fn pragma(c: &Connection, name: &str) -> Result<i64, DbError> {
    Ok(c.query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))?)
}

fn tell(done: std::io::Result<()>, path: &Path) {
    if let Err(e) = done {
        tracing::warn!(path = %path.display(), error = %e, "its blocks are not all there; on a full disk it may not be written");
    }
}

/// Makes a file that is overwritten in place, where the file system would not do so by itself (btrfs).
fn in_place(path: &Path) {
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    if let Ok(file) = open(path, flags, Mode::RUSR | Mode::WUSR)
        && let Ok(flags) = ioctl_getflags(&file)
    {
        let _ = ioctl_setflags(&file, flags | IFlags::NOCOW);
    }
}

/// Writes the log into the database; the next transaction begins it anew. The log keeps its blocks.
pub(super) fn checkpoint(c: &Connection) -> Result<(), DbError> {
    Ok(c.query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(()))?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn is_dense(path: &Path, at_least: u64) -> bool {
        let meta = std::fs::metadata(path).unwrap();
        meta.len() >= at_least && meta.blocks() * 512 >= meta.len()
    }

    #[test]
    fn the_reserve_is_taken_and_given_and_a_sparse_copy_of_it_is_none() {
        let tmp = tempfile::tempdir().unwrap();
        let reserve = Reserve::of(&tmp.path().join("banger.db"));
        assert!(reserve.fill());
        let file = tmp.path().join("banger.reserve");
        assert!(is_dense(&file, SIZE) && is_dense(&reserve.log, LOG));
        reserve.release();
        assert!(!file.exists());
        std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
        assert!(!is_dense(&file, SIZE));
        assert!(reserve.fill() && is_dense(&file, SIZE));
    }

    #[test]
    fn free_pages_are_inside_and_have_blocks() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("banger.db");
        let reserve = Reserve::of(&path);
        let connection = super::super::connect(&path).unwrap();
        for _ in 0..2 {
            reserve.spare(&connection).unwrap();
            let free = free(&connection).unwrap();
            assert!(free >= SPARE, "{free}");
        }
        checkpoint(&connection).unwrap();
        assert!(is_dense(&path, 0), "{:?}", std::fs::metadata(&path).unwrap());
        let tables: i64 = connection
            .query_row("SELECT count(*) FROM sqlite_master WHERE name = 'spare'", [], |row| {
                row.get(0)
            })
            .unwrap();
        assert_eq!(tables, 0);
    }
}
