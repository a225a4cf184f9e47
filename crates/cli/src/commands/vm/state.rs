//! `banger vm start`, `stop`, `restart`, `kill`, `pause`, `resume` and `suspend`: the same request to several machines, each an
//! operation that brings the machine into another state.

use std::time::Duration;

use banger_proto::api::{KillMachine, Machine, StartMachine, StopMachine};
use clap::Args;
use serde::Serialize;

use crate::cli::{Context, OutputArgs};
use crate::client::operation::{Leaving, carry_out};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{Done, Meant, WaitArgs, duration, for_each, milliseconds, named_in_full, signal};
use crate::completion;
use crate::error::Result;

/// Which machines, and how to say what became of them.
#[derive(Debug, Args)]
struct Which {
    /// Machines by name or id; a unique beginning is enough where nothing is lost, else four characters or more of an id
    #[arg(required = true, value_name = "MACHINE", add = completion::machines())]
    machines: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

/// A change of state.
struct Change {
    /// As in the path of the request.
    verb: &'static str,
    /// What a machine is then.
    result: &'static str,
    /// What is said of a machine to which nothing has to be done.
    already: &'static str,
    /// What becomes of it when we are interrupted.
    leaving: Leaving,
    /// What a machine has in memory is lost.
    loses: bool,
}

/// Whether an engine that does not answer is ended, too.
#[derive(Debug, Args)]
struct ForceArgs {
    /// End a machine whose engine does not answer, too (state `unverified`); it has to be named in full
    #[arg(short, long)]
    force: bool,
}

impl ForceArgs {
    /// With force no prefix is enough.
    fn check(&self, machine: &Machine, references: &[String]) -> Result<()> {
        match self.force {
            true => named_in_full(machine, references),
            false => Ok(()),
        }
    }
}

impl Which {
    /// Asks for the change of each machine and waits for all.
    fn change(&self, context: &Context, change: &Change, request: &impl Serialize) -> Result<u8> {
        self.change_with(context, change, request, &ForceArgs { force: false })
    }

    /// The same, by force if so wanted.
    fn change_with(
        &self,
        context: &Context,
        change: &Change,
        request: &impl Serialize,
        force: &ForceArgs,
    ) -> Result<u8> {
        let meant = if change.loses { Meant::Exactly } else { Meant::Loosely };
        context.block_on(async {
            let client = Client::new(&context.places)?;
            for_each(
                context,
                &client,
                (&self.machines, meant),
                self.output,
                |client, machine| async move {
                    force.check(&machine, &self.machines)?;
                    let path = format!("{}/{}", machine_path(&machine.id), change.verb);
                    let label = format!("vm {} {}", change.verb, machine.name);
                    let done = carry_out(context, &client, &path, request, &label, change.leaving).await?;
                    Ok(if done.operation.unchanged {
                        Done::nothing(&machine, change.already)
                    } else {
                        Done::new(&machine, change.result)
                    })
                },
            )
            .await
        })
    }
}

/// A request without options.
#[derive(Serialize)]
struct Nothing {}

/// Start machines that are stopped or suspended
///
/// One that is suspended goes on where it was; --cold drops its memory and boots it from its disks, as after a power cut.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm start build test\n  banger vm start build --cold")]
pub(crate) struct StartArgs {
    /// Boot, though memory was kept or there is a template
    #[arg(long)]
    cold: bool,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    which: Which,
}

impl StartArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let request = StartMachine {
            wait: self.wait.wait_for(),
            timeout_ms: self.wait.timeout_ms(),
            cold: self.cold,
        };
        let change = Change {
            verb: "start",
            result: "started",
            already: "is running already",
            leaving: Leaving::Cancels,
            loses: self.cold,
        };
        self.which.change(context, &change, &request)
    }
}

/// Shut machines down and start them again
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger vm restart build")]
pub(crate) struct RestartArgs {
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    which: Which,
}

impl RestartArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let request = StartMachine {
            wait: self.wait.wait_for(),
            timeout_ms: self.wait.timeout_ms(),
            cold: false,
        };
        let change = Change {
            verb: "restart",
            result: "restarted",
            already: "is running already",
            // Half a restart would leave the machine stopped.
            leaving: Leaving::GoesOn,
            loses: true,
        };
        self.which.change(context, &change, &request)
    }
}

/// Shut machines down; their disks stay
///
/// A machine that does not go down in time is ended. One whose engine does not answer at all is left alone: --force ends its process.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  banger vm stop build\n  banger vm stop build test --timeout 5s\n  banger vm stop --force build"
)]
pub(crate) struct StopArgs {
    /// How long a machine may take to go down by itself
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    force: ForceArgs,
    #[command(flatten)]
    which: Which,
}

impl StopArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let request = StopMachine {
            timeout_ms: self.timeout.map(milliseconds),
            force: self.force.force,
        };
        let change = Change {
            verb: "stop",
            result: "stopped",
            already: "is stopped already",
            leaving: Leaving::GoesOn,
            loses: true,
        };
        self.which.change_with(context, &change, &request, &self.force)
    }
}

/// End machines at once, as if the power went out; their disks stay
///
/// A machine whose engine does not answer is left alone, for it might be another's: with --force its process is ended, if everything
/// but its answer identifies it (process id, start time, name, arguments).
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm kill build\n  banger vm kill --force build")]
pub(crate) struct KillArgs {
    /// Signal for the engine's process: KILL (the default), TERM, INT, HUP, QUIT, USR1, USR2 or ABRT
    #[arg(short, long, value_parser = signal)]
    signal: Option<String>,
    #[command(flatten)]
    force: ForceArgs,
    #[command(flatten)]
    which: Which,
}

impl KillArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let request = KillMachine {
            signal: self.signal,
            force: self.force.force,
        };
        let change = Change {
            verb: "kill",
            result: "killed",
            already: "is stopped already",
            leaving: Leaving::GoesOn,
            loses: true,
        };
        self.which.change_with(context, &change, &request, &self.force)
    }
}

/// Stop the processors of running machines
///
/// Everything stays where it is, in memory; commands in them wait. `banger vm resume` lets them go on.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger vm pause build")]
pub(crate) struct PauseArgs {
    #[command(flatten)]
    which: Which,
}

impl PauseArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let change = Change {
            verb: "pause",
            result: "paused",
            already: "is paused already",
            leaving: Leaving::Cancels,
            loses: false,
        };
        self.which.change(context, &change, &Nothing {})
    }
}

/// Let paused machines go on
///
/// A stalled machine tries again what could not be written to the host's disk. It does so by itself, too, when there is space.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger vm resume build")]
pub(crate) struct ResumeArgs {
    #[command(flatten)]
    which: Which,
}

impl ResumeArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let change = Change {
            verb: "resume",
            result: "resumed",
            already: "is running already",
            leaving: Leaving::GoesOn,
            loses: false,
        };
        self.which.change(context, &change, &Nothing {})
    }
}

/// Write the memory of machines to disk and end their engines
///
/// They take neither processor time nor memory then. `banger vm start` lets them go on where they were, and so does whatever
/// uses them: exec, shell, ssh, cp.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  banger vm suspend build\n  banger vm suspend build && banger vm exec build -- uptime"
)]
pub(crate) struct SuspendArgs {
    #[command(flatten)]
    which: Which,
}

impl SuspendArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let change = Change {
            verb: "suspend",
            result: "suspended",
            already: "is suspended already",
            leaving: Leaving::Cancels,
            loses: false,
        };
        self.which.change(context, &change, &Nothing {})
    }
}
