//! `banger-agent`: `/init` of the initramfs, and the agent that it starts.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        banger_agent::boot::run();
    }
    match std::env::args().nth(1).as_deref() {
        Some(banger_agent::pid1::SERVE) => banger_agent::serve::run(),
        Some(banger_agent::rehearsal::NOTHING) => ExitCode::SUCCESS,
        _ => {
            banger_agent::serve::say_usage();
            ExitCode::from(2)
        }
    }
}
