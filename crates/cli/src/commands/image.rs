//! `banger image`: root file systems in the store.

use banger_core::size;
use banger_proto::api::{BuildImage, Image};
use clap::{Args, Subcommand};
use jiff::Timestamp;

use crate::cli::{Context, OutputArgs};
use crate::client::Client;
use crate::client::operation::{Leaving, carry_out};
use crate::commands::stock::{self, Kept};
use crate::completion;
use crate::error::Result;
use crate::table;

/// Where images are kept.
pub(crate) const PATH: &str = "images";

/// Manage images
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "Examples:\n  banger image list\n  banger image build debian-slim"
)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    #[command(visible_alias = "ls")]
    List(ImageListArgs),
    Show(ImageShowArgs),
    Build(ImageBuildArgs),
    #[command(visible_alias = "rm")]
    Delete(ImageDeleteArgs),
}

/// List images
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger image list")]
struct ImageListArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// Show everything about an image
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger image show debian")]
struct ImageShowArgs {
    /// Image by name or digest
    #[arg(add = completion::images())]
    image: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// Build one of the default images
///
/// Takes the packages from the distribution's own archive. Needs no root where the host allows it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger image build debian\n  banger image build debian-slim --force")]
struct ImageBuildArgs {
    /// Recipe: `debian` (systemd, ssh, git and build basics) or `debian-slim` (no init system)
    #[arg(add = completion::recipes())]
    name: String,
    /// Build again though there is one
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Remove images that no machine uses
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger image delete debian-slim")]
struct ImageDeleteArgs {
    /// Images by name
    #[arg(required = true, value_name = "IMAGE", add = completion::images())]
    images: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

impl Kept for Image {
    const LIST: &'static str = "images";
    const HEADINGS: &'static [&'static str] = &["NAME", "DIGEST", "SIZE", "INIT", "MACHINES", "CREATED"];

    fn name(&self) -> &str {
        &self.name
    }

    fn row(&self, now: Timestamp) -> Vec<String> {
        vec![
            self.name.clone(),
            table::short(&self.digest),
            size::format(self.allocated_bytes),
            self.init.clone().unwrap_or_else(|| "-".to_owned()),
            self.used_by.len().to_string(),
            table::ago(&self.created_at, now),
        ]
    }

    fn pairs(&self, now: Timestamp) -> Vec<(&'static str, String)> {
        let (whole, allocated) = (size::format(self.size_bytes), size::format(self.allocated_bytes));
        vec![
            ("name", self.name.clone()),
            ("digest", self.digest.clone()),
            ("size", format!("{whole} ({allocated} on disk)")),
            ("init", self.init.clone().unwrap_or_else(|| "none".to_owned())),
            ("source", self.source.clone()),
            ("created", stock::moment(&self.created_at, now)),
            ("used by", stock::names(&self.used_by)),
        ]
    }
}

impl ImageArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        match self.command {
            ImageCommand::List(args) => stock::list::<Image>(context, args.output, PATH),
            ImageCommand::Show(args) => stock::show::<Image>(context, args.output, PATH, &args.image),
            ImageCommand::Build(args) => args.run(context),
            ImageCommand::Delete(args) => stock::remove(context, args.output, PATH, &args.images),
        }
    }
}

impl ImageBuildArgs {
    fn run(self, context: &Context) -> Result<u8> {
        let image: Image = context.block_on(async {
            let client = Client::new(&context.places)?;
            let request = BuildImage {
                name: self.name.clone(),
                force: self.force,
            };
            carry_out(context, &client, PATH, &request, "image build", Leaving::Cancels).await?;
            stock::get(&client, PATH, &self.name).await
        })?;
        stock::made(context, self.output, image)
    }
}
