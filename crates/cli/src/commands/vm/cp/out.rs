//! Out of a machine, onto the host.

use std::io::Read;
use std::path::{Path, PathBuf};

use banger_proto::api::Machine;
use bytes::{Buf, Bytes};
use http_body_util::BodyExt;
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::{Copied, guest_path, means_content, means_directory, notice, refused, split, stat};
use crate::cli::Context;
use crate::client::{Client, encode, machine_path};
use crate::error::{Error, Kind, Result};
use crate::files::extract::{Report, Top, extract};
use crate::files::place::{self, Found, Place, Source, place, place_named};
use crate::signals::Signals;

/// Opens a source in a machine, with the id of that.
async fn open(client: &Client, machine: &str, path: &str) -> Result<(String, hyper::body::Incoming)> {
    let machine = client.get::<Machine>(&machine_path(machine)).await?.id;
    let body = client
        .stream(&format!("{}/files?path={}", machine_path(&machine), encode(path)))
        .await?;
    Ok((machine, body))
}

/// What the source in the machine is, and its path with all links followed.
async fn source(client: &Client, machine: &str, path: &str) -> Result<(Source, String)> {
    let named = guest_path(path)?;
    let there = stat(client, machine, &named).await?;
    let wrong = |kind, why: &str| Err(Error::new(kind, format!("{named} in the machine {why}")));
    let (kind, real) = match (super::found(&there), there.target) {
        (Found::Nothing, _) => return wrong(Kind::NotFound, "does not exist"),
        (Found::Dangling, _) | (Found::Link(_), None) => return wrong(Kind::NotFound, "is a link that leads nowhere"),
        (Found::Itself(kind), _) => (kind, named.clone()),
        (Found::Link(kind), Some(target)) => (kind, target.path),
    };
    let source = match kind {
        place::Kind::Special => return wrong(Kind::Usage, "is neither file nor directory"),
        place::Kind::File if means_directory(path) => return wrong(Kind::Conflict, "is not a directory"),
        place::Kind::File => Source::File,
        place::Kind::Directory if means_content(path) || named == "/" => Source::Content,
        place::Kind::Directory => Source::Directory,
    };
    Ok((source, real))
}

/// What stands at a path of this host.
fn found_here(path: &Path) -> Result<Found> {
    use std::io::ErrorKind as E;
    let kind = |meta: &std::fs::Metadata| match (meta.is_dir(), meta.is_file()) {
        (true, _) => place::Kind::Directory,
        (_, true) => place::Kind::File,
        _ => place::Kind::Special,
    };
    let error = |e| Error::io("look at", path, e);
    match path.symlink_metadata() {
        Ok(meta) if meta.is_symlink() => match path.metadata() {
            Ok(meta) => Ok(Found::Link(kind(&meta))),
            Err(e)
                if matches!(e.kind(), E::NotFound | E::NotADirectory)
                    || Errno::from_io_error(&e) == Some(Errno::LOOP) =>
            {
                Ok(Found::Dangling)
            }
            Err(e) => Err(error(e)),
        },
        Ok(meta) => Ok(Found::Itself(kind(&meta))),
        Err(e) if matches!(e.kind(), E::NotFound | E::NotADirectory) => Ok(Found::Nothing),
        Err(e) => Err(error(e)),
    }
}

/// The directory that the copy is made in, and the name of its top there. A link that the user named is followed, no other.
fn destination(source: Source, name: &str, to: &Path) -> Result<(PathBuf, Top)> {
    let slash = means_directory(&to.to_string_lossy());
    // Without the slash at its end, which would follow a link.
    let to: PathBuf = to.components().collect();
    let shown = |path: &Path| path.display().to_string();
    let apart = |path: &Path| -> Result<(PathBuf, Top)> {
        let name = path
            .file_name()
            .ok_or_else(|| Error::usage(format!("{} is no name for a copy", path.display())))?;
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
        Ok((parent.unwrap_or(Path::new(".")).to_owned(), Top::Named(name.to_owned())))
    };
    let place = place(source, found_here(&to)?, slash).map_err(|refusal| refused(&shown(&to), refusal))?;
    let (directory, top) = match place {
        Place::Into if source == Source::Content => (to, Top::Content),
        Place::Into => {
            let named = to.join(name);
            place_named(source, found_here(&named)?).map_err(|refusal| refused(&shown(&named), refusal))?;
            (to, Top::Named(name.into()))
        }
        Place::As => apart(&to)?,
        Place::Through => apart(&to.canonicalize().map_err(|e| Error::io("find", &to, e))?)?,
    };
    if !directory.is_dir() {
        return Err(Error::new(
            Kind::NotFound,
            format!("there is no directory {}", directory.display()),
        ));
    }
    Ok((directory, top))
}

/// Copies a file or a directory out of a machine.
pub(super) async fn copy(context: &Context, client: &Client, machine: &str, path: &str, to: &Path) -> Result<Copied> {
    let machine = client.get::<Machine>(&machine_path(machine)).await?.id;
    let (source, real) = source(client, &machine, path).await?;
    let named = guest_path(path)?;
    let (directory, top) = destination(source, split(&named).1, to)?;
    let mut activity = context.printer.short_activity("vm cp");
    activity.stage("copying");
    let (_, body) = open(client, &machine, &real).await?;
    let report = receive(body, directory, top, &mut activity).await?;
    drop(activity);
    notice(context, &report.skipped, report.skipped_count);
    Ok(Copied {
        entries: report.entries,
        bytes: report.bytes,
        skipped: report.skipped_count,
    })
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
    // Not before the work's end: what is half written has to go.
    let mut signals = Signals::ending()?;
    loop {
        let frame = tokio::select! {
            frame = body.frame() => frame,
            number = signals.next() => {
                failed = Some(Error::signal(number));
                let _ = sender.send(Err(std::io::ErrorKind::ConnectionAborted.into())).await;
                break;
            }
        };
        let Some(frame) = frame else { break };
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

/// Writes a tar stream to standard output.
pub(super) async fn stream(context: &Context, client: &Client, machine: &str, path: &str) -> Result<()> {
    if context.printer.stdout_is_terminal() {
        return Err(Error::usage("a tar stream does not belong on a terminal")
            .hint("redirect standard output, or pipe it into tar"));
    }
    let (_, mut body) = open(client, machine, path).await?;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Error::unavailable(format!("the stream from the machine broke off: {e}")))?;
        if let Ok(piece) = frame.into_data() {
            context.printer.data(piece)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_was_named_is_followed_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("real")).unwrap();
        std::fs::write(at("file"), "").unwrap();
        for (target, link) in [
            ("real", "to-dir"),
            ("file", "to-file"),
            ("none", "dangling"),
            ("/dev/null", "null"),
            ("loop", "loop"),
        ] {
            std::os::unix::fs::symlink(target, at(link)).unwrap();
        }
        let named = |name: &str| Top::Named(name.into());
        let file = |to: &str| destination(Source::File, "f", &at(to)).map_err(|e| e.kind);
        assert_eq!(file("to-dir"), Ok((at("to-dir"), named("f"))));
        assert_eq!(file("to-dir/"), Ok((at("to-dir"), named("f"))));
        let real = dir.path().canonicalize().unwrap();
        assert_eq!(file("to-file"), Ok((real, named("file"))));
        assert_eq!(file("new"), Ok((dir.path().to_owned(), named("new"))));
        for (to, kind) in [
            ("to-file/", Kind::Conflict),
            ("file/", Kind::Conflict),
            ("dangling", Kind::Conflict),
            ("loop", Kind::Conflict),
            ("null", Kind::Conflict),
            ("new/", Kind::NotFound),
            ("none/new", Kind::NotFound),
            ("file/new", Kind::NotFound),
        ] {
            assert_eq!(file(to), Err(kind), "{to}");
        }
        // What has the source's name in there was not named.
        std::os::unix::fs::symlink("../file", at("real/f")).unwrap();
        std::os::unix::fs::symlink(".", at("real/d")).unwrap();
        assert_eq!(file("to-dir"), Ok((at("to-dir"), named("f"))), "it is replaced");
        assert!(destination(Source::Directory, "d", &at("real")).is_err());
        assert_eq!(
            destination(Source::Content, "d", &at("real")),
            Ok((at("real"), Top::Content))
        );
    }
}
