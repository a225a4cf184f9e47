//! A command that does nothing, run beside what a copy is told when it wakes.
//!
//! An engine that emulates translates code when it is first run, and a copy's engine begins with nothing translated. The first command
//! takes a copy as long as everything before it, nearly all of it for code that is run for the first time: the kernel's way to start a
//! program and the agent's. So a copy with a second processor runs a command there while the first one takes on the identity.
//!
//! The command is the agent itself, which ends at once: nothing of the image runs before the copy is itself. Its session is in a table of
//! its own, which nobody else sees.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use banger_proto::frame::{Frame, Kind, Open};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};

use crate::console::say;
use crate::session::attach;
use crate::session::table::Sessions;

/// The word that makes the program do nothing.
pub const NOTHING: &str = "nothing";

/// How long it may take; nobody waits for it.
const WITHIN: Duration = Duration::from_secs(20);

/// Whether there is a processor to do it on.
pub(crate) fn possible() -> bool {
    std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1)
}

/// Begins it, in a thread of its own.
pub(crate) fn begin() {
    let begun = std::thread::Builder::new().spawn(|| {
        if let Err(e) = run() {
            say(&format!("the rehearsal failed: {e}"));
        }
    });
    if let Err(e) = begun {
        say(&format!("no rehearsal: {e}"));
    }
}

fn run() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // What comes of it is no matter.
        let _ = tokio::time::timeout(WITHIN, command().collect()).await;
    });
    Ok(())
}

/// A session as a client asks for it, from its first frame to its last.
fn command() -> attach::SessionBody {
    let open = Open {
        command: vec!["/proc/self/exe".to_owned(), NOTHING.to_owned()],
        ..Open::default()
    };
    let mut frames = Frame::json(Kind::Open, &open).encode();
    frames.extend(Frame::new(Kind::Go, []).encode());
    let sessions = Arc::new(Sessions::new(PathBuf::from("/etc")));
    attach::serve(sessions, "rehearsal".to_owned(), Full::new(Bytes::from(frames)))
}

#[cfg(test)]
mod tests {
    use banger_proto::frame::{Decoder, Exit};

    use super::*;

    #[tokio::test]
    async fn a_command_runs_from_its_first_frame_to_its_last() {
        // The program of a test takes the word for the name of a test that it does not have, and ends well.
        let told = tokio::time::timeout(WITHIN, command().collect())
            .await
            .unwrap()
            .unwrap();
        let mut decoder = Decoder::new();
        decoder.push(&told.to_bytes());
        let mut last = None;
        while let Some(frame) = decoder.next_frame().unwrap() {
            last = Some(frame);
        }
        let last = last.unwrap();
        assert_eq!(last.kind, Kind::Exit);
        assert_eq!(last.parse::<Exit>().unwrap().code, 0);
    }
}
