//! Programs: what is heard of them, and that none outlives its future.

use super::*;

const SH: Program = Program {
    name: "sh",
    package: "dash",
    purpose: "test",
};

fn sh(script: &str, deadline: Duration) -> Run {
    Run::new(SH, deadline).unwrap().arg("-c").arg(script)
}

#[tokio::test]
async fn output_and_clean_environment() {
    let out = sh("echo $LC_ALL; echo ${CARGO_PKG_NAME-unset}", Duration::from_secs(20))
        .output(100)
        .await
        .unwrap();
    assert_eq!(out, b"C\nunset\n");
}

#[tokio::test]
async fn failure_keeps_bounded_last_words() {
    let error = sh(
        "i=0; while [ $i -lt 100 ]; do echo line $i >&2; i=$((i+1)); done; exit 3",
        Duration::from_secs(20),
    )
    .output(100)
    .await
    .unwrap_err();
    let Error::ProgramFailed { how, last_words, .. } = error else {
        panic!("{error:?}")
    };
    assert_eq!(how, "exit status 3");
    assert_eq!(last_words.len(), TAIL_LINES);
    assert_eq!(last_words.last().unwrap(), "line 99");
}

#[tokio::test]
async fn full_disk_is_recognised() {
    let error = sh(
        "echo 'cp: write error: No space left on device' >&2; exit 1",
        Duration::from_secs(20),
    )
    .output(100)
    .await
    .unwrap_err();
    assert!(error.is_no_space());
}

#[tokio::test]
async fn too_much_output_is_an_error() {
    assert!(sh("echo 12345", Duration::from_secs(20)).output(3).await.is_err());
}

#[tokio::test]
async fn deadline_ends_the_whole_group() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let script = format!("sleep 1000 & echo $! > {}; wait", pid_file.display());
    let error = sh(&script, Duration::from_millis(500)).output(100).await.unwrap_err();
    assert!(matches!(error, Error::ProgramTimeout { .. }), "{error:?}");
    wait_gone(&pid_file).await;
}

#[tokio::test]
async fn dropping_the_future_ends_the_whole_group() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let script = format!("sleep 1000 & echo $! > {}; wait", pid_file.display());
    let task = tokio::spawn(async move { sh(&script, Duration::from_secs(600)).output(100).await });
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while std::fs::read_to_string(&pid_file).map_or(true, |s| s.trim().is_empty()) {
        assert!(std::time::Instant::now() < deadline, "the program did not start");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    task.abort();
    wait_gone(&pid_file).await;
}

async fn wait_gone(pid_file: &Path) {
    let pid: u32 = std::fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
    let stat = format!("/proc/{pid}/stat");
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    // A zombie counts as gone: its parent is whoever adopts orphans here.
    while std::fs::read_to_string(&stat).is_ok_and(|s| !s.contains(") Z ")) {
        assert!(std::time::Instant::now() < deadline, "process {pid} lives on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn program_error_wins_over_truncated_output() {
    let error = sh("echo no >&2; exit 9", Duration::from_secs(20))
        .stream(
            |_| {},
            |mut file| {
                let mut buf = Vec::new();
                io::Read::read_to_end(&mut file, &mut buf).unwrap();
                Err::<(), _>(Error::Tar {
                    what: "x".into(),
                    source: crate::tar::TarError::Truncated,
                })
            },
        )
        .await
        .unwrap_err();
    assert!(matches!(error, Error::ProgramFailed { .. }), "{error:?}");
}

#[test]
fn missing_program_is_typed() {
    let program = Program {
        name: "no-such-program-here",
        package: "thepackage",
        purpose: "test",
    };
    let error = Run::new(program, GRACE).unwrap_err();
    assert!(error.hint().unwrap().contains("thepackage"));
}

#[test]
fn lines_are_cut_and_cleaned() {
    let mut lines = Vec::new();
    let mut splitter = LineSplitter::default();
    splitter.feed(b"a\rb\x1b[0m\n\n", &mut |l| lines.push(l));
    splitter.feed(&vec![b'x'; 10_000], &mut |l| lines.push(l));
    splitter.finish(&mut |l| lines.push(l));
    assert_eq!(lines, ["a".to_owned(), "b?[0m".to_owned(), "x".repeat(LINE_BYTES)]);
}
