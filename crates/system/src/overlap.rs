//! Whether a network of machines overlaps what the host has: its addresses, its routes, and the range that Docker takes by default. No I/O:
//! the caller hands over the text of `/proc/net/fib_trie`, which has the addresses and routes of all of the kernel's tables.
//!
//! A bridge whose network overlaps another one takes what the host sends to that one.

use std::net::Ipv4Addr;

use crate::net::Network;

/// Where the kernel tells the host's addresses and routes.
pub const TABLES: &str = "net/fib_trie";
/// Routes with shorter prefixes are ways to everywhere: the default route, or the two halves in its place. The longest private range is a
/// /8.
const LEAST: u8 = 8;
/// What Docker gives its first bridge.
const DOCKER: Block = Block {
    address: Ipv4Addr::new(172, 17, 0, 0),
    prefix: 16,
};
/// Networks that an installation tries, in this order, when none is named.
const CANDIDATES: [[u8; 4]; 6] = [
    [172, 16, 0, 1],
    [172, 16, 200, 1],
    [10, 213, 0, 1],
    [10, 87, 0, 1],
    [192, 168, 213, 1],
    [10, 39, 0, 1],
];

/// A range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// One of its addresses.
    pub address: Ipv4Addr,
    /// Length of its prefix, 0 to 32.
    pub prefix: u8,
}

impl Block {
    fn mask(self) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(self.prefix.min(32))).unwrap_or(0)
    }

    /// Whether all of another one is in it.
    fn holds(self, other: Self) -> bool {
        self.prefix <= other.prefix && (u32::from(self.address) ^ u32::from(other.address)) & self.mask() == 0
    }
}

impl std::fmt::Display for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let base = Ipv4Addr::from(u32::from(self.address) & self.mask());
        write!(f, "{base}/{}", self.prefix)
    }
}

/// What a network overlaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Overlap {
    /// An address of the host, or a route.
    #[error("it overlaps {0}, an address or a route of this host")]
    Host(Block),
    /// Docker's default range.
    #[error("it overlaps {0}, which Docker takes by default")]
    Docker(Block),
}

/// The first thing of the host's that a network overlaps. `tables` is the text of [`TABLES`]; `own` are ranges of banger's bridges, which
/// do not count.
pub fn find(net: &Network, tables: &str, own: &[Block]) -> Option<Overlap> {
    let wanted = net.block();
    let overlaps = |other: &Block| wanted.holds(*other) || other.holds(wanted);
    if overlaps(&DOCKER) {
        return Some(Overlap::Docker(DOCKER));
    }
    blocks(tables)
        .into_iter()
        .filter(|block| !own.iter().any(|own| own.holds(*block)))
        .find(overlaps)
        .map(Overlap::Host)
}

/// The first of the networks that an installation tries that overlaps nothing.
pub fn choose(bridge: &str, tables: &str, own: &[Block]) -> Option<Network> {
    CANDIDATES
        .into_iter()
        .filter_map(|address| Network::new(bridge, address.into(), 24).ok())
        .find(|net| find(net, tables, own).is_none())
}

/// Addresses and routes in the text: a line `|-- ADDRESS`, then one `/LENGTH SCOPE TYPE` for each route to it.
fn blocks(text: &str) -> Vec<Block> {
    let mut address = None;
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(leaf) = line.strip_prefix("|-- ") {
            address = leaf.parse().ok();
        } else if let (Some(address), Some(route)) = (address, line.strip_prefix('/')) {
            let mut words = route.split_whitespace();
            let prefix = words.next().and_then(|n| n.parse().ok()).filter(|n| *n <= 32);
            let kind = words.nth(1).unwrap_or_default();
            if let Some(prefix) = prefix.filter(|n| *n >= LEAST && !matches!(kind, "BROADCAST" | "MULTICAST")) {
                found.push(Block { address, prefix });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Of a laptop: its own network, Docker, a VPN that takes all of 10/8 and, by two halves, the rest.
    const LAPTOP: &str = "Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
        /1 universe UNICAST
     |-- 10.0.0.0
        /8 universe UNICAST
     |-- 128.0.0.0
        /1 universe UNICAST
     +-- 172.18.0.0/16 2 0 2
        |-- 172.18.0.0
           /16 link UNICAST
        |-- 172.18.255.255
           /32 link BROADCAST
     +-- 192.168.1.0/24 2 0 2
        |-- 192.168.1.0
           /24 link UNICAST
        |-- 192.168.1.9
           /32 host LOCAL
Id 51820:
     |-- 100.64.3.0
        /24 universe UNICAST
";

    fn net(text: &str) -> Network {
        Network::parse("br-fc", text).unwrap()
    }

    #[test]
    fn what_the_host_has_is_not_taken() {
        let over = |text| find(&net(text), LAPTOP, &[]).map(|overlap| overlap.to_string());
        for free in ["172.16.0.1/24", "192.168.2.1/24", "172.19.0.1/16", "100.64.4.1/24"] {
            assert_eq!(over(free), None, "{free}");
        }
        for (taken, by) in [
            ("192.168.1.10/29", "192.168.1.0/24"),
            ("192.168.1.129/25", "192.168.1.0/24"),
            ("192.168.0.1/16", "192.168.1.0/24"),
            ("10.9.0.1/24", "10.0.0.0/8"),
            ("172.18.3.1/24", "172.18.0.0/16"),
            ("100.64.3.1/28", "100.64.3.0/24"),
            ("172.17.0.1/16", "172.17.0.0/16, which Docker takes"),
            ("172.17.200.1/24", "172.17.0.0/16, which Docker takes"),
        ] {
            let said = over(taken).unwrap_or_default();
            assert!(said.contains(by), "{taken}: {said}");
        }
    }

    #[test]
    fn what_banger_has_itself_does_not_count() {
        let tables = format!(
            "{LAPTOP}     |-- 172.16.0.0\n        /24 link UNICAST\n     |-- 172.16.0.1\n        /32 host LOCAL\n"
        );
        let wider = net("172.16.0.1/23");
        assert!(find(&wider, &tables, &[]).is_some());
        assert_eq!(find(&wider, &tables, &[net("172.16.0.1/24").block()]), None);
    }

    #[test]
    fn an_installation_finds_a_free_one() {
        assert_eq!(choose("br-fc", "", &[]), Some(Network::default()));
        assert_eq!(choose("br-fc", LAPTOP, &[]).unwrap().cidr(), "172.16.0.0/24");
        let office = format!("{LAPTOP}     |-- 172.16.0.0\n        /12 universe UNICAST\n");
        assert_eq!(choose("br-fc-x", &office, &[]).unwrap().cidr(), "192.168.213.0/24");
        let all = format!("{office}     |-- 192.168.0.0\n        /16 universe UNICAST\n");
        assert_eq!(choose("br-fc", &all, &[]), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "(\\|-- |/|\\+-- |[0-9./ A-Z\n]){0,200}") {
            let _ = choose("br-fc", &text, &[]);
        }
    }
}
