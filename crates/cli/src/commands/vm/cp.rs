//! `banger vm cp`.

use banger_proto::agent::Stat;
use banger_proto::api::FilesWritten;
use clap::Args;
use serde::Serialize;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::{Client, encode, machine_path};
use crate::error::{self, Error, Result};
use crate::files::place::{Found, Kind, Refusal};
use crate::printer::clean;

mod into;
mod out;

/// Copy files between this host and a machine
///
/// One side is MACHINE:PATH; a relative path there starts at /root. Destinations are treated as `cp -r` treats them: where the
/// destination is a directory, or a link to one, the copy goes into it, else it gets that name. A name that ends in a slash is a
/// directory. DIR/. means the content of a directory. A source that is a link means what it leads to. `-` is a tar stream on
/// standard input or output.
///
/// Permissions, times of change, holes of sparse files and hard links are kept. A file replaces an old one in one step when it is
/// complete: a copy that fails leaves the old file as it was. Directories that are there keep their permissions and times.
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
                    into::copy(context, &client, &from, &machine, &path).await.map(Some)
                }
                (Side::Stream, Side::Machine { machine, path }) => {
                    into::stream(context, &client, &machine, &guest_path(&path)?)
                        .await
                        .map(Some)
                }
                (Side::Machine { machine, path }, Side::Host(to)) => {
                    let to = context.places.expand(&to)?;
                    out::copy(context, &client, &machine, &path, &to).await.map(Some)
                }
                (Side::Machine { machine, path }, Side::Stream) => {
                    out::stream(context, &client, &machine, &guest_path(&path)?)
                        .await
                        .map(|()| None)
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

/// An absolute path in the guest. A trailing `/.` or `/` is gone; `..` stays, as only the guest knows where that leads.
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
    let parts: Vec<&str> = whole.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    Ok(format!("/{}", parts.join("/")))
}

/// The content of the directory is meant, not the directory: one that is named `.` or `..` has no name for a copy.
fn means_content(path: &str) -> bool {
    let path = path.trim_end_matches('/');
    matches!(path, "." | "..") || path.ends_with("/.") || path.ends_with("/..")
}

/// A directory is meant.
fn means_directory(path: &str) -> bool {
    path.ends_with('/') || means_content(path)
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

/// What was found in the guest.
fn found(stat: &Stat) -> Found {
    let kind = |kind: &str| match kind {
        "file" => Kind::File,
        "dir" => Kind::Directory,
        _ => Kind::Special,
    };
    match (stat.kind.as_str(), &stat.target) {
        ("missing", _) => Found::Nothing,
        ("symlink", Some(target)) => Found::Link(kind(&target.kind)),
        ("symlink", None) => Found::Dangling,
        (itself, _) => Found::Itself(kind(itself)),
    }
}

/// The error for a destination that does not fit.
fn refused(what: &str, refusal: Refusal) -> Error {
    let kind = match refusal {
        Refusal::NoDirectory => error::Kind::NotFound,
        _ => error::Kind::Conflict,
    };
    let error = Error::new(kind, format!("{what} {}", refusal.why()));
    match refusal {
        Refusal::NoDirectory | Refusal::NotADirectory => error.hint("a name that ends in a slash means a directory"),
        Refusal::IsADirectory => error.hint("nothing replaces a directory; remove it first"),
        Refusal::Dangling => error.hint("remove the link, or make what it leads to"),
        Refusal::Special => error.hint("`-` as the destination writes a tar stream to standard output"),
    }
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
            ("../etc/./x", "/root/../etc/x"),
            ("/", "/"),
            ("/a//b/./c", "/a/b/c"),
        ] {
            assert_eq!(guest_path(path).unwrap(), normal, "{path}");
        }
        assert_eq!(split("/etc"), ("/", "etc"));
        assert_eq!(split("/a/b"), ("/a", "b"));
        assert!(means_content("out/.") && means_content(".") && means_content("a/../") && !means_content("out"));
        assert!(means_directory("out/") && means_directory("..") && !means_directory("a..") && !means_directory("out"));
    }
}
