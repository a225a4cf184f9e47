//! `banger template`: saved machines from which new ones start.

use banger_core::size;
use banger_proto::api::{BuildTemplate, PruneTemplates, Pruned, Template};
use banger_proto::error::ErrorCode;
use clap::{Args, Subcommand};
use jiff::Timestamp;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::Client;
use crate::client::operation::{Leaving, carry_out};
use crate::commands::stock::{self, Kept};
use crate::commands::vm::common::{disk, memory, network, vcpu};
use crate::completion;
use crate::error::Result;
use crate::table;

/// Where templates are kept.
pub(crate) const PATH: &str = "templates";

/// Manage templates, from which new machines start
///
/// A template is the saved memory of a freshly started machine. It is made by itself for the first machine of its kind, and
/// later ones go on from there instead of booting. It holds nothing of any machine.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "Examples:\n  banger template list\n  banger template build debian --memory 2G\n  banger template prune"
)]
pub(crate) struct TemplateArgs {
    #[command(subcommand)]
    command: TemplateCommand,
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    #[command(visible_alias = "ls")]
    List(TemplateListArgs),
    Show(TemplateShowArgs),
    Build(TemplateBuildArgs),
    Prune(TemplatePruneArgs),
    #[command(visible_alias = "rm")]
    Delete(TemplateDeleteArgs),
}

/// List templates
///
/// The size is what their files take on the host. One that is not current fits nothing any more: engine, kernel, agent or image
/// have changed since.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger template list")]
struct TemplateListArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// Show everything about a template
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger template show 3f0c")]
struct TemplateShowArgs {
    /// Template by id or unambiguous prefix
    #[arg(add = completion::templates())]
    template: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// Make a template before the first machine needs it
///
/// Takes what decides what a machine is made of; what is not given is resolved as for `banger vm run`. Prints the template's id.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  banger template build\n  banger template build debian-slim --vcpu 1 --memory 512M --force"
)]
struct TemplateBuildArgs {
    /// Image; `debian` unless the configuration says otherwise
    #[arg(add = completion::images())]
    image: Option<String>,
    /// Kernel to boot
    #[arg(long, add = completion::kernels())]
    kernel: Option<String>,
    /// Virtual processors
    #[arg(long, value_name = "N", value_parser = vcpu)]
    vcpu: Option<u32>,
    /// Memory, like 512M or 2G
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    memory: Option<u64>,
    /// Size of the root disk, like 8G; the default is 8G, or the size of the image where that is larger
    #[arg(long, value_name = "SIZE", value_parser = disk)]
    disk_size: Option<u64>,
    /// Network: user or none
    #[arg(long, value_parser = network)]
    network: Option<String>,
    /// Make it anew though there is one
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Remove templates that fit nothing any more, and those beyond the budget
///
/// Prints the ids of those that went. Machines that were started from them are not affected.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger template prune\n  banger template prune --all")]
struct TemplatePruneArgs {
    /// All templates
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Remove templates
///
/// Machines that were started from them are not affected. The next machine of the kind makes a new one.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger template delete 3f0c")]
struct TemplateDeleteArgs {
    /// Templates by id, or four characters or more of it
    #[arg(required = true, value_name = "TEMPLATE", add = completion::templates())]
    templates: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

impl Kept for Template {
    const LIST: &'static str = "templates";
    const HEADINGS: &'static [&'static str] = &["ID", "IMAGE", "VCPU", "MEM", "SIZE", "USES", "LAST USED", "CURRENT"];

    fn name(&self) -> &str {
        &self.id
    }

    fn row(&self, now: Timestamp) -> Vec<String> {
        vec![
            table::short(&self.id),
            self.image.clone(),
            self.spec.vcpu.to_string(),
            format!("{} MiB", self.spec.memory_mib),
            stock::size_or_dash(self.memory_bytes.saturating_add(self.disk_bytes)),
            self.uses.to_string(),
            self.last_used_at
                .as_ref()
                .map_or_else(|| "never".to_owned(), |t| table::ago(t, now)),
            match (self.ready, self.current) {
                (false, _) => "being made",
                (true, true) => "yes",
                (true, false) => "no",
            }
            .to_owned(),
        ]
    }

    fn pairs(&self, now: Timestamp) -> Vec<(&'static str, String)> {
        let spec = &self.spec;
        let yes_or = |yes: bool, no: &str| if yes { "yes".to_owned() } else { no.to_owned() };
        vec![
            ("id", self.id.clone()),
            (
                "image",
                format!("{} ({})", self.image, table::short(&spec.image_digest)),
            ),
            (
                "kernel",
                format!("{} ({})", spec.kernel, table::short(&spec.kernel_digest)),
            ),
            (
                "engine",
                format!("{}/{} {}", spec.engine, spec.accel, self.engine_version),
            ),
            ("vcpu", spec.vcpu.to_string()),
            ("memory", format!("{} MiB", spec.memory_mib)),
            ("disk", size::format(spec.disk_bytes)),
            ("network", spec.network.clone()),
            ("ready", yes_or(self.ready, "no, it is being made")),
            ("current", yes_or(self.current, "no, nothing would use it any more")),
            (
                "size",
                format!(
                    "{} memory, {} disks (allocated)",
                    size::format(self.memory_bytes),
                    size::format(self.disk_bytes)
                ),
            ),
            ("uses", self.uses.to_string()),
            ("created", stock::moment(&self.created_at, now)),
            (
                "last used",
                self.last_used_at
                    .as_ref()
                    .map_or_else(|| "never".to_owned(), |t| stock::moment(t, now)),
            ),
        ]
    }
}

impl TemplateArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        match self.command {
            TemplateCommand::List(args) => stock::list::<Template>(context, args.output, PATH),
            TemplateCommand::Show(args) => stock::show::<Template>(context, args.output, PATH, &args.template),
            TemplateCommand::Build(args) => args.run(context),
            TemplateCommand::Prune(args) => args.run(context),
            TemplateCommand::Delete(args) => stock::remove(context, args.output, PATH, &args.templates),
        }
    }
}

impl TemplateBuildArgs {
    fn run(self, context: &Context) -> Result<u8> {
        let output = self.output;
        let template: Template = context.block_on(async {
            let client = Client::new(&context.places)?;
            let request = BuildTemplate {
                image: self.image,
                kernel: self.kernel,
                vcpu: self.vcpu,
                memory_mib: self.memory,
                disk_bytes: self.disk_size,
                network: self.network,
                force: self.force,
            };
            let built = carry_out(context, &client, PATH, &request, "template build", Leaving::Cancels).await?;
            match stock::get(&client, PATH, &built.operation.target).await {
                // An operation that began before the image was there has its name for a target.
                Err(error) if error.is(ErrorCode::NotFound) => {
                    let known = stock::all(&client, PATH).await?;
                    newest(known, &built.operation.target, &request).ok_or(error)
                }
                other => other,
            }
        })?;
        stock::made(context, output, template)
    }
}

/// The latest template of the image that a request could have made.
fn newest(known: Vec<Template>, image: &str, request: &BuildTemplate) -> Option<Template> {
    let fits = |t: &Template| {
        let spec = &t.spec;
        t.current
            && t.image == image
            && request.kernel.as_ref().is_none_or(|k| *k == spec.kernel)
            && request.vcpu.is_none_or(|n| n == spec.vcpu)
            && request.memory_mib.is_none_or(|n| n == spec.memory_mib)
            && request.disk_bytes.is_none_or(|n| n == spec.disk_bytes)
            && request.network.as_ref().is_none_or(|n| *n == spec.network)
    };
    known
        .into_iter()
        .filter(fits)
        .max_by(|a, b| a.created_at.cmp(&b.created_at))
}

impl TemplatePruneArgs {
    fn run(self, context: &Context) -> Result<u8> {
        let request = PruneTemplates { all: self.all };
        let pruned: Pruned = context.block_on(async {
            let client = Client::new(&context.places)?;
            client.post("templates/prune", &request).await
        })?;
        let freed = size::format(pruned.freed_bytes);
        if self.output.json() {
            context.printer.json(&versioned(pruned))?;
            return Ok(0);
        }
        context
            .printer
            .data(pruned.removed.iter().map(|id| format!("{id}\n")).collect::<String>())?;
        context.printer.note(format!("freed {freed}"));
        Ok(0)
    }
}
