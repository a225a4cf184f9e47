//! `banger kernel`: kernels in the store.

use banger_core::size;
use banger_proto::api::{ImportKernel, Kernel};
use clap::{Args, Subcommand};
use jiff::Timestamp;

use crate::cli::{Context, OutputArgs};
use crate::client::Client;
use crate::client::operation::{Leaving, carry_out};
use crate::commands::stock::{self, Kept};
use crate::completion;
use crate::error::{Error, Result};
use crate::table;

/// Where kernels are kept.
pub(crate) const PATH: &str = "kernels";

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
    /// Kernels by name
    #[arg(required = true, value_name = "KERNEL", add = completion::kernels())]
    kernels: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

impl Kept for Kernel {
    const LIST: &'static str = "kernels";
    const HEADINGS: &'static [&'static str] = &["NAME", "DIGEST", "RELEASE", "SIZE", "MACHINES", "CREATED"];

    fn name(&self) -> &str {
        &self.name
    }

    fn row(&self, now: Timestamp) -> Vec<String> {
        vec![
            self.name.clone(),
            table::short(&self.digest),
            self.release.clone(),
            size::format(self.size_bytes),
            self.used_by.len().to_string(),
            table::ago(&self.created_at, now),
        ]
    }

    fn pairs(&self, now: Timestamp) -> Vec<(&'static str, String)> {
        vec![
            ("name", self.name.clone()),
            ("digest", self.digest.clone()),
            ("release", self.release.clone()),
            ("size", size::format(self.size_bytes)),
            ("source", self.source.clone()),
            ("created", stock::moment(&self.created_at, now)),
            ("used by", stock::names(&self.used_by)),
        ]
    }
}

impl KernelArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        match self.command {
            KernelCommand::List(args) => stock::list::<Kernel>(context, args.output, PATH),
            KernelCommand::Show(args) => stock::show::<Kernel>(context, args.output, PATH, &args.kernel),
            KernelCommand::Import(args) => args.run(context),
            KernelCommand::Delete(args) => stock::remove(context, args.output, PATH, &args.kernels),
        }
    }
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
        let kernel: Kernel = context.block_on(async {
            let client = Client::new(&context.places)?;
            let request = ImportKernel {
                name: self.name.clone(),
                from,
                force: self.force,
            };
            carry_out(context, &client, PATH, &request, "kernel import", Leaving::Cancels).await?;
            stock::get(&client, PATH, &self.name).await
        })?;
        stock::made(context, self.output, kernel)
    }
}
