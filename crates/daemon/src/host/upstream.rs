//! The name servers that guests are told: those of the host.

use std::net::Ipv4Addr;
use std::path::Path;

/// Most of them.
const MOST: usize = 3;
/// Largest file that is read.
const MAX: u64 = 64 << 10;

/// Where the host's resolver says whom it asks, the best first.
const FILES: [&str; 2] = ["run/systemd/resolve/resolv.conf", "etc/resolv.conf"];

/// The host's name servers that a guest can reach too.
pub(super) fn read(root: &Path) -> Vec<Ipv4Addr> {
    use std::io::Read;
    for file in FILES {
        let mut text = String::new();
        let read = std::fs::File::open(root.join(file)).and_then(|f| f.take(MAX).read_to_string(&mut text));
        if read.is_ok() {
            let servers = parse(&text);
            if !servers.is_empty() {
                return servers;
            }
        }
    }
    Vec::new()
}

/// The servers of a `resolv.conf`; those on the host's own loopback, and link-local ones, are of no use to a guest.
fn parse(text: &str) -> Vec<Ipv4Addr> {
    let server = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let keyword = words.next()? == "nameserver";
        let address: Ipv4Addr = words.next().filter(|_| keyword)?.parse().ok()?;
        // Link-local ones are where some clouds have both names and secrets: machines do not reach that range.
        let closed =
            address.is_loopback() || address.is_unspecified() || address.is_multicast() || address.is_link_local();
        let reachable = !closed;
        reachable.then_some(address)
    };
    text.lines().filter_map(server).take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_servers_that_a_guest_reaches() {
        let text = "# x\nsearch lan\nnameserver 127.0.0.53\nnameserver 169.254.169.254\nnameserver ::1\nnameserver 192.168.1.1\n nameserver 9.9.9.9 \nnameserver x\n";
        assert_eq!(parse(text), [Ipv4Addr::new(192, 168, 1, 1), Ipv4Addr::new(9, 9, 9, 9)]);
        assert!(parse("nameserver\n\0\nnameserver 127.0.0.1").is_empty());
        let tmp = tempfile::tempdir().unwrap();
        assert!(read(tmp.path()).is_empty());
        std::fs::create_dir_all(tmp.path().join("etc")).unwrap();
        std::fs::write(tmp.path().join("etc/resolv.conf"), text).unwrap();
        assert_eq!(read(tmp.path()).len(), 2);
    }
}
