//! `banger vm recover`.

use banger_proto::api::{Machine, Recoverable};
use clap::Args;
use jiff::Timestamp;
use serde::Deserialize;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, element};
use crate::completion;
use crate::error::{Error, Result};
use crate::table;

/// Take machines back that are not in the database any more
///
/// The directory of each machine holds what it was: name, size, image, ports. When the database was lost or emptied, this lists the
/// machines whose files are there, and takes those back that are named. One that still runs is adopted and runs on.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm recover\n  banger vm recover build\n  banger vm recover --all")]
pub(crate) struct RecoverArgs {
    /// Machines by their old name, or by id; without, those that can be taken back are listed
    #[arg(value_name = "MACHINE", conflicts_with = "all", add = completion::recoverable())]
    machines: Vec<String>,
    /// Take all of them back
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Deserialize)]
struct Recoverables {
    machines: Vec<Recoverable>,
}

/// All machines that can be taken back.
pub(crate) async fn all(client: &Client) -> Result<Vec<Recoverable>> {
    Ok(client.get::<Recoverables>("recoverable").await?.machines)
}

impl RecoverArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        context.block_on(async {
            let client = Client::new(&context.places)?;
            if self.machines.is_empty() && !self.all {
                return self.list(context, &client).await;
            }
            let references = match self.all {
                true => all(&client).await?.into_iter().map(|m| m.id).collect(),
                false => self.machines.clone(),
            };
            self.recover(context, &client, references).await
        })
    }

    async fn list(&self, context: &Context, client: &Client) -> Result<u8> {
        let found = all(client).await?;
        let printer = &context.printer;
        if self.output.json() {
            printer.json(&found.into_iter().map(versioned).collect::<Vec<_>>())?;
            return Ok(0);
        }
        if found.is_empty() {
            printer.note("every machine that has files is in the database");
            return Ok(0);
        }
        let now = Timestamp::now();
        let rows = found.iter().map(|m| {
            vec![
                table::short(&m.id),
                m.name.clone(),
                m.image.clone(),
                table::ago(&m.created_at, now),
            ]
        });
        printer.data(table::render(&["ID", "NAME", "IMAGE", "CREATED"], rows))?;
        printer.note("`banger vm recover --all` takes them back");
        Ok(0)
    }

    /// The good ones are taken back whatever becomes of the others.
    async fn recover(&self, context: &Context, client: &Client, references: Vec<String>) -> Result<u8> {
        let (mut done, mut failed): (Vec<Machine>, Option<Error>) = (Vec::new(), None);
        for reference in references {
            let path = format!("recoverable/{}", element(&reference));
            match client.post::<_, Machine>(&path, &serde_json::json!({})).await {
                Ok(machine) => done.push(machine),
                Err(error) => {
                    if let Some(before) = failed.replace(error) {
                        context.printer.error(&before);
                    }
                }
            }
        }
        if self.output.json() {
            context
                .printer
                .json(&done.into_iter().map(versioned).collect::<Vec<_>>())?;
        } else {
            for machine in done {
                context.printer.line(&machine.name)?;
            }
        }
        failed.map_or(Ok(0), Err)
    }
}
