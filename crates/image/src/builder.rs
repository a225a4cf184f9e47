//! Bootstrapping for a daemon that may not do it itself.
//!
//! The tool that bootstraps an image without root starts programs with special rights (`newuidmap`), which the daemon of system mode must
//! not: its unit has `NoNewPrivileges`. So systemd starts [`serve`] for it, in a unit of its own, for every connection to a socket that
//! only the owner may open. The closed list of what can be asked for are the names of [`crate::recipe::RECIPES`]: a daemon that was
//! taken over gets an image built, nothing more. The tar stream and the tool's messages go to descriptors that come along.
//!
//! ```text
//! daemon ── bangerd --ask-builder NAME ──socket──▶ systemd ── bangerd --builder ── mmdebstrap
//!    ▲            (its pipes) ────────────────────────────────────▶ tar, messages │
//!    └─────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! When the asking end goes away, the tool is ended.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

use crate::build::{Scratch, prepare};
use crate::error::Result;
use crate::process::Run;
use crate::recipe::{RECIPES, Recipe};

/// Names the socket, in the environment of a daemon that has to ask.
pub const SOCKET: &str = "BANGER_BUILDER";
/// The option of the daemon's program with which it asks: `--ask-builder NAME`.
pub const ASK: &str = "--ask-builder";
/// Longest name of a recipe, with its line feed.
const MAX_NAME: usize = 64;
/// What is answered at the end.
const DONE: u8 = b'0';
/// See [`DONE`].
const FAILED: u8 = b'1';

/// The socket, where this process has to ask.
pub fn socket() -> Option<PathBuf> {
    std::env::var_os(SOCKET).map(PathBuf::from).filter(|p| p.is_absolute())
}

/// A run of the program that asks: this one. Its output is the tool's.
pub(crate) fn asking(recipe: &Recipe, socket: &Path, deadline: std::time::Duration) -> Run {
    // Also after an update has replaced it.
    Run::of(Path::new("/proc/self/exe"), deadline)
        .args([ASK, recipe.name])
        .env(SOCKET, socket)
}

/// Asks for the root file system of a recipe, which goes to our standard output, and the tool's messages to standard error. Words for a
/// person when it could not be done.
pub fn ask(socket: &Path, recipe: &str) -> std::result::Result<(), String> {
    let failed = |e: io::Error| format!("cannot have an image built through {}: {e}", socket.display());
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    let (stdout, stderr) = (io::stdout(), io::stderr());
    let descriptors = [stdout.as_fd(), stderr.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    let line = format!("{recipe}\n");
    let sent = rustix::net::sendmsg(
        &stream,
        &[IoSlice::new(line.as_bytes())],
        &mut control,
        SendFlags::NOSIGNAL,
    );
    if sent.map_err(|e| failed(e.into()))? != line.len() {
        return Err(failed(io::ErrorKind::WriteZero.into()));
    }
    let mut answer = [0];
    stream.read_exact(&mut answer).map_err(failed)?;
    if answer == [DONE] {
        Ok(())
    } else {
        Err(format!("the image `{recipe}` could not be bootstrapped"))
    }
}

/// Does what is asked for on a connection, and answers.
pub async fn serve(stream: UnixStream) -> io::Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(&stream)?.uid;
    if peer != rustix::process::geteuid() && !peer.is_root() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let (name, out, mut err) = receive(&stream)?;
    let Some(recipe) = RECIPES.iter().find(|r| r.name == name) else {
        let _ = writeln!(err, "there is no recipe `{}`", name.escape_default());
        return answer(stream, FAILED);
    };
    let mut words = err.try_clone()?;
    let watched = stream.try_clone()?;
    let work = async move { bootstrap(recipe, out, err).await };
    let outcome = tokio::select! {
        outcome = work => outcome,
        // What it was doing is ended by being dropped.
        () = gone(watched) => return Ok(()),
    };
    match outcome {
        Ok(()) => answer(stream, DONE),
        Err(error) => {
            // The tool's own messages are there already.
            let _ = writeln!(words, "{error}");
            answer(stream, FAILED)
        }
    }
}

async fn bootstrap(recipe: &'static Recipe, mut out: File, mut err: File) -> Result<()> {
    let scratch = Scratch::outside()?;
    let run = prepare(recipe, &scratch).await?.hold(scratch);
    run.stream(
        move |line| {
            let _ = writeln!(err, "{line}");
        },
        move |mut stdout| {
            io::copy(&mut stdout, &mut out).map_err(|e| crate::error::Error::io("pass the root file system on", e))?;
            Ok(())
        },
    )
    .await
}

fn answer(mut stream: UnixStream, word: u8) -> io::Result<()> {
    stream.write_all(&[word])
}

/// Comes back when the other end is gone.
async fn gone(stream: UnixStream) {
    let watch = move || {
        let mut byte = [0];
        while matches!((&stream).read(&mut byte), Ok(n) if n > 0) {}
    };
    let _ = tokio::task::spawn_blocking(watch).await;
}

fn receive(stream: &UnixStream) -> io::Result<(String, File, File)> {
    let mut bytes = [0; MAX_NAME];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::net::recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut files = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .map(|fd: OwnedFd| File::from(fd));
    let name = bytes
        .get(..got.bytes)
        .and_then(|b| b.strip_suffix(b"\n"))
        .and_then(|b| std::str::from_utf8(b).ok());
    match (name, files.next(), files.next()) {
        (Some(name), Some(out), Some(err)) => Ok((name.to_owned(), out, err)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a builder answers to this, and what it says.
    fn asked(line: &[u8], descriptors: bool) -> (io::Result<()>, Vec<u8>, String) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let said = dir.path().join("said");
        let out = File::create(&said).unwrap();
        let fds = [out.as_fd(), out.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if descriptors {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        rustix::net::sendmsg(&ours, &[IoSlice::new(line)], &mut control, SendFlags::empty()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let outcome = runtime.block_on(serve(theirs));
        let mut answer = Vec::new();
        // Closed with bytes unread is a reset.
        let _ = (&ours).read_to_end(&mut answer);
        (outcome, answer, std::fs::read_to_string(said).unwrap())
    }

    #[test]
    fn only_recipes_can_be_asked_for() {
        for name in ["", "debian; id", "../debian", "--setup-hook=id", "Debian"] {
            let (outcome, answer, said) = asked(format!("{name}\n").as_bytes(), true);
            assert!(outcome.is_ok() && answer == [FAILED], "{name}");
            assert!(said.contains("no recipe"), "{name} {said}");
        }
        assert!(asked(b"debian", true).0.is_err(), "unfinished");
        assert!(asked(&[b'x'; 200], true).0.is_err(), "too long");
        assert!(asked(b"debian\n", false).0.is_err(), "without descriptors");
    }

    #[test]
    fn a_builder_that_is_not_there_is_named() {
        let why = ask(Path::new("/nonexistent/build.sock"), "debian").unwrap_err();
        assert!(why.contains("/nonexistent/build.sock"), "{why}");
    }
}
