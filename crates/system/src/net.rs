//! A machine's place in the network of system mode, and everything that follows from it.
//!
//! A machine has a **slot**, a small number that the daemon allocates and writes down with the machine's row. Address, MAC, tap and
//! the user id of its jail are functions of the slot, so that daemon and helper compute the same without telling each other, and
//! taps can be made, with all their rules, before anybody knows whose they will be.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::overlap::Block;

/// Name of the bridge when the configuration has none.
pub const DEFAULT_BRIDGE: &str = "br-fc";
/// Address of the bridge, with its prefix, when the configuration has none.
pub const DEFAULT_ADDRESS: (Ipv4Addr, u8) = (Ipv4Addr::new(172, 16, 0, 1), 24);
/// Port of the name server for `.vm` on 127.0.0.1 when the configuration has none. Privileged, so that no user of the host can take it
/// while the daemon is away and answer in its place; below those that programs of root pick at random (512 to 1023); assigned to
/// nothing.
pub const DNS_PORT: u16 = 253;
/// The first port that is not privileged, where the host says nothing else.
pub const FIRST_OPEN_PORT: u16 = 1024;
/// What every tap's name begins with; the slot follows.
pub const TAP_PREFIX: &str = "tap-fc-";
/// Highest slot. With the prefix it still fits the 15 characters of an interface's name.
pub const MAX_SLOT: u32 = 65_533;
/// User and group id of the jail of slot 0. The range is one that systemd leaves to nobody
/// (`1879048192` to `2147352575`, see systemd's `UIDS-GIDS.md`).
pub const JAIL_UID_BASE: u32 = 1_879_048_192;

/// The network of machines in system mode: one bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawNetwork", into = "RawNetwork")]
pub struct Network {
    bridge: String,
    address: Ipv4Addr,
    prefix: u8,
}

/// The wire form of [`Network`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNetwork {
    bridge: String,
    address: Ipv4Addr,
    prefix: u8,
}

impl TryFrom<RawNetwork> for Network {
    type Error = NetError;

    fn try_from(raw: RawNetwork) -> Result<Self, NetError> {
        Self::new(&raw.bridge, raw.address, raw.prefix)
    }
}

impl From<Network> for RawNetwork {
    fn from(net: Network) -> Self {
        Self {
            bridge: net.bridge,
            address: net.address,
            prefix: net.prefix,
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            bridge: DEFAULT_BRIDGE.to_owned(),
            address: DEFAULT_ADDRESS.0,
            prefix: DEFAULT_ADDRESS.1,
        }
    }
}

/// Why a network is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetError {
    /// The bridge's name.
    #[error("`{0}` is not a bridge of banger's: `br-fc` and `br-fc-…` (at most 15 of a-z, 0-9 and -) are")]
    Bridge(String),
    /// The prefix.
    #[error("a prefix of /{0} is not possible; /16 to /29 are")]
    Prefix(u8),
    /// The address.
    #[error("{0} is not a private IPv4 address of a host in its network")]
    Address(Ipv4Addr),
    /// The text.
    #[error("`{0}` is not of the form 172.16.0.1/24")]
    Form(String),
    /// A slot that the network does not have.
    #[error("the network {network} has no place {slot}: it ends at {last}")]
    Slot {
        /// The network.
        network: String,
        /// What was asked for.
        slot: u32,
        /// The last one.
        last: u32,
    },
}

impl Network {
    /// A network, checked: a bridge of banger's, a private address (RFC 1918, or 100.64.0.0/10) that is neither the first nor the last of
    /// its network.
    pub fn new(bridge: &str, address: Ipv4Addr, prefix: u8) -> Result<Self, NetError> {
        check_bridge(bridge)?;
        if !(16..=29).contains(&prefix) {
            return Err(NetError::Prefix(prefix));
        }
        let shared = u32::from(address) & 0xffc0_0000 == u32::from(Ipv4Addr::new(100, 64, 0, 0));
        let net = Self {
            bridge: bridge.to_owned(),
            address,
            prefix,
        };
        let host = u32::from(address) - net.base();
        if !(address.is_private() || shared) || host == 0 || host > net.hosts() {
            return Err(NetError::Address(address));
        }
        Ok(net)
    }

    /// Reads address and prefix, `172.16.0.1/24`.
    pub fn parse(bridge: &str, text: &str) -> Result<Self, NetError> {
        let form = || NetError::Form(text.escape_default().to_string());
        let (address, prefix) = text.split_once('/').ok_or_else(form)?;
        let address = address.parse().map_err(|_| form())?;
        let prefix = prefix.parse().map_err(|_| form())?;
        Self::new(bridge, address, prefix)
    }

    /// Name of the bridge.
    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    /// Address of the bridge: the guests' gateway.
    pub fn gateway(&self) -> Ipv4Addr {
        self.address
    }

    /// Length of the prefix.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Its range.
    pub fn block(&self) -> Block {
        Block {
            address: self.address,
            prefix: self.prefix,
        }
    }

    /// `172.16.0.1/24`: the bridge's address with the prefix.
    pub fn text(&self) -> String {
        format!("{}/{}", self.address, self.prefix)
    }

    /// `172.16.0.0/24`
    pub fn cidr(&self) -> String {
        format!("{}/{}", Ipv4Addr::from(self.base()), self.prefix)
    }

    fn base(&self) -> u32 {
        u32::from(self.address) & (u32::MAX << (32 - u32::from(self.prefix)))
    }

    /// Addresses of hosts.
    fn hosts(&self) -> u32 {
        (1 << (32 - u32::from(self.prefix))) - 2
    }

    /// The last slot: one per address, the bridge's left out.
    pub fn last_slot(&self) -> u32 {
        (self.hosts() - 2).min(MAX_SLOT)
    }

    /// Checks a slot.
    pub fn check(&self, slot: u32) -> Result<(), NetError> {
        if slot <= self.last_slot() {
            Ok(())
        } else {
            Err(NetError::Slot {
                network: self.cidr(),
                slot,
                last: self.last_slot(),
            })
        }
    }

    /// Address of a slot's machine: the slot-th address of the network that is not the bridge's.
    pub fn address(&self, slot: u32) -> Result<Ipv4Addr, NetError> {
        self.check(slot)?;
        let bridge = u32::from(self.address) - self.base();
        let host = slot + 1;
        Ok(Ipv4Addr::from(self.base() + host + u32::from(host >= bridge)))
    }

    /// MAC address of a slot's machine: `02:fc:` and the bytes of its address.
    pub fn mac(&self, slot: u32) -> Result<String, NetError> {
        let [a, b, c, d] = self.address(slot)?.octets();
        Ok(format!("02:fc:{a:02x}:{b:02x}:{c:02x}:{d:02x}"))
    }
}

/// Name of a slot's tap.
pub fn tap(slot: u32) -> String {
    format!("{TAP_PREFIX}{slot}")
}

/// The slot of a tap's name, if it is one of banger's.
pub fn tap_slot(name: &str) -> Option<u32> {
    let digits = name.strip_prefix(TAP_PREFIX)?;
    let slot = digits.parse().ok()?;
    (slot <= MAX_SLOT && tap(slot) == name).then_some(slot)
}

/// User and group id of a slot's jail.
pub fn jail_uid(slot: u32) -> u32 {
    JAIL_UID_BASE + slot.min(MAX_SLOT)
}

fn check_bridge(name: &str) -> Result<(), NetError> {
    let tail = match name.strip_prefix(DEFAULT_BRIDGE) {
        Some("") => return Ok(()),
        Some(tail) => tail,
        None => return Err(NetError::Bridge(name.escape_default().to_string())),
    };
    let fits = tail.len() > 1
        && tail.starts_with('-')
        && name.len() <= 15
        && tail.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    if fits {
        Ok(())
    } else {
        Err(NetError::Bridge(name.escape_default().to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_guest_is_behind_the_bridge() {
        let net = Network::default();
        assert_eq!(net.address(0).unwrap(), Ipv4Addr::new(172, 16, 0, 2));
        assert_eq!(net.mac(0).unwrap(), "02:fc:ac:10:00:02");
        assert_eq!((net.cidr().as_str(), net.last_slot()), ("172.16.0.0/24", 252));
        assert_eq!((tap(7).as_str(), tap_slot("tap-fc-7")), ("tap-fc-7", Some(7)));
        assert!(tap(MAX_SLOT).len() <= 15);
        for foreign in ["tap-fc-", "tap-fc-07", "tap-fc-+7", "tap-fc-99999", "tap0", "tap-fc-7x"] {
            assert_eq!(tap_slot(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn only_bridges_of_banger() {
        let with = |name: &str| Network::new(name, DEFAULT_ADDRESS.0, 24);
        for good in ["br-fc", "br-fc-x", "br-fc-test-1"] {
            assert!(with(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "br0",
            "docker0",
            "br-fcx",
            "br-fc-",
            "br-fc-A",
            "br-fc-../x",
            "br-fc-0123456789",
            "br-fc-x y",
        ] {
            assert!(matches!(with(bad), Err(NetError::Bridge(_))), "{bad}");
        }
    }

    #[test]
    fn only_private_networks() {
        let parse = |text| Network::parse(DEFAULT_BRIDGE, text);
        assert!(parse("10.1.2.3/16").is_ok() && parse("100.64.9.1/24").is_ok());
        for bad in [
            "8.8.8.8/24",
            "172.16.0.0/24",
            "172.16.0.255/24",
            "127.0.0.1/24",
            "169.254.1.1/24",
        ] {
            assert!(matches!(parse(bad), Err(NetError::Address(_))), "{bad}");
        }
        assert_eq!(parse("10.0.0.1/8"), Err(NetError::Prefix(8)));
        for bad in ["", "10.0.0.1", "10.0.0.1/", "10.0.0/24", "x/24", "10.0.0.1/-1"] {
            assert!(matches!(parse(bad), Err(NetError::Form(_))), "{bad}");
        }
        let text = r#"{"bridge":"br0","address":"172.16.0.1","prefix":24}"#;
        assert!(
            serde_json::from_str::<Network>(text).is_err(),
            "the wire is checked too"
        );
    }

    proptest! {
        #[test]
        fn every_slot_has_an_address_of_its_own(prefix in 24u8..=29, host in 1u32..=254) {
            let bits = (1u32 << (32 - u32::from(prefix))) - 2;
            let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 3, 4, 0)) + 1 + host % bits);
            let net = Network::new("br-fc", address, prefix).unwrap();
            let all: BTreeSet<_> = (0..=net.last_slot()).map(|s| net.address(s).unwrap()).collect();
            prop_assert_eq!(all.len() as u32, net.last_slot() + 1);
            prop_assert!(!all.contains(&address));
            prop_assert!(all.iter().all(|a| u32::from(*a) > net.base() && u32::from(*a) <= net.base() + bits));
            prop_assert!(net.address(net.last_slot() + 1).is_err());
        }
    }
}
