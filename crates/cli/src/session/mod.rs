//! Exec sessions: a program in the guest, wired to our own standard streams.
//!
//! The session lives in the guest. When the connection breaks (the daemon was restarted), it is joined again under the same id,
//! output goes on behind the last byte that came, and input that the guest had not taken is sent again.
//!
//! ```text
//! Open, Go ──▶ Opened ──▶ frames … ──▶ Exit
//!    ▲                         │
//!    └─ connect again ◀─ broken┘      at most RECONNECT_DEADLINE
//! ```
//!
//! Each step until the session is open has a deadline, and a signal that ends a program ends the client at once until then. A
//! terminal that is gone ends nothing: the client leaves, the program runs on.
//!
//! `Go` does not wait for `Opened`: that would be one more way to the guest and back before the program starts. A session whose
//! connection broke in between is only ever joined again, so that its program runs at most once.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use banger_proto::api::{Machine, MachineState};
use banger_proto::error::ErrorCode;
use banger_proto::frame::{Exit, Frame, Kind as FrameKind, Open, StdinAck};
use bytes::Bytes;
use futures_util::stream::SplitStream;
use futures_util::{SinkExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;

use crate::client::{Client, WebSocket, machine_path};
use crate::error::{Error, Kind, Result};
use crate::printer::Printer;
use crate::session::input::{DetachKeys, InputLog};
use crate::session::opening::Patience;
use crate::session::output::{Output, Stream};
use crate::session::terminal::Screen;
use crate::session::wire::{Broken, Frames, lost, next, parse, protocol, refused, send, send_signal};
use crate::signals;
use crate::timings::Marks;

pub(crate) mod input;
pub(crate) mod opening;
pub(crate) mod output;
pub(crate) mod run;
pub(crate) mod terminal;
mod wire;

/// How long a broken connection is tried again.
const RECONNECT_DEADLINE: Duration = Duration::from_secs(30);

/// A break that is over sooner is not worth a word.
const RECONNECT_SILENCE: Duration = Duration::from_secs(1);

/// How long a program may take to end after the terminal is gone, or its output.
const LEAVE_DEADLINE: Duration = Duration::from_secs(2);

/// How often an interrupt is passed on before we leave ourselves.
const PATIENCE: u32 = 3;

/// How a session ended for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The program ended with this status.
    Exit(i32),
    /// The user left; the program runs on.
    Detached,
    /// The terminal is gone; the program runs on.
    HungUp,
}

/// What a session hears from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    /// A signal of this number.
    Signal(i32),
    /// The terminal is gone.
    HungUp,
}

/// What a session is made of, apart from its streams.
#[derive(Debug)]
pub(crate) struct Session<'a> {
    /// The daemon.
    pub(crate) client: &'a Client,
    /// For what has to be said.
    pub(crate) printer: &'a Printer,
    /// Id of the machine. Not its name: that could mean another machine by the time of a reconnection.
    pub(crate) machine: String,
    /// Id of the session.
    pub(crate) id: String,
    /// What to run or join.
    pub(crate) open: Open,
    /// Keys that detach; only for a terminal.
    pub(crate) detach: Option<DetachKeys>,
    /// Where times are noted.
    pub(crate) marks: Rc<Marks>,
    /// How long it may take until it is open.
    pub(crate) patience: Patience,
}

/// The streams of a session.
pub(crate) struct Streams {
    /// Begins to read input.
    pub(crate) input: fn() -> mpsc::Receiver<Bytes>,
    /// Takes output.
    pub(crate) output: Output,
    /// Signals as they come.
    pub(crate) signals: mpsc::Receiver<Heard>,
    /// The terminal, of a session that has one.
    pub(crate) screen: Option<Arc<Screen>>,
}

impl Streams {
    /// The terminal was there and is gone.
    fn screen_is_gone(&self) -> bool {
        self.screen.as_ref().is_some_and(|screen| screen.is_gone())
    }
}

/// What has to survive a broken connection.
struct State {
    log: InputLog,
    input: Option<mpsc::Receiver<Bytes>>,
    /// `Go` was sent at least once, so there is a session to be joined.
    asked: bool,
    joined: bool,
    output_offset: u64,
    interrupts: u32,
    /// We leave at this time with this status, whatever the guest does.
    leave: Option<(Instant, i32)>,
    discard: bool,
}

/// The end of a session, and whether there are last words to be sent.
struct Ended {
    end: End,
    parting: bool,
}

impl Session<'_> {
    /// Runs it to its end.
    pub(crate) async fn run(mut self, mut streams: Streams) -> Result<End> {
        let mut state = State {
            log: InputLog::default(),
            input: None,
            asked: false,
            joined: false,
            output_offset: 0,
            interrupts: 0,
            leave: None,
            discard: false,
        };
        let mut broken: Option<Instant> = None;
        let mut told = false;
        let mut first: Option<Error> = None;
        let end = loop {
            let error = match self.attend(&mut state, &mut streams, &mut broken, &mut told).await {
                Ok(end) => break end,
                // The break came before the request did: there is nothing to be joined, and the break is what went wrong.
                Err(Broken::Fatal(error)) if !state.joined && error.is(ErrorCode::NotFound) => {
                    return Err(first.unwrap_or(error));
                }
                Err(Broken::Fatal(error)) => return Err(error),
                Err(Broken::Retry(error)) if !state.asked => return Err(error),
                Err(Broken::Retry(error)) => error,
            };
            first.get_or_insert_with(|| error.clone());
            if self.is_suspended().await {
                let (machine, id) = (&self.machine, &self.id);
                let message = format!("machine {machine} was suspended, and its programs with it");
                return Err(Error::new(Kind::Conflict, message).hint(format!(
                    "`banger vm attach {machine} {id}` wakes it and joins this one again"
                )));
            }
            let since = *broken.get_or_insert_with(Instant::now);
            if since.elapsed() >= RECONNECT_DEADLINE {
                let mut error = error;
                error.message = format!("the session could not be joined again: {}", error.message);
                return Err(error.hint(format!(
                    "the program may still run: `banger vm attach {} {}`",
                    self.machine, self.id
                )));
            }
            if since.elapsed() >= RECONNECT_SILENCE && !told {
                told = true;
                self.say("the connection to the daemon is broken; trying to join the session again");
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
                Some(heard) = ending(&mut streams.signals) => match heard {
                    Heard::Signal(number) => return Err(Error::signal(number)),
                    Heard::HungUp => return Ok(End::HungUp),
                },
            }
        };
        if end == End::HungUp {
            return Ok(end);
        }
        // What was said last has to come out, but a reader that does not read can't keep us for ever.
        let written = tokio::select! {
            written = streams.output.finish() => written,
            _ = ending(&mut streams.signals) => Ok(()),
        };
        match written {
            Err(_) if streams.screen.is_some_and(|screen| screen.is_gone()) => Ok(end),
            written => written.map(|()| end),
        }
    }

    /// One connection: from `Open` to the end of the session or of the connection.
    async fn attend(
        &mut self,
        state: &mut State,
        streams: &mut Streams,
        broken: &mut Option<Instant>,
        told: &mut bool,
    ) -> Result<End, Broken> {
        let Some((socket, opened, going)) = self.open(state, &mut streams.signals).await? else {
            return Ok(End::HungUp);
        };
        Marks::note(&self.marks.opened);
        if broken.take().is_some() && std::mem::take(told) {
            self.say("joined the session again");
        }
        if state.joined && opened.dropped > 0 {
            self.say(&format!("{} bytes of output were lost meanwhile", opened.dropped));
        }
        state.output_offset += opened.dropped;
        if !state.joined {
            state.joined = true;
            state.log = InputLog::starting_at(opened.stdin_received);
            state.input = self.open.stdin.then(streams.input);
        }
        let (mut sink, mut frames) = socket.split();
        let (sender, mut queue) = mpsc::unbounded_channel::<Message>();
        if !opened.started && !going {
            send(&sender, FrameKind::Go, &[]);
        }
        if state.log.acknowledge(opened.stdin_received).is_err() {
            return Err(Broken::Fatal(protocol("it has more input than was sent")));
        }
        for piece in state.log.pending() {
            send(&sender, FrameKind::Stdin, piece);
        }
        if state.log.eof {
            send(&sender, FrameKind::StdinEof, &[]);
        }
        if self.open.tty && opened.existing {
            send_size(&sender);
        }
        // Sending apart from receiving: a peer that waits for us to read must not keep us from doing so.
        let write = async move {
            while let Some(message) = queue.recv().await {
                sink.feed(message).await?;
                while let Ok(message) = queue.try_recv() {
                    sink.feed(message).await?;
                }
                sink.flush().await?;
            }
            Ok::<(), tokio_tungstenite::tungstenite::Error>(())
        };
        tokio::pin!(write);
        let end = tokio::select! {
            biased;
            end = self.converse(state, streams, &mut frames, &sender) => end?,
            // A failed write shows as a failed read as well, which knows more.
            Err(error) = &mut write => {
                return Err(lost(error));
            }
        };
        if end.parting {
            drop(sender);
            let _ = tokio::time::timeout(Duration::from_millis(500), write).await;
        }
        Ok(end.end)
    }

    /// Whether somebody suspended the machine: joining the session again would wake it at once. A daemon that does not answer
    /// knows nothing.
    async fn is_suspended(&self) -> bool {
        let machine = self.client.sibling().get::<Machine>(&machine_path(&self.machine)).await;
        machine.is_ok_and(|m| matches!(m.state, MachineState::Suspending | MachineState::Suspended))
    }

    /// What the program gets of a signal of ours, and whether we leave for it.
    fn passed_on(&self, number: i32, state: &mut State) -> (i32, bool) {
        if self.open.tty && matches!(number, signals::HUP | signals::TERM) {
            // We were told to end: the program is told what it would be told with us.
            return (signals::HUP, true);
        }
        if matches!(number, signals::INT | signals::TERM) {
            state.interrupts += 1;
            if state.interrupts > PATIENCE {
                const KILL: i32 = 9;
                return (KILL, true);
            }
        }
        (number, false)
    }

    async fn converse(
        &mut self,
        state: &mut State,
        streams: &mut Streams,
        frames: &mut SplitStream<WebSocket>,
        sender: &Frames,
    ) -> Result<Ended, Broken> {
        loop {
            let full = !state.discard && streams.output.is_full();
            let leave = state.leave;
            let reading = state.input.is_some() && state.log.has_room();
            tokio::select! {
                () = streams.output.room(), if full => {}
                frame = next(frames), if !full => {
                    let (kind, payload) = frame?;
                    match kind {
                        FrameKind::Stdout | FrameKind::Stderr => {
                            Marks::note(&self.marks.output);
                            state.output_offset += payload.len() as u64;
                            if !state.discard {
                                let stream = if kind == FrameKind::Stdout { Stream::Out } else { Stream::Err };
                                streams.output.push(stream, payload);
                            }
                        }
                        FrameKind::StdinAck => {
                            let ack: StdinAck = parse(&payload)?;
                            if state.log.acknowledge(ack.received).is_err() {
                                return Err(Broken::Fatal(protocol("it acknowledged input that was never sent")));
                            }
                        }
                        FrameKind::Exit => {
                            let end = End::Exit(parse::<Exit>(&payload)?.code);
                            return Ok(Ended { end, parting: false });
                        }
                        FrameKind::Error => return Err(refused(&payload)),
                        other => return Err(Broken::Fatal(protocol(&format!("{other:?} from the guest")))),
                    }
                }
                piece = receive(&mut state.input), if reading => match piece {
                    Some(piece) => {
                        let (piece, detach) = match &mut self.detach {
                            Some(keys) => keys.feed(piece),
                            None => (piece, false),
                        };
                        if !piece.is_empty() {
                            send(sender, FrameKind::Stdin, &piece);
                            state.log.push(piece);
                        }
                        if detach {
                            send(sender, FrameKind::Detach, &[]);
                            return Ok(Ended { end: End::Detached, parting: true });
                        }
                    }
                    // Nobody typed an end of file.
                    None if streams.screen_is_gone() => return Ok(hung_up(sender)),
                    None => {
                        state.input = None;
                        state.log.eof = true;
                        send(sender, FrameKind::StdinEof, &[]);
                    }
                },
                Some(heard) = streams.signals.recv() => match heard {
                    Heard::Signal(number) => self.signal(number, state, sender),
                    Heard::HungUp => return Ok(hung_up(sender)),
                },
                () = streams.output.broken.notified() => {
                    if streams.screen_is_gone() {
                        return Ok(hung_up(sender));
                    }
                    // What a program gets that writes into a closed pipe itself.
                    state.discard = true;
                    send_signal(sender, signals::PIPE);
                    state.leave = Some((Instant::now() + LEAVE_DEADLINE, 128 + signals::PIPE));
                }
                () = tokio::time::sleep_until(leave.map_or_else(Instant::now, |l| l.0)), if leave.is_some() => {
                    let status = leave.map_or(1, |l| l.1);
                    // Nobody will look at it any more.
                    send_signal(sender, signals::HUP);
                    return Ok(Ended { end: End::Exit(status), parting: true });
                }
            }
        }
    }

    fn signal(&self, number: i32, state: &mut State, sender: &Frames) {
        if number == signals::WINCH {
            if self.open.tty {
                send_size(sender);
            }
            return;
        }
        let (passed, over) = self.passed_on(number, state);
        send_signal(sender, passed);
        if over {
            state
                .leave
                .get_or_insert((Instant::now() + LEAVE_DEADLINE, 128 + number));
        }
    }

    fn say(&self, text: &str) {
        // In raw mode a line feed alone would not return to the first column.
        self.printer.note(if self.open.tty {
            format!("\r{text}\r")
        } else {
            text.to_owned()
        });
    }
}

/// Leaves a session whose terminal is gone. The program does not hear of it.
fn hung_up(sender: &Frames) -> Ended {
    send(sender, FrameKind::Detach, &[]);
    Ended {
        end: End::HungUp,
        parting: true,
    }
}

fn send_size(sender: &Frames) {
    if let Some(size) = terminal::size() {
        let frame = Frame::json(FrameKind::Resize, &size);
        send(sender, FrameKind::Resize, &frame.payload);
    }
}

/// The next signal that is not about the size of the window. Cancel safe.
async fn ending(signals: &mut mpsc::Receiver<Heard>) -> Option<Heard> {
    loop {
        match signals.recv().await {
            Some(Heard::Signal(signals::WINCH)) => {}
            other => return other,
        }
    }
}

async fn receive(input: &mut Option<mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    match input {
        Some(input) => input.recv().await,
        None => None,
    }
}

#[cfg(test)]
mod tests;
