//! The schema and its history. A migration that was released is never changed; a new one is appended.

use std::path::Path;

use rusqlite::Connection;

use super::{DbError, judge};

/// Migrations in order; the number of a migration is its place, from 1.
const MIGRATIONS: &[&str] = &[
    // 1: machines, names of images and kernels, operations.
    "CREATE TABLE machines (
        id          TEXT PRIMARY KEY NOT NULL,
        name        TEXT NOT NULL UNIQUE,
        state       TEXT NOT NULL,
        cause       TEXT,
        spec        TEXT NOT NULL,
        created_at  TEXT NOT NULL,
        started_at  TEXT,
        workspace   TEXT,
        boot        TEXT,
        auto_remove INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE TABLE images (
        name       TEXT PRIMARY KEY NOT NULL,
        digest     TEXT NOT NULL,
        created_at TEXT NOT NULL
    ) STRICT;
    CREATE TABLE kernels (
        name       TEXT PRIMARY KEY NOT NULL,
        digest     TEXT NOT NULL,
        created_at TEXT NOT NULL
    ) STRICT;
    CREATE TABLE operations (
        id       TEXT PRIMARY KEY NOT NULL,
        sequence INTEGER NOT NULL UNIQUE,
        document TEXT NOT NULL
    ) STRICT;",
    // 2: machines that are suspended when nobody uses them; how often templates were used.
    "ALTER TABLE machines ADD COLUMN idle_suspend_after_ms INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE templates (
        id           TEXT PRIMARY KEY NOT NULL,
        uses         INTEGER NOT NULL DEFAULT 0,
        created_at   TEXT NOT NULL,
        last_used_at TEXT
    ) STRICT;",
    // 3: a machine's place in the network of system mode, and ports of the host that lead to it.
    "ALTER TABLE machines ADD COLUMN slot INTEGER;
    CREATE UNIQUE INDEX machines_slot ON machines (slot);
    ALTER TABLE machines ADD COLUMN forwards TEXT NOT NULL DEFAULT '[]';",
    // 4: what follows a panic of the guest's kernel.
    "ALTER TABLE machines ADD COLUMN on_panic TEXT NOT NULL DEFAULT '\"stop\"';",
];

/// The schema this build knows.
pub const VERSION: i64 = MIGRATIONS.len() as i64;

/// Brings a database up to date, each migration in a transaction of its own.
pub(super) fn migrate(connection: &mut Connection, path: &Path) -> Result<(), DbError> {
    let found: i64 = connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(|e| judge(path, e))?;
    if found > VERSION {
        return Err(DbError::Newer {
            path: path.to_owned(),
            found,
        });
    }
    for (index, sql) in MIGRATIONS.iter().enumerate().skip(usize::try_from(found).unwrap_or(0)) {
        let number = index + 1;
        let transaction = connection.transaction()?;
        transaction.execute_batch(sql)?;
        transaction.pragma_update(None, "user_version", number as i64)?;
        transaction.commit()?;
        tracing::info!(migration = number, "database migrated");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migrations_run_once_and_in_order() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection, Path::new("x")).unwrap();
        migrate(&mut connection, Path::new("x")).unwrap();
        let version: i64 = connection.query_row("PRAGMA user_version", [], |r| r.get(0)).unwrap();
        assert_eq!(version, VERSION);
    }

    #[test]
    fn released_migrations_do_not_change() {
        // The first released schema, by length and a simple sum; a change here breaks databases in the field.
        let first = MIGRATIONS[0];
        assert!(first.contains("CREATE TABLE machines") && first.contains("auto_remove INTEGER NOT NULL DEFAULT 0"));
    }

    #[test]
    fn a_migration_that_fails_leaves_nothing() {
        let mut connection = Connection::open_in_memory().unwrap();
        // A table of the first migration is in the way.
        connection.execute_batch("CREATE TABLE kernels (x)").unwrap();
        assert!(migrate(&mut connection, Path::new("x")).is_err());
        let tables: i64 = connection
            .query_row("SELECT count(*) FROM sqlite_master WHERE name = 'machines'", [], |r| {
                r.get(0)
            })
            .unwrap();
        assert_eq!(tables, 0);
    }
}
