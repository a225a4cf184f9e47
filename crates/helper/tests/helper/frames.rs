//! Guests without machines: frames written to and read from a tap, and a host on the outside.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::support::{ip, net, open_tap, thread_number, tool, unshare_network};

pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Where clouds keep what they tell their machines.
pub(crate) const METADATA: [Ipv4Addr; 5] = [
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(192, 0, 0, 192),
    Ipv4Addr::new(192, 80, 8, 124),
];
/// A network of the host's that is not outside, as Docker has it: the host's address there, and a container's.
pub(crate) const INNER_HOST: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 1);
pub(crate) const CONTAINER: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 2);
const LIMIT: Duration = Duration::from_secs(10);

pub(crate) type Mac = [u8; 6];
pub(crate) const EVERYBODY: Mac = [0xff; 6];

/// MAC of whatever has an address in the network: machines and bridge alike.
pub(crate) fn mac(address: Ipv4Addr) -> Mac {
    let [a, b, c, d] = address.octets();
    [0x02, 0xfc, a, b, c, d]
}

/// A guest on a slot's tap.
#[derive(Debug)]
pub(crate) struct Guest {
    tap: OwnedFd,
    pub(crate) address: Ipv4Addr,
    pub(crate) mac: Mac,
}

impl Guest {
    pub(crate) fn on(slot: u32) -> Self {
        let address = net().address(slot).unwrap();
        let tap = open_tap(&banger_system::net::tap(slot)).unwrap();
        forwards(slot);
        // The host need not ask for its address.
        let text: Vec<String> = mac(address).iter().map(|b| format!("{b:02x}")).collect();
        ip(&format!("neigh replace {address} lladdr {} dev br-fc", text.join(":")));
        Self {
            tap,
            address,
            mac: mac(address),
        }
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        assert_eq!(rustix::io::write(&self.tap, frame).unwrap(), frame.len());
    }

    /// Sends a datagram to an address, by way of the bridge.
    pub(crate) fn say(&self, to: Ipv4Addr, port: u16, text: &str) {
        self.say_from(4000, to, port, text);
    }

    /// The same from another port: another connection.
    pub(crate) fn say_from(&self, from: u16, to: Ipv4Addr, port: u16, text: &str) {
        let packet = ipv4(self.address, to, 17, &udp(from, port, text));
        self.send(&ethernet(mac(net().gateway()), self.mac, 0x0800, &packet));
    }

    /// Sends a datagram straight to another guest.
    pub(crate) fn whisper(&self, to: &Guest, text: &str) {
        let packet = ipv4(self.address, to.address, 17, &udp(4000, 4001, text));
        self.send(&ethernet(to.mac, self.mac, 0x0800, &packet));
    }

    /// The frames that come up to one that has this text in it, without the host's own chatter (IPv6, ARP of the host).
    pub(crate) fn until(&self, text: &str) -> Vec<Vec<u8>> {
        let deadline = Instant::now() + LIMIT;
        let mut frames = Vec::new();
        loop {
            let frame = self
                .next(deadline)
                .unwrap_or_else(|| panic!("`{text}` did not arrive; {frames:02x?} did"));
            if frame.get(6..12) == Some(&mac(net().gateway())) && frame.get(12..14) != Some(&[0x08, 0x00]) {
                continue;
            }
            let found = contains(&frame, text);
            frames.push(frame);
            if found {
                return frames;
            }
        }
    }

    fn next(&self, deadline: Instant) -> Option<Vec<u8>> {
        loop {
            let mut buffer = vec![0; 2048];
            match rustix::io::read(&self.tap, &mut buffer) {
                Ok(count) => {
                    buffer.truncate(count);
                    return Some(buffer);
                }
                Err(rustix::io::Errno::AGAIN) => {}
                Err(e) => panic!("reading a tap: {e}"),
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let left = rustix::time::Timespec::try_from(left).unwrap();
            poll(&mut [PollFd::new(&self.tap, PollFlags::IN)], Some(&left)).unwrap();
        }
    }
}

/// Waits until a tap's port of the bridge takes frames: the kernel has it do so a moment after the tap was opened.
pub(crate) fn forwards(slot: u32) {
    let deadline = Instant::now() + LIMIT;
    let name = banger_system::net::tap(slot);
    while !tool("ip", &format!("-d -o link show {name}"), "").contains("bridge_slave state forwarding") {
        assert!(Instant::now() < deadline, "`{name}` does not come up");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

pub(crate) fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

pub(crate) fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut header = vec![0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0];
    header.extend_from_slice(&from.octets());
    header.extend_from_slice(&to.octets());
    let sum = checksum(&header).to_be_bytes();
    header[10..12].copy_from_slice(&sum);
    [header, payload.to_vec()].concat()
}

pub(crate) fn udp(from: u16, to: u16, text: &str) -> Vec<u8> {
    let length = u16::try_from(8 + text.len()).unwrap();
    [
        &from.to_be_bytes()[..],
        &to.to_be_bytes(),
        &length.to_be_bytes(),
        &[0, 0],
        text.as_bytes(),
    ]
    .concat()
}

pub(crate) fn echo(text: &str) -> Vec<u8> {
    let mut packet = [&[8, 0, 0, 0, 0, 1, 0, 1][..], text.as_bytes()].concat();
    let sum = checksum(&packet).to_be_bytes();
    packet[2..4].copy_from_slice(&sum);
    packet
}

pub(crate) fn arp(operation: u16, from: (Mac, Ipv4Addr), to: (Mac, Ipv4Addr)) -> Vec<u8> {
    [
        &[0, 1, 8, 0, 6, 4][..],
        &operation.to_be_bytes(),
        &from.0,
        &from.1.octets(),
        &to.0,
        &to.1.octets(),
    ]
    .concat()
}

pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// Somebody on a network that the host is in: sockets there.
#[derive(Debug)]
pub(crate) struct Outside {
    /// At port 7 of its addresses, [`METADATA`] among them.
    pub(crate) socket: UdpSocket,
    /// At port 53.
    pub(crate) names: UdpSocket,
    _namespace: mpsc::Sender<()>,
}

impl Outside {
    /// [`OUTSIDE`], to which the host's default route leads, over the interface `out0`.
    pub(crate) fn new() -> Self {
        let outside = Self::beside("out0", HOST, OUTSIDE);
        ip(&format!("route add default via {OUTSIDE}"));
        outside
    }

    /// [`CONTAINER`], on the interface `docker0`, which is no way to anywhere else.
    pub(crate) fn container() -> Self {
        Self::beside("docker0", INNER_HOST, CONTAINER)
    }

    /// Somebody at `there`, whose default route leads to the host, which is `here` and has this interface.
    pub(crate) fn beside(interface: &'static str, host: Ipv4Addr, address: Ipv4Addr) -> Self {
        let (here, there) = mpsc::channel();
        let (hold, held) = mpsc::channel::<()>();
        let (go, gone) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            unshare_network();
            here.send((thread_number(), None)).unwrap();
            gone.recv().unwrap();
            ip("link set lo up");
            ip("link set peer up");
            ip(&format!("addr add {address}/24 dev peer"));
            for address in METADATA {
                ip(&format!("addr add {address}/32 dev peer"));
            }
            ip(&format!("route add default via {host}"));
            let sockets = [7, 53].map(|port| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
            here.send((0, Some(sockets))).unwrap();
            let _ = held.recv();
        });
        let (thread, _) = there.recv().unwrap();
        ip(&format!("link add {interface} type veth peer name peer"));
        ip(&format!("link set peer netns {thread}"));
        ip(&format!("addr add {host}/24 dev {interface}"));
        ip(&format!("link set {interface} up"));
        go.send(()).unwrap();
        let [socket, names] = there.recv().unwrap().1.unwrap();
        for socket in [&socket, &names] {
            socket.set_read_timeout(Some(LIMIT)).unwrap();
        }
        Self {
            socket,
            names,
            _namespace: hold,
        }
    }

    /// The next datagram: its text and where it came from.
    pub(crate) fn heard(&self) -> (String, std::net::SocketAddr) {
        let mut buffer = [0; 2048];
        let (count, from) = self.socket.recv_from(&mut buffer).expect("nothing arrived outside");
        (String::from_utf8_lossy(&buffer[..count]).into_owned(), from)
    }

    /// Nothing came that has not been heard: what the host itself says is the next.
    pub(crate) fn nothing_but(&self, address: Ipv4Addr, marker: &str) {
        let host = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        host.send_to(marker.as_bytes(), (address, 7)).unwrap();
        assert_eq!(self.heard().0, marker);
    }
}
