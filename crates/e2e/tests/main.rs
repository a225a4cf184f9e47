//! Real machines through the real programs: one program, a module per subject.
//!
//! `cargo test --release -p banger-e2e`; any part of a test's name selects it. Tests that only look share the machines of
//! [`harness::shared`]; whoever changes a machine or a daemon has an environment of its own, and fails when anything is
//! left of it. Missing prerequisites skip a test, under `CI=true` they fail it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "these are tests, a panic is how one fails"
)]

use std::process::ExitCode;

mod harness;

mod adoption;
mod combinations;
mod copies;
mod copy;
mod copy_like_cp;
mod daemon;
mod debian;
mod ends;
mod exec;
mod faults;
mod forks;
mod inputs;
mod isolation;
mod job;
mod lifecycle;
mod losses;
mod ordinary;
mod output;
mod ports;
mod remove;
mod search;
mod sessions;
mod snapshots;
mod space;
mod ssh;
mod suspend;
mod system_mode;
mod templates;
mod terminal;

fn main() -> ExitCode {
    let trials = [
        // The longest first, so that the end is not one of them alone.
        debian::trials(),
        copies::trials(),
        templates::trials(),
        space::trials(),
        suspend::trials(),
        ends::trials(),
        system_mode::trials(),
        snapshots::trials(),
        forks::trials(),
        ports::trials(),
        ssh::trials(),
        job::trials(),
        losses::trials(),
        lifecycle::trials(),
        adoption::trials(),
        remove::trials(),
        sessions::trials(),
        faults::trials(),
        daemon::trials(),
        isolation::trials(),
        copy::trials(),
        copy_like_cp::trials(),
        ordinary::trials(),
        terminal::trials(),
        exec::trials(),
        combinations::trials(),
        inputs::trials(),
        output::trials(),
    ];
    harness::run(trials.into_iter().flatten().collect())
}
