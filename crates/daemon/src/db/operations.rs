//! Rows of recent operations, so that what became of one can be told after a restart.

use banger_proto::api::Operation;
use rusqlite::params;

use super::{Db, DbError};

impl Db {
    /// Operations that are kept, oldest first. Rows that cannot be read are left out; nothing depends on them.
    pub async fn operations(&self) -> Result<Vec<Operation>, DbError> {
        self.call(|c| {
            let mut statement = c.prepare("SELECT document FROM operations ORDER BY sequence")?;
            let documents = statement
                .query_map([], |row| row.get::<_, String>(0))?
                .collect::<Result<Vec<_>, _>>()?;
            Ok(documents.iter().filter_map(|d| serde_json::from_str(d).ok()).collect())
        })
        .await
    }

    /// Writes an operation as it is now, and forgets all but the newest `keep`.
    pub async fn put_operation(&self, operation: Operation, keep: usize) -> Result<(), DbError> {
        self.write(move |c| {
            let document = serde_json::to_string(&operation).map_err(|e| DbError::Row {
                table: "operations",
                what: e.to_string(),
            })?;
            c.execute(
                "INSERT INTO operations (id, sequence, document)
                 VALUES (?1, (SELECT coalesce(max(sequence), 0) + 1 FROM operations), ?2)
                 ON CONFLICT (id) DO UPDATE SET document = excluded.document",
                params![operation.id, document],
            )?;
            c.execute(
                "DELETE FROM operations WHERE sequence <= (SELECT max(sequence) FROM operations) - ?1",
                params![keep as i64],
            )?;
            Ok(())
        })
        .await
    }
}
