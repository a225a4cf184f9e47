//! The `banger` program; everything is in the library beside it.

use std::process::ExitCode;

fn main() -> ExitCode {
    banger_cli::main()
}
