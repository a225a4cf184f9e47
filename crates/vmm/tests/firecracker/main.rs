//! The Firecracker driver: with a Firecracker that behaves like the documented one and fails where it is told to, and, where one is
//! named, with a real one.
#![allow(missing_docs, unreachable_pub)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr, clippy::print_stdout)]

mod bed;
mod fake;
mod faults;
mod find;
mod jailed;
mod life;
mod memory;
mod real;

fn main() -> std::process::ExitCode {
    let args: Vec<String> = std::env::args().collect();
    // The test program is its own fake.
    if fake::is_meant(&args) {
        return fake::main(&args);
    }
    let tests = [
        find::tests(),
        life::tests(),
        faults::tests(),
        jailed::tests(),
        real::tests(),
    ];
    bed::run(&args, tests.into_iter().flatten().collect())
}
