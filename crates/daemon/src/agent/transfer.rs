//! Transfers of any length, which have no deadline as a whole: they end when the agent makes no progress.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::link::{Body, BodyError, LinkError};

/// Whose turn it is in an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// The client's: there is nothing for the agent to take.
    Client,
    /// The agent's since this moment: to take what is there or, at the end, to answer.
    Agent(Instant),
}

/// How far an upload is.
#[derive(Debug, Clone)]
pub(super) struct Progress(Arc<Mutex<Turn>>);

impl Progress {
    /// Of an upload that begins now.
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Turn::Agent(Instant::now()))))
    }

    fn set(&self, turn: Turn) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = turn;
    }

    fn turn(&self) -> Turn {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it has been the agent's turn for so long.
    pub(super) async fn stalled(&self, within: Duration) {
        loop {
            let due = match self.turn() {
                Turn::Agent(since) => since + within,
                Turn::Client => Instant::now() + within,
            };
            if due <= Instant::now() {
                return;
            }
            sleep_until(due).await;
        }
    }
}

/// The body of an upload, which notes whose turn it is. The connection asks for more only when the agent has room for it.
pub(super) struct Upload<B> {
    pub(super) body: B,
    pub(super) progress: Progress,
}

impl<B> HttpBody for Upload<B>
where
    B: HttpBody<Data = Bytes, Error = BodyError> + Unpin,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        self.progress.set(match polled {
            Poll::Pending => Turn::Client,
            Poll::Ready(_) => Turn::Agent(Instant::now()),
        });
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of a download, which breaks off when the agent sends nothing for so long while it is asked to.
pub struct Download {
    body: Incoming,
    what: &'static str,
    within: Duration,
    /// Runs while the agent is waited for.
    wait: Option<Pin<Box<Sleep>>>,
}

impl Download {
    /// Of what this request is answered with.
    pub(super) fn new(body: Incoming, what: &'static str, within: Duration) -> Self {
        Self {
            body,
            what,
            within,
            wait: None,
        }
    }
}

impl HttpBody for Download {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            self.wait = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let (what, within) = (self.what, self.within);
        let wait = self.wait.get_or_insert_with(|| Box::pin(tokio::time::sleep(within)));
        wait.as_mut().poll(cx).map(|()| {
            let error = LinkError::Timeout {
                what: format!("send more of its answer to {what}"),
                after: within,
            };
            tracing::info!(error = %error, "a transfer is broken off");
            Some(Err(error.into()))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// A body of which this is the progress.
pub(super) fn watched(body: Body, progress: &Progress) -> Body {
    Body::new(Upload {
        body,
        progress: progress.clone(),
    })
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt, StreamBody};
    use tokio::sync::mpsc;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn only_the_agents_turn_counts() {
        const WITHIN: Duration = Duration::from_millis(80);
        let (send, receive) = mpsc::channel::<Bytes>(4);
        let stream = futures_util::stream::unfold(receive, |mut r| async move {
            r.recv().await.map(|b| (Ok::<_, BodyError>(Frame::data(b)), r))
        });
        let progress = Progress::new();
        let mut body = watched(Body::new(StreamBody::new(Box::pin(stream))), &progress);
        // The connection has asked, and the client is silent: nobody is blamed however long that is.
        let asked = timeout(WITHIN, body.frame()).await;
        assert!(asked.is_err());
        assert!(timeout(3 * WITHIN, progress.stalled(WITHIN)).await.is_err());
        // There is a piece, and the connection does not ask for the next.
        send.send(Bytes::from_static(b"x")).await.unwrap();
        body.frame().await.unwrap().unwrap();
        timeout(5 * WITHIN, progress.stalled(WITHIN)).await.unwrap();
        // All of it is sent, and no answer comes.
        drop(send);
        assert!(body.frame().await.is_none());
        timeout(5 * WITHIN, progress.stalled(WITHIN)).await.unwrap();
    }
}
