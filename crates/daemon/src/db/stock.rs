//! Names of images and kernels. The objects themselves are content-addressed files in the store.

use banger_proto::api::Timestamp;
use rusqlite::params;

use super::{Db, DbError};

/// Which names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameTable {
    /// Names of images.
    Images,
    /// Names of kernels.
    Kernels,
}

impl NameTable {
    fn table(self) -> &'static str {
        match self {
            Self::Images => "images",
            Self::Kernels => "kernels",
        }
    }
}

/// A name and what it points at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedObject {
    /// Name.
    pub name: String,
    /// Digest, `sha256:…`.
    pub digest: String,
    /// When the name was pointed at it.
    pub created_at: Timestamp,
}

impl Db {
    /// All names of a table, in their order.
    pub async fn names(&self, table: NameTable) -> Result<Vec<NamedObject>, DbError> {
        self.call(move |c| {
            let sql = format!("SELECT name, digest, created_at FROM {} ORDER BY name", table.table());
            let mut statement = c.prepare_cached(&sql)?;
            let rows = statement.query_map([], |row| {
                Ok(NamedObject {
                    name: row.get(0)?,
                    digest: row.get(1)?,
                    created_at: row.get(2)?,
                })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// Points a name at an object.
    pub async fn put_name(&self, table: NameTable, object: NamedObject) -> Result<(), DbError> {
        self.write(move |c| {
            let sql = format!(
                "INSERT INTO {} (name, digest, created_at) VALUES (?1, ?2, ?3)
                 ON CONFLICT (name) DO UPDATE SET digest = excluded.digest, created_at = excluded.created_at",
                table.table()
            );
            c.execute(&sql, params![object.name, object.digest, object.created_at])?;
            Ok(())
        })
        .await
    }

    /// Forgets a name.
    pub async fn delete_name(&self, table: NameTable, name: String) -> Result<(), DbError> {
        self.call(move |c| {
            c.execute(&format!("DELETE FROM {} WHERE name = ?1", table.table()), [name])?;
            Ok(())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_points_at_one_object() {
        let tmp = tempfile::tempdir().unwrap();
        let db = Db::open(&tmp.path().join("banger.db")).unwrap();
        for digest in ["sha256:1", "sha256:2"] {
            let object = NamedObject {
                name: "debian".to_owned(),
                digest: digest.to_owned(),
                created_at: crate::time::now(),
            };
            db.put_name(NameTable::Images, object).await.unwrap();
        }
        let names = db.names(NameTable::Images).await.unwrap();
        assert_eq!(names.len(), 1);
        assert_eq!(names[0].digest, "sha256:2");
        assert!(db.names(NameTable::Kernels).await.unwrap().is_empty());
        db.delete_name(NameTable::Images, "debian".to_owned()).await.unwrap();
        assert!(db.names(NameTable::Images).await.unwrap().is_empty());
    }
}
