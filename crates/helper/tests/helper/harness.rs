//! Running the tests: what this host lacks for one has it counted as skipped, with the reason.

use std::panic::{catch_unwind, resume_unwind};
use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};

/// What a test ends with that cannot run here.
struct Skip(String);

/// Names the tests of a module: `tests! { one, another }`, and `tests! { one; ignored: another }` for what runs only when asked for.
macro_rules! tests {
    ($($name:ident),* $(,)? $(; ignored: $asked:ident)?) => {
        pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
            vec![
                $(crate::harness::trial(concat!(module_path!(), "::", stringify!($name)), $name),)*
                $(crate::harness::trial(concat!(module_path!(), "::", stringify!($asked)), $asked).with_ignored_flag(true),)?
            ]
        }
    };
}
pub(crate) use tests;

/// One test.
pub(crate) fn trial(name: &str, test: fn()) -> Trial {
    let name = name.split_once("::").map_or(name, |(_, rest)| rest);
    Trial::ignorable_test(name, move || match catch_unwind(test) {
        Ok(()) => Ok(Completion::Completed),
        Err(panic) => match panic.downcast::<Skip>() {
            Ok(skip) => Ok(Completion::ignored_with(skip.0)),
            Err(panic) => resume_unwind(panic),
        },
    })
}

/// Ends the test as skipped. In CI that is a failure.
pub(crate) fn skip(reason: &str) -> ! {
    assert!(
        std::env::var_os("CI").is_none_or(|v| v != "true"),
        "cannot be tested here: {reason}"
    );
    resume_unwind(Box::new(Skip(reason.to_owned())))
}

/// Runs what the command line selects.
pub(crate) fn run(trials: Vec<Trial>) -> ExitCode {
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
