//! The agent proper: one thread that takes one connection of the host after another.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use banger_proto::agent::{CHANNEL_NAME, VSOCK_PORT};
use rustix::process::{Resource, Rlimit};

use crate::agent::Agent;
use crate::channel::Channel;
use crate::channel::virtio::{Port, find_port};
use crate::channel::vsock::{self, Vsock};
use crate::console::{chain, say};
use crate::handover::{Handover, recall};
use crate::{rehearsal, server};

/// How long the agent waits before it looks for a channel again that was not there or broke.
const AGAIN: Duration = Duration::from_millis(500);

/// Says what this program is for.
pub fn say_usage() {
    let _ = writeln!(
        io::stderr(),
        "banger-agent is the first program of a banger machine; it has no use elsewhere"
    );
}

/// Runs the agent. Standard input is the socket to process 1.
pub fn run() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = prepare().and_then(|socket| runtime?.block_on(serve(socket)));
    if let Err(e) = result {
        say(&format!("the agent ends: {}", chain(&e)));
    }
    ExitCode::FAILURE
}

/// Puts the process in order: a session of its own, descriptors that children don't inherit, limits as a login has them.
fn prepare() -> io::Result<std::os::unix::net::UnixStream> {
    // Started from a shell it would lead a group already; as a child of process 1 it does not.
    let _ = rustix::process::setsid();
    let socket = rustix::stdio::stdin().as_fd().try_clone_to_owned()?;
    let null = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    let files = Rlimit {
        current: Some(1024),
        maximum: Some(524_288),
    };
    let _ = rustix::process::setrlimit(Resource::Nofile, files);
    let socket = std::os::unix::net::UnixStream::from(socket);
    socket.set_nonblocking(true)?;
    Ok(socket)
}

async fn serve(socket: std::os::unix::net::UnixStream) -> io::Result<()> {
    let handover = Handover::new(tokio::net::UnixStream::from_std(socket)?);
    let agent = Agent::new(handover, recall());
    let mut complained = false;
    loop {
        let result = match find_port(Path::new("/sys"), Path::new("/dev"), CHANNEL_NAME) {
            Ok(Some(path)) => match Port::open(&path) {
                Ok(port) => serve_channel(&agent, port).await,
                Err(e) => Err(e),
            },
            Ok(None) if vsock::is_there(Path::new("/sys")) => match Vsock::listen(VSOCK_PORT) {
                Ok(vsock) => serve_channel(&agent, vsock).await,
                Err(e) => Err(e),
            },
            Ok(None) => Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("neither a virtio-serial port `{CHANNEL_NAME}` nor a vsock device"),
            )),
            Err(e) => Err(e),
        };
        if let Err(e) = result
            && !std::mem::replace(&mut complained, true)
        {
            say(&format!("the guest channel is not usable: {}", chain(&e)));
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Serves one connection after another, until the channel itself breaks.
pub async fn serve_channel<C: Channel>(agent: &Arc<Agent>, mut channel: C) -> io::Result<()> {
    loop {
        let stream = channel.accept().await?;
        if agent.beside && agent.is_frozen() {
            // A copy that wakes, most likely.
            rehearsal::begin();
        }
        // However a connection ends, the next one is the host's affair.
        let _ = server::serve(agent.clone(), stream).await;
    }
}
