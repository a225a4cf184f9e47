//! Netlink, as much of it as is needed: one synchronous socket, messages with attributes, answers and dumps.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

/// How long the kernel may take for an answer.
const LIMIT: Duration = Duration::from_secs(10);
/// Bytes of the header of a message.
const HEADER: usize = 16;
/// How often a dump that was disturbed is begun again.
const DUMPS: usize = 10;

const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const ACK: u16 = libc::NLM_F_ACK as u16;
const DUMP: u16 = libc::NLM_F_DUMP as u16;
const INTERRUPTED: u16 = libc::NLM_F_DUMP_INTR as u16;
const KIND: u16 = 0x3fff;

/// A message that is being built: type, flags, fixed part, attributes.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    /// A message with its fixed part.
    pub(crate) fn new(kind: u16, flags: i32, fixed: &[u8]) -> Self {
        Self {
            kind,
            flags: u16::try_from(flags).unwrap_or(0),
            body: fixed.to_vec(),
        }
    }

    /// Adds an attribute.
    pub(crate) fn put(mut self, kind: u16, value: &[u8]) -> Self {
        attribute(&mut self.body, kind, value);
        self
    }

    /// Adds a text, with the zero that ends it.
    pub(crate) fn text(self, kind: u16, value: &str) -> Self {
        self.put(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// Adds a number of four bytes in the host's order.
    pub(crate) fn number(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_ne_bytes())
    }

    fn bytes(&self, flags: u16, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(HEADER + self.body.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&self.kind.to_ne_bytes());
        bytes.extend_from_slice(&(self.flags | flags | REQUEST).to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// Attributes, for what is nested in another.
pub(crate) fn attributes(parts: &[(u16, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, value) in parts {
        attribute(&mut bytes, *kind, value);
    }
    bytes
}

fn attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// The attributes in some bytes.
pub(crate) fn each(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut left = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(left, 0)?);
        let kind = u16_at(left, 2)? & KIND;
        let value = left.get(4..length)?;
        left = left.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

/// The value of an attribute.
pub(crate) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    each(bytes).find(|(k, _)| *k == kind).map(|(_, value)| value)
}

/// A text up to the zero that ends it.
pub(crate) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// Four bytes as a number in the host's order.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// A socket to one part of the kernel.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

/// What a round of reading brought.
#[derive(Debug, Default)]
struct Round {
    found: Vec<Vec<u8>>,
    interrupted: bool,
}

impl Socket {
    /// To links and addresses: protocol 0.
    pub(crate) fn route() -> io::Result<Self> {
        Self::open(None)
    }

    /// To tables of rules.
    pub(crate) fn netfilter() -> io::Result<Self> {
        Self::open(Some(NETFILTER))
    }

    fn open(protocol: Option<Protocol>) -> io::Result<Self> {
        let family = AddressFamily::NETLINK;
        let fd = rustix::net::socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        set_socket_timeout(&fd, Timeout::Recv, Some(LIMIT))?;
        Ok(Self {
            fd,
            sequence: 0,
            buffer: vec![0; 64 << 10],
        })
    }

    /// Has something done.
    pub(crate) fn act(&mut self, message: &Message) -> io::Result<()> {
        self.round(message, ACK, |_| true).map(drop)
    }

    /// Asks for one thing; none where it is not there.
    pub(crate) fn get(&mut self, message: &Message) -> io::Result<Option<Vec<u8>>> {
        match self.round(message, ACK, |_| true) {
            Ok(round) => Ok(round.found.into_iter().next()),
            Err(e) if absent(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Asks for everything of a kind, without gaps: what changes meanwhile has it begin again.
    pub(crate) fn dump(&mut self, message: &Message) -> io::Result<Vec<Vec<u8>>> {
        self.dump_where(message, |_| true)
    }

    /// The same, of which only some is kept while it arrives: there may be very many.
    pub(crate) fn dump_where(&mut self, message: &Message, keep: fn(&[u8]) -> bool) -> io::Result<Vec<Vec<u8>>> {
        for _ in 0..DUMPS {
            let round = self.round(message, DUMP, keep)?;
            if !round.interrupted {
                return Ok(round.found);
            }
        }
        Err(io::Error::other("what was to be listed changes all the time"))
    }

    /// Sends a message and reads up to the end of its answer.
    fn round(&mut self, message: &Message, flags: u16, keep: fn(&[u8]) -> bool) -> io::Result<Round> {
        self.sequence += 1;
        let bytes = message.bytes(flags, self.sequence);
        rustix::net::sendto(&self.fd, &bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut round = Round::default();
        loop {
            let (count, whole) = match rustix::net::recv(&self.fd, &mut self.buffer[..], RecvFlags::TRUNC) {
                Ok(counts) => counts,
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            };
            if whole > count {
                return Err(io::Error::other("an answer of the kernel is too long"));
            }
            if self.take(count, &mut round, keep)? {
                return Ok(round);
            }
        }
    }

    /// Takes the messages of one datagram. True: that was the end.
    fn take(&self, count: usize, round: &mut Round, keep: fn(&[u8]) -> bool) -> io::Result<bool> {
        let mut left = &self.buffer[..count];
        while let Some(length) = u32_at(left, 0) {
            let length = length as usize;
            let (Some(kind), Some(flags), Some(sequence)) = (u16_at(left, 4), u16_at(left, 6), u32_at(left, 8)) else {
                break;
            };
            let Some(body) = left.get(HEADER..length) else {
                return Err(io::Error::other("an answer of the kernel is cut off"));
            };
            left = left.get(length.next_multiple_of(4)..).unwrap_or(&[]);
            if sequence != self.sequence {
                continue;
            }
            round.interrupted |= flags & INTERRUPTED != 0;
            match i32::from(kind) {
                libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                    return match u32_at(body, 0).map(u32::cast_signed) {
                        Some(code) if code < 0 => Err(io::Error::from_raw_os_error(-code)),
                        _ => Ok(true),
                    };
                }
                libc::NLMSG_NOOP => {}
                _ if keep(body) => round.found.push(body.to_vec()),
                _ => {}
            }
        }
        Ok(false)
    }
}

/// Whether an error says that something is not there.
pub(crate) fn absent(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn attributes_are_found_again() {
        let inner = attributes(&[(1, b"abc"), (0x8002, b"")]);
        let bytes = attributes(&[(7, b"x"), (0x8009, &inner), (7, b"second")]);
        assert_eq!(find(&bytes, 7), Some(&b"x"[..]));
        let nested = find(&bytes, 9).unwrap();
        assert_eq!(each(nested).collect::<Vec<_>>(), [(1, &b"abc"[..]), (2, &b""[..])]);
        assert_eq!(text(b"eth0\0\0\0"), "eth0");
    }

    proptest! {
        #[test]
        fn any_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            prop_assert!(each(&bytes).count() <= bytes.len());
        }
    }
}
