//! Following a long operation of the daemon to its end, with progress.

use std::time::Duration;

use banger_proto::api::{Accepted, Operation, OperationState, ProgressUnit};
use banger_proto::error::ErrorCode;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Serialize;

use crate::cli::Context;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::printer::Activity;
use crate::signals::Signals;

/// Longest line of the event stream.
const MAX_LINE: usize = 1024 * 1024;

/// What an operation does before it does anything; not worth a line.
const QUEUED: &str = "queued";

/// How long a cancelled operation may take to be undone.
const CANCEL_DEADLINE: Duration = Duration::from_secs(10);

/// What becomes of an operation when the one who waits for it is interrupted or gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// It is cancelled and undone.
    Cancels,
    /// It goes on.
    GoesOn,
}

/// Asks for something that takes a while, and follows it to its end with progress under this label.
pub(crate) async fn carry_out(
    context: &Context,
    client: &Client,
    path: &str,
    request: &impl Serialize,
    label: &str,
    leaving: Leaving,
) -> Result<Accepted> {
    // Taken first: an interrupt just behind the request must not leave it unattended.
    let mut signals = Signals::ending()?;
    let mut accepted: Accepted = client.post(path, request).await?;
    accepted.operation = follow_shown(context, client, accepted.operation, label, leaving, &mut signals).await?;
    Ok(accepted)
}

/// Follows an operation that was begun, with progress under this label.
pub(crate) async fn follow_shown(
    context: &Context,
    client: &Client,
    operation: Operation,
    label: &str,
    leaving: Leaving,
    signals: &mut Signals,
) -> Result<Operation> {
    let mut activity = context.printer.activity(label);
    follow(client, operation, leaving, &mut activity, signals).await
}

/// Follows an operation until it ends. An operation that fails comes back as the error it failed with.
pub(crate) async fn follow(
    client: &Client,
    operation: Operation,
    leaving: Leaving,
    activity: &mut Activity<'_>,
    signals: &mut Signals,
) -> Result<Operation> {
    let id = operation.id.clone();
    show(&operation, activity);
    if operation.state != OperationState::Running {
        return finished(operation);
    }
    let cancels = leaving == Leaving::Cancels;
    let mut events = Events::open(client, &id, cancels).await?;
    let mut interrupted: Option<(i32, tokio::time::Instant)> = None;
    let mut reopened = false;
    loop {
        let deadline = interrupted.map(|i| i.1);
        tokio::select! {
            event = events.next() => match event {
                Ok(Some(operation)) => {
                    show(&operation, activity);
                    if operation.state != OperationState::Running {
                        return match interrupted {
                            Some((number, _)) if operation.state != OperationState::Done => Err(Error::signal(number)),
                            _ => finished(operation),
                        };
                    }
                    reopened = false;
                }
                // The stream ended before the operation did: the daemon went away.
                _ if reopened => return Err(gone(&id)),
                _ => {
                    reopened = true;
                    events = Events::open(client, &id, cancels).await.map_err(|e| {
                        if e.is(ErrorCode::NotFound) { gone(&id) } else { e }
                    })?;
                }
            },
            number = signals.next(), if interrupted.is_none() => {
                if leaving == Leaving::GoesOn {
                    return Err(Error::signal(number).hint("what was begun goes on in the daemon"));
                }
                activity.stage("cancelling");
                let canceled = client.sibling().delete_only(&format!("operations/{id}")).await;
                if canceled.is_err() {
                    // Dropping the stream cancels just as well.
                    return Err(Error::signal(number));
                }
                interrupted = Some((number, tokio::time::Instant::now() + CANCEL_DEADLINE));
            }
            () = tokio::time::sleep_until(deadline.unwrap_or_else(tokio::time::Instant::now)), if deadline.is_some() => {
                let number = interrupted.map_or(crate::signals::INT, |i| i.0);
                return Err(Error::signal(number)
                    .hint(format!("undoing {id} takes longer than {} s; it goes on in the daemon", CANCEL_DEADLINE.as_secs())));
            }
        }
    }
}

fn finished(operation: Operation) -> Result<Operation> {
    match operation.state {
        OperationState::Done | OperationState::Running => Ok(operation),
        OperationState::Failed | OperationState::Canceled => {
            let id = operation.id;
            let mut error = match operation.error {
                Some(error) => Error::from(error),
                None if operation.state == OperationState::Canceled => Error::from(banger_proto::error::ApiError::new(
                    ErrorCode::Canceled,
                    format!("{} of {} was cancelled", operation.kind, operation.target),
                )),
                None => Error::failed(format!("{} of {} failed", operation.kind, operation.target)),
            };
            error.operation.get_or_insert(id);
            Err(error)
        }
    }
}

fn gone(id: &str) -> Error {
    Error::unavailable(format!("the daemon ended while {id} was under way"))
        .hint("see `banger vm list` for how far it came")
}

fn show(operation: &Operation, activity: &mut Activity<'_>) {
    if operation.stage != QUEUED {
        activity.stage(&operation.stage);
    }
    if let Some(progress) = operation.progress {
        match progress.unit {
            ProgressUnit::Bytes => activity.bytes(progress.done, progress.total),
            ProgressUnit::Items => activity.items(progress.done, progress.total),
        }
    }
}

struct Events {
    body: Incoming,
    lines: Lines,
}

impl Events {
    async fn open(client: &Client, id: &str, cancels: bool) -> Result<Self> {
        let path = format!("operations/{id}/events?cancel_on_disconnect={cancels}");
        // A connection of its own: the client's must stay free for what happens meanwhile.
        Ok(Self {
            body: client.stream(&path).await?,
            lines: Lines::default(),
        })
    }

    /// The next snapshot, nothing at the end of the stream.
    async fn next(&mut self) -> Result<Option<Operation>> {
        loop {
            if let Some(line) = self.lines.next() {
                if line.trim_ascii().is_empty() {
                    continue;
                }
                let operation = serde_json::from_slice(&line)
                    .map_err(|e| Error::failed(format!("an event of the daemon was not understood: {e}")))?;
                return Ok(Some(operation));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(Error::unavailable(format!("the event stream broke off: {error}"))),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.lines.push(&data)?;
                    }
                }
            }
        }
    }
}

/// Cuts a stream into lines of bounded length.
#[derive(Debug, Default)]
struct Lines {
    buffer: Vec<u8>,
}

impl Lines {
    fn push(&mut self, bytes: &Bytes) -> Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() > MAX_LINE && !self.buffer.contains(&b'\n') {
            return Err(Error::failed("an event of the daemon is too long"));
        }
        Ok(())
    }

    fn next(&mut self) -> Option<Vec<u8>> {
        let end = self.buffer.iter().position(|&b| b == b'\n')?;
        let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
        line.pop();
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole() {
        let mut lines = Lines::default();
        lines.push(&Bytes::from_static(b"ab")).unwrap();
        assert_eq!(lines.next(), None);
        lines.push(&Bytes::from_static(b"c\n\nx")).unwrap();
        assert_eq!(lines.next().unwrap(), b"abc");
        assert_eq!(lines.next().unwrap(), b"");
        assert_eq!(lines.next(), None);
    }

    #[test]
    fn a_failed_operation_is_its_error() {
        let operation = Operation {
            id: "op-1".into(),
            kind: "machine.create".into(),
            target: "a".into(),
            state: OperationState::Failed,
            stage: String::new(),
            progress: None,
            error: None,
            started_at: String::new(),
            ended_at: None,
            unchanged: false,
        };
        let error = finished(operation.clone()).unwrap_err();
        assert_eq!(
            (error.message.as_str(), error.operation.as_deref()),
            ("machine.create of a failed", Some("op-1"))
        );
        let canceled = finished(Operation {
            state: OperationState::Canceled,
            ..operation
        })
        .unwrap_err();
        assert_eq!(canceled.kind.status(), 130);
    }
}
