//! The way to an open session: connection, request, answer. Each step has a deadline, and signals end the client at once.

use std::time::Duration;

use banger_proto::frame::{Frame, Kind as FrameKind, MAX_PAYLOAD, Open, Opened, Signal};
use futures_util::SinkExt;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

use crate::client::{WebSocket, encode, machine_path};
use crate::error::{Error, Kind, Result};
use crate::session::wire::{Broken, lost, message, next, protocol, refused};
use crate::session::{Heard, Session, State, ending, terminal};
use crate::signals;

/// How long the steps to an open session may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// Until the daemon takes the request: it wakes the machine for it where that is suspended.
    pub(crate) connect: Duration,
    /// From there until the session is open. Longer than the daemon itself waits for the agent.
    pub(crate) open: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(300),
            open: Duration::from_secs(60),
        }
    }
}

/// How long a last word may take to be sent.
const PARTING: Duration = Duration::from_millis(500);

impl Session<'_> {
    /// Opens the session, or joins it. Nothing if the terminal went away meanwhile. The last part says whether the program was
    /// told to go already.
    pub(super) async fn open(
        &self,
        state: &mut State,
        signals: &mut mpsc::Receiver<Heard>,
    ) -> Result<Option<(WebSocket, Opened, bool)>, Broken> {
        let Patience { connect, open } = self.patience;
        let mut socket = tokio::select! {
            socket = timeout(connect, self.connect()) => {
                socket.map_err(|_| self.late("take the request for", connect))??
            }
            Some(heard) = ending(signals) => return ended(heard),
        };
        let going = !self.open.attach_only && !state.asked;
        let opening = timeout(open, self.asked(state, &mut socket, signals, going));
        let opened = opening.await.map_err(|_| self.late("open", open))??;
        Ok(opened.map(|opened| (socket, opened, going)))
    }

    fn late(&self, what: &str, after: Duration) -> Broken {
        let message = format!(
            "the daemon did not {what} the session in machine {} within {after:?}",
            self.machine
        );
        Broken::Fatal(Error::new(Kind::Timeout, message).hint("see `banger daemon logs`"))
    }

    async fn connect(&self) -> Result<WebSocket, Broken> {
        let path = format!("{}/sessions/{}/attach", machine_path(&self.machine), encode(&self.id));
        self.client.websocket(&path, MAX_PAYLOAD + 1).await.map_err(|error| {
            if error.kind == Kind::Unavailable {
                Broken::Retry(error)
            } else {
                Broken::Fatal(error)
            }
        })
    }

    /// Asks for the session and waits until the guest has it.
    async fn asked(
        &self,
        state: &mut State,
        socket: &mut WebSocket,
        signals: &mut mpsc::Receiver<Heard>,
        going: bool,
    ) -> Result<Option<Opened>, Broken> {
        tokio::select! {
            asked = self.ask(state, socket, going) => asked?,
            Some(heard) = ending(signals) => return ended(heard),
        }
        loop {
            let heard = tokio::select! {
                frame = next(socket) => match frame? {
                    (FrameKind::Opened, payload) => {
                        return serde_json::from_slice(&payload)
                            .map(Some)
                            .map_err(|e| Broken::Fatal(protocol(&e.to_string())));
                    }
                    (FrameKind::Error, payload) => return Err(refused(&payload)),
                    (kind, _) => return Err(Broken::Fatal(protocol(&format!("{kind:?} before Opened")))),
                },
                Some(heard) = ending(signals) => heard,
            };
            let Heard::Signal(number) = heard else {
                return ended(heard);
            };
            if going {
                // For the program, should it run by now.
                let (passed, _) = self.passed_on(number, state);
                let frame = Frame::json(FrameKind::Signal, &Signal { signal: passed }).to_message();
                let _ = timeout(PARTING, socket.send(Message::Binary(frame.into()))).await;
            }
            if !going || !matches!(number, signals::USR1 | signals::USR2) {
                return ended(heard);
            }
        }
    }

    /// Asks for the session. A new one is told to go in the same breath.
    async fn ask(&self, state: &mut State, socket: &mut WebSocket, going: bool) -> Result<(), Broken> {
        let mut open = Open {
            attach_only: !going,
            output_offset: state.output_offset,
            size: if self.open.tty {
                terminal::size().or(self.open.size)
            } else {
                None
            },
            ..self.open.clone()
        };
        if !going {
            // What it runs is known there.
            open.command.clear();
            open.env.clear();
        }
        state.asked = true;
        for frame in Frame::opening(&open) {
            socket
                .feed(Message::Binary(frame.to_message().into()))
                .await
                .map_err(lost)?;
        }
        if going {
            socket.feed(message(FrameKind::Go, &[])).await.map_err(lost)?;
        }
        socket.flush().await.map_err(lost)
    }
}

/// The end of a client that has no session yet.
fn ended<T>(heard: Heard) -> Result<Option<T>, Broken> {
    match heard {
        Heard::Signal(number) => Err(Broken::Fatal(Error::signal(number))),
        Heard::HungUp => Ok(None),
    }
}
