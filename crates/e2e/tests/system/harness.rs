//! Running scenarios: one at a time, each with a deadline, none after one that hung.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use banger_testkit::need::Skip;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::lab;

/// The file by which the lab is told.
const MARKER: &str = "/etc/banger-lab";

/// Names the scenarios of a module, each with its deadline in seconds: `scenarios! { one: 60, another: 300 }`.
macro_rules! scenarios {
    ($($name:ident: $seconds:expr),* $(,)?) => {
        pub(crate) fn scenarios() -> Vec<libtest_mimic::Trial> {
            vec![$(crate::harness::scenario(concat!(module_path!(), "::", stringify!($name)), $seconds, $name)),*]
        }
    };
}
pub(crate) use scenarios;

/// The scenario that did not end in time: what it holds is in nobody else's hands.
static HUNG: Mutex<Option<String>> = Mutex::new(None);

/// One scenario.
pub(crate) fn scenario(name: &str, seconds: u64, run: fn()) -> Trial {
    let name = name.split_once("::").map_or(name, |(_, rest)| rest).to_owned();
    let own = name.clone();
    Trial::ignorable_test(name, move || {
        if !Path::new(MARKER).is_file() {
            return Ok(Completion::ignored_with("outside the lab"));
        }
        if let Some(hung) = HUNG.lock().unwrap().as_ref() {
            return Err(Failed::from(format!("not run, because {hung} has not ended")));
        }
        let begun = Instant::now();
        eprintln!("--- {own}");
        let (done, outcome) = channel();
        std::thread::spawn(move || {
            let _ = done.send(catch_unwind(AssertUnwindSafe(run)));
        });
        match outcome.recv_timeout(Duration::from_secs(seconds)) {
            Ok(Ok(())) => {
                eprintln!("--- {own}: {:.1} s", begun.elapsed().as_secs_f32());
                Ok(Completion::Completed)
            }
            Ok(Err(panic)) => {
                let panic = match panic.downcast::<Skip>() {
                    Ok(skip) => {
                        eprintln!("--- {own}: skipped: {}", skip.0);
                        return Ok(Completion::ignored_with(skip.0));
                    }
                    Err(panic) => panic,
                };
                let text = panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| panic.downcast_ref::<&str>().copied());
                Err(Failed::from(text.unwrap_or("it panicked without a message").to_owned()))
            }
            Err(RecvTimeoutError::Timeout) => {
                *HUNG.lock().unwrap() = Some(own.clone());
                Err(Failed::from(format!(
                    "{own} was not done after {seconds} s\n{}",
                    lab::processes()
                )))
            }
            Err(RecvTimeoutError::Disconnected) => Err(Failed::from("the scenario's thread is gone")),
        }
    })
}

/// Runs what the command line selects: scenarios whose names contain one of its words, or all.
pub(crate) fn run(mut scenarios: Vec<Trial>) -> ExitCode {
    let (flags, names): (Vec<String>, Vec<String>) = std::env::args().skip(1).partition(|word| word.starts_with('-'));
    let program = std::env::args().next().unwrap_or_default();
    let mut args = Arguments::from_iter(std::iter::once(program).chain(flags));
    scenarios.retain(|s| names.is_empty() || names.iter().any(|name| s.name().contains(name.as_str())));
    if !Path::new(MARKER).is_file() && !args.list {
        println!("skipped: scenarios of system mode run in the lab: cargo xtask lab run");
        return ExitCode::SUCCESS;
    }
    args.test_threads = Some(1);
    libtest_mimic::run(&args, scenarios).exit_code()
}
