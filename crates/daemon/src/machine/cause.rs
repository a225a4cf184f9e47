//! Why an engine is gone, in words.

use std::time::Duration;

use banger_core::plan::MachinePaths;
use banger_vmm::{ExitRecord, console_tail, exit_record};
use tokio::time::Instant;

/// What ends a process that reads a page of a mapped file that can't be had.
const SIGBUS: i32 = 7;
/// Lines of the console that are looked at.
const TAIL: usize = 20;
/// How often a record is looked for that is not there yet.
const LOOK: Duration = Duration::from_millis(20);

/// Why the engine is gone. The record is written just after the process's end: it is waited for.
pub async fn find(paths: &MachinePaths, within: Duration) -> String {
    let deadline = Instant::now() + within;
    loop {
        let record = exit_record(paths);
        if record.is_some() || Instant::now() >= deadline {
            return of_exit(record.as_ref(), &console_tail(paths, TAIL));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The cause of an engine's end that nobody asked for, from its record and the guest's last lines.
pub fn of_exit(record: Option<&ExitRecord>, console: &[String]) -> String {
    let panicked = console.iter().any(|line| line.contains("Kernel panic"));
    let Some(record) = record else {
        return "its engine is gone and left no record (was the host restarted?)".to_owned();
    };
    match (record.code, record.signal) {
        _ if panicked => "the guest's kernel panicked".to_owned(),
        (Some(0), _) => "the guest powered itself off".to_owned(),
        (_, Some(SIGBUS)) => {
            "its engine was ended by SIGBUS: memory that it maps from a file could not be had (a full tmpfs, or a damaged file)".to_owned()
        }
        (_, Some(signal)) => format!("its engine was ended by signal {signal}"),
        (Some(code), _) => match record.last_words.last() {
            Some(words) => format!("its engine failed with exit status {code}: {words}"),
            None => format!("its engine failed with exit status {code}"),
        },
        (None, None) => "its engine ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(code: Option<i32>, signal: Option<i32>) -> ExitRecord {
        ExitRecord {
            code,
            signal,
            last_words: vec!["qemu: bad".to_owned()],
            at_ms: 0,
        }
    }

    #[test]
    fn causes_are_told_apart() {
        assert_eq!(
            of_exit(Some(&record(Some(0), None)), &[]),
            "the guest powered itself off"
        );
        assert_eq!(
            of_exit(Some(&record(None, Some(9))), &[]),
            "its engine was ended by signal 9"
        );
        assert_eq!(
            of_exit(Some(&record(Some(1), None)), &[]),
            "its engine failed with exit status 1: qemu: bad"
        );
        assert!(of_exit(Some(&record(None, Some(7))), &[]).contains("full tmpfs"));
        let panic = ["[ 1.2] Kernel panic - not syncing: x".to_owned()];
        assert_eq!(
            of_exit(Some(&record(Some(0), None)), &panic),
            "the guest's kernel panicked"
        );
        assert!(of_exit(None, &[]).contains("no record"));
    }
}
