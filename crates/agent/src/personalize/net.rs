//! Static network configuration by netlink, since an image need not have any tool for it.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use banger_proto::agent::GuestNetwork;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTNH_F_ONLINK: u32 = 4;

/// Addresses as they were asked for, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    address: Ipv4Addr,
    prefix: u8,
    gateway: Ipv4Addr,
    mac: Option<[u8; 6]>,
}

impl Addresses {
    /// Reads them; `None` when they are none.
    pub fn of(network: &GuestNetwork) -> Option<Self> {
        let (address, gateway) = (network.address.parse().ok()?, network.gateway.parse().ok()?);
        let mac = match &network.mac {
            Some(text) => Some(mac(text)?),
            None => None,
        };
        (network.prefix <= 32).then_some(Self {
            address,
            prefix: network.prefix,
            gateway,
            mac,
        })
    }

    /// Whether the gateway is in the network of the address: else the kernel has to be told that it is on the link.
    fn reaches_gateway(&self) -> bool {
        let differs = u32::from(self.address) ^ u32::from(self.gateway);
        differs.leading_zeros() >= u32::from(self.prefix)
    }
}

/// Brings loopback up.
pub fn loopback_up() -> io::Result<()> {
    // Its index is always 1, and the kernel gives it its address.
    Link::open()?.ask(&up(1))
}

/// The six bytes of a MAC address of one interface: not all zero, not of a group.
fn mac(text: &str) -> Option<[u8; 6]> {
    let mut out = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut out {
        let part = parts
            .next()
            .filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && out != [0; 6] && out[0] & 1 == 0).then_some(out)
}

fn index(name: &str) -> io::Result<u32> {
    std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))?
        .trim()
        .parse()
        .map_err(io::Error::other)
}

/// Brings the interface `name` up with a static address and a default route.
pub fn configure(name: &str, addresses: &Addresses) -> io::Result<()> {
    if let Some(mac) = addresses.mac {
        crate::sys::set_hardware_address(name, mac)?;
    }
    let index = index(name)?;
    let mut link = Link::open()?;
    link.ask(&address(RTM_NEWADDR, index, addresses))?;
    link.ask(&up(index))?;
    link.ask(&default_route(index, addresses))
}

/// Turns the configuration `old` of the interface `name` into `new`. A MAC address is changed under way, so that addresses and
/// routes stay.
pub fn change(name: &str, old: Option<&Addresses>, new: Option<&Addresses>) -> io::Result<()> {
    if old.is_none() && new.is_none() {
        return Ok(());
    }
    if let Some(mac) = new.and_then(|new| new.mac) {
        // Not by netlink, which has the kernel run ten times the code for it.
        crate::sys::set_hardware_address(name, mac)?;
    }
    let place = |a: &Addresses| (a.address, a.prefix);
    let moves = old.map(place) != new.map(place);
    if !moves && old.map(|old| old.gateway) == new.map(|new| new.gateway) {
        return Ok(());
    }
    let index = index(name)?;
    let mut link = Link::open()?;
    if let Some(old) = old.filter(|_| moves) {
        // Its routes go with it. One that the user has removed is not missed.
        match link.ask(&address(RTM_DELADDR, index, old)) {
            Err(e) if e.raw_os_error() == Some(Errno::ADDRNOTAVAIL.raw_os_error()) => {}
            other => other?,
        }
    }
    let Some(new) = new else { return Ok(()) };
    link.ask(&address(RTM_NEWADDR, index, new))?;
    link.ask(&up(index))?;
    link.ask(&default_route(index, new))
}

struct Link {
    socket: OwnedFd,
}

impl Link {
    fn open() -> io::Result<Self> {
        // Routes are protocol 0 of this family, which is what no protocol means.
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        Ok(Self { socket })
    }

    /// Sends one request; the kernel has carried it out, or refused it, when this comes back.
    fn ask(&mut self, message: &[u8]) -> io::Result<()> {
        rustix::net::send(&self.socket, message, SendFlags::empty())?;
        let mut answer = [0; 4096];
        let (_, n) = rustix::net::recv(&self.socket, &mut answer, RecvFlags::empty())?;
        outcome(&answer[..n.min(4096)])
    }
}

/// Reads the acknowledgement.
fn outcome(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    let code = answer
        .get(16..20)
        .and_then(|b| b.try_into().ok())
        .map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
        _ => Err(io::Error::other("an answer of the kernel that is no acknowledgement")),
    }
}

fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(16 + payload.len()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(16 + payload.len());
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    out.extend([0; 8]);
    out.extend(payload);
    out
}

fn attribute<const N: usize>(out: &mut Vec<u8>, kind: u16, value: [u8; N]) {
    out.extend(u16::try_from(4 + N).unwrap_or(u16::MAX).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn up(index: u32) -> Vec<u8> {
    // struct ifinfomsg: family, pad, type, index, flags, change mask.
    let mut payload = vec![0; 4];
    payload.extend(index.to_ne_bytes());
    payload.extend(IFF_UP.to_ne_bytes());
    payload.extend(IFF_UP.to_ne_bytes());
    message(RTM_NEWLINK, 0, &payload)
}

fn address(kind: u16, index: u32, addresses: &Addresses) -> Vec<u8> {
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    let mut payload = vec![AF_INET, addresses.prefix, 0, 0];
    payload.extend(index.to_ne_bytes());
    attribute(&mut payload, IFA_LOCAL, addresses.address.octets());
    attribute(&mut payload, IFA_ADDRESS, addresses.address.octets());
    let flags = if kind == RTM_NEWADDR {
        NLM_F_CREATE | NLM_F_REPLACE
    } else {
        0
    };
    message(kind, flags, &payload)
}

fn default_route(index: u32, addresses: &Addresses) -> Vec<u8> {
    // struct rtmsg: family, destination and source lengths, tos, table (main), protocol (static), scope (universe), type
    // (unicast), flags.
    let mut payload = vec![AF_INET, 0, 0, 0, 254, 4, 0, 1];
    let flags = if addresses.reaches_gateway() { 0 } else { RTNH_F_ONLINK };
    payload.extend(flags.to_ne_bytes());
    attribute(&mut payload, RTA_GATEWAY, addresses.gateway.octets());
    attribute(&mut payload, RTA_OIF, index.to_ne_bytes());
    message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_their_lengths() {
        let network = GuestNetwork {
            address: "10.0.2.15".into(),
            prefix: 24,
            gateway: "10.0.2.2".into(),
            dns: vec![],
            mac: None,
        };
        let addresses = Addresses::of(&network).unwrap();
        for message in [
            up(1),
            address(RTM_NEWADDR, 2, &addresses),
            address(RTM_DELADDR, 2, &addresses),
            default_route(2, &addresses),
        ] {
            assert_eq!(
                u32::from_ne_bytes(message[..4].try_into().unwrap()) as usize,
                message.len()
            );
            assert_eq!(message.len() % 4, 0);
        }
        assert_eq!(
            Addresses::of(&GuestNetwork {
                prefix: 33,
                ..network.clone()
            }),
            None
        );
        assert_eq!(
            Addresses::of(&GuestNetwork {
                address: "x".into(),
                ..network
            }),
            None
        );
    }

    #[test]
    fn a_gateway_elsewhere_is_on_the_link() {
        let flags = |address: &str, prefix, gateway: &str| {
            let network = GuestNetwork {
                address: address.into(),
                prefix,
                gateway: gateway.into(),
                dns: vec![],
                mac: None,
            };
            default_route(2, &Addresses::of(&network).unwrap())[24]
        };
        assert_eq!(flags("172.16.0.7", 24, "172.16.0.1"), 0);
        assert_eq!(flags("172.16.0.7", 24, "172.16.1.1"), 4);
        assert_eq!(flags("172.16.0.7", 32, "172.16.0.1"), 4);
        assert_eq!(flags("172.16.0.7", 0, "10.0.0.1"), 0);
    }

    #[test]
    fn mac_addresses() {
        assert_eq!(mac("02:00:fe:DC:00:01"), Some([2, 0, 0xfe, 0xdc, 0, 1]));
        for bad in [
            "",
            "02:00:fe:dc:00",
            "02:00:fe:dc:00:01:02",
            "2:0:0:0:0:1",
            "00:00:00:00:00:00",
            "03:00:00:00:00:01",
        ] {
            assert_eq!(mac(bad), None, "{bad}");
        }
        assert_eq!(mac("+2:00:00:00:00:01"), None);
    }

    proptest::proptest! {
        #[test]
        fn every_mac_address_is_read_back(bytes in proptest::array::uniform6(0u8..)) {
            let text = bytes.map(|b| format!("{b:02x}")).join(":");
            let good = bytes[0] & 1 == 0 && bytes != [0; 6];
            proptest::prop_assert_eq!(mac(&text), good.then_some(bytes));
        }

        #[test]
        fn any_text_is_no_harm(text in "\\PC{0,20}") {
            let _ = mac(&text);
        }
    }

    #[test]
    fn refusals_are_errors() {
        let answer = |code: i32| {
            [
                &36u32.to_ne_bytes()[..],
                &2u16.to_ne_bytes(),
                &[0; 10],
                &code.to_ne_bytes(),
            ]
            .concat()
        };
        assert!(outcome(&answer(0)).is_ok());
        assert_eq!(outcome(&answer(-19)).unwrap_err().raw_os_error(), Some(19));
        assert!(outcome(&[]).is_err());
    }
}
