//! QEMU's control protocol: one client at a time, lines of JSON over a Unix socket.
//!
//! QEMU serves one connection and lets others wait, so a connection is opened for a purpose and closed again. Everything has
//! a deadline but the wait for an event; a line has a greatest length.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::VecDeque;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use crate::dial::{dial, peer};

/// The longest line that is read: lists of all nodes of long chains.
const LINE: u64 = 4 << 20;
/// More lines than this before a reply are a fault, not events.
const SKIPPED: usize = 1000;
/// Events that are kept until somebody asks for them.
const EVENTS: usize = 64;
/// How long the rest of a line may take.
const REST: Duration = Duration::from_secs(3);

/// What went wrong on a control connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The socket cannot be reached: not there yet, or nobody listens.
    #[error("cannot connect to the control socket")]
    Unreachable(#[source] std::io::Error),
    /// The connection broke.
    #[error("cannot talk over the control socket")]
    Io(#[source] std::io::Error),
    /// The other side hung up.
    #[error("the control socket was closed while waiting for {0}")]
    Closed(&'static str),
    /// The deadline passed.
    #[error("no {0} in time")]
    Timeout(&'static str),
    /// The other side does not speak the protocol.
    #[error("the control socket does not speak QMP: {0}")]
    Protocol(String),
    /// A command was refused.
    #[error("`{command}` was refused: {message}")]
    Refused {
        /// The command.
        command: String,
        /// What QEMU said.
        message: String,
    },
}

/// A control connection that is ready for commands.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    deadline: Instant,
    peer: Option<u32>,
    next_id: u64,
    events: VecDeque<String>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    event: Option<String>,
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Failure>,
    id: Option<u64>,
}

#[derive(Deserialize)]
struct Failure {
    class: String,
    desc: String,
}

/// Answer of `query-name`.
#[derive(Debug, Deserialize)]
struct Name {
    name: Option<String>,
}

/// Answer of `query-status`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// `running`, `paused`, `prelaunch`, `shutdown`, `internal-error` …
    pub status: String,
    /// Whether the virtual CPUs run.
    pub running: bool,
}

impl Client {
    /// Connects and negotiates. The deadline holds for everything that is done with this connection.
    pub async fn connect(path: &Path, within: Duration) -> Result<Self, QmpError> {
        let deadline = Instant::now() + within;
        let stream = match dial(path, deadline).await {
            Ok(stream) => stream,
            Err(e) if e.kind() == std::io::ErrorKind::TimedOut => return Err(QmpError::Timeout("connection")),
            Err(e) => return Err(QmpError::Unreachable(e)),
        };
        Self::negotiate(stream, deadline).await
    }

    /// Negotiates over a connection that is there.
    pub async fn over(stream: UnixStream, within: Duration) -> Result<Self, QmpError> {
        Self::negotiate(stream, Instant::now() + within).await
    }

    async fn negotiate(stream: UnixStream, deadline: Instant) -> Result<Self, QmpError> {
        let peer = peer(&stream);
        let mut client = Self {
            stream: BufReader::new(stream),
            deadline,
            peer,
            next_id: 0,
            events: VecDeque::new(),
        };
        let greeting = client.read("greeting").await?;
        if greeting.greeting.is_none() {
            return Err(QmpError::Protocol("no greeting".to_owned()));
        }
        client.execute::<Value>("qmp_capabilities", None).await?;
        Ok(client)
    }

    /// The process that opened the socket, as the kernel knows it.
    pub fn peer(&self) -> Option<u32> {
        self.peer
    }

    /// Sets another deadline for what comes next.
    pub fn extend(&mut self, within: Duration) {
        self.deadline = Instant::now() + within;
    }

    /// Executes a command.
    pub async fn execute<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Option<Value>,
    ) -> Result<T, QmpError> {
        let (line, id) = self.request(command, arguments);
        self.write(line.as_bytes()).await?;
        self.reply(command, id).await
    }

    /// Hands a descriptor over, under a name for later commands.
    pub async fn give(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
        let (line, id) = self.request("getfd", Some(json!({ "fdname": name })));
        let stream = self.stream.get_ref();
        let send = stream.async_io(Interest::WRITABLE, || {
            let fds = [fd];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            let parts = [IoSlice::new(line.as_bytes())];
            Ok(sendmsg(stream.as_fd(), &parts, &mut control, SendFlags::NOSIGNAL)?)
        });
        let sent = match timeout_at(self.deadline, send).await {
            Ok(sent) => sent.map_err(QmpError::Io)?,
            Err(_) => return Err(QmpError::Timeout("room for a command")),
        };
        self.write(line.as_bytes().get(sent..).unwrap_or_default()).await?;
        self.reply::<Value>("getfd", id).await.map(drop)
    }

    fn request(&mut self, command: &str, arguments: Option<Value>) -> (String, u64) {
        self.next_id += 1;
        let id = self.next_id;
        let mut request = json!({ "execute": command, "id": id });
        if let (Some(arguments), Some(request)) = (arguments, request.as_object_mut()) {
            request.insert("arguments".to_owned(), arguments);
        }
        let mut line = request.to_string();
        line.push('\n');
        (line, id)
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), QmpError> {
        match timeout_at(self.deadline, self.stream.get_mut().write_all(bytes)).await {
            Ok(written) => written.map_err(QmpError::Io),
            Err(_) => Err(QmpError::Timeout("room for a command")),
        }
    }

    async fn reply<T: DeserializeOwned>(&mut self, command: &str, id: u64) -> Result<T, QmpError> {
        for _ in 0..SKIPPED {
            let message = self.read("reply").await?;
            if let Some(Failure { class, desc }) = message.error {
                // An error without an id is about a line that QEMU could not read, so about ours.
                return Err(QmpError::Refused {
                    command: command.to_owned(),
                    message: format!("{desc} ({class})"),
                });
            }
            match message.value {
                Some(value) if message.id == Some(id) => {
                    return serde_json::from_value(value)
                        .map_err(|e| QmpError::Protocol(format!("unexpected answer to {command}: {e}")));
                }
                // Late answers to nothing, events and what later versions may add.
                _ if message.event.is_some() || message.value.is_some() => self.keep(message.event),
                _ => return Err(QmpError::Protocol("a message of no known kind".to_owned())),
            }
        }
        Err(QmpError::Protocol("events without end".to_owned()))
    }

    /// Keeps the name of an event; of too many the first are forgotten.
    fn keep(&mut self, event: Option<String>) {
        self.events.extend(event);
        if self.events.len() > EVENTS {
            self.events.pop_front();
        }
    }

    /// The name of the next event. Waits for it without a deadline; one that came since this connection was opened is the next.
    pub async fn event(&mut self) -> Result<String, QmpError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            if self.stream.fill_buf().await.map_err(QmpError::Io)?.is_empty() {
                return Err(QmpError::Closed("event"));
            }
            self.extend(REST);
            let message = self.read("event").await?;
            self.keep(message.event);
        }
    }

    /// Name of the guest, as given at the start.
    pub async fn name(&mut self) -> Result<Option<String>, QmpError> {
        Ok(self.execute::<Name>("query-name", None).await?.name)
    }

    /// What the machine does.
    pub async fn status(&mut self) -> Result<Status, QmpError> {
        self.execute("query-status", None).await
    }

    async fn read(&mut self, what: &'static str) -> Result<Message, QmpError> {
        let mut line = Vec::new();
        let mut limited = (&mut self.stream).take(LINE);
        match timeout_at(self.deadline, limited.read_until(b'\n', &mut line)).await {
            Err(_) => return Err(QmpError::Timeout(what)),
            Ok(Err(e)) if e.kind() == std::io::ErrorKind::ConnectionReset => return Err(QmpError::Closed(what)),
            Ok(Err(e)) => return Err(QmpError::Io(e)),
            Ok(Ok(_)) => {}
        }
        if line.last() != Some(&b'\n') {
            return Err(if line.len() as u64 >= LINE {
                QmpError::Protocol(format!("a line of more than {LINE} bytes"))
            } else {
                QmpError::Closed(what)
            });
        }
        serde_json::from_slice(&line).map_err(|e| QmpError::Protocol(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::path::PathBuf;

    use super::*;

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;
    const SOON: Duration = Duration::from_secs(20);
    const BRIEF: Duration = Duration::from_millis(200);

    /// One side of a scripted conversation.
    struct Server(BufReader<UnixStream>);

    impl Server {
        async fn say(&mut self, text: &str) {
            self.0.get_mut().write_all(text.as_bytes()).await.unwrap();
            self.0.get_mut().write_all(b"\n").await.unwrap();
        }

        /// Reads a command; answers its name and id.
        async fn hear(&mut self) -> (String, u64) {
            let mut line = String::new();
            self.0.read_line(&mut line).await.unwrap();
            let value: Value = serde_json::from_str(&line).unwrap();
            (
                value["execute"].as_str().unwrap().to_owned(),
                value["id"].as_u64().unwrap(),
            )
        }

        /// What the documented one does until it takes commands.
        async fn negotiate(&mut self) {
            self.say(GREETING).await;
            let (command, id) = self.hear().await;
            assert_eq!(command, "qmp_capabilities");
            self.say(&format!(r#"{{"return": {{}}, "id": {id}}}"#)).await;
        }
    }

    /// A fake QEMU that follows a script.
    async fn serve<F, Fut>(script: F) -> (tempfile::TempDir, PathBuf)
    where
        F: FnOnce(Server) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send,
    {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            script(Server(BufReader::new(stream))).await;
        });
        (dir, path)
    }

    #[tokio::test]
    async fn a_whole_conversation_with_events_between() {
        let (_dir, path) = serve(|mut server| async move {
            server.negotiate().await;
            let (command, id) = server.hear().await;
            assert_eq!(command, "query-name");
            server
                .say(r#"{"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 2}}"#)
                .await;
            server.say(r#"{"return": {"name": "stale"}, "id": 99}"#).await;
            server
                .say(&format!(r#"{{"return": {{"name": "banger-x"}}, "id": {id}}}"#))
                .await;
            let (_, id) = server.hear().await;
            server
                .say(&format!(
                    r#"{{"return": {{"status": "paused", "running": false, "singlestep": false}}, "id": {id}}}"#
                ))
                .await;
        })
        .await;
        let mut client = Client::connect(&path, SOON).await.unwrap();
        assert_eq!(client.peer(), Some(std::process::id()));
        assert_eq!(client.name().await.unwrap().as_deref(), Some("banger-x"));
        let status = client.status().await.unwrap();
        assert_eq!((status.status.as_str(), status.running), ("paused", false));
        assert!(matches!(
            client.status().await,
            Err(QmpError::Closed("reply") | QmpError::Io(_))
        ));
    }

    #[tokio::test]
    async fn a_descriptor_arrives_with_its_command() {
        use std::io::{IoSliceMut, Read, Seek, Write};
        use std::os::fd::OwnedFd;

        use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

        let (ours, theirs) = UnixStream::pair().unwrap();
        let other = tokio::spawn(async move {
            let mut server = Server(BufReader::new(theirs));
            server.negotiate().await;
            let stream = server.0.get_ref();
            let mut text = vec![0; 1000];
            let mut got: Option<OwnedFd> = None;
            let count = stream
                .async_io(Interest::READABLE, || {
                    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                    let mut control = RecvAncillaryBuffer::new(&mut space);
                    let mut parts = [IoSliceMut::new(&mut text)];
                    let read = recvmsg(stream.as_fd(), &mut parts, &mut control, RecvFlags::empty())?;
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(fds) = message {
                            got = fds.into_iter().next();
                        }
                    }
                    Ok(read.bytes)
                })
                .await
                .unwrap();
            let request: Value = serde_json::from_slice(&text[..count]).unwrap();
            assert_eq!(
                (&request["execute"], &request["arguments"]["fdname"]),
                (&json!("getfd"), &json!("state"))
            );
            server
                .say(&json!({ "return": {}, "id": request["id"] }).to_string())
                .await;
            let mut content = String::new();
            std::fs::File::from(got.unwrap()).read_to_string(&mut content).unwrap();
            assert_eq!(content, "the state");
        });
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"the state").unwrap();
        file.rewind().unwrap();
        let mut client = Client::over(ours, SOON).await.unwrap();
        client.give("state", file.as_fd()).await.unwrap();
        other.await.unwrap();
    }

    #[tokio::test]
    async fn a_refusal_is_quoted() {
        let (_dir, path) = serve(|mut server| async move {
            server.negotiate().await;
            let (_, id) = server.hear().await;
            server
                .say(&format!(
                    r#"{{"error": {{"class": "GenericError", "desc": "no such thing"}}, "id": {id}}}"#
                ))
                .await;
            server.hear().await;
        })
        .await;
        let mut client = Client::connect(&path, SOON).await.unwrap();
        let error = client.execute::<Value>("cont", None).await.unwrap_err();
        assert_eq!(error.to_string(), "`cont` was refused: no such thing (GenericError)");
    }

    #[tokio::test]
    async fn a_greeting_that_is_late_is_waited_for_but_not_for_ever() {
        let (_dir, path) = serve(|mut server| async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            server.negotiate().await;
            server.hear().await;
        })
        .await;
        assert!(Client::connect(&path, SOON).await.is_ok());
        let (_dir, path) = serve(|server| async move {
            std::future::pending::<()>().await;
            drop(server);
        })
        .await;
        assert!(matches!(
            Client::connect(&path, BRIEF).await,
            Err(QmpError::Timeout("greeting"))
        ));
    }

    #[tokio::test]
    async fn one_that_waits_its_turn_times_out() {
        // QEMU takes a second connection only when the first is closed: the kernel accepts it, nobody answers. When its queue
        // is full the kernel does not even do that.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        for what in ["greeting", "greeting", "connection"] {
            let error = Client::connect(&path, BRIEF).await.unwrap_err();
            assert!(matches!(error, QmpError::Timeout(w) if w == what), "{error}");
        }
    }

    #[tokio::test]
    async fn faults_of_the_other_side_are_told_apart() {
        let (_dir, path) = serve(|server| async move { drop(server) }).await;
        assert!(matches!(
            Client::connect(&path, SOON).await,
            Err(QmpError::Closed("greeting"))
        ));

        let (_dir, path) = serve(|mut server| async move { server.say("220 mail.example.org ESMTP").await }).await;
        assert!(matches!(Client::connect(&path, SOON).await, Err(QmpError::Protocol(_))));

        let (_dir, path) = serve(|mut server| async move { server.say(r#"{"hello": 1}"#).await }).await;
        assert!(matches!(Client::connect(&path, SOON).await, Err(QmpError::Protocol(_))));

        let (_dir, path) = serve(|mut server| async move {
            let flood = vec![b'x'; 64 << 10];
            while server.0.get_mut().write_all(&flood).await.is_ok() {}
        })
        .await;
        assert!(matches!(Client::connect(&path, SOON).await, Err(QmpError::Protocol(_))));

        let (_dir, path) = serve(|mut server| async move {
            server.negotiate().await;
            server.hear().await;
            while server.0.get_mut().write_all(b"{\"event\": \"X\"}\n").await.is_ok() {}
        })
        .await;
        let mut client = Client::connect(&path, SOON).await.unwrap();
        assert!(matches!(client.status().await, Err(QmpError::Protocol(_))));

        let (_dir, path) = serve(|mut server| async move {
            server.negotiate().await;
            let (_, id) = server.hear().await;
            server
                .say(&format!(r#"{{"return": {{"status": 7}}, "id": {id}}}"#))
                .await;
            server.hear().await;
        })
        .await;
        let mut client = Client::connect(&path, SOON).await.unwrap();
        assert!(matches!(client.status().await, Err(QmpError::Protocol(_))));

        // Half a line, then the end.
        let (_dir, path) = serve(|mut server| async move {
            server.0.get_mut().write_all(b"{\"QMP\": ").await.unwrap();
        })
        .await;
        assert!(matches!(
            Client::connect(&path, SOON).await,
            Err(QmpError::Closed("greeting"))
        ));

        let missing = Path::new("/nonexistent/control.sock");
        assert!(matches!(
            Client::connect(missing, SOON).await,
            Err(QmpError::Unreachable(_))
        ));
    }
}

/// A control connection on whose other side a script answers.
#[cfg(test)]
pub(crate) mod fake {
    use super::*;

    /// A script: for each command in turn what it must be and what is answered: `Ok` with a value, or `Err` with a refusal. Where
    /// it ends the other side hangs up. Join the handle to see that all of it was said.
    pub(crate) async fn client(
        script: Vec<(&'static str, Result<Value, &'static str>)>,
    ) -> (Client, tokio::task::JoinHandle<Vec<Value>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let other = tokio::spawn(async move {
            let mut stream = BufReader::new(theirs);
            let mut heard = Vec::new();
            let mut say = r#"{"QMP": {}}"#.to_owned();
            for (expected, answer) in std::iter::once(("qmp_capabilities", Ok(json!({})))).chain(script) {
                stream.get_mut().write_all(format!("{say}\n").as_bytes()).await.unwrap();
                let mut line = String::new();
                stream.read_line(&mut line).await.unwrap();
                let mut request: Value = serde_json::from_str(&line).unwrap();
                assert_eq!(request["execute"], expected, "{line}");
                say = match answer {
                    Ok(value) => json!({ "return": value, "id": request["id"] }),
                    Err(desc) => json!({ "error": { "class": "GenericError", "desc": desc }, "id": request["id"] }),
                }
                .to_string();
                heard.push(request["arguments"].take());
            }
            stream.get_mut().write_all(format!("{say}\n").as_bytes()).await.unwrap();
            heard
        });
        (Client::over(ours, Duration::from_secs(20)).await.unwrap(), other)
    }
}
