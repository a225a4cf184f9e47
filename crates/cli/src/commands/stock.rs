//! What the commands for images, kernels, templates and snapshots share: they are kept by the daemon under a path, listed in a
//! table, shown as pairs, made by an operation and removed by name.

use std::collections::HashMap;

use banger_core::size;
use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, element};
use crate::error::{Error, Result};
use crate::table;

/// Something that the daemon keeps.
pub(crate) trait Kept: Serialize + DeserializeOwned {
    /// The name of the list in the daemon's answer.
    const LIST: &'static str;
    /// Headings of the table.
    const HEADINGS: &'static [&'static str];

    /// What it is called on the command line.
    fn name(&self) -> &str;

    /// Its row in the table.
    fn row(&self, now: Timestamp) -> Vec<String>;

    /// Everything about it.
    fn pairs(&self, now: Timestamp) -> Vec<(&'static str, String)>;
}

/// All that are kept under a path.
pub(crate) async fn all<T: Kept>(client: &Client, path: &str) -> Result<Vec<T>> {
    let mut answer: HashMap<String, Vec<T>> = client.get(path).await?;
    answer
        .remove(T::LIST)
        .ok_or_else(|| Error::failed(format!("the daemon's answer to /v1/{path} has no {}", T::LIST)))
}

/// Lists all that are kept under a path.
pub(crate) fn list<T: Kept>(context: &Context, output: OutputArgs, path: &str) -> Result<u8> {
    let found: Vec<T> = context.block_on(async { all(&Client::new(&context.places)?, path).await })?;
    let printer = &context.printer;
    if output.json() {
        printer.json(&found.into_iter().map(versioned).collect::<Vec<_>>())?;
    } else if printer.quiet {
        printer.data(found.iter().map(|t| format!("{}\n", t.name())).collect::<String>())?;
    } else {
        let now = Timestamp::now();
        printer.data(table::render(T::HEADINGS, found.iter().map(|t| t.row(now))))?;
    }
    Ok(0)
}

/// The one that is kept under a path by this name.
pub(crate) async fn get<T: Kept>(client: &Client, path: &str, name: &str) -> Result<T> {
    client.get(&format!("{path}/{}", element(name))).await
}

/// Shows the one of this name.
pub(crate) fn show<T: Kept>(context: &Context, output: OutputArgs, path: &str, name: &str) -> Result<u8> {
    let found: T = context.block_on(async { get(&Client::new(&context.places)?, path, name).await })?;
    if output.json() {
        context.printer.json(&versioned(found))?;
    } else {
        context.printer.data(table::pairs(found.pairs(Timestamp::now())))?;
    }
    Ok(0)
}

/// Says which one was made: all of it in JSON, else its name.
pub(crate) fn made<T: Kept>(context: &Context, output: OutputArgs, made: T) -> Result<u8> {
    if output.json() {
        context.printer.json(&versioned(made))?;
    } else {
        context.printer.line(made.name())?;
    }
    Ok(0)
}

/// Removes several, one after the other; the good ones go whatever becomes of the others.
pub(crate) fn remove(context: &Context, output: OutputArgs, path: &str, names: &[String]) -> Result<u8> {
    #[derive(Serialize)]
    struct Removed<'a> {
        name: &'a str,
        result: &'static str,
    }
    context.block_on(async {
        let client = Client::new(&context.places)?;
        let mut removed = Vec::new();
        let mut failed: Option<Error> = None;
        for name in names {
            match client.delete_only(&format!("{path}/{}", element(name))).await {
                Ok(()) if output.json() => removed.push(versioned(Removed {
                    name,
                    result: "deleted",
                })),
                Ok(()) => context.printer.line(name)?,
                Err(error) => {
                    if let Some(earlier) = failed.replace(error) {
                        context.printer.error(&earlier);
                    }
                }
            }
        }
        if output.json() {
            context.printer.json(&removed)?;
        }
        failed.map_or(Ok(0), Err)
    })
}

/// When something was, and how long ago that is.
pub(crate) fn moment(timestamp: &str, now: Timestamp) -> String {
    format!("{timestamp} ({})", table::ago(timestamp, now))
}

/// Names in a row, a dash for none.
pub(crate) fn names(names: &[String]) -> String {
    if names.is_empty() {
        "-".to_owned()
    } else {
        names.join(", ")
    }
}

/// A size that may be nothing.
pub(crate) fn size_or_dash(bytes: u64) -> String {
    if bytes == 0 {
        "-".to_owned()
    } else {
        size::format(bytes)
    }
}
