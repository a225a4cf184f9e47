//! The kernel's word that the host's ways have changed: routes, and which interfaces forward. What machines reach follows from both.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Groups of messages: routes of IPv4 (`RTNLGRP_IPV4_ROUTE`), settings of its interfaces (`RTNLGRP_IPV4_NETCONF`).
const GROUPS: u32 = 1 << (7 - 1) | 1 << (24 - 1);

/// Hears of changes.
#[derive(Debug)]
pub(super) struct Ways(Option<AsyncFd<OwnedFd>>);

impl Ways {
    /// Listens from now on. Where the kernel does not let it, nothing is ever heard.
    pub(super) fn listen() -> Self {
        Self(
            open()
                .inspect_err(|e| tracing::warn!(error = %e, "changes of routes are not heard of"))
                .ok(),
        )
    }

    /// Waits for the next change, or for several at once.
    pub(super) async fn changed(&self) {
        let Some(socket) = &self.0 else {
            return std::future::pending().await;
        };
        loop {
            let Ok(mut ready) = socket.readable().await else {
                return std::future::pending().await;
            };
            let mut heard = false;
            // Bounded: what comes faster than it is read is heard of the next time.
            for _ in 0..1024 {
                let mut buffer = [0u8; 64];
                match rustix::net::recv(socket.get_ref(), &mut buffer[..], RecvFlags::TRUNC) {
                    // Some were lost because there were too many: that is a change as well.
                    Ok(_) | Err(rustix::io::Errno::NOBUFS) => heard = true,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(_) => {
                        ready.clear_ready();
                        break;
                    }
                }
            }
            if heard {
                return;
            }
        }
    }
}

fn open() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
    // SAFETY: the watch owns the descriptor, which so stays open and the same for as long as it is registered.
    unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }.map_err(io::Error::from)
}
