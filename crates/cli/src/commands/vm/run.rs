//! `banger vm run`, the main job: a machine, a workspace in it, a command in that.
//!
//! ```text
//!   check arguments ─▶ check workspace ─▶ create ─▶ copy workspace ─▶ run ─▶ (--rm) remove
//!      (pure)            (local only)        └─────── interrupted or failed ────────┘
//! ```

use std::ffi::OsString;
use std::rc::Rc;
use std::time::Duration;

use banger_core::argument::{self, RunTarget};
use banger_proto::api::{CreateMachine, Machine, PatchMachine};
use clap::Args;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, machine_path};
use crate::commands::vm::common::{SpecArgs, WaitArgs};
use crate::commands::vm::create::{create, directory_hint, with_directory_hint};
use crate::commands::vm::delete::delete;
use crate::commands::vm::exec::{ProgramArgs, open, run_in};
use crate::commands::vm::shell::left_running;
use crate::completion;
use crate::error::{Error, Kind, Result};
use crate::session::run::words;
use crate::session::terminal::interactive;
use crate::signals::Signals;
use crate::timings::{Marks, Stopwatch};
use crate::workspace::{self, Packing, Snapshot};

/// How long `--rm` may take for its cleanup.
const CLEANUP_DEADLINE: Duration = Duration::from_secs(10);

/// How long a look at a workspace may take to end after a signal.
const LOOKING_ENDS: Duration = Duration::from_secs(2);

/// Make a machine, copy a repository into it and run a command or a shell there
///
/// An argument that starts with `.`, `/` or `~` is a workspace: a git work tree whose tracked files, as they are now, land
/// in /root/repo together with a short history; with --user they belong to that user, in ~/repo. Anything else is an image. Both, one or none may be given.
///
/// With a command its standard streams and signals pass through and its exit status is ours. Without one a shell opens on a
/// terminal; elsewhere the machine is left running.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  banger run ./repo -- make test\n  banger run --rm -- uname -a\n  \
                        banger run debian-slim --name scratch\n  banger run . --branch fix --from main -d"
)]
pub(crate) struct RunArgs {
    /// Workspace (starts with `.`, `/` or `~`), image, or both
    #[arg(value_name = "PATH|IMAGE", num_args = 0..=2, add = completion::images())]
    target: Vec<String>,
    #[command(flatten)]
    spec: SpecArgs,
    #[command(flatten)]
    wait: WaitArgs,
    /// Remove the machine when the command or shell ends, however it does
    #[arg(long)]
    rm: bool,
    /// Leave the machine running and return
    #[arg(short, long)]
    detach: bool,
    #[command(flatten)]
    program: ProgramArgs,
    /// Copy untracked files too (ignored ones never are)
    #[arg(long)]
    include_untracked: bool,
    /// Check out a new branch of this name in the machine
    #[arg(long, value_name = "NAME")]
    branch: Option<String>,
    /// Commit that the new branch starts from, instead of HEAD
    #[arg(long, value_name = "REF")]
    from: Option<String>,
    /// Only list the files that would be copied
    #[arg(long)]
    dry_run: bool,
    /// Say at the end how long each stage took, on standard error
    #[arg(long, conflicts_with = "dry_run")]
    timings: bool,
    #[command(flatten)]
    output: OutputArgs,
    /// Command and its arguments
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// What happens once the machine is there.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Then {
    Command(Vec<String>),
    Shell,
    /// It is left running, because that was asked for.
    Detach,
    /// It is left running, because there is neither a command nor a terminal.
    Leave,
}

/// What the arguments ask for, with everything checked that needs no look at anything.
#[derive(Debug)]
struct Plan {
    workspace: Option<String>,
    image: Option<String>,
    then: Then,
}

impl RunArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let plan = self.plan(interactive())?;
        let hint = plan.image.as_ref().and_then(|image| directory_hint(image));
        let command = match &plan.then {
            Then::Command(words) => words.clone(),
            _ => Vec::new(),
        };
        let mut open = open(&self.program, command, true)?;
        if plan.workspace.is_some() {
            // The directory says where the workspace goes, and the program runs there.
            open.workdir = None;
        }
        let keys = self.program.terminal.keys()?;
        let mut request = self.spec.clone().request(plan.image, &self.wait)?;
        request.auto_remove = self.rm;
        let mut watch = Stopwatch::since(context.began);
        context.block_on(async {
            let mut signals = Signals::ending()?;
            let snapshot = match &plan.workspace {
                Some(path) => Some(self.snapshot(context, path, &mut signals).await?),
                None => None,
            };
            if self.dry_run {
                return match &snapshot {
                    Some(snapshot) => workspace::show(context, snapshot, self.output.json()),
                    None => {
                        Err(Error::usage("--dry-run needs a workspace").hint("name one, like `banger run . --dry-run`"))
                    }
                };
            }
            if let Some(snapshot) = &snapshot {
                workspace::notices(context, snapshot);
                watch.lap("inspect");
            }
            let client = Client::new(&context.places)?;
            let packing = snapshot.as_ref().map(Packing::begin);
            let mut begun = None;
            let started = start(context, &client, &request, &mut signals, &mut watch, &mut begun).await;
            let mut machine = match started {
                Ok(machine) => machine,
                Err(error) => {
                    // A daemon that fails undoes what it began; one that ended left it to the next.
                    if let Some(machine) = begun.filter(|_| self.rm && error.kind == Kind::Unavailable) {
                        clean_up(context, &client, &machine).await;
                    }
                    if let Some(packing) = packing {
                        packing.discard().await;
                    }
                    return Err(with_directory_hint(error, hint));
                }
            };
            let use_it = async {
                if let (Some(snapshot), Some(packing)) = (&snapshot, packing) {
                    let user = self.program.user.as_deref();
                    machine = copy_in(context, &client, &machine, (snapshot, user), packing, &mut signals).await?;
                    watch.lap("workspace");
                }
                match plan.then {
                    Then::Command(_) | Then::Shell => {
                        let marks = Rc::<Marks>::default();
                        let status = run_in(context, &client, &machine, open, keys, Rc::clone(&marks)).await;
                        watch.session(&marks);
                        status
                    }
                    Then::Detach => self.name(context, &machine),
                    Then::Leave => {
                        self.name(context, &machine)?;
                        context.printer.note(format!(
                            "no command and no terminal, so {name} is left running: `banger vm exec {name} -- COMMAND`",
                            name = machine.name
                        ));
                        Ok(0)
                    }
                }
            };
            let result = use_it.await;
            if self.timings {
                // Before the machine is gone, and on nobody's account.
                if let Ok(Machine { boot: Some(boot), .. }) = client.get(&machine_path(&machine.id)).await {
                    watch.start(&boot);
                }
                watch.skip();
            }
            if self.rm {
                clean_up(context, &client, &machine).await;
                watch.lap("removal");
            } else if !matches!(plan.then, Then::Detach | Then::Leave) || result.is_err() {
                // Its name may have been made up, so a script learns it here.
                left_running(context, &machine.name);
            }
            if self.timings {
                self.tell(context, &watch)?;
            }
            result
        })
    }

    /// Says how long it took. Standard output is the command's.
    fn tell(&self, context: &Context, watch: &Stopwatch) -> Result<()> {
        let text = if self.output.json() {
            serde_json::to_string(&versioned(watch.report()))
                .map_err(|e| Error::failed(format!("cannot write JSON: {e}")))?
        } else {
            watch.render().trim_end().to_owned()
        };
        context.printer.report(text)
    }

    /// Prints which machine it was.
    fn name(&self, context: &Context, machine: &Machine) -> Result<u8> {
        if self.output.json() {
            context.printer.json(&versioned(machine))?;
        } else {
            context.printer.line(&machine.name)?;
        }
        Ok(0)
    }

    fn plan(&self, terminal: bool) -> Result<Plan> {
        let RunTarget { workspace, image } =
            argument::classify(&self.target).map_err(|e| Error::usage(e.message).hint(e.hint))?;
        let refuse = |message: &str, hint: &str| Err(Error::usage(message).hint(hint));
        let command = words(&self.command)?;
        if self.detach && self.rm {
            return refuse(
                "-d and --rm exclude each other",
                "with -d the machine is meant to stay; leave one of them out",
            );
        }
        if self.detach && !command.is_empty() {
            return refuse(
                "-d takes no command",
                "start the machine with -d, then run commands with `banger vm exec NAME -- COMMAND`",
            );
        }
        if self.detach && (!self.program.env.is_empty() || self.program.user.is_some() || self.program.terminal.tty) {
            return refuse(
                "--env, --user and -t are for a command or a shell, and -d has none",
                "give them to `banger vm exec` later",
            );
        }
        if self.detach && workspace.is_none() && self.program.workdir.is_some() {
            return refuse(
                "--workdir has no use with -d and without a workspace",
                "give it to `banger vm exec` later",
            );
        }
        if self.from.is_some() && self.branch.is_none() {
            return refuse(
                "--from needs --branch",
                "name the branch that is to start there: --branch NAME --from REF",
            );
        }
        if workspace.is_none() {
            let without = [
                (self.branch.is_some(), "--branch"),
                (self.include_untracked, "--include-untracked"),
                (self.dry_run, "--dry-run"),
            ];
            if let Some((_, flag)) = without.iter().find(|w| w.0) {
                return refuse(&format!("{flag} needs a workspace"), "name one, like `banger run . …`");
            }
        }
        let then = match (command.is_empty(), self.detach, terminal || self.program.terminal.tty) {
            (false, _, _) => Then::Command(command),
            (true, true, _) => Then::Detach,
            (true, false, true) => Then::Shell,
            (true, false, false) => Then::Leave,
        };
        if self.rm && then == Then::Leave && !self.dry_run {
            return refuse(
                "--rm without a command needs a terminal for the shell",
                "give a command after `--`, or -t for a shell all the same",
            );
        }
        Ok(Plan { workspace, image, then })
    }

    /// Looks at the workspace. A signal ends that.
    async fn snapshot(&self, context: &Context, path: &str, signals: &mut Signals) -> Result<Snapshot> {
        let path = context.places.expand(path)?;
        let options = workspace::Options {
            include_untracked: self.include_untracked,
            branch: self.branch.clone(),
            from: self.from.clone(),
            guest_path: workspace::guest_path(self.program.workdir.as_deref(), self.program.user.as_deref())?,
        };
        let (found, mut looking) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let _ = found.send(workspace::inspect(&path, options, &workspace::User::of_process()));
        });
        tokio::select! {
            found = &mut looking => found.map_err(|_| Error::failed("looking at the workspace broke off"))?,
            number = signals.next() => {
                // Git is of the same terminal and ends as well; then its temporary directory is removed.
                let _ = tokio::time::timeout(LOOKING_ENDS, looking).await;
                Err(Error::signal(number))
            }
        }
    }
}

/// Creates the machine. One that goes with its command is held from the moment it has an id.
async fn start(
    context: &Context,
    client: &Client,
    request: &CreateMachine,
    signals: &mut Signals,
    watch: &mut Stopwatch,
    begun: &mut Option<Machine>,
) -> Result<Machine> {
    client.connected().await?;
    watch.lap("connect");
    let machine = create(context, client, request, signals, |machine| {
        watch.lap("create");
        *begun = Some(machine.clone());
        if request.auto_remove {
            tokio::spawn(hold(client.sibling(), machine.id.clone()));
        }
    })
    .await?;
    watch.lap("start");
    Ok(machine)
}

/// Tells the daemon that somebody still wants the machine, for as long as this process lives.
async fn hold(client: Client, machine: String) {
    use futures_util::StreamExt;
    loop {
        if let Ok(mut socket) = client
            .websocket(&format!("{}/hold", machine_path(&machine)), 4096)
            .await
        {
            while let Some(Ok(_)) = socket.next().await {}
        }
        // The daemon went away. The next one has to learn of us within the time it gives holders to come back.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn copy_in(
    context: &Context,
    client: &Client,
    machine: &Machine,
    (snapshot, user): (&Snapshot, Option<&str>),
    packing: Packing,
    signals: &mut Signals,
) -> Result<Machine> {
    let mut snapshot = snapshot.clone();
    let copy = async {
        if let Err(error) = snapshot.settle(client, &machine.id, user).await {
            packing.discard().await;
            return Err(error);
        }
        workspace::upload(context, client, &machine.id, &snapshot, packing).await?;
        let patch = PatchMachine {
            workspace: Some(snapshot.record()),
            ..PatchMachine::default()
        };
        client.patch::<_, Machine>(&machine_path(&machine.id), &patch).await
    };
    tokio::select! {
        machine = copy => machine,
        number = signals.next() => Err(Error::signal(number)),
    }
}

/// Removes the machine with a deadline of its own. Signals that come meanwhile change nothing: they have been taken over.
async fn clean_up(context: &Context, client: &Client, machine: &Machine) {
    // Its own lines would stand behind the command's output.
    let activity = context.printer.short_activity("vm delete");
    let removal = async {
        // The daemon may have ended; the removal is for the next one then.
        client.connected().await?;
        delete(&client.sibling(), machine, true, activity).await
    };
    let removed = tokio::time::timeout(CLEANUP_DEADLINE, removal).await;
    let error = match removed {
        Ok(Ok(_)) => return,
        Ok(Err(error)) if error.kind == Kind::NotFound => return,
        Ok(Err(error)) => error,
        Err(_) => Error::new(
            Kind::Timeout,
            format!("not done within {} s", CLEANUP_DEADLINE.as_secs()),
        ),
    };
    context.printer.warn(format!(
        "cannot remove {name} now ({error}); the daemon removes it by itself, else: `banger vm delete -f {name}`",
        name = machine.name
    ));
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: RunArgs,
    }

    fn plan(line: &str, terminal: bool) -> Result<Plan> {
        let words = std::iter::once("run").chain(line.split_whitespace());
        Line::try_parse_from(words)
            .unwrap_or_else(|e| panic!("{line}: {e}"))
            .run
            .plan(terminal)
    }

    #[test]
    fn combinations_that_make_no_sense_are_refused() {
        for (line, part) in [
            ("-d --rm", "exclude"),
            ("-d -- make", "-d takes no command"),
            ("-d -e A=b", "--env"),
            ("-d --workdir /srv", "--workdir"),
            (". --from main", "--from needs --branch"),
            ("--branch x", "--branch needs a workspace"),
            ("--include-untracked", "--include-untracked needs"),
            ("--dry-run", "--dry-run needs"),
            ("debian slim", "two images"),
            (". /x", "two workspaces"),
            ("--rm", "--rm without a command"),
        ] {
            let error = plan(line, false).unwrap_err();
            assert_eq!(error.kind, Kind::Usage, "{line}");
            assert!(error.message.contains(part), "{line}: {}", error.message);
            assert!(error.hint.is_some(), "{line}");
        }
    }

    #[test]
    fn what_follows_depends_on_command_and_terminal() {
        for (line, terminal, then) in [
            ("-- make test", true, Then::Command(vec!["make".into(), "test".into()])),
            ("", true, Then::Shell),
            ("--rm", true, Then::Shell),
            ("-t", false, Then::Shell),
            ("", false, Then::Leave),
            ("-d", true, Then::Detach),
            (". --branch x --from y -d --workdir /srv/x", false, Then::Detach),
            (". --dry-run --rm", false, Then::Leave),
        ] {
            assert_eq!(plan(line, terminal).unwrap().then, then, "{line}");
        }
    }

    #[test]
    fn options_behind_the_dashes_are_the_commands() {
        assert_eq!(
            plan("debian -- ls --rm -d", false).unwrap().then,
            Then::Command(vec!["ls".into(), "--rm".into(), "-d".into()])
        );
    }
}
