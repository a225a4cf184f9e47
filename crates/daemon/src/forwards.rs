//! Ports of this host that lead to ports of machines. The daemon listens, and relays each connection through the guest's agent, so
//! that it works with any network and with none.
//!
//! A machine's forwards are in its row. Their listeners are there while the machine has an engine or is suspended: a connection wakes
//! it. They are made before a machine is (a port that is taken is told before anything happens), and again when the daemon starts.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use banger_core::forward::{self, ForwardError};
use banger_core::id::MachineId;
use banger_proto::api::{Forward, MachineState};
use banger_proto::error::{ApiError, ErrorCode};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use crate::agent::relay;
use crate::error::IntoApi;
use crate::machine::Machine;
use crate::reach::reach;
use crate::services::Services;

/// Connections of one machine that are relayed at once; more wait to be accepted. Some of the link's places are left to sessions and
/// transfers.
const CONNECTIONS: usize = 40;
/// Connections that wait to be accepted, for each port.
const BACKLOG: i32 = 128;
/// How long to wait when there is no room for another connection.
const ROOM: Duration = Duration::from_millis(100);
/// How often a port is tried again that was taken when the daemon started.
const AGAIN: Duration = Duration::from_secs(5);

/// The listeners of all machines.
#[derive(Debug, Default)]
pub struct Forwards {
    machines: Mutex<BTreeMap<MachineId, OfMachine>>,
}

#[derive(Debug)]
struct OfMachine {
    name: String,
    room: Arc<Semaphore>,
    open: Vec<Open>,
}

#[derive(Debug)]
struct Open {
    forward: Forward,
    /// Where new connections go.
    guest_port: Arc<AtomicU16>,
    listener: OwnedFd,
    _accepting: AbortOnDropHandle<()>,
}

impl Drop for Open {
    fn drop(&mut self) {
        // The task lets go of the listener a little later; its port is free at once.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

/// Ports that are bound and not served yet. Dropped, they are free again.
#[derive(Debug, Default)]
pub struct Reserved(Vec<(Forward, Option<TcpListener>)>);

impl Reserved {
    /// The forwards, with the ports that were found for those that left them open.
    pub fn forwards(&self) -> Vec<Forward> {
        self.0.iter().map(|(forward, _)| forward.clone()).collect()
    }
}

impl Forwards {
    fn machines(&self) -> MutexGuard<'_, BTreeMap<MachineId, OfMachine>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Binds ports: all of them, or none. Those that `of` listens on already are its own.
    pub fn reserve(&self, wanted: &[Forward], of: Option<&MachineId>) -> Result<Reserved, ApiError> {
        let wanted = forward::check(wanted).map_err(IntoApi::into_api)?;
        let mut reserved = Vec::with_capacity(wanted.len());
        for forward in wanted {
            let has = |open: &Open| same_socket(&open.forward, &forward) && forward.host_port != 0;
            let own = of.is_some_and(|id| self.machines().get(id).is_some_and(|m| m.open.iter().any(has)));
            if own {
                reserved.push((forward, None));
                continue;
            }
            let bound = bind(&forward).map_err(|e| self.explain(&forward, &e))?;
            reserved.push((bound.0, Some(bound.1)));
        }
        Ok(Reserved(reserved))
    }

    /// What is to be said of a port that could not be bound.
    fn explain(&self, wanted: &Forward, e: &std::io::Error) -> ApiError {
        let socket = forward::socket(wanted);
        let (code, why, hint) = match e.kind() {
            std::io::ErrorKind::AddrInUse => {
                let machines = self.machines();
                let clash = |open: &Open| open.forward.host_port == wanted.host_port;
                let holder = machines.values().find(|m| m.open.iter().any(clash));
                let why = holder.map_or_else(
                    || "another program listens there".to_owned(),
                    |m| format!("it leads to machine `{}`", m.name),
                );
                let hint = format!("choose another port, or -p {} for any that is free", wanted.guest_port);
                (ErrorCode::Conflict, why, hint)
            }
            std::io::ErrorKind::AddrNotAvailable => (
                ErrorCode::InvalidSpec,
                "this host does not have that address".to_owned(),
                "`ip address` shows those it has; 0.0.0.0 stands for all of them".to_owned(),
            ),
            std::io::ErrorKind::PermissionDenied => (
                ErrorCode::InvalidSpec,
                "ports below 1024 need privileges that the daemon does not have".to_owned(),
                "choose a port from 1024 on".to_owned(),
            ),
            _ => (ErrorCode::Internal, e.to_string(), "choose another port".to_owned()),
        };
        ApiError::new(code, format!("port {socket} of this host cannot be had: {why}")).hint(hint)
    }

    /// Serves what was reserved for a machine, in place of what it had. Must be called within a runtime.
    pub fn open(&self, m: &Arc<Machine>, reserved: Reserved) {
        let mut machines = self.machines();
        if reserved.0.is_empty() || m.is_gone() {
            machines.remove(&m.id);
            return;
        }
        let entry = machines.entry(m.id.clone()).or_insert_with(|| OfMachine {
            name: String::new(),
            room: Arc::new(Semaphore::new(CONNECTIONS)),
            open: Vec::new(),
        });
        entry.name = m.name();
        let mut before = std::mem::take(&mut entry.open);
        for (forward, listener) in reserved.0 {
            match listener {
                Some(listener) => match serve(m, &entry.room, forward, listener) {
                    Ok(open) => entry.open.push(open),
                    Err(e) => tracing::warn!(machine = %m.id, error = %e, "a port is not forwarded"),
                },
                None => {
                    let own = before.iter().position(|open| same_socket(&open.forward, &forward));
                    entry.open.extend(own.map(|at| {
                        let mut open = before.swap_remove(at);
                        open.guest_port.store(forward.guest_port, Ordering::Relaxed);
                        open.forward = forward;
                        open
                    }));
                }
            }
        }
    }

    /// Makes sure that a machine's forwards are served.
    pub fn ensure(&self, m: &Arc<Machine>) -> Result<(), ApiError> {
        let wanted = m.row().forwards;
        let served = self
            .machines()
            .get(&m.id)
            .map(|o| o.open.iter().map(|open| open.forward.clone()).collect::<Vec<_>>());
        if served.unwrap_or_default() == wanted {
            return Ok(());
        }
        let reserved = self.reserve(&wanted, Some(&m.id))?;
        self.open(m, reserved);
        Ok(())
    }

    /// Whether there is any listener.
    pub fn serve_any(&self) -> bool {
        !self.machines().is_empty()
    }

    /// Ends a machine's listeners, and the connections through them.
    pub fn close(&self, id: &MachineId) {
        let closed = self.machines().remove(id);
        drop(closed);
    }
}

impl IntoApi for ForwardError {
    fn into_api(self) -> ApiError {
        ApiError::new(ErrorCode::InvalidSpec, self.to_string()).hint(self.hint())
    }
}

fn same_socket(one: &Forward, other: &Forward) -> bool {
    (&one.host_ip, one.host_port) == (&other.host_ip, other.host_port)
}

/// Whether a machine in this state has listeners.
pub fn serves(state: MachineState) -> bool {
    !matches!(
        state,
        MachineState::Stopped | MachineState::Stopping | MachineState::Error | MachineState::Deleting
    )
}

/// Serves the forwards of machines that were there when the daemon started. A port that is taken is tried again for as long as its
/// machine is there.
pub fn restore(services: &Arc<Services>) {
    let mut missing = Vec::new();
    for m in services.machines() {
        if !serves(m.state()) || m.row().forwards.is_empty() {
            continue;
        }
        if let Err(e) = services.forwards.ensure(&m) {
            tracing::warn!(machine = %m.id, error = %e.message, "its ports are not forwarded; tried again");
            missing.push(m);
        }
    }
    if missing.is_empty() {
        return;
    }
    let services = services.clone();
    tokio::spawn(async move {
        while !missing.is_empty() {
            tokio::select! {
                () = tokio::time::sleep(AGAIN) => {}
                () = services.stopping.cancelled() => return,
            }
            missing.retain(|m| !m.is_gone() && serves(m.state()) && services.forwards.ensure(m).is_err());
        }
    });
}

/// Binds one port, and tells which it is.
fn bind(wanted: &Forward) -> std::io::Result<(Forward, TcpListener)> {
    let ip = forward::host_ip(wanted).map_err(std::io::Error::other)?;
    let address = SocketAddr::new(ip, wanted.host_port);
    let (family, flags) = match ip {
        std::net::IpAddr::V4(_) => (AddressFamily::INET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK),
        std::net::IpAddr::V6(_) => (AddressFamily::INET6, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK),
    };
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // Connections of before that linger don't keep it.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if ip.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    let listener = TcpListener::from(socket);
    let bound = Forward {
        host_ip: ip.to_string(),
        host_port: listener.local_addr()?.port(),
        guest_port: wanted.guest_port,
    };
    Ok((bound, listener))
}

fn serve(m: &Arc<Machine>, room: &Arc<Semaphore>, forward: Forward, listener: TcpListener) -> std::io::Result<Open> {
    let kept = OwnedFd::from(listener.try_clone()?);
    let listener = tokio::net::TcpListener::from_std(listener)?;
    tracing::info!(machine = %m.id, forward = forward::show(&forward), "forwarded");
    let guest_port = Arc::new(AtomicU16::new(forward.guest_port));
    let accepting = accept(m.clone(), room.clone(), listener, guest_port.clone());
    Ok(Open {
        forward,
        guest_port,
        listener: kept,
        _accepting: AbortOnDropHandle::new(tokio::spawn(accepting)),
    })
}

/// Takes connections until it is dropped, and they with it.
async fn accept(m: Arc<Machine>, room: Arc<Semaphore>, listener: tokio::net::TcpListener, port: Arc<AtomicU16>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                tracing::debug!(machine = %m.id, error = %e, "no connection was accepted");
                tokio::time::sleep(ROOM).await;
                continue;
            }
        };
        let Ok(place) = room.clone().acquire_owned().await else {
            return;
        };
        let (m, port) = (m.clone(), port.load(Ordering::Relaxed));
        connections.spawn(async move {
            let _place = place;
            connection(&m, stream, port).await;
        });
    }
}

async fn connection(m: &Arc<Machine>, stream: TcpStream, port: u16) {
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(&stream, true);
    let work = async {
        m.services.reconciled().await?;
        let (used, link) = reach(m).await?;
        let done = relay::tcp(&stream, &link, port).await.map_err(IntoApi::into_api);
        drop(used);
        done
    };
    let done = tokio::select! {
        done = work => done,
        () = m.services.stopping.cancelled() => Ok(()),
    };
    if let Err(e) = done {
        tracing::info!(machine = %m.id, port, error = %e.message, "forwarded connection ended");
        // What the guest refused, or broke off, is not an orderly end.
        let _ = sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(host_port: u16, guest_port: u16) -> Forward {
        Forward {
            host_ip: "127.0.0.1".to_owned(),
            host_port,
            guest_port,
        }
    }

    #[test]
    fn ports_are_reserved_all_or_none() {
        let forwards = Forwards::default();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = forwards
            .reserve(&[forward(0, 80), forward(port, 81)], None)
            .unwrap_err();
        assert_eq!(error.code, ErrorCode::Conflict);
        assert!(
            error.message.contains(&format!("127.0.0.1:{port}")),
            "{}",
            error.message
        );
        assert!(error.hint.unwrap().contains("-p 81"));
        drop(taken);
        let reserved = forwards.reserve(&[forward(0, 80), forward(port, 81)], None).unwrap();
        let found = reserved.forwards();
        assert!(found[0].host_port != 0 && found[1] == forward(port, 81));
        assert!(forwards.reserve(&[forward(port, 81)], None).is_err());
        drop(reserved);
        assert!(forwards.reserve(&found, None).is_ok());
    }

    #[tokio::test]
    async fn a_port_is_free_as_soon_as_it_is_closed() {
        let (wanted, listener) = bind(&forward(0, 80)).unwrap();
        let kept = OwnedFd::from(listener.try_clone().unwrap());
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let accepting = tokio::spawn(async move { listener.accept().await.map(drop) });
        tokio::task::yield_now().await;
        let open = Open {
            forward: wanted.clone(),
            guest_port: Arc::default(),
            listener: kept,
            _accepting: AbortOnDropHandle::new(tokio::spawn(std::future::pending())),
        };
        assert!(bind(&wanted).is_err());
        drop(open);
        let (again, _listener) = bind(&wanted).unwrap();
        assert_eq!(again, wanted);
        assert!(accepting.await.unwrap().is_err());
    }

    #[test]
    fn what_cannot_be_had_is_told() {
        let forwards = Forwards::default();
        let elsewhere = Forward {
            host_ip: "192.0.2.1".to_owned(),
            ..forward(0, 80)
        };
        let error = forwards.reserve(&[elsewhere], None).unwrap_err();
        assert!(
            error.message.contains("does not have that address"),
            "{}",
            error.message
        );
        let nonsense = Forward {
            host_ip: "nonsense".to_owned(),
            ..forward(0, 80)
        };
        assert_eq!(
            forwards.reserve(&[nonsense], None).unwrap_err().code,
            ErrorCode::InvalidSpec
        );
    }
}
