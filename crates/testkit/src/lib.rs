//! Fixtures of banger's tests. Real programs, real machines, nothing of the user's.
//!
//! * [`env::TestEnv`]: directories of its own for one test, the real `banger` run in them, and a check at the end that no
//!   process and no file of a machine is left;
//! * [`base`]: kernel and default images, made once through the real commands and shared by hard links;
//! * [`command`]: running a program with a deadline that kills and names what hung;
//! * [`terminal`]: the same on a terminal;
//! * [`repository`]: git repositories to work on;
//! * [`need`]: what a host must have for a test, and skipping where it has not;
//! * [`processes`]: looking through `/proc`;
//! * [`system`]: an installation in system mode, in namespaces of its own.
//!
//! Everything here panics with a message when it fails: its callers are tests.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "this crate is part of tests, a panic is how a test fails"
)]

pub mod base;
pub mod binaries;
pub mod command;
pub mod env;
pub mod http;
pub mod need;
pub mod processes;
pub mod repository;
pub mod system;
pub mod terminal;

pub use command::{Cmd, Done, Running};
pub use env::TestEnv;
pub use need::Need;
pub use repository::Repository;
pub use system::SystemEnv;
pub use terminal::Terminal;
