//! `banger kernel`: kernels in the store.

use banger_core::size;
use banger_proto::api::{Accepted, ImportKernel, Kernel};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Deserialize;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::operation::{Leaving, follow};
use crate::client::{Client, encode};
use crate::commands::image::delete_each;
use crate::completion;
use crate::error::{Error, Result};
use crate::signals::Signals;
use crate::table;

/// Manage kernels
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "Examples:\n  banger kernel list\n  banger kernel import"
)]
pub(crate) struct KernelArgs {
    #[command(subcommand)]
    command: KernelCommand,
}

#[derive(Debug, Subcommand)]
enum KernelCommand {
    #[command(visible_alias = "ls")]
    List(KernelListArgs),
    Show(KernelShowArgs),
    Import(KernelImportArgs),
    #[command(visible_alias = "rm")]
    Delete(KernelDeleteArgs),
}

/// List kernels
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger kernel list")]
struct KernelListArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// Show everything about a kernel
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger kernel show default")]
struct KernelShowArgs {
    /// Kernel by name or digest
    #[arg(add = completion::kernels())]
    kernel: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// Import a kernel from a distribution's package
///
/// Without --from the distribution's own kernel package is fetched by its package client.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  banger kernel import\n  banger kernel import test --from ./linux-image-6.1.0-cloud-amd64.deb"
)]
struct KernelImportArgs {
    /// Name to keep it under; machines use `default`
    #[arg(default_value = "default")]
    name: String,
    /// Package of a kernel, a .deb file
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    from: Option<String>,
    /// Import again though there is one
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Remove kernels that no machine uses
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger kernel delete test")]
struct KernelDeleteArgs {
    /// Kernels by name or digest
    #[arg(required = true, value_name = "KERNEL", add = completion::kernels())]
    kernels: Vec<String>,
}

#[derive(Deserialize)]
struct Kernels {
    kernels: Vec<Kernel>,
}

/// All kernels.
pub(crate) async fn kernels(client: &Client) -> Result<Vec<Kernel>> {
    Ok(client.get::<Kernels>("kernels").await?.kernels)
}

impl KernelArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        match self.command {
            KernelCommand::List(args) => args.run(context),
            KernelCommand::Show(args) => args.run(context),
            KernelCommand::Import(args) => args.run(context),
            KernelCommand::Delete(args) => context.block_on(async {
                let client = Client::new(&context.places)?;
                delete_each(context, &client, "kernels", &args.kernels).await
            }),
        }
    }
}

impl KernelListArgs {
    fn run(self, context: &Context) -> Result<u8> {
        let found = context.block_on(async { kernels(&Client::new(&context.places)?).await })?;
        let printer = &context.printer;
        if self.output.json() {
            printer.json(&found.into_iter().map(versioned).collect::<Vec<_>>())?;
        } else if printer.quiet {
            printer.data(found.iter().map(|k| format!("{}\n", k.name)).collect::<String>())?;
        } else {
            let now = Timestamp::now();
            let rows = found.iter().map(|k| {
                vec![
                    k.name.clone(),
                    table::short(&k.digest),
                    k.release.clone(),
                    size::format(k.size_bytes),
                    k.used_by.len().to_string(),
                    table::ago(&k.created_at, now),
                ]
            });
            printer.data(table::render(
                &["NAME", "DIGEST", "RELEASE", "SIZE", "MACHINES", "CREATED"],
                rows,
            ))?;
        }
        Ok(0)
    }
}

impl KernelShowArgs {
    fn run(self, context: &Context) -> Result<u8> {
        let kernel = context.block_on(async { show(&Client::new(&context.places)?, &self.kernel).await })?;
        print(context, self.output, kernel)
    }
}

async fn show(client: &Client, kernel: &str) -> Result<Kernel> {
    client
        .get(&format!("kernels/{}", encode(kernel).replace('/', "%2F")))
        .await
}

fn print(context: &Context, output: OutputArgs, kernel: Kernel) -> Result<u8> {
    if output.json() {
        context.printer.json(&versioned(kernel))?;
        return Ok(0);
    }
    let now = Timestamp::now();
    context.printer.data(table::pairs([
        ("name", kernel.name),
        ("digest", kernel.digest),
        ("release", kernel.release),
        ("size", size::format(kernel.size_bytes)),
        ("source", kernel.source),
        (
            "created",
            format!("{} ({})", kernel.created_at, table::ago(&kernel.created_at, now)),
        ),
        (
            "used by",
            if kernel.used_by.is_empty() {
                "-".to_owned()
            } else {
                kernel.used_by.join(", ")
            },
        ),
    ]))?;
    Ok(0)
}

impl KernelImportArgs {
    fn run(self, context: &Context) -> Result<u8> {
        // The daemon has another working directory, and no idea of ours.
        let from = match &self.from {
            Some(file) => {
                let path = context.places.expand(file)?;
                let path = path.canonicalize().map_err(|e| Error::io("find", &path, e))?;
                Some(
                    path.into_os_string()
                        .into_string()
                        .map_err(|_| Error::usage("the path is not valid UTF-8"))?,
                )
            }
            None => None,
        };
        let kernel = context.block_on(async {
            let client = Client::new(&context.places)?;
            let mut signals = Signals::ending()?;
            let request = ImportKernel {
                name: self.name.clone(),
                from,
                force: self.force,
            };
            let accepted: Accepted = client.post("kernels", &request).await?;
            let mut activity = context.printer.activity("kernel import");
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
            return print(context, self.output, kernel);
        }
        context.printer.line(kernel.name)?;
        Ok(0)
    }
}
