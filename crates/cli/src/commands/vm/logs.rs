//! `banger vm logs`.

use clap::Args;
use http_body_util::BodyExt;
use hyper::body::Incoming;

use crate::cli::Context;
use crate::client::{Client, machine_path};
use crate::completion;
use crate::error::{Error, Result};

/// Show the console of a machine: its kernel and its start-up
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger vm logs build\n  banger vm logs build -f --tail 50")]
pub(crate) struct LogsArgs {
    /// Machine by name, id or unambiguous prefix
    #[arg(add = completion::machines())]
    machine: String,
    /// Go on as the console does
    #[arg(short, long)]
    follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<u64>,
}

impl LogsArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        context.block_on(async {
            let client = Client::new(&context.places)?;
            let mut path = format!("{}/logs?follow={}", machine_path(&self.machine), self.follow);
            if let Some(tail) = self.tail {
                path.push_str(&format!("&tail={tail}"));
            }
            copy(context, client.stream(&path).await?).await?;
            Ok(0)
        })
    }
}

/// Copies a text stream to standard output. On a terminal without what could drive it.
pub(crate) async fn copy(context: &Context, mut body: Incoming) -> Result<()> {
    let harmless = context.printer.stdout_is_terminal();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Error::unavailable(format!("the stream broke off: {e}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if harmless {
            context.printer.data(defuse(&data))?;
        } else {
            context.printer.data(&data)?;
        }
    }
    Ok(())
}

/// Takes out every control byte but line feed and tab. Bytes above 0x7f stay: they are parts of characters.
fn defuse(bytes: &[u8]) -> Vec<u8> {
    bytes
        .iter()
        .copied()
        .filter(|&b| matches!(b, b'\n' | b'\t') || (b >= 0x20 && b != 0x7f))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_cannot_drive_the_terminal() {
        assert_eq!(
            defuse("a\x1b]0;title\x07b\r\n\tü".as_bytes()),
            "a]0;titleb\n\tü".as_bytes()
        );
    }
}
