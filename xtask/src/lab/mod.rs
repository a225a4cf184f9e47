//! The lab: a Debian guest with systemd, device-mapper and hardware virtualisation of its own, in which system mode is tested.
//!
//! * [`root`]: its root file system, made of packages once, and the booted machine, saved once,
//! * [`payload`]: what a run brings along: programs, test program, kernel and image,
//! * [`machine`]: the emulator and the conversation with the guest.
//!
//! Described in docs/lab.md.
#![allow(
    clippy::expect_used,
    reason = "a chore that finds its own process broken has nothing better to do"
)]

mod machine;
mod payload;
mod root;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machine::{Console, Machine};
use root::Root;

/// How `cargo xtask lab` is used.
pub(crate) const USAGE: &str = "\
  cargo xtask lab build [--fresh]    make the lab; see docs/lab.md
  cargo xtask lab run [NAME…] [--exact] [--list] [--logs] [--cold] [--no-build] [--deadline SECONDS]
                      [--firecracker FILE --jailer FILE]
                                     run scenarios of system mode in it
  cargo xtask lab shell [--cold] [--no-build]
                                     a terminal in it; Ctrl-A x ends it
";

/// Time for all scenarios of a run, if nothing is said.
const RUN: Duration = Duration::from_secs(1800);
/// Time for collecting logs.
const LOGS: Duration = Duration::from_secs(120);

/// What the command line says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    fresh: bool,
    cold: bool,
    no_build: bool,
    logs: bool,
    deadline: Option<Duration>,
    firecracker: Option<PathBuf>,
    jailer: Option<PathBuf>,
    /// For the test program.
    pass: Vec<String>,
}

impl Options {
    fn parse(args: &[&str]) -> Result<Self, String> {
        let mut options = Self {
            firecracker: std::env::var_os("BANGER_TEST_FIRECRACKER").map(PathBuf::from),
            jailer: std::env::var_os("BANGER_TEST_JAILER").map(PathBuf::from),
            ..Self::default()
        };
        let mut args = args.iter();
        while let Some(&arg) = args.next() {
            let mut value = || args.next().copied().ok_or_else(|| format!("{arg} needs a value"));
            match arg {
                "--fresh" => options.fresh = true,
                "--cold" => options.cold = true,
                "--no-build" => options.no_build = true,
                "--logs" => options.logs = true,
                "--deadline" => {
                    let seconds = value()?;
                    let seconds = seconds
                        .parse()
                        .map_err(|_| format!("`{seconds}` is no number of seconds"))?;
                    options.deadline = Some(Duration::from_secs(seconds));
                }
                "--firecracker" => options.firecracker = Some(value()?.into()),
                "--jailer" => options.jailer = Some(value()?.into()),
                "--exact" | "--list" | "--quiet" | "--ignored" => options.pass.push(arg.to_owned()),
                other if other.starts_with('-') => return Err(format!("lab does not know `{other}`\n\n{USAGE}")),
                name => options.pass.push(name.to_owned()),
            }
        }
        if options.firecracker.is_some() != options.jailer.is_some() {
            return Err("firecracker and jailer belong together: give both or none".into());
        }
        Ok(options)
    }
}

/// `cargo xtask lab`: returns the exit status.
pub(crate) fn run(repository: &Path, args: &[&str]) -> Result<u8, String> {
    let (chore, rest) = args.split_first().ok_or(USAGE)?;
    let options = Options::parse(rest)?;
    let directory = banger_testkit::binaries::target().join("lab");
    std::fs::create_dir_all(&directory).map_err(|e| format!("{}: {e}", directory.display()))?;
    match *chore {
        "build" => {
            let root = Root::get(&directory, options.fresh)?;
            root.warm(&directory)?;
            eprintln!("the lab is in {}", root.directory().display());
            Ok(0)
        }
        "run" => scenarios(repository, &directory, &options),
        "shell" => shell(repository, &directory, &options),
        other => Err(format!("lab has no `{other}`\n\n{USAGE}")),
    }
}

/// A lab that answers, with a payload.
fn start(repository: &Path, directory: &Path, options: &Options, console: Console) -> Result<Machine, String> {
    let root = Root::get(directory, options.fresh)?;
    let payload = payload::get(repository, directory, options)?;
    if !options.cold {
        let tried = root
            .warm(directory)
            .and_then(|saved| Machine::restore(&root, &saved, &payload, console, directory));
        match tried {
            Ok(machine) => return Ok(machine),
            Err(e) => {
                eprintln!("the saved lab could not be used, it is made anew the next time; booting: {e}");
                root.forget_warm();
            }
        }
    }
    Machine::boot(&root, &payload, console, directory)
}

fn scenarios(repository: &Path, directory: &Path, options: &Options) -> Result<u8, String> {
    let mut machine = start(repository, directory, options, Console::Collected)?;
    let words: Vec<String> = options.pass.iter().map(|w| quoted(w)).collect();
    let outcome = machine.run(&words.join(" "), options.deadline.unwrap_or(RUN), &mut |bytes| {
        let mut out = std::io::stdout().lock();
        // Whoever reads the output may have left.
        let _ = out.write_all(bytes).and_then(|()| out.flush());
    });
    if options.logs || !matches!(outcome, Ok(0)) {
        let to = logs(&mut machine, directory)?;
        eprintln!("logs of this run: {}", to.display());
    }
    outcome.map_err(|e| format!("{e}\n{}", machine.last_words()))
}

/// Brings logs back: what the guest collects, if it still can, and its console.
fn logs(machine: &mut Machine, directory: &Path) -> Result<PathBuf, String> {
    let now = banger_testkit::Cmd::new("date").arg("+%Y%m%d-%H%M%S").ok().out();
    let to = directory.join("logs").join(now.trim());
    let failed = |e: std::io::Error| format!("{}: {e}", to.display());
    std::fs::create_dir_all(&to).map_err(failed)?;
    std::fs::write(to.join("console.log"), machine.console()).map_err(failed)?;
    match machine.logs(LOGS) {
        Ok(archive) => {
            let unpacked = banger_testkit::Cmd::new("tar")
                .args(["--extract", "--no-same-owner", "--file=-", "--directory"])
                .arg(&to)
                .stdin(archive)
                .run();
            if unpacked.status != 0 {
                eprintln!("the logs could not be unpacked: {}", unpacked.err());
            }
        }
        Err(e) => eprintln!("the lab gave no logs but its console: {e}"),
    }
    Ok(to)
}

fn shell(repository: &Path, directory: &Path, options: &Options) -> Result<u8, String> {
    let mut machine = start(repository, directory, options, Console::Terminal)?;
    machine.shell()?;
    machine.wait()
}

/// A word as the guest's shell takes it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\n', " ").replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The page of the lab names scenarios: those that are there.
    #[test]
    fn scenarios_that_docs_name_are_there() {
        let top = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let page = std::fs::read_to_string(top.join("docs/lab.md")).unwrap();
        let mut scenarios = Vec::new();
        for entry in std::fs::read_dir(top.join("crates/e2e/tests/system"))
            .unwrap()
            .flatten()
        {
            let text = std::fs::read_to_string(entry.path()).unwrap();
            let Some((_, list)) = text.split_once("\nscenarios! {") else {
                continue;
            };
            let names = list
                .split('}')
                .next()
                .unwrap_or_default()
                .lines()
                .filter_map(|line| line.trim().split_once(": "));
            let module = entry.path().file_stem().unwrap().to_string_lossy().into_owned();
            scenarios.extend(names.map(|(name, _)| format!("{module}::{name}")));
        }
        let run = page
            .lines()
            .filter_map(|line| line.strip_prefix("$ cargo xtask lab run"));
        let words = run.flat_map(|rest| rest.split('#').next().unwrap_or_default().split_whitespace());
        let named: Vec<&str> = words
            .filter(|word| !word.starts_with('-') && !word.starts_with('.'))
            .collect();
        assert!(!named.is_empty() && !scenarios.is_empty());
        for word in named {
            assert!(
                scenarios.iter().any(|name| name.contains(word)),
                "docs/lab.md runs `{word}`"
            );
        }
        let example = page
            .lines()
            .filter_map(|line| line.strip_prefix("fn ")?.strip_suffix("() {"));
        for name in example {
            assert!(
                scenarios.iter().any(|known| known.ends_with(&format!("::{name}"))),
                "docs/lab.md has `{name}`"
            );
        }
    }

    #[test]
    fn what_a_run_is_told_reaches_the_test_program() {
        let options = Options::parse(&["install", "--exact", "--deadline", "60", "--logs"]).unwrap();
        assert_eq!(options.pass, ["install", "--exact"]);
        assert_eq!(options.deadline, Some(Duration::from_secs(60)));
        assert!(options.logs && !options.cold);
        assert!(Options::parse(&["--deadline"]).is_err());
        assert!(Options::parse(&["--frobnicate"]).is_err());
        assert!(Options::parse(&["--firecracker", "/f"]).is_err());
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
