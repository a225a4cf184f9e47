//! `banger vm cp`.

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

use banger_proto::agent::Stat;
use banger_proto::api::{FilesWritten, Machine};
use bytes::{Buf, Bytes};
use clap::Args;
use http_body_util::BodyExt;
use serde::Serialize;
use tokio::sync::mpsc;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, encode, machine_path};
use crate::error::{Error, Kind, Result};
use crate::files::extract::{Report, Top, extract};
use crate::files::tree;
use crate::files::upload::put;
use crate::printer::clean;

/// How many links in a row are followed for a source in the machine.
const MAX_LINKS: usize = 16;

/// Copy files between this host and a machine
///
/// One side is MACHINE:PATH; a relative path there starts at /root. A directory is copied with everything in it. Where the
/// destination is a directory the copy goes into it, else it gets that name; DIR/. means the content of a directory. `-` is a tar
/// stream on standard input or output.
///
/// What comes from a machine never leaves its destination: links to elsewhere, devices and sockets are left out, with a notice.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  banger vm cp build:/var/log/syslog .\n  banger vm cp ./site build:/srv\n  \
                        banger vm cp build:out/. ./results\n  banger vm cp build:/etc - | tar -t"
)]
pub(crate) struct CpArgs {
    /// Source: PATH, MACHINE:PATH or -
    source: String,
    /// Destination: PATH, MACHINE:PATH or -
    destination: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Side {
    Host(String),
    Machine { machine: String, path: String },
    Stream,
}

impl Side {
    /// A colon behind a name is a machine's, unless a slash, dot or tilde shows that it is a path of this host.
    fn parse(text: &str) -> Self {
        if text == "-" {
            return Self::Stream;
        }
        match text.split_once(':') {
            Some((machine, path)) if !machine.is_empty() && !machine.contains(['/', '.', '~']) => Self::Machine {
                machine: machine.to_owned(),
                path: path.to_owned(),
            },
            _ => Self::Host(text.to_owned()),
        }
    }
}

/// What was copied.
#[derive(Debug, Serialize)]
struct Copied {
    entries: u64,
    bytes: u64,
    skipped: u64,
}

impl From<FilesWritten> for Copied {
    fn from(written: FilesWritten) -> Self {
        Self {
            entries: written.entries,
            bytes: written.bytes,
            skipped: 0,
        }
    }
}

impl CpArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let sides = (Side::parse(&self.source), Side::parse(&self.destination));
        let copied = context.block_on(async {
            let client = Client::new(&context.places)?;
            match sides {
                (Side::Host(from), Side::Machine { machine, path }) => {
                    let from = context.places.expand(&from)?;
                    to_machine(context, &client, &from, &machine, &path).await.map(Some)
                }
                (Side::Stream, Side::Machine { machine, path }) => {
                    stream_in(context, &client, &machine, &guest_path(&path)?)
                        .await
                        .map(Some)
                }
                (Side::Machine { machine, path }, Side::Host(to)) => {
                    let to_path = context.places.expand(&to)?;
                    from_machine(context, &client, &machine, &path, &to_path, to.ends_with('/'))
                        .await
                        .map(Some)
                }
                (Side::Machine { machine, path }, Side::Stream) => {
                    let (_, body) = open(&client, &machine, &guest_path(&path)?).await?;
                    stream_out(context, body).await.map(|()| None)
                }
                (Side::Machine { .. }, Side::Machine { .. }) => Err(Error::usage("both sides are in machines")
                    .hint("copy through here: `banger vm cp A:/x - | banger vm cp - B:/y`")),
                _ => Err(Error::usage("neither side is in a machine").hint("write one side as MACHINE:PATH")),
            }
        })?;
        if let Some(copied) = copied
            && self.output.json()
        {
            context.printer.json(&versioned(copied))?;
        }
        Ok(0)
    }
}

/// A path in the guest, absolute and without `..`; a trailing `/.` or `/` is gone too.
fn guest_path(path: &str) -> Result<String> {
    if path.contains('\0') {
        return Err(Error::usage("the path holds a zero byte"));
    }
    let below = path
        .strip_prefix("~/")
        .or_else(|| (path == "~").then_some(""))
        .unwrap_or(path);
    let whole = if below.starts_with('/') {
        below.to_owned()
    } else {
        format!("/root/{below}")
    };
    let mut parts: Vec<&str> = Vec::new();
    for part in whole.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    Ok(format!("/{}", parts.join("/")))
}

/// The content of the directory is meant, not the directory.
fn means_content(path: &str) -> bool {
    path.ends_with("/.") || path == "."
}

/// Parent and last name of a normalised path in the guest.
fn split(path: &str) -> (&str, &str) {
    match path.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((parent, name)) => (parent, name),
        None => ("/", path),
    }
}

async fn stat(client: &Client, machine: &str, path: &str) -> Result<Stat> {
    client
        .get(&format!("{}/stat?path={}", machine_path(machine), encode(path)))
        .await
}

async fn to_machine(context: &Context, client: &Client, from: &Path, machine: &str, path: &str) -> Result<Copied> {
    let found = std::fs::metadata(from).map_err(|e| {
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
    if !found.is_dir() && !found.is_file() {
        return Err(Error::usage(format!(
            "{} is neither file nor directory",
            from.display()
        )));
    }
    let machine = client.get::<Machine>(&machine_path(machine)).await?.id;
    let to = guest_path(path)?;
    let there = stat(client, &machine, &to).await?;
    let content = found.is_dir() && from.as_os_str().as_encoded_bytes().ends_with(b"/.") || from == Path::new(".");
    let (directory, top) = match there.kind.as_str() {
        "dir" if content => (to.clone(), PathBuf::new()),
        "dir" => (to.clone(), PathBuf::from(own_name(from)?)),
        "missing" => {
            if path.ends_with('/') && !found.is_dir() {
                return Err(Error::new(
                    Kind::NotFound,
                    format!("there is no directory {to} in the machine"),
                ));
            }
            let (parent, name) = split(&to);
            if stat(client, &machine, parent).await?.kind != "dir" {
                return Err(
                    Error::new(Kind::NotFound, format!("there is no directory {parent} in the machine"))
                        .hint("make it first with `banger vm exec … -- mkdir -p`"),
                );
            }
            (parent.to_owned(), PathBuf::from(name))
        }
        kind if found.is_dir() => {
            return Err(Error::new(
                Kind::Conflict,
                format!("{to} in the machine is a {kind}, not a directory"),
            ));
        }
        _ => {
            let (parent, name) = split(&to);
            (parent.to_owned(), PathBuf::from(name))
        }
    };
    let mut activity = context.printer.short_activity("vm cp");
    activity.stage("looking at the files");
    let list = tree::list(from, found.is_dir())?;
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

async fn stream_in(context: &Context, client: &Client, machine: &str, directory: &str) -> Result<Copied> {
    let machine = client.get::<Machine>(&machine_path(machine)).await?.id;
    let mut activity = context.printer.short_activity("vm cp");
    activity.stage("copying");
    let copy = |sink: &mut crate::files::upload::Sink| {
        std::io::copy(&mut std::io::stdin().lock(), sink)
            .map(|_| ())
            .map_err(|e| {
                if e.kind() == std::io::ErrorKind::BrokenPipe {
                    crate::files::upload::aborted()
                } else {
                    Error::failed(format!("cannot read standard input: {}", crate::error::reason(&e)))
                }
            })
    };
    Ok(put(client, &machine, directory, 0, &mut activity, copy).await?.into())
}

/// Opens a source in a machine, with the id of that.
async fn open(client: &Client, machine: &str, path: &str) -> Result<(String, hyper::body::Incoming)> {
    let machine = client.get::<Machine>(&machine_path(machine)).await?.id;
    let body = client
        .stream(&format!("{}/files?path={}", machine_path(&machine), encode(path)))
        .await?;
    Ok((machine, body))
}

async fn from_machine(
    context: &Context,
    client: &Client,
    machine: &str,
    path: &str,
    to: &Path,
    slash: bool,
) -> Result<Copied> {
    let source = guest_path(path)?;
    let (_, name) = split(&source);
    let content = means_content(path) || name.is_empty();
    let (directory, top) = if to.is_dir() {
        (
            to.to_owned(),
            if content { Top::Content } else { Top::Named(name.into()) },
        )
    } else if to.symlink_metadata().is_ok() || !slash {
        // A name for the copy; its directory has to be there.
        let name = to
            .file_name()
            .ok_or_else(|| Error::usage(format!("{} is no name for a copy", to.display())))?;
        let parent = to
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        (parent.to_owned(), Top::Named(name.to_owned()))
    } else {
        return Err(Error::new(
            Kind::NotFound,
            format!("there is no directory {}", to.display()),
        ));
    };
    if !directory.is_dir() {
        return Err(Error::new(
            Kind::NotFound,
            format!("there is no directory {}", directory.display()),
        ));
    }
    let mut source = source;
    let mut activity = context.printer.short_activity("vm cp");
    activity.stage("copying");
    for _ in 0..MAX_LINKS {
        let (_, body) = open(client, machine, &source).await?;
        let report = receive(body, directory.clone(), top.clone(), &mut activity).await?;
        let Some(link) = &report.only_link else {
            drop(activity);
            notice(context, &report.skipped, report.skipped_count);
            return Ok(Copied {
                entries: report.entries,
                bytes: report.bytes,
                skipped: report.skipped_count,
            });
        };
        // What is meant is what the link points to, in the machine.
        let link = String::from_utf8(link.clone())
            .map_err(|_| Error::failed(format!("{source} is a link to no UTF-8 name")))?;
        let (parent, _) = split(&source);
        source = guest_path(&if link.starts_with('/') {
            link
        } else {
            format!("{parent}/{link}")
        })?;
    }
    Err(Error::failed(format!("{path} in the machine is behind too many links")))
}

async fn receive(
    mut body: hyper::body::Incoming,
    directory: PathBuf,
    top: Top,
    activity: &mut crate::printer::Activity<'_>,
) -> Result<Report> {
    let (sender, pieces) = mpsc::channel(8);
    let work = tokio::task::spawn_blocking(move || {
        extract(
            &directory,
            top,
            Pieces {
                pieces,
                current: Bytes::new(),
            },
        )
    });
    let mut done = 0;
    let mut failed = None;
    while let Some(frame) = body.frame().await {
        let piece = match frame {
            Ok(frame) => frame.into_data().unwrap_or_default(),
            Err(error) => {
                failed = Some(Error::unavailable(format!(
                    "the stream from the machine broke off: {error}"
                )));
                let _ = sender.send(Err(std::io::ErrorKind::UnexpectedEof.into())).await;
                break;
            }
        };
        done += piece.len() as u64;
        activity.bytes(done, 0);
        if sender.send(Ok(piece)).await.is_err() {
            // Extraction has ended: at the end mark, or badly, which it will say.
            break;
        }
    }
    drop(sender);
    let report = work
        .await
        .map_err(|e| Error::failed(format!("extraction broke off: {e}")))?;
    match failed {
        Some(error) => Err(error),
        None => report,
    }
}

/// The pieces of a body as a reader.
struct Pieces {
    pieces: mpsc::Receiver<std::io::Result<Bytes>>,
    current: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.current = piece?,
                None => return Ok(0),
            }
        }
        let n = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..n]);
        Ok(n)
    }
}

async fn stream_out(context: &Context, mut body: hyper::body::Incoming) -> Result<()> {
    if context.printer.stdout_is_terminal() {
        return Err(Error::usage("a tar stream does not belong on a terminal")
            .hint("redirect standard output, or pipe it into tar"));
    }
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Error::unavailable(format!("the stream from the machine broke off: {e}")))?;
        if let Ok(piece) = frame.into_data() {
            context.printer.data(piece)?;
        }
    }
    Ok(())
}

fn notice(context: &Context, skipped: &[String], count: u64) {
    const SHOWN: usize = 10;
    if count == 0 {
        return;
    }
    let shown = skipped
        .iter()
        .take(SHOWN)
        .map(|s| clean(s))
        .collect::<Vec<_>>()
        .join(", ");
    let more = count.saturating_sub(SHOWN as u64);
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    context.printer.warn(format!("{count} left out: {shown}{more}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart() {
        let machine = |m: &str, p: &str| Side::Machine {
            machine: m.into(),
            path: p.into(),
        };
        for (text, side) in [
            ("build:/etc", machine("build", "/etc")),
            ("build:", machine("build", "")),
            ("build:a:b", machine("build", "a:b")),
            ("./a:b", Side::Host("./a:b".into())),
            ("/a:b", Side::Host("/a:b".into())),
            ("a.txt:b", Side::Host("a.txt:b".into())),
            ("plain", Side::Host("plain".into())),
            (":x", Side::Host(":x".into())),
            ("-", Side::Stream),
        ] {
            assert_eq!(Side::parse(text), side, "{text}");
        }
    }

    #[test]
    fn guest_paths_are_normal() {
        for (path, normal) in [
            ("/etc/", "/etc"),
            ("out/.", "/root/out"),
            ("", "/root"),
            ("~/x", "/root/x"),
            ("../../../etc", "/etc"),
            ("/", "/"),
            ("/a//b/./c", "/a/b/c"),
        ] {
            assert_eq!(guest_path(path).unwrap(), normal, "{path}");
        }
        assert_eq!(split("/etc"), ("/", "etc"));
        assert_eq!(split("/a/b"), ("/a", "b"));
        assert!(means_content("out/.") && means_content(".") && !means_content("out"));
    }
}
