//! Developers' chores: `cargo xtask`.
//!
//! * [`walls`]: which crate may depend on which, and what must not stand in the tree,
//! * [`bench`]: figures and ratios, never assertions,
//! * [`lab`]: the machine in which system mode is tested,
//! * [`docs`]: whether the generated documents are current.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a chore prints what it finds")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

mod bench;
mod docs;
mod lab;
mod metadata;
mod walls;

const USAGE: &str = "\
developers' chores of banger

  cargo xtask check-walls            which crate may depend on which, and what must not stand in the tree
  cargo xtask docs                   whether docs/cli.md and docs/openapi.json are current (make docs writes them)
  cargo xtask bench [--json] [--only NAME]… [--quick] [--list]
                                     figures and ratios on this host; see docs/performance.md
";

fn main() -> ExitCode {
    if bench::channel::is_guest() {
        if let Err(e) = bench::channel::guest() {
            eprintln!("the guest's side of the benchmark failed: {e}");
        }
        return ExitCode::FAILURE;
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args.as_slice() {
        ["check-walls"] => walls::run(&root()),
        ["docs"] => docs::run(&root()),
        ["bench", rest @ ..] => bench::run(rest),
        ["lab", rest @ ..] => {
            return match lab::run(&root(), rest) {
                Ok(status) => ExitCode::from(status),
                Err(message) => {
                    eprintln!("error: {message}");
                    ExitCode::FAILURE
                }
            };
        }
        [bench::watch::CHORE, watched] => bench::watch::run(watched),
        [] | ["help" | "--help" | "-h"] => {
            print!("{USAGE}{}", lab::USAGE);
            Ok(())
        }
        [other, ..] => Err(format!("there is no chore `{other}`\n\n{USAGE}{}", lab::USAGE)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

/// The repository.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}
