//! What only reads is asked again when the daemon goes away before its answer is whole: machines outlive it, and the next one knows them.

use std::time::Duration;

use tokio::time::Instant;

use crate::client::start::START_DEADLINE;
use crate::error::{Error, Result};

/// Pause before a question that was cut off is asked again.
const AGAIN: Duration = Duration::from_millis(20);

/// An answer, or why there is none.
pub(super) type Answer<T> = std::result::Result<T, Cut>;

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Cut {
    /// The daemon went away in the middle. What only reads can be asked again, of the next.
    Lost(Error),
    /// Anything else.
    Told(Error),
}

impl From<Error> for Cut {
    fn from(error: Error) -> Self {
        Self::Told(error)
    }
}

impl From<Cut> for Error {
    fn from(cut: Cut) -> Self {
        match cut {
            Cut::Lost(error) | Cut::Told(error) => error,
        }
    }
}

/// Asks until there is an answer, or a daemon that goes away each time has been given enough chances. An answer that was waited for for
/// long before it was cut off begins a new count.
pub(super) async fn again<T>(ask: impl AsyncFnMut() -> Answer<T>) -> Result<T> {
    within(START_DEADLINE, ask).await
}

async fn within<T>(limit: Duration, mut ask: impl AsyncFnMut() -> Answer<T>) -> Result<T> {
    let mut first: Option<Instant> = None;
    loop {
        let begun = Instant::now();
        let error = match ask().await {
            Err(Cut::Lost(error)) => error,
            other => return Ok(other?),
        };
        if begun.elapsed() >= limit {
            first = None;
        }
        if first.get_or_insert_with(Instant::now).elapsed() >= limit {
            return Err(error);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use serde_json::Value;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use crate::client::Client;
    use crate::error::Kind;

    /// What a daemon that dies at different times has sent by then, and at last one that answers.
    const CUT: [&str; 4] = [
        "",
        "HTTP/1.1 200",
        "HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n{\"a\":",
    ];
    const WHOLE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n{\"a\":1}";

    /// A daemon whose first connections end so, and the number of requests that it has read.
    fn daemon(path: &std::path::Path) -> Arc<AtomicUsize> {
        let listener = UnixListener::bind(path).unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                let number = counted.fetch_add(1, Ordering::SeqCst);
                stream
                    .write_all(CUT.get(number).unwrap_or(&WHOLE).as_bytes())
                    .await
                    .unwrap();
            }
        });
        count
    }

    #[tokio::test]
    async fn what_only_reads_is_asked_until_the_answer_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.sock");
        let count = daemon(&path);
        let client = Client::at(path, false, None);
        assert_eq!(client.get::<Value>("machines").await.unwrap()["a"], 1);
        assert_eq!(count.load(Ordering::SeqCst), CUT.len() + 1);
    }

    #[tokio::test]
    async fn one_that_goes_away_each_time_is_given_up() {
        let mut count = 0;
        let limit = super::AGAIN * 5;
        let asked = super::within(limit, async || -> super::Answer<()> {
            count += 1;
            // Waited for for long, then cut off: as often as it may be.
            if count < 8 {
                tokio::time::sleep(limit).await;
            }
            Err(super::Cut::Lost(crate::error::Error::unavailable("gone")))
        });
        assert_eq!(asked.await.unwrap_err().message, "gone");
        assert!(count > 8, "{count}");
    }

    #[tokio::test]
    async fn what_changes_something_is_asked_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.sock");
        let count = daemon(&path);
        let client = Client::at(path, false, None);
        let error = client.delete::<Value>("machines/m").await.unwrap_err();
        assert_eq!((error.kind, count.load(Ordering::SeqCst)), (Kind::Unavailable, 1));
    }

    #[tokio::test]
    async fn a_stream_is_asked_for_until_it_begins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.sock");
        let count = daemon(&path);
        drop(Client::at(path, false, None).stream("machines/m/logs").await.unwrap());
        assert_eq!(count.load(Ordering::SeqCst), 3, "the third has a head");
    }
}
