//! Signals that end a wait or are passed on to the guest.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::{Error, Result, reason};

/// The numbers on Linux, of those that are passed on.
pub(crate) const HUP: i32 = 1;
/// See [`HUP`].
pub(crate) const INT: i32 = 2;
/// See [`HUP`].
pub(crate) const QUIT: i32 = 3;
/// See [`HUP`].
pub(crate) const USR1: i32 = 10;
/// See [`HUP`].
pub(crate) const USR2: i32 = 12;
/// See [`HUP`].
pub(crate) const PIPE: i32 = 13;
/// See [`HUP`].
pub(crate) const TERM: i32 = 15;
/// See [`HUP`].
pub(crate) const WINCH: i32 = 28;

/// A set of signals that no longer have their default effect, for the rest of the process's life.
#[derive(Debug)]
pub(crate) struct Signals {
    streams: Vec<(i32, Signal)>,
}

impl Signals {
    /// Takes these signals over.
    pub(crate) fn take(numbers: &[i32]) -> Result<Self> {
        let streams = numbers
            .iter()
            .map(|&n| signal(SignalKind::from_raw(n)).map(|s| (n, s)))
            .collect::<Result<_, _>>();
        streams
            .map(|streams| Self { streams })
            .map_err(|e| Error::failed(format!("cannot handle signals: {}", reason(&e))))
    }

    /// Takes over what users and systems end a program with.
    pub(crate) fn ending() -> Result<Self> {
        Self::take(&[INT, TERM, HUP])
    }

    /// The next one. Cancel safe.
    pub(crate) async fn next(&mut self) -> i32 {
        std::future::poll_fn(|context| {
            for (number, stream) in &mut self.streams {
                if let std::task::Poll::Ready(Some(())) = stream.poll_recv(context) {
                    return std::task::Poll::Ready(*number);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}
