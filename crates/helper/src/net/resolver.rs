//! The host's resolver: systemd-resolved asks the daemon for names below `.vm`, where it runs.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use banger_system::helper::HelperError;
use banger_system::net::Network;

use crate::ctx::Ctx;

/// Where `resolvectl` is.
const RESOLVECTL: &[&str] = &["/usr/bin/resolvectl", "/bin/resolvectl"];
/// How long it may take; it waits for a service.
const LIMIT: Duration = Duration::from_secs(5);

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
