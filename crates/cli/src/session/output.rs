//! Output of a session: written by a thread of its own, so that a slow reader of ours holds up neither signals nor input.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::{Notify, mpsc, oneshot};

/// Pieces of output that may wait for the writer.
const QUEUE: usize = 16;

/// Which stream a piece belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// Where output goes.
pub(crate) struct Output {
    sender: mpsc::Sender<(Stream, Bytes)>,
    /// Standard output has no reader any more.
    pub(crate) broken: Arc<Notify>,
    done: oneshot::Receiver<()>,
    /// Starts the writer. Many a command says nothing, and then no thread is made.
    start: Option<Box<dyn FnOnce() + Send>>,
}

impl Output {
    /// To our own standard output and standard error.
    pub(crate) fn to_process() -> Self {
        let (mut output, receiver, done) = Self::channel();
        let broken = Arc::clone(&output.broken);
        output.start = Some(Box::new(move || {
            std::thread::spawn(move || {
                write_out(receiver, &broken);
                let _ = done.send(());
            });
        }));
        output
    }

    /// To a channel; what is sent to the last part ends [`Output::finish`].
    pub(crate) fn channel() -> (Self, mpsc::Receiver<(Stream, Bytes)>, oneshot::Sender<()>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (done, wait) = oneshot::channel();
        let output = Self {
            sender,
            broken: Arc::new(Notify::new()),
            done: wait,
            start: None,
        };
        (output, receiver, done)
    }

    /// The queue is full.
    pub(crate) fn is_full(&self) -> bool {
        self.sender.capacity() == 0
    }

    /// Waits until the queue is not full. Cancel safe.
    pub(crate) async fn room(&self) {
        let _ = self.sender.reserve().await;
    }

    /// Queues a piece; there has to be room.
    pub(crate) fn push(&mut self, stream: Stream, bytes: Bytes) {
        if let Some(start) = self.start.take() {
            start();
        }
        let _ = self.sender.try_send((stream, bytes));
    }

    /// Waits until everything is written.
    pub(crate) async fn finish(self) {
        drop(self.sender);
        if self.start.is_none() {
            let _ = self.done.await;
        }
    }
}

fn write_out(mut receiver: mpsc::Receiver<(Stream, Bytes)>, broken: &Notify) {
    let (stdout, stderr) = (std::io::stdout(), std::io::stderr());
    let mut open = true;
    while let Some((stream, bytes)) = receiver.blocking_recv() {
        match stream {
            Stream::Out if open => {
                if write_all(stdout.as_fd(), &bytes).is_err() {
                    open = false;
                    broken.notify_one();
                }
            }
            Stream::Out => {}
            // Who closed standard error does not want it.
            Stream::Err => drop(write_all(stderr.as_fd(), &bytes)),
        }
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                poll(&mut [PollFd::new(&fd, PollFlags::OUT)], None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
