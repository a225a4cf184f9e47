//! The host's resolver: systemd-resolved asks the daemon for names below `.vm`, where it runs.

use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use banger_system::helper::{HelperCode, HelperError};
use banger_system::net::{DNS_PORT, Network};

use crate::ctx::{Ctx, error, failed};

/// Where `resolvectl` is.
const RESOLVECTL: &[&str] = &["/usr/bin/resolvectl", "/bin/resolvectl"];
/// How long it may take; it waits for a service.
const LIMIT: Duration = Duration::from_secs(5);

/// The sockets that the daemon answers from, for datagrams and connections. The port is root's to bind: when the daemon has gone
/// nobody else can take it, and the next one is given it again. Nothing of it is kept here.
pub(crate) fn sockets() -> Result<Vec<OwnedFd>, HelperError> {
    let address = (Ipv4Addr::LOCALHOST, DNS_PORT);
    let cannot = |e: io::Error| match e.kind() {
        io::ErrorKind::AddrInUse => error(
            HelperCode::Conflict,
            format!("port {DNS_PORT} of 127.0.0.1 is somebody's already"),
        ),
        _ => failed(format_args!("bind port {DNS_PORT} of 127.0.0.1"), e),
    };
    let datagrams = UdpSocket::bind(address).map_err(cannot)?;
    let connections = TcpListener::bind(address).map_err(cannot)?;
    Ok(vec![datagrams.into(), connections.into()])
}

/// Whether systemd-resolved runs: somebody listens on its socket. Asking `resolvectl` where nobody does would wait.
fn runs(ctx: &Ctx) -> bool {
    let socket = ctx.layout.root().join("run/systemd/resolve/io.systemd.Resolve");
    UnixStream::connect(socket).is_ok() && crate::run::find(RESOLVECTL).is_some()
}

/// Routes names below `.vm` to the daemon. False where there is nobody to tell.
pub(crate) fn set(ctx: &Ctx, net: &Network, port: u16) -> Result<bool, HelperError> {
    if !runs(ctx) {
        return Ok(false);
    }
    let server = format!("127.0.0.1:{port}");
    for arguments in [
        ["dns", net.bridge(), &server],
        ["domain", net.bridge(), "~vm"],
        ["default-route", net.bridge(), "false"],
    ] {
        crate::run::run(RESOLVECTL, &arguments, b"", LIMIT)?;
    }
    Ok(true)
}

/// The opposite.
pub(crate) fn clear(ctx: &Ctx, net: &Network) -> Result<(), HelperError> {
    if runs(ctx) {
        crate::run::run(RESOLVECTL, &["revert", net.bridge()], b"", LIMIT)?;
    }
    Ok(())
}
