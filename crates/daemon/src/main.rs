//! `bangerd`: the daemon of one user. See the library.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use banger_daemon::{ready, run, version};

/// Worker threads: the daemon moves bytes and waits, it does not compute.
const WORKERS: usize = 2;

const USAGE: &str = "usage: bangerd [--ready-fd N]\n       bangerd --system\n\nThe daemon of banger. `banger` starts it when none answers; \
in system mode systemd does.\n";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    ready::close_inherited(match args.as_slice() {
        ["--ready-fd", number] => number.parse().ok(),
        _ => None,
    });
    let mut mode = run::Mode::User;
    let ready_fd = match args.as_slice() {
        [] => None,
        ["--system"] => {
            mode = run::Mode::System;
            None
        }
        [banger_image::builder::ASK, recipe] => return ask_builder(recipe),
        ["--builder"] => return builder(),
        ["--version" | "-V"] => {
            let _ = writeln!(
                std::io::stdout(),
                "bangerd {} (commit {})",
                version::VERSION,
                version::COMMIT
            );
            return ExitCode::SUCCESS;
        }
        ["--help" | "-h"] => {
            let _ = write!(std::io::stdout(), "{USAGE}");
            return ExitCode::SUCCESS;
        }
        ["--ready-fd", number] => match number.parse().ok().and_then(ready::take) {
            Some(fd) => Some(fd),
            None => {
                let _ = writeln!(std::io::stderr(), "bangerd: `{number}` is not an open descriptor");
                return ExitCode::from(2);
            }
        },
        _ => {
            let _ = write!(std::io::stderr(), "{USAGE}");
            return ExitCode::from(2);
        }
    };
    start(mode, ready_fd)
}

/// Has the builder bootstrap an image: its output is ours.
fn ask_builder(recipe: &str) -> ExitCode {
    let socket = banger_image::builder::socket().unwrap_or_default();
    match banger_image::builder::ask(&socket, recipe) {
        Ok(()) => ExitCode::SUCCESS,
        Err(words) => {
            let _ = writeln!(std::io::stderr(), "error: {words}");
            ExitCode::FAILURE
        }
    }
}

/// The builder itself, for one connection: systemd gives it as standard input.
fn builder() -> ExitCode {
    let serve = || {
        let stream = std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let outcome = runtime.block_on(banger_image::builder::serve(stream.into()));
        // A tool that was ended cleans up after itself; whatever is left then is ended with the unit.
        runtime.shutdown_timeout(std::time::Duration::from_secs(10));
        outcome
    };
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start(mode: run::Mode, ready_fd: Option<OwnedFd>) -> ExitCode {
    let mut told = ready_fd.map(File::from);
    let outcome = run::prepare(mode).and_then(|prepared| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder
            .worker_threads(WORKERS)
            .thread_stack_size(2 * 1024 * 1024)
            .enable_all();
        let runtime = builder.build().map_err(|source| run::StartError::Io {
            what: "start the runtime".to_owned(),
            source,
        })?;
        let listening = || {
            if let Some(mut ready) = told.take() {
                let _ = ready.write_all(b"ready\n");
            }
            ready::notify();
        };
        let outcome = runtime.block_on(run::run(prepared, listening));
        // Threads that wait for a program or a file keep nobody waiting.
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!(error = e.line(), "the daemon does not run");
            // Once: whoever started it reads both descriptors, and the closed one says enough.
            drop(told);
            let _ = writeln!(std::io::stderr(), "{}", e.words());
            ExitCode::from(e.exit_status())
        }
    }
}
