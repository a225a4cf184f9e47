//! Output of a session: written by a thread of its own, so that a slow reader of ours holds up neither signals nor input.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::error::Result;
use crate::printer::output_error;

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
    /// Standard output has no reader any more, or some output could not be written.
    pub(crate) broken: Arc<Notify>,
    /// Why some output could not be written. A reader that went away is no reason.
    pub(crate) failure: Arc<OnceLock<Errno>>,
    done: oneshot::Receiver<()>,
    /// Starts the writer. Many a command says nothing, and then no thread is made.
    start: Option<Box<dyn FnOnce() + Send>>,
}

impl Output {
    /// To our own standard output and standard error.
    pub(crate) fn to_process() -> Self {
        let (mut output, receiver, done) = Self::channel();
        let (broken, failure) = (Arc::clone(&output.broken), Arc::clone(&output.failure));
        output.start = Some(Box::new(move || {
            std::thread::spawn(move || {
                let (stdout, stderr) = (std::io::stdout(), std::io::stderr());
                write_out(receiver, stdout.as_fd(), stderr.as_fd(), &broken, &failure);
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
            failure: Arc::default(),
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

    /// Waits until everything is written, and says if something could not be.
    pub(crate) async fn finish(self) -> Result<()> {
        drop(self.sender);
        if self.start.is_none() {
            let _ = self.done.await;
        }
        match self.failure.get() {
            Some(&errno) => Err(output_error(&errno.into())),
            None => Ok(()),
        }
    }
}

fn write_out(
    mut receiver: mpsc::Receiver<(Stream, Bytes)>,
    stdout: BorrowedFd<'_>,
    stderr: BorrowedFd<'_>,
    broken: &Notify,
    failure: &OnceLock<Errno>,
) {
    let (mut out, mut err) = (Some(stdout), Some(stderr));
    while let Some((stream, bytes)) = receiver.blocking_recv() {
        let fd = match stream {
            Stream::Out => &mut out,
            Stream::Err => &mut err,
        };
        let Some(Err(errno)) = fd.map(|fd| write_all(fd, &bytes)) else {
            continue;
        };
        *fd = None;
        if errno != Errno::PIPE {
            let _ = failure.set(errno);
        }
        // A program goes on whose errors have no reader.
        if errno != Errno::PIPE || stream == Stream::Out {
            broken.notify_one();
        }
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                poll(&mut [PollFd::new(&fd, PollFlags::OUT)], None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::error::Kind;

    async fn written(stdout: &OwnedFd, stderr: &OwnedFd) -> (Result<()>, bool) {
        let (mut output, receiver, done) = Output::channel();
        output.push(Stream::Out, Bytes::from_static(b"out"));
        output.push(Stream::Err, Bytes::from_static(b"err"));
        let (broken, failure) = (Arc::clone(&output.broken), Arc::clone(&output.failure));
        let (stdout, stderr) = (stdout.try_clone().unwrap(), stderr.try_clone().unwrap());
        let told = Arc::clone(&broken);
        let writer = tokio::task::spawn_blocking(move || {
            write_out(receiver, stdout.as_fd(), stderr.as_fd(), &broken, &failure);
            done.send(()).unwrap();
        });
        let result = output.finish().await;
        writer.await.unwrap();
        let told = tokio::time::timeout(std::time::Duration::ZERO, told.notified()).await;
        (result, told.is_ok())
    }

    #[tokio::test]
    async fn only_a_reader_that_is_gone_is_no_failure() {
        let open = |path| OwnedFd::from(std::fs::OpenOptions::new().write(true).open(path).unwrap());
        let (null, full) = (open("/dev/null"), open("/dev/full"));
        let (reader, gone) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        drop(reader);
        let kind = |result: Result<()>| result.map_err(|e| e.kind);
        for (stdout, stderr, expected, told) in [
            (&null, &null, Ok(()), false),
            (&gone, &null, Ok(()), true),
            (&null, &gone, Ok(()), false),
            (&full, &null, Err(Kind::NoSpace), true),
            (&null, &full, Err(Kind::NoSpace), true),
            (&gone, &full, Err(Kind::NoSpace), true),
        ] {
            let (result, was_told) = written(stdout, stderr).await;
            assert_eq!((kind(result), was_told), (expected, told));
        }
    }
}
