//! System mode in the lab: a program that `cargo xtask lab run` takes into a Debian guest of its own and runs there as root.
//!
//! A module per subject, a function per scenario; docs/lab.md says how to add one. Scenarios run one after the other, each with a
//! deadline. Outside the lab the program says so and ends.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "these are tests, a panic is how one fails"
)]

use std::process::ExitCode;

mod harness;
mod installed;
mod lab;
mod root_helper;

mod disk;
mod install;
mod jail;
mod promises;
mod space;
mod survive;
mod user_mode;
mod wait;

fn main() -> ExitCode {
    let scenarios = [
        // In the order in which they run.
        promises::scenarios(),
        install::scenarios(),
        survive::scenarios(),
        wait::scenarios(),
        user_mode::scenarios(),
        disk::scenarios(),
        jail::scenarios(),
        space::scenarios(),
    ];
    harness::run(scenarios.into_iter().flatten().collect())
}
