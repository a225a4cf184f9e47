//! One command in a guest that is about to become a template: what a first command needs of the image is in the guest's page cache
//! then, and in that of every copy.

use std::time::Duration;

use banger_proto::frame::{Decoder, Frame, Kind, Open};
use http_body_util::BodyExt;
use tokio::time::timeout;

use super::call::Call;
use super::calls::full;
use super::link::{Link, LinkError};

/// How long it may take; a template is made without it too.
const WITHIN: Duration = Duration::from_secs(20);
/// What is run: a shell, and a program by it.
const COMMAND: [&str; 3] = ["/bin/sh", "-c", "/bin/true; command -v true"];
/// Most that is read of its output.
const OUTPUT: usize = 64 * 1024;

/// Runs it. A failure is no matter.
pub async fn run(link: &Link) {
    match timeout(WITHIN, session(link)).await {
        Ok(Ok(())) => {}
        Ok(Err(e)) => tracing::debug!(error = %e, "a guest is not warmed up"),
        Err(_) => tracing::debug!("a guest is not warmed up in time"),
    }
}

async fn session(link: &Link) -> Result<(), LinkError> {
    let open = Open {
        command: COMMAND.map(str::to_owned).to_vec(),
        ..Open::default()
    };
    let mut frames = Frame::json(Kind::Open, &open).encode();
    frames.extend(Frame::new(Kind::Go, []).encode());
    let answer = link
        .send(Call::Session, "warm", full(frames), link.connect_by(), WITHIN)
        .await?;
    let mut body = answer.into_body();
    let (mut decoder, mut read) = (Decoder::default(), 0);
    while let Some(Ok(piece)) = body.frame().await {
        let Ok(data) = piece.into_data() else { continue };
        read += data.len();
        decoder.push(&data);
        while let Ok(Some(frame)) = decoder.next_frame() {
            if matches!(frame.kind, Kind::Exit | Kind::Error) {
                return Ok(());
            }
        }
        if read > OUTPUT {
            break;
        }
    }
    Ok(())
}
