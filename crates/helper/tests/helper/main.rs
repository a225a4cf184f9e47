//! The helper itself, as root, in a network namespace of each test's own: its gates, its rules with packets, and what it leaves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod foreign;
mod frames;
mod gates;
mod guests;
mod names;
mod rounds;
mod support;
mod uplinks;
