//! Rows of templates: how often each was used, and when last. What a template is stands in its directory.

use std::collections::BTreeMap;

use banger_proto::api::Timestamp;
use rusqlite::params;

use super::{Db, DbError};

/// The use of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateRow {
    /// Machines that were started from it.
    pub uses: u64,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was last used.
    pub last_used_at: Option<Timestamp>,
}

impl Db {
    /// All of them, by id.
    pub async fn templates(&self) -> Result<BTreeMap<String, TemplateRow>, DbError> {
        self.call(|c| {
            let mut statement = c.prepare_cached("SELECT id, uses, created_at, last_used_at FROM templates")?;
            let rows = statement.query_map([], |row| {
                let uses: i64 = row.get(1)?;
                Ok((
                    row.get(0)?,
                    TemplateRow {
                        uses: uses.try_into().unwrap_or(0),
                        created_at: row.get(2)?,
                        last_used_at: row.get(3)?,
                    },
                ))
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// Notes a template that was made; one that is there already starts anew.
    pub async fn add_template(&self, id: String, now: Timestamp) -> Result<(), DbError> {
        self.write(move |c| {
            c.execute(
                "INSERT OR REPLACE INTO templates (id, uses, created_at) VALUES (?1, 0, ?2)",
                params![id, now],
            )?;
            Ok(())
        })
        .await
    }

    /// Counts a use.
    pub async fn template_used(&self, id: String, now: Timestamp) -> Result<(), DbError> {
        self.write(move |c| {
            c.execute(
                "UPDATE templates SET uses = uses + 1, last_used_at = ?2 WHERE id = ?1",
                params![id, now],
            )?;
            Ok(())
        })
        .await
    }

    /// Forgets one.
    pub async fn delete_template(&self, id: String) -> Result<(), DbError> {
        self.insist(move |c| {
            c.execute("DELETE FROM templates WHERE id = ?1", [&id])?;
            Ok(())
        })
        .await
    }
}
