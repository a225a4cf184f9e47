//! Benchmarks: programs that print figures and ratios. Nothing is asserted.
//!
//! Each benchmark gets an environment of its own (`banger_testkit`), runs the real programs and returns figures. A figure
//! holds all its samples; the table shows median, least, most, and how the median stands to the target or to baselines
//! that were measured beside it. Targets are judged in a table of their own.
#![allow(
    clippy::expect_used,
    reason = "a benchmark that cannot be set up has nothing to report"
)]

mod agent;
mod bare;
pub(crate) mod channel;
mod copies;
mod engine;
mod figures;
mod measure;
mod podman;
pub(crate) mod qmp;
mod system;
mod templates;
pub(crate) mod watch;

use std::panic::{AssertUnwindSafe, catch_unwind};

use banger_testkit::{Need, need};

use figures::Report;

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    /// Few samples: to see that the benchmarks run.
    quick: bool,
}

impl Effort {
    fn samples(self, full: usize, quick: usize) -> usize {
        if self.quick { quick } else { full }
    }
}

/// A benchmark.
struct Bench {
    name: &'static str,
    what: &'static str,
    needs: &'static [Need],
    run: fn(Effort, &mut Report),
}

const BENCHES: &[Bench] = &[
    Bench {
        name: "cli",
        what: "`banger --version`; a program that does nothing as baseline",
        needs: &[Need::Programs],
        run: measure::cli,
    },
    Bench {
        name: "list",
        what: "`vm list` with 20 machines",
        needs: &[Need::Base],
        run: measure::list,
    },
    Bench {
        name: "memory",
        what: "resident memory of the daemon, idle and per running machine",
        needs: &[Need::Base],
        run: measure::memory,
    },
    Bench {
        name: "start",
        what: "cold start to exec-ready",
        needs: &[Need::Base],
        run: measure::start,
    },
    Bench {
        name: "run",
        what: "`vm run --rm IMAGE -- true` from a template, beside a cold start, the bare engine and podman",
        needs: &[Need::Base],
        run: templates::run,
    },
    Bench {
        name: "burst",
        what: "20 `vm run` at once",
        needs: &[Need::Base],
        run: templates::burst,
    },
    Bench {
        name: "fork",
        what: "8 copies of a running machine, all answering",
        needs: &[Need::Base],
        run: copies::fork,
    },
    Bench {
        name: "suspend",
        what: "suspending a machine, and waking it by a command",
        needs: &[Need::Base],
        run: copies::suspend,
    },
    Bench {
        name: "copies",
        what: "50 machines running: memory of each, all answering, nothing left",
        needs: &[Need::Base],
        run: copies::copies,
    },
    Bench {
        name: "helper",
        what: "calls of the root helper, its size and memory",
        needs: &[Need::System],
        run: system::helper,
    },
    Bench {
        name: "adoption",
        what: "20 machines found again by a daemon that was killed",
        needs: &[Need::System],
        run: system::adoption,
    },
    Bench {
        name: "rounds",
        what: "200 machines made and removed in system mode, and what they leave",
        needs: &[Need::System],
        run: system::rounds,
    },
    Bench {
        name: "exec",
        what: "`vm exec NAME -- true`, whole process",
        needs: &[Need::Base],
        run: measure::exec,
    },
    Bench {
        name: "throughput",
        what: "standard output and input of a guest's command",
        needs: &[Need::Base],
        run: measure::throughput,
    },
    Bench {
        name: "channel",
        what: "the bare guest channel, as baseline of throughput",
        needs: &[Need::Base],
        run: channel::run,
    },
    Bench {
        name: "upload",
        what: "100 MB of workspace",
        needs: &[Need::Base, Need::Git],
        run: measure::upload,
    },
    Bench {
        name: "build",
        what: "kernel import and image build",
        needs: &[Need::Programs, Need::ImageTools],
        run: measure::build,
    },
];

/// `cargo xtask bench`
pub(crate) fn run(args: &[&str]) -> Result<(), String> {
    let mut json = false;
    let mut effort = Effort { quick: false };
    let mut only: Vec<&str> = Vec::new();
    let mut args = args.iter();
    while let Some(&arg) = args.next() {
        match arg {
            "--json" => json = true,
            "--quick" => effort.quick = true,
            "--only" => only.push(args.next().copied().ok_or("--only needs a name")?),
            "--list" => {
                for bench in BENCHES {
                    println!("{:<12}{}", bench.name, bench.what);
                }
                return Ok(());
            }
            other => return Err(format!("bench does not know `{other}`")),
        }
    }
    if let Some(unknown) = only.iter().find(|n| !BENCHES.iter().any(|b| b.name == **n)) {
        return Err(format!("there is no benchmark `{unknown}`; --list names them"));
    }
    let _watch = watch::start()?;
    let mut report = Report::new();
    let mut failed = Vec::new();
    for bench in BENCHES.iter().filter(|b| only.is_empty() || only.contains(&b.name)) {
        if let Some(reason) = need::missing(bench.needs) {
            eprintln!("skipped: {}: {reason}", bench.name);
            continue;
        }
        eprintln!("{}: {}", bench.name, bench.what);
        // One that cannot be measured here says why on standard error, and costs no other its figures.
        let ran = AssertUnwindSafe(|| (bench.run)(effort, &mut report));
        if catch_unwind(ran).is_err() {
            failed.push(bench.name);
        }
    }
    print!("{}", if json { report.json() } else { report.table() });
    if failed.is_empty() {
        return Ok(());
    }
    Err(format!("not measured to the end: {}", failed.join(", ")))
}
