//! How an engine ended that nobody was asked to end, and what that means for its machine.
//!
//! Two sources are read together. The record says how the process ended; a guest that goes down takes its engine with it, and the process
//! then exits with status 0, whatever the guest did. What the guest did its kernel says last, on the console: these lines have the
//! highest priority and are printed always. A guest can forge them, and gains nothing: it decides itself whether it goes down or reboots.

use std::time::Duration;

use banger_proto::agent::POWERS_OFF;
use banger_proto::shim::ExitRecord;
use banger_vmm::{console_tail, exit_record};
use tokio::time::Instant;

use super::record::Machine;
use crate::engines;

/// What ends a process that reads a page of a mapped file that can't be had.
const SIGBUS: i32 = 7;
/// Lines of the console that are looked at: a panic is followed by registers and a call trace.
const TAIL: usize = 300;
/// How often a record is looked for that is not there yet.
const LOOK: Duration = Duration::from_millis(20);
/// Longest line of a panic that is told.
const LINE: usize = 200;

/// How an engine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest rebooted.
    Rebooted,
    /// The guest's kernel panicked.
    Panicked {
        /// What it said, as the console has it.
        line: String,
    },
    /// The engine failed, was ended by somebody, or is gone without a trace: why, in words.
    Engine(String),
}

impl End {
    /// The end as a machine's cause.
    pub fn cause(&self) -> String {
        match self {
            Self::PoweredOff => "the guest powered itself off".to_owned(),
            Self::Rebooted => "the guest rebooted".to_owned(),
            Self::Panicked { line } if line.is_empty() => "the guest's kernel panicked".to_owned(),
            Self::Panicked { line } => format!("the guest's kernel panicked: {line}"),
            Self::Engine(why) => why.clone(),
        }
    }
}

/// How the engine of a machine ended. The record is written just after the process's end: it is waited for.
pub async fn find(m: &Machine, within: Duration) -> End {
    let deadline = Instant::now() + within;
    let engine = m.row().spec.engine;
    loop {
        let record = exit_record(&m.paths);
        if record.is_none() && Instant::now() < deadline {
            tokio::time::sleep(LOOK).await;
            continue;
        }
        let record = match record {
            Some(record) => Some(seen(m, &engine, record).await),
            None => None,
        };
        return of_exit(&engine, record.as_ref(), &console_tail(&m.paths, TAIL));
    }
}

/// The record with what only the engine's parent has seen, where the shim was not that.
async fn seen(m: &Machine, engine: &str, mut record: ExitRecord) -> ExitRecord {
    if record.code.is_none()
        && record.signal.is_none()
        && let Ok(engine) = m.services.engine(engine).await
        && let Some(end) = engine.ended(&m.id).await
    {
        (record.code, record.signal) = (end.code, end.signal);
    }
    record
}

/// How an engine ended, from its record and the guest's last lines.
pub fn of_exit(engine: &str, record: Option<&ExitRecord>, console: &[String]) -> End {
    let Some(record) = record else {
        return End::Engine("its engine is gone and left no record (was the host restarted?)".to_owned());
    };
    // What QEMU says that is asked to end by a signal: it exits with status 0.
    let told = record
        .last_words
        .iter()
        .find(|line| line.contains("terminating on signal"));
    let guest = guests_end(console);
    match (record.code, record.signal, guest) {
        (_, Some(SIGBUS), _) => End::Engine(
            "its engine was ended by SIGBUS: memory that it maps from a file could not be had (a full tmpfs, or a damaged file)".to_owned(),
        ),
        (_, Some(signal), _) => End::Engine(format!(
            "its engine was ended by signal {signal}{}",
            signal_name(signal)
        )),
        (Some(code), _, _) if code != 0 => End::Engine(failed(engine, code, record, console)),
        (_, _, Some(end)) => end,
        (Some(_), _, None) if told.is_some() => {
            End::Engine(format!("its engine was ended: {}", told.cloned().unwrap_or_default()))
        }
        // The processor was reset without a word: a triple fault, or a reset that the kernel was not asked for.
        (Some(_), _, None) => End::Rebooted,
        (None, None, None) => {
            End::Engine("its engine ended, and how was not seen (the root helper was restarted since)".to_owned())
        }
    }
}

/// What the guest's kernel said last of its own end.
fn guests_end(console: &[String]) -> Option<End> {
    let mut end = None;
    for line in console {
        if let Some((_, what)) = line.split_once("Kernel panic - not syncing: ") {
            let what: String = what.chars().take(LINE).collect();
            // The end of a panic's report says it again.
            let line = what.trim_end_matches("]---").trim_end().to_owned();
            end = Some(End::Panicked { line });
        } else if line.contains(POWERS_OFF)
            || line.contains("reboot: Power down")
            || line.contains("reboot: System halted")
        {
            end = Some(End::PoweredOff);
        } else if line.contains("reboot: Restarting system") && end != Some(End::PoweredOff) {
            // Where the board has no power to cut, the agent has said before that this is one.
            end = Some(End::Rebooted);
        }
    }
    end
}

/// Why an engine with this exit status failed.
fn failed(engine: &str, code: i32, record: &ExitRecord, console: &[String]) -> String {
    let known = match (engine, code) {
        (engines::FIRECRACKER, 148) => Some("it called what its seccomp filter forbids"),
        (engines::FIRECRACKER, 149) => Some("SIGBUS: no room for its memory, or a disk that failed"),
        (engines::FIRECRACKER, 150) => Some("SIGSEGV"),
        (engines::FIRECRACKER, 151) => Some("SIGXFSZ: a file grew beyond its limit"),
        (engines::FIRECRACKER, 154) => Some("SIGXCPU"),
        (engines::FIRECRACKER, 157) => Some("SIGILL"),
        _ => None,
    };
    // Engine and guest share one output where the engine was not the shim's child.
    let words = record.last_words.last().or_else(|| match known {
        None => console.last(),
        Some(_) => None,
    });
    let why = match (known, words) {
        (Some(known), Some(words)) => format!(" ({known}): {words}"),
        (Some(known), None) => format!(" ({known})"),
        (None, Some(words)) => format!(": {words}"),
        (None, None) => String::new(),
    };
    format!("its engine failed with exit status {code}{why}")
}

/// The name of a signal, to follow its number.
fn signal_name(signal: i32) -> &'static str {
    match signal {
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        9 => " (SIGKILL)",
        11 => " (SIGSEGV)",
        15 => " (SIGTERM)",
        25 => " (SIGXFSZ: a file grew beyond its limit)",
        31 => " (SIGSYS: it called what its seccomp filter forbids)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(code: Option<i32>, signal: Option<i32>) -> ExitRecord {
        ExitRecord {
            code,
            signal,
            last_words: Vec::new(),
            at_ms: 0,
        }
    }

    fn lines(text: &[&str]) -> Vec<String> {
        text.iter().map(|line| (*line).to_owned()).collect()
    }

    const RESTART: &str = "[   12.3] reboot: Restarting system";
    const PANIC: &str = "[ 1.2] Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b";

    #[test]
    fn what_the_guest_did_its_kernel_says() {
        let panicked = End::Panicked {
            line: "Attempted to kill init! exitcode=0x0000000b".to_owned(),
        };
        let agent = format!("[ 3.1] banger-agent: {POWERS_OFF}");
        for (console, expected) in [
            (lines(&["login:", "[ 9.9] reboot: Power down"]), End::PoweredOff),
            (lines(&["[ 9.9] reboot: System halted"]), End::PoweredOff),
            (lines(&[RESTART]), End::Rebooted),
            (
                lines(&["[ 9.9] reboot: Restarting system with command 'x'"]),
                End::Rebooted,
            ),
            (vec![agent, RESTART.to_owned()], End::PoweredOff),
            (
                lines(&[PANIC, "CPU: 0 PID: 1", "Call Trace:", " panic+0x1"]),
                panicked.clone(),
            ),
            (
                lines(&[
                    PANIC,
                    "---[ end Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b ]---",
                ]),
                panicked,
            ),
            (lines(&["login:"]), End::Rebooted),
        ] {
            assert_eq!(
                of_exit("qemu", Some(&record(Some(0), None)), &console),
                expected,
                "{console:?}"
            );
            // Of a jailed engine it may not be known how it ended.
            let unseen = of_exit("firecracker", Some(&record(None, None)), &console);
            let fits = unseen == expected || console == ["login:"] && matches!(unseen, End::Engine(_));
            assert!(fits, "{console:?}: {unseen:?}");
        }
    }

    #[test]
    fn an_engine_that_failed_is_no_guest_that_went_down() {
        let restarting = lines(&[RESTART]);
        for (engine, record, console, words) in [
            (
                "qemu",
                record(None, Some(9)),
                &restarting,
                "ended by signal 9 (SIGKILL)",
            ),
            ("qemu", record(Some(1), None), &restarting, "failed with exit status 1"),
            ("firecracker", record(Some(148), None), &restarting, "seccomp filter"),
            ("firecracker", record(None, None), &Vec::new(), "how was not seen"),
        ] {
            let End::Engine(why) = of_exit(engine, Some(&record), console) else {
                panic!("{words}")
            };
            assert!(why.contains(words), "{why}");
        }
        let mut told = record(Some(0), None);
        told.last_words = lines(&["qemu-system-x86_64: terminating on signal 15 from pid 7 (kill)"]);
        assert!(
            of_exit("qemu", Some(&told), &[])
                .cause()
                .contains("signal 15 from pid 7")
        );
        let mut failed = record(Some(1), None);
        failed.last_words = lines(&["qemu: bad"]);
        let cause = of_exit("qemu", Some(&failed), &[]).cause();
        assert_eq!(cause, "its engine failed with exit status 1: qemu: bad");
        // A jailed engine's last words are on the console.
        let console = lines(&["2026-01-01T00:00:00 [x:main:ERROR] no memory"]);
        let cause = of_exit("firecracker", Some(&record(Some(1), None)), &console).cause();
        assert!(cause.ends_with("[x:main:ERROR] no memory"), "{cause}");
        assert!(
            of_exit("qemu", Some(&record(None, Some(7))), &[])
                .cause()
                .contains("full tmpfs")
        );
        assert!(of_exit("qemu", None, &[]).cause().contains("no record"));
    }
}
