//! As little of a client of QEMU's control protocol as saves a machine's state, loads it and lets it go on.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a socket is tried, and an engine asked.
const AGAIN: Duration = Duration::from_micros(500);

/// A control connection that takes commands.
pub(crate) struct Qmp(BufReader<UnixStream>);

/// Connects as soon as somebody listens.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    let end = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Err(_) if Instant::now() < end => std::thread::sleep(AGAIN),
            other => return other,
        }
    }
}

impl Qmp {
    /// Negotiates.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::over(connect(path)?)
    }

    /// Negotiates over a connection.
    pub(crate) fn over(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self(BufReader::new(stream));
        qmp.read()?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Leaves memory where it is: in its file.
    pub(crate) fn ignore_shared(&mut self) -> io::Result<()> {
        let capabilities = json!({"capabilities": [{"capability": "x-ignore-shared", "state": true}]});
        self.execute("migrate-set-capabilities", capabilities).map(drop)
    }

    /// Writes processors and devices to a file.
    pub(crate) fn save(&mut self, state: &Path, patience: Duration) -> io::Result<()> {
        self.hand_over(&File::create(state)?)?;
        self.execute("migrate", json!({"uri": "fd:state"}))?;
        self.until_moved(patience)
    }

    /// Loads processors and devices from a file. They stay stopped.
    pub(crate) fn load(&mut self, state: &Path) -> io::Result<()> {
        self.hand_over(&File::open(state)?)?;
        self.execute("migrate-incoming", json!({"uri": "fd:state"}))?;
        self.until_moved(PATIENCE)
    }

    fn until_moved(&mut self, patience: Duration) -> io::Result<()> {
        let end = Instant::now() + patience;
        loop {
            let progress = self.execute("query-migrate", json!({}))?;
            match progress["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => return Err(io::Error::other(progress.to_string())),
                _ if Instant::now() > end => return Err(io::Error::other(format!("not done in time: {progress}"))),
                _ => std::thread::sleep(AGAIN),
            }
        }
    }

    /// Gives the engine a file by the name `state`.
    fn hand_over(&mut self, state: &File) -> io::Result<()> {
        let line = json!({"execute": "getfd", "arguments": {"fdname": "state"}}).to_string();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [state.as_fd()];
        if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        let sent = sendmsg(
            self.0.get_ref(),
            &[IoSlice::new(line.as_bytes())],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        if sent != line.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.answer().map(drop)
    }

    /// A command and its answer.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        self.0.get_mut().write_all(line.as_bytes())?;
        self.answer()
    }

    fn answer(&mut self) -> io::Result<Value> {
        loop {
            let mut message = self.read()?;
            if let Some(error) = message.get("error") {
                return Err(io::Error::other(error.to_string()));
            }
            // Everything else is an event.
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn read(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}
