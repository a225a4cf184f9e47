//! The helper itself, as root, in a network namespace of each test's own: its gates, its rules with packets, and what it leaves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod foreign;
mod frames;
mod gates;
mod guests;
mod harness;
mod names;
mod rounds;
mod support;
mod uplinks;

pub(crate) use harness::tests;

fn main() -> std::process::ExitCode {
    let trials = [
        rounds::trials(),
        gates::trials(),
        guests::trials(),
        uplinks::trials(),
        foreign::trials(),
        names::trials(),
    ];
    harness::run(trials.into_iter().flatten().collect())
}
