//! `banger internal ssh-proxy`: bytes between ssh and the sshd of a machine.

use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;

use crate::cli::Context;
use crate::client::{Client, machine_path};
use crate::error::{Error, Result};
use crate::session::input::read_stdin;
use crate::session::output::{Output, Stream};

/// Largest message from the daemon.
const MAX_MESSAGE: usize = 4 * 1024 * 1024;

/// The reference in what ssh calls the host: `NAME.vm`, or what `banger vm ssh` passes.
pub(crate) fn reference(host: &str) -> &str {
    host.strip_suffix(".vm").unwrap_or(host)
}

/// Connects standard input and output with the sshd of a machine until either end is done.
pub(crate) fn run(context: &Context, host: &str) -> Result<u8> {
    context.block_on(async {
        let client = Client::new(&context.places)?;
        let path = format!("{}/connect?target=sshd", machine_path(reference(host)));
        let socket = client.websocket(&path, MAX_MESSAGE).await?;
        let (mut sink, mut frames) = socket.split();
        let mut input = read_stdin();
        let mut output = Output::to_process();
        let broken = std::sync::Arc::clone(&output.broken);
        let send = async {
            while let Some(piece) = input.recv().await {
                sink.send(Message::Binary(piece)).await?;
            }
            sink.close().await
        };
        let receive = async {
            while let Some(message) = frames.next().await {
                match message {
                    Ok(Message::Binary(bytes)) => {
                        output.room().await;
                        output.push(Stream::Out, bytes);
                    }
                    // A close with a reason is a refusal: there is no sshd, or the machine is not running.
                    Ok(Message::Close(Some(close))) if !close.reason.is_empty() => {
                        let machine = reference(host);
                        return Err(Error::failed(close.reason.as_str().to_owned()).hint(format!(
                            "`banger vm shell {machine}` needs nothing in the machine but a shell"
                        )));
                    }
                    Ok(Message::Close(_)) => return Ok(()),
                    Ok(_) => {}
                    Err(error) => return Err(lost(&error)),
                }
            }
            Ok(())
        };
        let ended = tokio::select! {
            ended = receive => ended,
            // ssh has nothing more to say; what is on its way to it is of no interest any more.
            ended = send => ended.map_err(|e| lost(&e)),
            () = broken.notified() => Ok(()),
        };
        let written = output.finish().await;
        ended.and(written).map(|()| 0)
    })
}

fn lost(error: &tokio_tungstenite::tungstenite::Error) -> Error {
    Error::unavailable(format!("the connection to the machine was lost: {error}"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_host_is_the_machine() {
        for (host, machine) in [
            ("build.vm", "build"),
            ("0123456789abcdef", "0123456789abcdef"),
            ("vm", "vm"),
        ] {
            assert_eq!(super::reference(host), machine);
        }
    }
}
