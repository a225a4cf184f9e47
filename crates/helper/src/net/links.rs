//! Network interfaces: the bridge and taps, read and changed by rtnetlink.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;

use super::netlink::{Message, Socket, attributes, each, find, text, u32_at};
use super::uplinks;

const AF_UNSPEC: u8 = libc::AF_UNSPEC as u8;
const AF_INET: u8 = libc::AF_INET as u8;
const AF_BRIDGE: u8 = libc::AF_BRIDGE as u8;
/// Of a bridge: spanning tree, snooping for multicast.
const BRIDGE_STP: u16 = 5;
const BRIDGE_SNOOPING: u16 = 23;
/// Of a bridge's port: it takes the senders of frames for its own; it gets frames for those whom nobody knows.
const PORT_LEARNING: u16 = 8;
const PORT_FLOOD: u16 = 9;
/// Of a bridge's port: it exchanges no frames with others that have this.
const PORT_ISOLATED: u16 = 33;
/// Of a tap: whose it is.
const TUN_OWNER: u16 = 1;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const NESTED: u16 = 0x8000;

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Link {
    /// Its number.
    pub(crate) index: u32,
    /// Its name.
    pub(crate) name: String,
    /// Its alias; empty without one.
    pub(crate) alias: String,
    /// What it is: `bridge`, `tun`; empty for hardware.
    pub(crate) kind: String,
    /// Number of the bridge that it is a port of.
    pub(crate) master: Option<u32>,
    /// Its MAC.
    pub(crate) mac: Vec<u8>,
    /// It is up.
    pub(crate) up: bool,
    /// User who may open it, of a tap.
    pub(crate) owner: Option<u32>,
}

/// Interfaces of this network namespace.
#[derive(Debug)]
pub(crate) struct Links(Socket);

impl Links {
    pub(crate) fn open() -> io::Result<Self> {
        Socket::route().map(Self)
    }

    /// All interfaces.
    pub(crate) fn all(&mut self) -> io::Result<Vec<Link>> {
        let message = Message::new(libc::RTM_GETLINK, 0, &interface(AF_UNSPEC, 0, 0, 0));
        Ok(self.0.dump(&message)?.iter().filter_map(|body| parse(body)).collect())
    }

    /// The interface of a name.
    pub(crate) fn named(&mut self, name: &str) -> io::Result<Option<Link>> {
        let message = Message::new(libc::RTM_GETLINK, 0, &interface(AF_UNSPEC, 0, 0, 0)).text(libc::IFLA_IFNAME, name);
        Ok(self.0.get(&message)?.and_then(|body| parse(&body)))
    }

    /// Numbers of the interfaces by which routes to everywhere lead ([`super::uplinks`]).
    pub(crate) fn defaults(&mut self) -> io::Result<BTreeSet<u32>> {
        let message = Message::new(libc::RTM_GETROUTE, 0, &uplinks::routes());
        let found = self.0.dump_where(&message, uplinks::everywhere)?;
        Ok(found.iter().flat_map(|body| uplinks::interfaces(body)).collect())
    }

    /// Makes a bridge, which is down yet.
    pub(crate) fn make_bridge(&mut self, name: &str, mac: &[u8]) -> io::Result<()> {
        let options = attributes(&[(BRIDGE_STP, &0u32.to_ne_bytes()), (BRIDGE_SNOOPING, &[0])]);
        let info = attributes(&[(IFLA_INFO_KIND, b"bridge"), (IFLA_INFO_DATA | NESTED, &options)]);
        let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let message = Message::new(libc::RTM_NEWLINK, flags, &interface(AF_UNSPEC, 0, 0, 0))
            .text(libc::IFLA_IFNAME, name)
            .put(libc::IFLA_ADDRESS, mac)
            .put(libc::IFLA_LINKINFO | NESTED, &info);
        self.0.act(&message)
    }

    /// Gives an interface its alias, makes it a port of a bridge where one is told, and has it up.
    pub(crate) fn put_up(&mut self, index: u32, alias: &str, master: Option<u32>) -> io::Result<()> {
        let up = libc::IFF_UP.cast_unsigned();
        let mut message = Message::new(libc::RTM_SETLINK, 0, &interface(AF_UNSPEC, index, up, up))
            .put(libc::IFLA_IFALIAS, alias.as_bytes());
        if let Some(master) = master {
            message = message.number(libc::IFLA_MASTER, master);
        }
        self.0.act(&message)
    }

    /// Gives an interface another alias.
    pub(crate) fn set_alias(&mut self, index: u32, alias: &str) -> io::Result<()> {
        let message = Message::new(libc::RTM_SETLINK, 0, &interface(AF_UNSPEC, index, 0, 0))
            .put(libc::IFLA_IFALIAS, alias.as_bytes());
        self.0.act(&message)
    }

    /// Whether a bridge's port exchanges no frames with others of its kind, whatever the rules are.
    pub(crate) fn set_isolated(&mut self, index: u32, isolated: bool) -> io::Result<()> {
        self.set_port(index, &[(PORT_ISOLATED, &[u8::from(isolated)])])
    }

    /// Has a bridge's port be the only one that frames for a MAC go to, and get no frames for MACs that are nobody's.
    pub(crate) fn pin(&mut self, index: u32, mac: &[u8]) -> io::Result<()> {
        self.set_port(index, &[(PORT_LEARNING, &[0]), (PORT_FLOOD, &[0])])?;
        let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        self.0
            .act(&Message::new(libc::RTM_NEWNEIGH, flags, &static_entry(index)).put(libc::NDA_LLADDR, mac))
    }

    fn set_port(&mut self, index: u32, options: &[(u16, &[u8])]) -> io::Result<()> {
        let message = Message::new(libc::RTM_SETLINK, 0, &interface(AF_BRIDGE, index, 0, 0))
            .put(libc::IFLA_PROTINFO | NESTED, &attributes(options));
        self.0.act(&message)
    }

    /// Removes an interface.
    pub(crate) fn delete(&mut self, index: u32) -> io::Result<()> {
        self.0
            .act(&Message::new(libc::RTM_DELLINK, 0, &interface(AF_UNSPEC, index, 0, 0)))
    }

    /// Addresses of IPv4: interface, address, length of the prefix.
    pub(crate) fn addresses(&mut self) -> io::Result<Vec<(u32, Ipv4Addr, u8)>> {
        let dump = Message::new(libc::RTM_GETADDR, 0, &on_interface(0, 0));
        Ok(self
            .0
            .dump(&dump)?
            .iter()
            .filter_map(|body| parse_address(body))
            .collect())
    }

    /// Has an interface have this address and no other of IPv4.
    pub(crate) fn set_address(&mut self, index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let mut there = false;
        for (_, had, length) in self.addresses()?.into_iter().filter(|(on, ..)| *on == index) {
            if (had, length) == (address, prefix) {
                there = true;
                continue;
            }
            let message = Message::new(libc::RTM_DELADDR, 0, &on_interface(index, length))
                .put(libc::IFA_LOCAL, &had.octets())
                .put(libc::IFA_ADDRESS, &had.octets());
            self.0.act(&message)?;
        }
        if there {
            return Ok(());
        }
        let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let message = Message::new(libc::RTM_NEWADDR, flags, &on_interface(index, prefix))
            .put(libc::IFA_LOCAL, &address.octets())
            .put(libc::IFA_ADDRESS, &address.octets());
        self.0.act(&message)
    }
}

/// `struct ifinfomsg`
fn interface(family: u8, index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0] = family;
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..16].copy_from_slice(&change.to_ne_bytes());
    bytes
}

/// `struct ifaddrmsg`
fn on_interface(index: u32, prefix: u8) -> [u8; 8] {
    let [a, b, c, d] = index.to_ne_bytes();
    [AF_INET, prefix, 0, 0, a, b, c, d]
}

/// `struct ndmsg` of an entry of the bridge that does not age.
fn static_entry(index: u32) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[0] = AF_BRIDGE;
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..10].copy_from_slice(&(libc::NUD_NOARP | libc::NUD_REACHABLE).to_ne_bytes());
    bytes[10] = libc::NTF_MASTER;
    bytes
}

fn parse(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32_at(body, 4)?,
        up: u32_at(body, 8)? & libc::IFF_UP.cast_unsigned() != 0,
        ..Link::default()
    };
    for (kind, value) in each(body.get(16..)?) {
        match kind {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_IFALIAS => link.alias = text(value),
            libc::IFLA_ADDRESS => link.mac = value.to_vec(),
            libc::IFLA_MASTER => link.master = u32_at(value, 0),
            libc::IFLA_LINKINFO => {
                link.kind = find(value, IFLA_INFO_KIND).map(text).unwrap_or_default();
                if link.kind == "tun" {
                    let data = find(value, IFLA_INFO_DATA).unwrap_or(&[]);
                    link.owner = find(data, TUN_OWNER).and_then(|owner| u32_at(owner, 0));
                }
            }
            _ => {}
        }
    }
    Some(link)
}

/// Interface, address, length of the prefix.
fn parse_address(body: &[u8]) -> Option<(u32, Ipv4Addr, u8)> {
    let prefix = *body.get(1)?;
    let value = find(body.get(8..)?, libc::IFA_LOCAL)?;
    let octets: [u8; 4] = value.try_into().ok()?;
    Some((u32_at(body, 4)?, octets.into(), prefix))
}
