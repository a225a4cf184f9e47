//! The command tree, and the way from arguments to an exit status.

use std::ffi::{OsStr, OsString};
use std::time::Instant;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::commands::{self, daemon, image, kernel, template, vm};
use crate::completion;
use crate::error::{Error, GUEST_COMMAND_FAILED, Kind, Result, STATUSES};
use crate::paths::Places;
use crate::printer::{Color, Printer};

const EXAMPLES: &str = "\
Examples:
  banger run ./repo -- make test   run a command in a new machine with your repository
  banger run --rm -- uname -a      run a command, then remove the machine
  banger ps                        list machines
  banger doctor                    check what this host can do";

/// Private Linux machines for your repositories: real virtual machines, made in seconds.
///
/// `banger run ./repo -- make test` makes a machine, copies the repository into it, runs the command there and hands back
/// its output and exit status. Without a command it opens a shell.
#[derive(Debug, Parser)]
#[command(
    name = "banger",
    bin_name = "banger",
    version = commands::version::one_line(),
    disable_help_subcommand = false,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = EXAMPLES,
    after_long_help = exit_statuses(),
)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Copy, Args)]
struct Global {
    /// Print only data and errors; lists print ids alone
    #[arg(short, long, global = true, help_heading = "Global options")]
    quiet: bool,
    /// When to use colours
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        hide_possible_values = true,
        help_heading = "Global options"
    )]
    color: Color,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(vm::run::RunArgs),
    Vm(vm::VmArgs),
    Ps(vm::list::ListArgs),
    Image(image::ImageArgs),
    Kernel(kernel::KernelArgs),
    Template(template::TemplateArgs),
    Daemon(daemon::DaemonArgs),
    System(commands::system::SystemArgs),
    Doctor(commands::doctor::DoctorArgs),
    Audit(commands::audit::AuditArgs),
    SshConfig(commands::ssh_config::SshConfigArgs),
    Completion(commands::completion::CompletionArgs),
    Version(commands::version::VersionArgs),
    Man(commands::man::ManArgs),
    Internal(commands::internal::InternalArgs),
}

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Format {
    /// For people
    #[default]
    Table,
    /// For programs; the schema is versioned and only grows
    Json,
}

/// Options of commands that print data.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct OutputArgs {
    /// How to print data: table or json
    #[arg(
        long,
        value_enum,
        default_value_t,
        hide_possible_values = true,
        hide_default_value = true,
        value_name = "FORMAT"
    )]
    format: Format,
    /// Short for --format json
    #[arg(long, conflicts_with = "format")]
    json: bool,
}

impl OutputArgs {
    /// JSON is wanted.
    pub(crate) fn json(self) -> bool {
        self.json || self.format == Format::Json
    }
}

/// An object as it is printed in JSON: with the version of its schema.
#[derive(Debug, Serialize)]
pub(crate) struct Versioned<T> {
    schema_version: u32,
    #[serde(flatten)]
    value: T,
}

/// Gives an object its schema version.
pub(crate) fn versioned<T: Serialize>(value: T) -> Versioned<T> {
    Versioned {
        schema_version: banger_proto::OUTPUT_SCHEMA_VERSION,
        value,
    }
}

/// What every command gets.
#[derive(Debug)]
pub(crate) struct Context {
    /// For everything that is shown.
    pub(crate) printer: Printer,
    /// Directories.
    pub(crate) places: Places,
    /// When the program began.
    pub(crate) began: Instant,
}

impl Context {
    /// Runs a future to its end.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = Result<T>>) -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Error::failed(format!("cannot start: {e}")))?;
        let result = runtime.block_on(future);
        // A thread that still reads standard input must not hold up the end.
        runtime.shutdown_background();
        result
    }
}

/// The command tree.
pub(crate) fn tree() -> clap::Command {
    Cli::command()
}

fn exit_statuses() -> String {
    let mut text = format!("{EXAMPLES}\n\nExit status:\n");
    for (status, meaning) in STATUSES {
        text.push_str(&format!("  {status:>3}  {meaning}\n"));
    }
    text.push_str("\nIn run, exec, shell and attach the status is that of the command in the guest.");
    text
}

/// The program, from arguments to exit status.
pub(crate) fn main() -> u8 {
    let began = Instant::now();
    if completion::answer() {
        return 0;
    }
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let guest = status_is_the_guests(&arguments);
    let own_status = |kind: Kind| match kind {
        Kind::BrokenPipe | Kind::Signal(_) => kind.status(),
        _ if guest => GUEST_COMMAND_FAILED,
        _ => kind.status(),
    };
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return not_parsed(&error, own_status(Kind::Usage)),
    };
    let context = Context {
        printer: Printer::new(cli.global.quiet, cli.global.color),
        places: Places::of_process(),
        began,
    };
    match cli.command.run(&context) {
        Ok(status) => status,
        Err(error) => {
            context.printer.error(&error);
            own_status(error.kind)
        }
    }
}

impl Command {
    fn run(self, context: &Context) -> Result<u8> {
        match self {
            Self::Run(args) => args.run(context),
            Self::Vm(args) => args.run(context),
            Self::Ps(args) => args.run(context),
            Self::Image(args) => args.run(context),
            Self::Kernel(args) => args.run(context),
            Self::Template(args) => args.run(context),
            Self::Daemon(args) => args.run(context),
            Self::System(args) => args.run(context),
            Self::Doctor(args) => args.run(context),
            Self::Audit(args) => args.run(context),
            Self::SshConfig(args) => args.run(context),
            Self::Completion(args) => args.run(context),
            Self::Version(args) => args.run(context),
            Self::Man(args) => args.run(context),
            Self::Internal(args) => args.run(context),
        }
    }
}

/// Shows what clap has to say: help that was asked for, or what is wrong.
fn not_parsed(error: &clap::Error, status: u8) -> u8 {
    let printer = Printer::new(false, color_of(std::env::args_os()));
    let help = matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    );
    match printer.rendered(&error.render(), help) {
        Ok(()) if help => 0,
        Ok(()) => status,
        Err(error) => error.kind.status(),
    }
}

/// The colour option of arguments that could not be parsed.
fn color_of(arguments: impl Iterator<Item = OsString>) -> Color {
    let arguments: Vec<String> = arguments
        .take_while(|a| a != "--")
        .filter_map(|a| a.into_string().ok())
        .collect();
    let value = arguments
        .iter()
        .enumerate()
        .find_map(|(i, a)| match a.strip_prefix("--color") {
            Some("") => arguments.get(i + 1).cloned(),
            Some(rest) => rest.strip_prefix('=').map(str::to_owned),
            None => None,
        });
    value.and_then(|v| Color::from_str(&v, true).ok()).unwrap_or_default()
}

/// Whether the arguments name a command whose exit status is that of a program in the guest. Decided without the parser,
/// since it also has to be known when parsing fails.
fn status_is_the_guests(arguments: &[OsString]) -> bool {
    let mut words = arguments
        .iter()
        .skip(1)
        .map(OsString::as_os_str)
        .filter(|a| !a.as_encoded_bytes().starts_with(b"-"));
    let is = |word: Option<&OsStr>, names: &[&str]| word.is_some_and(|w| names.iter().any(|n| w == *n));
    let first = words.next();
    is(first, &["run"]) || (is(first, &["vm"]) && is(words.next(), &["run", "exec", "shell", "attach"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_sound() {
        tree().debug_assert();
    }

    #[test]
    fn guest_commands_are_known_before_parsing() {
        let of = |line: &str| status_is_the_guests(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        for line in [
            "banger run",
            "banger -q vm exec x",
            "banger vm run --bogus",
            "banger vm shell",
            "banger vm attach x",
        ] {
            assert!(of(line), "{line}");
        }
        for line in [
            "banger",
            "banger vm list",
            "banger image run",
            "banger ps run",
            "banger vm",
        ] {
            assert!(!of(line), "{line}");
        }
    }

    #[test]
    fn colour_is_found_in_bad_arguments() {
        let of = |line: &str| color_of(line.split(' ').map(OsString::from));
        assert_eq!(of("banger --color never x"), Color::Never);
        assert_eq!(of("banger --color=always"), Color::Always);
        assert_eq!(of("banger -- --color=always"), Color::Auto);
    }

    #[test]
    fn an_object_carries_its_schema_version_and_an_empty_list_is_empty() {
        #[derive(Serialize)]
        struct Thing {
            a: u8,
        }
        assert_eq!(
            serde_json::to_string(&versioned(Thing { a: 1 })).unwrap(),
            r#"{"schema_version":1,"a":1}"#
        );
        assert_eq!(serde_json::to_string(&Vec::<Versioned<Thing>>::new()).unwrap(), "[]");
    }
}
