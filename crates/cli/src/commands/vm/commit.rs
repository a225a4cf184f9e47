//! `banger vm commit`: an image of a machine's root disk.

use banger_proto::api::{CommitMachine, Image};
use clap::Args;

use crate::cli::{Context, OutputArgs};
use crate::client::operation::{Leaving, carry_out};
use crate::client::{Client, machine_path};
use crate::commands::{image, stock};
use crate::completion;
use crate::error::Result;

/// Make an image of a machine's root disk
///
/// The machine has to be stopped, or one of its snapshots named. The work disk, /root, is not part of an image. Prints the
/// image's name.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  banger vm stop build && banger vm commit build toolbox\n  \
                        banger vm commit build toolbox --snapshot clean --force"
)]
pub(crate) struct CommitArgs {
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    /// Name of the image
    image: String,
    /// Snapshot to take it from; the stopped machine itself otherwise
    #[arg(long, value_name = "NAME", add = completion::snapshots())]
    snapshot: Option<String>,
    /// Replace an image of that name
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    output: OutputArgs,
}

impl CommitArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let request = CommitMachine {
            image: self.image,
            snapshot: self.snapshot,
            force: self.force,
        };
        let image: Image = context.block_on(async {
            let client = Client::new(&context.places)?;
            let path = format!("{}/commit", machine_path(&self.machine));
            carry_out(context, &client, &path, &request, "vm commit", Leaving::Cancels).await?;
            stock::get(&client, image::PATH, &request.image).await
        })?;
        stock::made(context, self.output, image)
    }
}
