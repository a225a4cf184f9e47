//! From the host into a machine.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use banger_proto::api::Machine;

use super::{Copied, found, guest_path, means_content, means_directory, notice, refused, split, stat};
use crate::cli::Context;
use crate::client::{Client, machine_path};
use crate::error::{Error, Kind, Result};
use crate::files::place::{Place, Source, place, place_named};
use crate::files::tree;
use crate::files::upload::{Sink, aborted, put};

/// Copies a file or a directory into a machine. Links of the guest are followed by the guest.
pub(super) async fn copy(context: &Context, client: &Client, from: &Path, machine: &str, path: &str) -> Result<Copied> {
    let is = std::fs::metadata(from).map_err(|e| {
        let kind = if e.kind() == std::io::ErrorKind::NotFound {
            Kind::NotFound
        } else {
            Kind::Failed
        };
        Error {
            kind,
            ..Error::io("copy", from, e)
        }
    })?;
    let source = match (is.is_dir(), is.is_file()) {
        (true, _) if means_content(&from.to_string_lossy()) => Source::Content,
        (true, _) => Source::Directory,
        (_, true) => Source::File,
        _ => {
            return Err(Error::usage(format!(
                "{} is neither file nor directory",
                from.display()
            )));
        }
    };
    let machine = client.get::<Machine>(&machine_path(machine)).await?.id;
    let (directory, top) = destination(client, &machine, source, from, path).await?;
    let mut activity = context.printer.short_activity("vm cp");
    activity.stage("looking at the files");
    let list = tree::list(from, is.is_dir())?;
    let total = list.total();
    activity.stage("copying");
    let skipped = list.skipped.clone();
    let written = put(client, &machine, &directory, total, &mut activity, move |sink| {
        list.pack(&top, sink)
    })
    .await?;
    drop(activity);
    notice(context, &skipped, skipped.len() as u64);
    Ok(Copied {
        skipped: skipped.len() as u64,
        ..written.into()
    })
}

/// The directory in the guest that the stream is unpacked in, and the name of its top there.
async fn destination(
    client: &Client,
    machine: &str,
    source: Source,
    from: &Path,
    path: &str,
) -> Result<(String, PathBuf)> {
    let to = guest_path(path)?;
    let shown = |path: &str| format!("{path} in the machine");
    let mut there = stat(client, machine, &to).await?;
    let mut place =
        place(source, found(&there), means_directory(path)).map_err(|refusal| refused(&shown(&to), refusal))?;
    let mut named = to.clone();
    if place == Place::Into {
        if source == Source::Content {
            return Ok((to, PathBuf::new()));
        }
        let name = own_name(from)?;
        // The guest's paths are text for the interfaces between here and there; an odd name goes without a look.
        let Some(text) = name.to_str() else {
            return Ok((to, name.into()));
        };
        named = format!("{}/{text}", to.trim_end_matches('/'));
        there = stat(client, machine, &named).await?;
        place = place_named(source, found(&there)).map_err(|refusal| refused(&shown(&named), refusal))?;
    }
    if let (Place::Through, Some(target)) = (place, &there.target) {
        named.clone_from(&target.path);
    }
    let (parent, name) = split(&named);
    if place == Place::As && there.kind == "missing" && found_directory(client, machine, parent).await?.is_none() {
        return Err(
            Error::new(Kind::NotFound, format!("there is no directory {parent} in the machine"))
                .hint("make it first with `banger vm exec … -- mkdir -p`"),
        );
    }
    Ok((parent.to_owned(), PathBuf::from(name)))
}

async fn found_directory(client: &Client, machine: &str, path: &str) -> Result<Option<()>> {
    use crate::files::place::{Found, Kind};
    let there = found(&stat(client, machine, path).await?);
    Ok(matches!(there, Found::Itself(Kind::Directory) | Found::Link(Kind::Directory)).then_some(()))
}

/// The name that a copy of this path has.
fn own_name(path: &Path) -> Result<OsString> {
    if let Some(name) = path.file_name() {
        return Ok(name.to_owned());
    }
    let real = path.canonicalize().map_err(|e| Error::io("find", path, e))?;
    real.file_name()
        .map(ToOwned::to_owned)
        .ok_or_else(|| Error::usage("the root directory cannot be copied under a name"))
}

/// Unpacks a tar stream from standard input.
pub(super) async fn stream(context: &Context, client: &Client, machine: &str, directory: &str) -> Result<Copied> {
    let machine = client.get::<Machine>(&machine_path(machine)).await?.id;
    let mut activity = context.printer.short_activity("vm cp");
    activity.stage("copying");
    let copy = |sink: &mut Sink| {
        std::io::copy(&mut std::io::stdin().lock(), sink)
            .map(|_| ())
            .map_err(|e| {
                if e.kind() == std::io::ErrorKind::BrokenPipe {
                    aborted()
                } else {
                    Error::failed(format!("cannot read standard input: {}", crate::error::reason(&e)))
                }
            })
    };
    Ok(put(client, &machine, directory, 0, &mut activity, copy).await?.into())
}
