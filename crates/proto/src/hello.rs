//! The handshake of the guest channel.
//!
//! A virtio-serial port has no connections: bytes of an earlier host may still lie in its queues when the next one opens it.
//! So both ends skip what they read until they see a greeting that carries the host's fresh nonce.
//!
//! ```text
//!  host                                guest
//!    Call{nonce}  ── every 100 ms ──▶    skips bytes until a greeting begins
//!                 ◀────────────────     Answer{nonce}        (to every Call)
//!    Go{nonce}    ────────────────▶     skips further Calls; from here on HTTP/2
//! ```
//!
//! A greeting is 32 bytes: eight bytes of magic, kind, three bytes zero, protocol version (u16, big endian), two bytes zero,
//! sixteen bytes of nonce.

use crate::agent::AGENT_PROTOCOL;

/// Length of a greeting.
pub const GREETING: usize = 32;

const MAGIC: [u8; 8] = *b"\x00BANGER\xff";

/// Kind of a greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GreetingKind {
    /// Host to guest: are you there.
    Call,
    /// Guest to host: here.
    Answer,
    /// Host to guest: HTTP/2 begins with the next byte.
    Go,
}

/// A greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// Its kind.
    pub kind: GreetingKind,
    /// Protocol version of the sender.
    pub protocol: u16,
    /// Chosen by the host, fresh for each connection.
    pub nonce: [u8; 16],
}

impl Greeting {
    /// A greeting of this build.
    pub fn new(kind: GreetingKind, nonce: [u8; 16]) -> Self {
        Self {
            kind,
            protocol: AGENT_PROTOCOL,
            nonce,
        }
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; GREETING] {
        let mut out = [0; GREETING];
        out[..8].copy_from_slice(&MAGIC);
        out[8] = match self.kind {
            GreetingKind::Call => 1,
            GreetingKind::Answer => 2,
            GreetingKind::Go => 3,
        };
        out[12..14].copy_from_slice(&self.protocol.to_be_bytes());
        out[16..].copy_from_slice(&self.nonce);
        out
    }

    fn decode(bytes: &[u8; GREETING]) -> Option<Self> {
        let kind = match bytes[8] {
            1 => GreetingKind::Call,
            2 => GreetingKind::Answer,
            3 => GreetingKind::Go,
            _ => return None,
        };
        let mut nonce = [0; 16];
        nonce.copy_from_slice(&bytes[16..]);
        let zero = bytes[9..12] == [0; 3] && bytes[14..16] == [0; 2];
        (bytes[..8] == MAGIC && zero).then_some(Self {
            kind,
            protocol: u16::from_be_bytes([bytes[12], bytes[13]]),
            nonce,
        })
    }
}

/// Finds greetings in a stream, skipping everything else. Holds at most [`GREETING`] bytes.
#[derive(Debug, Default)]
pub struct Scanner {
    window: Vec<u8>,
}

impl Scanner {
    /// A scanner that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes one byte. A greeting comes back with its last byte, so that nothing behind it is swallowed.
    pub fn push(&mut self, byte: u8) -> Option<Greeting> {
        self.window.push(byte);
        loop {
            let known = self.window.len().min(MAGIC.len());
            if self.window[..known] == MAGIC[..known] {
                break;
            }
            // Not the beginning of a greeting: forget up to the next byte that could be.
            let next = self.window[1..]
                .iter()
                .position(|&b| b == MAGIC[0])
                .map_or(self.window.len(), |p| p + 1);
            self.window.drain(..next);
            if self.window.is_empty() {
                break;
            }
        }
        let whole: [u8; GREETING] = self.window.as_slice().try_into().ok()?;
        let greeting = Greeting::decode(&whole);
        if greeting.is_some() {
            self.window.clear();
        } else {
            // A magic without sense behind it; go on behind its first byte.
            let rest: Vec<u8> = self.window.drain(..).skip(1).collect();
            for byte in rest {
                self.push(byte);
            }
        }
        greeting
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_greeting_is_found_behind_any_bytes(noise in prop::collection::vec(any::<u8>(), 0..200), nonce: [u8; 16]) {
            let greeting = Greeting::new(GreetingKind::Call, nonce);
            let mut scanner = Scanner::new();
            let mut bytes = noise;
            bytes.extend(greeting.encode());
            let found: Vec<_> = bytes.iter().filter_map(|&b| scanner.push(b)).collect();
            prop_assert_eq!(found, vec![greeting]);
        }

        #[test]
        fn a_torn_greeting_hides_one_call_at_most(cut in 0usize..GREETING, nonce: [u8; 16]) {
            // Calls are repeated until they are answered, so the second one does it.
            let old = Greeting::new(GreetingKind::Call, [0; 16]).encode();
            let greeting = Greeting::new(GreetingKind::Call, nonce);
            let mut scanner = Scanner::new();
            let calls = greeting.encode().into_iter().chain(greeting.encode());
            let bytes: Vec<u8> = old[..cut].iter().copied().chain(calls).collect();
            let found: Vec<_> = bytes.iter().filter_map(|&b| scanner.push(b)).collect();
            prop_assert_eq!(found.last(), Some(&greeting));
        }

        #[test]
        fn the_window_stays_small(noise in prop::collection::vec(prop::sample::select(vec![0u8, b'B', b'A', 0xff]), 0..400)) {
            let mut scanner = Scanner::new();
            for byte in noise {
                scanner.push(byte);
                prop_assert!(scanner.window.len() < GREETING);
            }
        }
    }
}
