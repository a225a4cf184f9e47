//! `banger image`: root file systems in the store.

use banger_core::size;
use banger_proto::api::{Accepted, BuildImage, Image};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Deserialize;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::operation::{Leaving, follow};
use crate::client::{Client, encode};
use crate::completion;
use crate::error::{Error, Result};
use crate::signals::Signals;
use crate::table;

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
    /// Images by name or digest
    #[arg(required = true, value_name = "IMAGE", add = completion::images())]
    images: Vec<String>,
}

#[derive(Deserialize)]
struct Images {
    images: Vec<Image>,
}

/// All images.
pub(crate) async fn images(client: &Client) -> Result<Vec<Image>> {
    Ok(client.get::<Images>("images").await?.images)
}

impl ImageArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        match self.command {
            ImageCommand::List(args) => args.run(context),
            ImageCommand::Show(args) => args.run(context),
            ImageCommand::Build(args) => args.run(context),
            ImageCommand::Delete(args) => args.run(context),
        }
    }
}

impl ImageListArgs {
    fn run(self, context: &Context) -> Result<u8> {
        let found = context.block_on(async { images(&Client::new(&context.places)?).await })?;
        let printer = &context.printer;
        if self.output.json() {
            printer.json(&found.into_iter().map(versioned).collect::<Vec<_>>())?;
        } else if printer.quiet {
            printer.data(found.iter().map(|i| format!("{}\n", i.name)).collect::<String>())?;
        } else {
            let now = Timestamp::now();
            let rows = found.iter().map(|i| {
                vec![
                    i.name.clone(),
                    table::short(&i.digest),
                    size::format(i.allocated_bytes),
                    i.init.clone().unwrap_or_else(|| "-".to_owned()),
                    i.used_by.len().to_string(),
                    table::ago(&i.created_at, now),
                ]
            });
            printer.data(table::render(
                &["NAME", "DIGEST", "SIZE", "INIT", "MACHINES", "CREATED"],
                rows,
            ))?;
        }
        Ok(0)
    }
}

impl ImageShowArgs {
    fn run(self, context: &Context) -> Result<u8> {
        let image = context.block_on(async { show(&Client::new(&context.places)?, &self.image).await })?;
        print(context, self.output, image)
    }
}

async fn show(client: &Client, image: &str) -> Result<Image> {
    client
        .get(&format!("images/{}", encode(image).replace('/', "%2F")))
        .await
}

fn print(context: &Context, output: OutputArgs, image: Image) -> Result<u8> {
    if output.json() {
        context.printer.json(&versioned(image))?;
        return Ok(0);
    }
    let now = Timestamp::now();
    context.printer.data(table::pairs([
        ("name", image.name),
        ("digest", image.digest),
        (
            "size",
            format!(
                "{} ({} on disk)",
                size::format(image.size_bytes),
                size::format(image.allocated_bytes)
            ),
        ),
        ("init", image.init.unwrap_or_else(|| "none".to_owned())),
        ("source", image.source),
        (
            "created",
            format!("{} ({})", image.created_at, table::ago(&image.created_at, now)),
        ),
        (
            "used by",
            if image.used_by.is_empty() {
                "-".to_owned()
            } else {
                image.used_by.join(", ")
            },
        ),
    ]))?;
    Ok(0)
}

impl ImageBuildArgs {
    fn run(self, context: &Context) -> Result<u8> {
        let image = context.block_on(async {
            let client = Client::new(&context.places)?;
            let mut signals = Signals::ending()?;
            let request = BuildImage {
                name: self.name.clone(),
                force: self.force,
            };
            let accepted: Accepted = client.post("images", &request).await?;
            let mut activity = context.printer.activity("image build");
            follow(
                &client,
                accepted.operation,
                Leaving::Cancels,
                &mut activity,
                &mut signals,
            )
            .await?;
            drop(activity);
            show(&client, &self.name).await
        })?;
        if self.output.json() {
            return print(context, self.output, image);
        }
        context.printer.line(image.name)?;
        Ok(0)
    }
}

impl ImageDeleteArgs {
    fn run(self, context: &Context) -> Result<u8> {
        context.block_on(async {
            let client = Client::new(&context.places)?;
            delete_each(context, &client, "images", &self.images).await
        })
    }
}

/// Removes several things of the store, one after the other; the good ones go whatever becomes of the others.
pub(crate) async fn delete_each(context: &Context, client: &Client, kind: &str, names: &[String]) -> Result<u8> {
    let mut failed: Option<Error> = None;
    for name in names {
        match client
            .delete_only(&format!("{kind}/{}", encode(name).replace('/', "%2F")))
            .await
        {
            Ok(()) => context.printer.line(name)?,
            Err(error) => {
                if let Some(earlier) = failed.replace(error) {
                    context.printer.error(&earlier);
                }
            }
        }
    }
    failed.map_or(Ok(0), Err)
}
