//! Telling systemd that calls can come: `READY=1` to the socket that it named.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

/// Tells it, where somebody wants to know. That nobody listens is no reason not to serve.
pub(crate) fn ready(socket: Option<&OsStr>) {
    let _ = socket.and_then(address).and_then(|address| {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None).ok()?;
        rustix::net::sendto(&socket, b"READY=1\n", SendFlags::NOSIGNAL, &address).ok()
    });
}

/// A path, or a name in the abstract namespace where it begins with `@`.
fn address(name: &OsStr) -> Option<SocketAddrUnix> {
    match name.as_bytes() {
        [b'/', ..] => SocketAddrUnix::new(name).ok(),
        [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        ready(Some(path.as_os_str()));
        let mut buffer = [0; 32];
        let count = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"READY=1\n");
        ready(None);
        ready(Some(OsStr::new("relative")));
        ready(Some(OsStr::new("/nonexistent/notify")));
    }
}
