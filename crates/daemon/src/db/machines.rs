//! Rows of machines.

use banger_core::id::MachineId;
use banger_proto::api::{BootReport, Forward, MachineSpec, MachineState, OnPanic, Timestamp, Workspace};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Db, DbError};

/// What lasts of a machine.
#[derive(Debug, Clone, PartialEq)]
pub struct MachineRow {
    /// Identifier.
    pub id: MachineId,
    /// Name.
    pub name: String,
    /// State as it was last known.
    pub state: MachineState,
    /// Why it is stopped or broken.
    pub cause: Option<String>,
    /// What it is made of.
    pub spec: MachineSpec,
    /// When the row was written.
    pub created_at: Timestamp,
    /// When the engine was last started.
    pub started_at: Option<Timestamp>,
    /// Repository that was copied in.
    pub workspace: Option<Workspace>,
    /// How the last start went.
    pub boot: Option<BootReport>,
    /// Removed when its holder is gone.
    pub auto_remove: bool,
    /// Suspended after so many milliseconds without use; 0 is never.
    pub idle_suspend_after_ms: u64,
    /// What follows when its guest's kernel has panicked.
    pub on_panic: OnPanic,
    /// Its place in the network of system mode (`banger_system::net`): no two machines have the same.
    pub slot: Option<u32>,
    /// Ports of the host that lead to it.
    pub forwards: Vec<Forward>,
}

const COLUMNS: &str = "id, name, state, cause, spec, created_at, started_at, workspace, boot, auto_remove, \
                       idle_suspend_after_ms, slot, forwards, on_panic";

impl Db {
    /// All machines, oldest first.
    pub async fn machines(&self) -> Result<Vec<MachineRow>, DbError> {
        self.call(|c| all(c)).await
    }

    /// Writes a new row. The name's unique index decides between two that come at once. Refused while there is no room to write
    /// down the machine's end.
    ///
    /// With `slots` it gets the smallest slot that neither a row nor anybody else has. Comes back as it was written.
    pub async fn insert_machine(&self, mut row: MachineRow, slots: Option<Slots>) -> Result<MachineRow, DbError> {
        if !self.keep_room().await {
            return Err(DbError::Full);
        }
        // What a machine leaves on the host must not outlive the knowledge of it, not even when the host loses power.
        self.call_lasting(move |c| {
            if let Some(slots) = &slots {
                row.slot = Some(free_slot(c, slots)?);
            }
            insert(c, &row)?;
            Ok(row)
        })
        .await
    }

    /// Writes an existing row anew.
    pub async fn update_machine(&self, row: MachineRow) -> Result<(), DbError> {
        self.write(move |c| update(c, &row)).await
    }

    /// The same for a change that has to outlive the host's power.
    pub async fn update_machine_lasting(&self, row: MachineRow) -> Result<(), DbError> {
        self.call_lasting(move |c| update(c, &row)).await
    }

    /// The same for a change on the way to a machine's end, which is written on a full disk too.
    pub async fn update_ending_machine(&self, row: MachineRow) -> Result<(), DbError> {
        self.insist(move |c| update(c, &row)).await
    }

    /// Removes a row; the last step of a delete.
    pub async fn delete_machine(&self, id: MachineId) -> Result<(), DbError> {
        self.insist(move |c| {
            c.execute("DELETE FROM machines WHERE id = ?1", [id.as_str()])?;
            Ok(())
        })
        .await
    }
}

/// The slots that a new machine can have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots {
    /// The last one.
    pub last: u32,
    /// Those that machines without a row have.
    pub lent: Vec<u32>,
}

fn free_slot(c: &Connection, slots: &Slots) -> Result<u32, DbError> {
    let mut statement = c.prepare_cached("SELECT slot FROM machines WHERE slot IS NOT NULL")?;
    let rows = statement.query_map([], |row| row.get::<_, u32>(0))?;
    let mut used = rows.collect::<Result<std::collections::BTreeSet<u32>, _>>()?;
    used.extend(&slots.lent);
    let free = crate::host::rules::free(&used, slots.last, 1).first().copied();
    free.ok_or(DbError::NoSlot(slots.last))
}

fn all(c: &Connection) -> Result<Vec<MachineRow>, DbError> {
    let mut statement = c.prepare_cached(&format!("SELECT {COLUMNS} FROM machines ORDER BY created_at, id"))?;
    let mut rows = statement.query([])?;
    let mut machines = Vec::new();
    while let Some(row) = rows.next()? {
        machines.push(read(row)?);
    }
    Ok(machines)
}

fn insert(c: &Connection, row: &MachineRow) -> Result<(), DbError> {
    write(
        c,
        row,
        &format!(
            "INSERT INTO machines ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)"
        ),
    )
}

fn update(c: &Connection, row: &MachineRow) -> Result<(), DbError> {
    write(
        c,
        row,
        "UPDATE machines SET name = ?2, state = ?3, cause = ?4, spec = ?5, created_at = ?6, started_at = ?7,
         workspace = ?8, boot = ?9, auto_remove = ?10, idle_suspend_after_ms = ?11,
         slot = ?12, forwards = ?13, on_panic = ?14 WHERE id = ?1",
    )
}

fn write(c: &Connection, row: &MachineRow, sql: &str) -> Result<(), DbError> {
    let values = params![
        row.id.as_str(),
        row.name,
        row.state.as_str(),
        row.cause,
        json(&row.spec)?,
        row.created_at,
        row.started_at,
        row.workspace.as_ref().map(json).transpose()?,
        row.boot.as_ref().map(json).transpose()?,
        row.auto_remove,
        i64::try_from(row.idle_suspend_after_ms).unwrap_or(i64::MAX),
        row.slot,
        json(&row.forwards)?,
        json(&row.on_panic)?,
    ];
    match c.prepare_cached(sql)?.execute(values) {
        Ok(_) => Ok(()),
        Err(e) if e.sqlite_error_code() == Some(rusqlite::ErrorCode::ConstraintViolation) => {
            let taken: Option<String> = c
                .query_row("SELECT id FROM machines WHERE name = ?1", [&row.name], |r| r.get(0))
                .optional()?;
            match taken {
                Some(id) if id != row.id.as_str() => Err(DbError::NameTaken(row.name.clone())),
                _ => Err(e.into()),
            }
        }
        Err(e) => Err(e.into()),
    }
}

fn read(row: &Row<'_>) -> Result<MachineRow, DbError> {
    let bad = |what: String| DbError::Row {
        table: "machines",
        what,
    };
    let id: String = row.get(0)?;
    let state: String = row.get(2)?;
    Ok(MachineRow {
        id: MachineId::parse(&id).map_err(|e| bad(format!("id `{}`: {e}", id.escape_default())))?,
        name: row.get(1)?,
        state: serde_json::from_value(serde_json::Value::String(state))
            .map_err(|e| bad(format!("state of {id}: {e}")))?,
        cause: row.get(3)?,
        spec: parse(&row.get::<_, String>(4)?, &id)?,
        created_at: row.get(5)?,
        started_at: row.get(6)?,
        workspace: row.get::<_, Option<String>>(7)?.map(|t| parse(&t, &id)).transpose()?,
        boot: row.get::<_, Option<String>>(8)?.map(|t| parse(&t, &id)).transpose()?,
        auto_remove: row.get(9)?,
        idle_suspend_after_ms: row.get::<_, i64>(10)?.try_into().unwrap_or(0),
        slot: row.get(11)?,
        forwards: parse(&row.get::<_, String>(12)?, &id)?,
        on_panic: parse(&row.get::<_, String>(13)?, &id)?,
    })
}

fn json<T: Serialize>(value: &T) -> Result<String, DbError> {
    serde_json::to_string(value).map_err(|e| DbError::Row {
        table: "machines",
        what: e.to_string(),
    })
}

fn parse<T: DeserializeOwned>(text: &str, id: &str) -> Result<T, DbError> {
    serde_json::from_str(text).map_err(|e| DbError::Row {
        table: "machines",
        what: format!("{id}: {e}"),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use banger_proto::api::StageTime;
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn row(id: u8, name: &str) -> MachineRow {
        MachineRow {
            id: MachineId::from_random([id; 8]),
            name: name.to_owned(),
            state: MachineState::Creating,
            cause: None,
            spec: MachineSpec {
                image: "debian".to_owned(),
                image_digest: String::new(),
                kernel: "default".to_owned(),
                kernel_digest: String::new(),
                engine: "qemu".to_owned(),
                accel: "tcg".to_owned(),
                vcpu: 2,
                memory_mib: 512,
                disk_bytes: 1 << 30,
                network: "user".to_owned(),
                nat: true,
                net_group: None,
            },
            created_at: crate::time::now(),
            started_at: None,
            workspace: None,
            boot: None,
            auto_remove: false,
            idle_suspend_after_ms: 0,
            on_panic: OnPanic::Stop,
            slot: None,
            forwards: Vec::new(),
        }
    }

    async fn db() -> (tempfile::TempDir, Db) {
        let tmp = tempfile::tempdir().unwrap();
        let db = Db::open(&tmp.path().join("banger.db")).unwrap();
        (tmp, db)
    }

    #[tokio::test]
    async fn slots_are_given_once_and_again_when_they_are_free() {
        let tmp = tempfile::tempdir().unwrap();
        let db = Db::open(&tmp.path().join("banger.db")).unwrap();
        let slots = |last| Some(Slots { last, lent: vec![1] });
        let (a, b) = tokio::join!(
            db.insert_machine(row(1, "a"), slots(9)),
            db.insert_machine(row(2, "b"), slots(9))
        );
        let mut given = [a.unwrap().slot, b.unwrap().slot];
        given.sort_unstable();
        assert_eq!(given, [Some(0), Some(2)]);
        let full = db.insert_machine(row(3, "c"), slots(2)).await;
        assert!(matches!(full, Err(DbError::NoSlot(2))), "{full:?}");
        for machine in db.machines().await.unwrap() {
            if machine.slot == Some(0) {
                db.delete_machine(machine.id).await.unwrap();
            }
        }
        assert_eq!(db.insert_machine(row(3, "c"), slots(2)).await.unwrap().slot, Some(0));
        // A machine of user mode has none.
        assert_eq!(db.insert_machine(row(4, "d"), None).await.unwrap().slot, None);
    }

    #[tokio::test]
    async fn of_two_machines_with_one_name_one_is_written() {
        let (_tmp, db) = db().await;
        let (one, two) = tokio::join!(
            db.insert_machine(row(1, "box"), None),
            db.insert_machine(row(2, "box"), None)
        );
        assert_eq!([one.is_ok(), two.is_ok()].iter().filter(|x| **x).count(), 1);
        let lost = one.err().or(two.err()).unwrap();
        assert!(matches!(lost, DbError::NameTaken(name) if name == "box"));
        assert_eq!(db.machines().await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_rename_to_a_taken_name_changes_nothing() {
        let (_tmp, db) = db().await;
        db.insert_machine(row(1, "a"), None).await.unwrap();
        db.insert_machine(row(2, "b"), None).await.unwrap();
        let mut changed = row(2, "a");
        changed.cause = Some("x".to_owned());
        assert!(matches!(db.update_machine(changed).await, Err(DbError::NameTaken(_))));
        let names: Vec<_> = db.machines().await.unwrap().into_iter().map(|m| m.name).collect();
        assert_eq!(names, ["a", "b"]);
    }

    fn states() -> impl Strategy<Value = MachineState> {
        use MachineState::*;
        prop::sample::select(vec![Creating, Starting, Running, Stopping, Stopped, Error, Deleting])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn rows_read_back(
            state in states(),
            cause in prop::option::of(".{0,40}"),
            vcpu: u32,
            disk in 0u64..(1 << 60),
            head in prop::option::of("[0-9a-f]{40}"),
            stages in prop::collection::vec(("[a-z]{1,8}", 0u64..1_000_000), 0..5),
            auto_remove: bool,
        ) {
            let connection = {
                let mut c = Connection::open_in_memory().unwrap();
                super::super::schema::migrate(&mut c, std::path::Path::new("memory")).unwrap();
                c
            };
            let mut wanted = row(3, "box");
            insert(&connection, &wanted).unwrap();
            wanted.state = state;
            wanted.cause = cause;
            wanted.spec.vcpu = vcpu;
            wanted.spec.disk_bytes = disk;
            wanted.workspace = head.map(|head| Workspace {
                source: "/src".to_owned(), guest_path: "/root/repo".to_owned(), head, branch: None,
            });
            wanted.boot = Some(BootReport {
                how: "boot".to_owned(),
                from: None,
                source_paused_ms: None,
                stages: stages.into_iter().map(|(stage, ms)| StageTime { stage, ms }).collect(),
            });
            wanted.auto_remove = auto_remove;
            update(&connection, &wanted).unwrap();
            prop_assert_eq!(all(&connection).unwrap(), vec![wanted]);
        }
    }

    #[tokio::test]
    async fn a_row_of_nonsense_is_an_error_with_its_place() {
        let (_tmp, db) = db().await;
        db.insert_machine(row(1, "a"), None).await.unwrap();
        db.call(|c| Ok(c.execute("UPDATE machines SET spec = '{'", [])?))
            .await
            .unwrap();
        let error = db.machines().await.unwrap_err();
        assert!(error.to_string().contains("0101010101010101"), "{error}");
    }
}
