//! The name server for `.vm` in system mode: `NAME.vm` is the address of the running machine of that name on the bridge.
//!
//! **The port** is one that only root can bind, and the root helper does: a daemon that has gone leaves names unanswered until the next
//! one is there, and no other user of the host can answer instead. A port that the configuration names from 1024 on the daemon binds
//! itself; `doctor` says that it is not held.
//!
//! It listens on loopback only and knows nothing else; the host's resolver is told to ask it for `.vm` (`docs/network.md`). What
//! clients send is bounded: one buffer for datagrams, a few connections with a deadline for each question.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use banger_proto::api::MachineState;
use banger_system::net::DNS_PORT;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use crate::services::Services;

pub mod wire;

use wire::MAX_QUERY;

/// How often a port that is taken is tried again.
const AGAIN: Duration = Duration::from_secs(10);
/// Connections at once; more wait to be accepted.
const CONNECTIONS: usize = 32;
/// How long a connection may take for its next question, and for taking the answer.
const IDLE: Duration = Duration::from_secs(10);
/// How long to wait when the system has no room.
const ROOM: Duration = Duration::from_millis(100);

/// Whether names are served.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum State {
    /// They are not meant to be.
    #[default]
    Off,
    /// They are, here.
    Listening(SocketAddr),
    /// They should be, but the port could not be had.
    Failed {
        /// Where.
        address: SocketAddr,
        /// Why not.
        why: String,
    },
}

/// The name server as other parts see it.
#[derive(Debug, Default)]
pub struct Dns {
    state: Mutex<State>,
}

impl Dns {
    /// Whether it serves.
    pub fn state(&self) -> State {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes a new state; whether it is one.
    fn set(&self, state: State) -> bool {
        let mut held = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let new = *held != state;
        *held = state;
        new
    }
}

/// Serves names until the daemon stops. A port that is taken is tried again every few seconds; everything else runs on without.
pub async fn serve(services: Arc<Services>) {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, services.config.network.dns_port));
    let work = async {
        loop {
            match sockets(&services, address).await {
                Ok((udp, tcp)) => {
                    services.dns.set(State::Listening(address));
                    tracing::info!(%address, "names of machines are served");
                    let zone = |name: &str| address_of(&services, name);
                    return tokio::join!(datagrams(&udp, zone), connections(&tcp, zone));
                }
                Err(e) => {
                    if services.dns.set(State::Failed {
                        address,
                        why: e.clone(),
                    }) {
                        tracing::warn!(%address, error = e, "names of machines are not served");
                    }
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    };
    tokio::select! {
        _ = work => {}
        () = services.stopping.cancelled() => {}
    }
    services.dns.set(State::Off);
}

/// The address of the running machine of that name.
fn address_of(services: &Services, name: &str) -> Option<Ipv4Addr> {
    let machine = services.machines().into_iter().find(|m| m.name() == name)?;
    let runs = matches!(
        machine.state(),
        MachineState::Starting | MachineState::Running | MachineState::Paused
    );
    machine.show().address.filter(|_| runs)?.parse().ok()
}

/// The sockets, from whoever may bind the port.
async fn sockets(services: &Services, address: SocketAddr) -> Result<(UdpSocket, TcpListener), String> {
    if let (DNS_PORT, Some(system)) = (address.port(), services.hosting.get()) {
        let (datagrams, connections) = system.name_sockets().await.map_err(|e| e.message)?;
        return adopt(datagrams, connections).map_err(|e| e.to_string());
    }
    bind(address).await.map_err(|e| e.to_string())
}

fn adopt(datagrams: OwnedFd, connections: OwnedFd) -> io::Result<(UdpSocket, TcpListener)> {
    let datagrams = std::net::UdpSocket::from(datagrams);
    let connections = std::net::TcpListener::from(connections);
    datagrams.set_nonblocking(true)?;
    connections.set_nonblocking(true)?;
    Ok((UdpSocket::from_std(datagrams)?, TcpListener::from_std(connections)?))
}

async fn bind(address: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    Ok((UdpSocket::bind(address).await?, TcpListener::bind(address).await?))
}

async fn datagrams(socket: &UdpSocket, zone: impl Fn(&str) -> Option<Ipv4Addr>) {
    let mut buffer = vec![0; MAX_QUERY];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((n, from)) => {
                if let Some(answer) = wire::answer(&buffer[..n], &zone) {
                    // An asker that has gone misses nothing; one that takes nothing asks again.
                    let _ = socket.try_send_to(&answer, from);
                }
            }
            Err(e) => {
                tracing::debug!(error = %e, "no question could be received");
                tokio::time::sleep(ROOM).await;
            }
        }
    }
}

async fn connections(listener: &TcpListener, zone: impl Fn(&str) -> Option<Ipv4Addr> + Copy) {
    let room = Semaphore::new(CONNECTIONS);
    let mut open = futures_util::stream::FuturesUnordered::new();
    loop {
        let next = async {
            // Never closed.
            let place = room.acquire().await;
            (place, listener.accept().await)
        };
        tokio::select! {
            (place, accepted) = next => match accepted {
                Ok((stream, _)) => open.push(async move {
                    let _ = connection(stream, zone).await;
                    drop(place);
                }),
                Err(e) => {
                    tracing::debug!(error = %e, "no connection could be accepted");
                    tokio::time::sleep(ROOM).await;
                }
            },
            Some(()) = futures_util::StreamExt::next(&mut open) => {}
        }
    }
}

/// Answers the questions of one connection, each behind its length.
async fn connection(mut stream: TcpStream, zone: impl Fn(&str) -> Option<Ipv4Addr>) -> io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let question = async {
            let length = usize::from(stream.read_u16().await?);
            if length > MAX_QUERY {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            buffer.resize(length, 0);
            stream.read_exact(&mut buffer).await?;
            let answer = wire::answer(&buffer, &zone).ok_or(io::ErrorKind::InvalidData)?;
            let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
            let framed = [&length.to_be_bytes()[..], &answer].concat();
            stream.write_all(&framed).await
        };
        tokio::time::timeout(IDLE, question).await??;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03web\x02vm\0\0\x01\0\x01";

    fn web(name: &str) -> Option<Ipv4Addr> {
        (name == "web").then_some(Ipv4Addr::new(172, 16, 0, 7))
    }

    #[tokio::test]
    async fn both_ways_to_ask() {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (udp, tcp) = (
            UdpSocket::bind(any).await.unwrap(),
            TcpListener::bind(any).await.unwrap(),
        );
        let (at_udp, at_tcp) = (udp.local_addr().unwrap(), tcp.local_addr().unwrap());
        let asks = async {
            let socket = UdpSocket::bind(any).await.unwrap();
            let mut buffer = [0; 512];
            for _ in 0..3 {
                socket.send_to(b"garbage", at_udp).await.unwrap();
                socket.send_to(QUERY, at_udp).await.unwrap();
                let (n, _) = socket.recv_from(&mut buffer).await.unwrap();
                assert_eq!(buffer[n - 4..n], [172, 16, 0, 7]);
            }
            // Those that say nothing keep nobody from being answered.
            let mut silent = Vec::new();
            for _ in 0..CONNECTIONS - 1 {
                silent.push(TcpStream::connect(at_tcp).await.unwrap());
            }
            let mut stream = TcpStream::connect(at_tcp).await.unwrap();
            for _ in 0..3 {
                stream.write_u16(u16::try_from(QUERY.len()).unwrap()).await.unwrap();
                stream.write_all(QUERY).await.unwrap();
                let n = usize::from(stream.read_u16().await.unwrap());
                stream.read_exact(&mut buffer[..n]).await.unwrap();
                assert_eq!(buffer[n - 4..n], [172, 16, 0, 7]);
            }
            // One that sends garbage is closed.
            stream.write_u16(60_000).await.unwrap();
            assert_eq!(stream.read(&mut buffer).await.unwrap(), 0);
        };
        let limit = Duration::from_secs(20);
        tokio::select! {
            _ = async { tokio::join!(datagrams(&udp, web), connections(&tcp, web)) } => unreachable!(),
            done = tokio::time::timeout(limit, asks) => done.unwrap(),
        }
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_told() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        assert!(bind(taken.local_addr().unwrap()).await.is_err());
        let dns = Dns::default();
        assert_eq!(dns.state(), State::Off);
        let failed = State::Failed {
            address: taken.local_addr().unwrap(),
            why: "taken".to_owned(),
        };
        assert!(dns.set(failed.clone()));
        assert!(!dns.set(failed.clone()));
        assert_eq!(dns.state(), failed);
    }
}
