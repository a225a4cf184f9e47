//! The database on file systems that are full, each mounted by the test itself where nobody else sees it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use banger_proto::api::{MachineState, Operation, OperationState};

use super::machines::tests::row;
use super::*;
use crate::ops::Ops;

/// Where the file system is, in the process that runs a test on it.
const PLACE: &str = "BANGER_TEST_FULL_DISK";

/// Runs a test again in a mount namespace with a file system of its own, and comes back with `None` when that is done. In the
/// namespace it comes back with the directory.
fn mounted(test: &str, script: &str) -> Option<PathBuf> {
    if let Some(place) = std::env::var_os(PLACE) {
        return Some(place.into());
    }
    let dir = tempfile::tempdir().unwrap();
    let script = format!("cd \"$1\" && mkdir fs && {script} || exit 77; shift; exec \"$@\"");
    let done = Command::new("unshare")
        .args(["-m", "sh", "-c", &script, "sh"])
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(PLACE, dir.path().join("fs"))
        .output();
    match done {
        Ok(done) if done.status.code() == Some(77) => eprintln!("skipped: nothing can be mounted here"),
        Err(e) => eprintln!("skipped: {e}"),
        Ok(done) => {
            let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
            assert!(done.status.success() && said.contains("1 passed"), "{said}");
        }
    }
    None
}

/// Takes every byte that is left.
fn take_all(dir: &Path) -> PathBuf {
    let path = dir.join("filler");
    let mut file = OpenOptions::new().create(true).append(true).open(&path).unwrap();
    for size in [1 << 20, 64 << 10, 4096, 512, 1] {
        while file.write_all(&vec![7; size]).is_ok() {}
    }
    let _ = file.sync_all();
    assert!(space::is_full(dir));
    path
}

/// Waits until a database is closed that was dropped: its blocks are anybody's only then.
fn close(db: Db) {
    drop(db);
    let open = || {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .flatten()
            .filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .any(|path| path.to_string_lossy().contains("/fs/banger.db"))
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while open() {
        assert!(std::time::Instant::now() < deadline, "the database stays open");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn operation(n: usize) -> Operation {
    Operation {
        id: format!("op-{n:08x}"),
        kind: "machine.stop".to_owned(),
        target: "a".repeat(40),
        state: OperationState::Running,
        stage: "s".repeat(n % 700),
        progress: None,
        error: None,
        started_at: crate::time::now(),
        ended_at: None,
        unchanged: false,
    }
}

/// Everything that is written while machines end, many times.
async fn ends(db: &Db) {
    for n in 0..300 {
        // Nothing depends on it, so it may be refused.
        if let Err(e) = db.put_operation(operation(n), 100).await {
            assert!(e.is_full(), "{e:?}");
        }
        let mut changed = row(u8::try_from(n % 20).unwrap(), &format!("m{}", n % 20));
        changed.state = [MachineState::Stopping, MachineState::Stopped][n % 2];
        changed.cause = Some("c".repeat(n));
        db.update_ending_machine(changed).await.unwrap();
    }
    for n in 0..10 {
        db.delete_machine(row(n, "").id).await.unwrap();
    }
}

async fn ends_are_written_on_a_full_disk(dir: &Path) {
    let path = dir.join("banger.db");
    let db = Db::open(&path).unwrap();
    for n in 0..20 {
        db.insert_machine(row(n, &format!("m{n}")), None).await.unwrap();
    }
    // As in a copy of the directory that leaves zeros out.
    let reserve = dir.join("banger.reserve");
    File::create(&reserve).unwrap().set_len(1 << 20).unwrap();
    let filler = take_all(dir);
    ends(&db).await;
    assert!(!db.keep_room().await);
    assert!(matches!(
        db.insert_machine(row(99, "z"), None).await,
        Err(DbError::Full)
    ));
    db.checkpoint().await;
    close(db);

    // A daemon starts, and so does one whose predecessor left everything as it was.
    for _ in 0..2 {
        let db = Db::open(&path).unwrap();
        let ops = Ops::open(db.clone()).await.unwrap();
        assert_eq!(ops.running(), 0);
        assert_eq!(db.machines().await.unwrap().len(), 10);
        db.update_ending_machine(row(15, "m15")).await.unwrap();
        drop(ops);
        close(db);
    }

    // There is space again: it is held without another start.
    let db = Db::open(&path).unwrap();
    std::fs::remove_file(filler).unwrap();
    assert!(db.keep_room().await && db.holds_room());
    db.insert_machine(row(99, "z"), None).await.unwrap();
    let filler = take_all(dir);
    ends(&db).await;
    std::fs::remove_file(filler).unwrap();
}

#[tokio::test]
async fn ends_are_written_on_a_full_tmpfs() {
    let test = "db::full_tests::ends_are_written_on_a_full_tmpfs";
    if let Some(dir) = mounted(test, "mount -t tmpfs -o size=12m none fs") {
        ends_are_written_on_a_full_disk(&dir).await;
    }
}

#[tokio::test]
async fn ends_are_written_on_a_full_ext4() {
    let test = "db::full_tests::ends_are_written_on_a_full_ext4";
    let script = "truncate -s 24M image && mkfs.ext4 -q image && mount -o loop image fs";
    if let Some(dir) = mounted(test, script) {
        ends_are_written_on_a_full_disk(&dir).await;
    }
}

/// A state directory of a release that held no space in the log, or a copy of one.
#[tokio::test]
async fn a_daemon_starts_on_a_full_disk_though_nothing_was_held() {
    let test = "db::full_tests::a_daemon_starts_on_a_full_disk_though_nothing_was_held";
    let Some(dir) = mounted(test, "mount -t tmpfs -o size=12m none fs") else {
        return;
    };
    let path = dir.join("banger.db");
    let db = Db::open(&path).unwrap();
    db.insert_machine(row(1, "a"), None).await.unwrap();
    db.checkpoint().await;
    close(db);
    std::fs::remove_file(dir.join("banger.db-wal")).unwrap();
    take_all(&dir);
    let db = Db::open(&path).unwrap();
    assert_eq!(db.machines().await.unwrap().len(), 1);
    // The reserve was given up for the log.
    assert!(!db.holds_room());
    ends(&db).await;
    close(db);

    // Without even that it says what is the matter.
    std::fs::remove_file(dir.join("banger.db-wal")).unwrap();
    take_all(&dir);
    let db = Db::open(&path).unwrap();
    let refused = db.put_operation(operation(1), 100).await.unwrap_err();
    assert!(refused.is_full(), "{refused:?}");
    close(db);
    let none = Db::open(&dir.join("new/banger.db"));
    assert!(none.is_err());
    let new = Db::open(&dir.join("new.db")).unwrap_err();
    assert!(new.is_full(), "{new:?}");
}
