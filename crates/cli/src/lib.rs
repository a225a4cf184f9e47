//! The command line of banger: arguments, the daemon's client, sessions, workspaces and rendering.
//!
//! * [`mod@cli`]: the command tree; `commands`: what each command does, one file each,
//! * `client`: the daemon's API and how the daemon is started,
//! * `session`: a program in the guest wired to our own streams,
//! * `workspace`: a git work tree as a tar stream; `files`: copying both ways,
//! * `system`: installing system mode, the only part that runs as root,
//! * `ssh`: OpenSSH through the daemon, and the user's `~/.ssh/config`,
//! * `printer`, `table`, `timings`, `error`: everything that is shown, and the exit statuses,
//! * `completion`, `reference`: what is generated from the command tree.
//!
//! It sees the daemon only through its API: neither its crate nor those of engines and images.

use std::process::ExitCode;

mod cli;
mod client;
mod commands;
mod completion;
mod error;
mod files;
mod paths;
mod printer;
pub mod reference;
mod session;
mod signals;
mod ssh;
mod system;
mod table;
mod timings;
mod workspace;

/// Runs the program: arguments in, exit status out.
pub fn main() -> ExitCode {
    ExitCode::from(cli::main())
}
