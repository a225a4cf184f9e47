//! Standard input of a session: what was sent and may have to be sent again, and the keys that detach.

use std::collections::VecDeque;
use std::os::fd::AsFd;

use banger_proto::frame::STDIN_WINDOW;
use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::mpsc;

/// Largest piece of input that is sent at once.
pub(crate) const CHUNK: usize = 64 * 1024;

/// Input that the guest may not have taken yet. Positions count bytes since the session began.
#[derive(Debug, Default)]
pub(crate) struct InputLog {
    /// Position up to which the guest has taken everything.
    taken: u64,
    /// Position behind the last byte of `pieces`.
    end: u64,
    pieces: VecDeque<Bytes>,
    /// No more comes behind `end`.
    pub(crate) eof: bool,
}

/// The guest claims to have taken what was never sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Overtaken;

impl InputLog {
    /// Begins at this position: that of a session that is joined.
    pub(crate) fn starting_at(position: u64) -> Self {
        Self {
            taken: position,
            end: position,
            ..Self::default()
        }
    }

    /// A piece of full size may be sent.
    pub(crate) fn has_room(&self) -> bool {
        self.end - self.taken + CHUNK as u64 <= STDIN_WINDOW
    }

    /// Keeps a piece that is being sent.
    pub(crate) fn push(&mut self, piece: Bytes) {
        self.end += piece.len() as u64;
        self.pieces.push_back(piece);
    }

    /// The guest has taken everything up to `position`; what it has is forgotten.
    pub(crate) fn acknowledge(&mut self, position: u64) -> Result<(), Overtaken> {
        if position > self.end {
            return Err(Overtaken);
        }
        while self.taken < position {
            let Some(first) = self.pieces.front_mut() else {
                return Err(Overtaken);
            };
            let step = (position - self.taken).min(first.len() as u64);
            // At most the length of the piece.
            let _ = first.split_to(usize::try_from(step).unwrap_or(usize::MAX));
            if first.is_empty() {
                self.pieces.pop_front();
            }
            self.taken += step;
        }
        Ok(())
    }

    /// What was sent and not taken.
    pub(crate) fn pending(&self) -> impl Iterator<Item = &Bytes> {
        self.pieces.iter()
    }
}

/// Reads standard input on a thread of its own, which ends with the process or with the receiver.
pub(crate) fn read_stdin() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(2);
    std::thread::spawn(move || {
        let stdin = std::io::stdin();
        let stdin = stdin.as_fd();
        let mut buffer = vec![0; CHUNK];
        loop {
            match rustix::io::read(stdin, &mut buffer) {
                Ok(0) => return,
                Ok(n) => {
                    if sender.blocking_send(Bytes::copy_from_slice(&buffer[..n])).is_err() {
                        return;
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                // Whoever shares this descriptor with us made it non-blocking.
                Err(rustix::io::Errno::AGAIN) => {
                    if poll(&mut [PollFd::new(&stdin, PollFlags::IN)], None).is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    });
    receiver
}

/// Looks for the keys that detach in what is typed.
#[derive(Debug)]
pub(crate) struct DetachKeys {
    keys: Vec<u8>,
    /// How many of them have been seen and held back.
    seen: usize,
}

/// Why a description of keys is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a key: write a character, or `ctrl-` and one of a-z @ [ \\ ] ^ _")]
pub(crate) struct KeyError(String);

impl DetachKeys {
    /// `ctrl-p,ctrl-q`; empty for none.
    pub(crate) fn parse(text: &str) -> Result<Self, KeyError> {
        let refused = |key: &str| KeyError(key.escape_default().to_string());
        let key = |key: &str| match key.as_bytes() {
            [one] if one.is_ascii_graphic() => Ok(*one),
            [b'c', b't', b'r', b'l', b'-', one] => match one.to_ascii_lowercase() {
                letter @ b'a'..=b'z' => Ok(letter - b'a' + 1),
                b'@' => Ok(0),
                sign @ b'['..=b'_' => Ok(sign - b'[' + 27),
                _ => Err(refused(key)),
            },
            _ => Err(refused(key)),
        };
        let keys = if text.is_empty() {
            Vec::new()
        } else {
            text.split(',').map(key).collect::<Result<_, _>>()?
        };
        Ok(Self { keys, seen: 0 })
    }

    /// What to pass on of these bytes, and whether the keys were pressed.
    pub(crate) fn feed(&mut self, bytes: Bytes) -> (Bytes, bool) {
        if self.keys.is_empty() {
            return (bytes, false);
        }
        let mut out = Vec::with_capacity(bytes.len());
        for &byte in &bytes {
            if byte == self.keys[self.seen] {
                self.seen += 1;
                if self.seen == self.keys.len() {
                    return (out.into(), true);
                }
                continue;
            }
            // What was held back was not the beginning of the keys after all, or only a later part of it is.
            out.extend_from_slice(&self.keys[..self.seen]);
            self.seen = 0;
            if byte == self.keys[0] {
                self.seen = 1;
            } else {
                out.push(byte);
            }
        }
        (out.into(), false)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_was_not_taken_is_kept() {
        let mut log = InputLog::starting_at(100);
        log.push(Bytes::from_static(b"abc"));
        log.push(Bytes::from_static(b"def"));
        log.acknowledge(104).unwrap();
        assert_eq!(log.pending().flatten().copied().collect::<Vec<_>>(), b"ef");
        assert_eq!(log.acknowledge(107), Err(Overtaken));
        log.acknowledge(106).unwrap();
        assert_eq!(log.pending().count(), 0);
        log.acknowledge(50).unwrap();
    }

    #[test]
    fn the_window_is_never_exceeded() {
        let mut log = InputLog::default();
        let mut sent = 0;
        while log.has_room() {
            log.push(Bytes::from(vec![0; CHUNK]));
            sent += CHUNK as u64;
        }
        assert_eq!(sent, STDIN_WINDOW);
    }

    #[test]
    fn keys_are_read() {
        assert_eq!(DetachKeys::parse("ctrl-p,ctrl-q").unwrap().keys, [16, 17]);
        assert_eq!(DetachKeys::parse("ctrl-],x").unwrap().keys, [29, b'x']);
        assert!(DetachKeys::parse("").unwrap().keys.is_empty());
        for bad in ["ctrl-", "esc", "ctrl-1", ",", "ctrl-pq"] {
            assert!(DetachKeys::parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn without_the_keys_everything_passes(
            pieces in prop::collection::vec(prop::collection::vec(prop::sample::select(vec![16u8, 17, 65]), 0..6), 0..8),
        ) {
            let all = pieces.concat();
            let at = all.windows(2).position(|w| w == [16, 17]);
            let mut keys = DetachKeys::parse("ctrl-p,ctrl-q").unwrap();
            let mut out = Vec::new();
            let mut detached = false;
            for piece in pieces {
                let (pass, now) = keys.feed(piece.into());
                out.extend_from_slice(&pass);
                if now {
                    detached = true;
                    break;
                }
            }
            prop_assert_eq!(detached, at.is_some());
            if let Some(at) = at {
                prop_assert_eq!(&out, &all[..at]);
            } else {
                out.extend_from_slice(&keys.keys[..keys.seen]);
                prop_assert_eq!(out, all);
            }
        }

        #[test]
        fn acknowledging_piecewise_keeps_the_rest(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 0..9),
            steps in prop::collection::vec(0u64..12, 0..9),
        ) {
            let all = pieces.concat();
            let mut log = InputLog::default();
            for piece in pieces {
                log.push(piece.into());
            }
            let mut position = 0;
            for step in steps {
                position = (position + step).min(all.len() as u64);
                log.acknowledge(position).unwrap();
                let rest: Vec<u8> = log.pending().flatten().copied().collect();
                prop_assert_eq!(&rest, &all[usize::try_from(position).unwrap()..]);
            }
        }
    }
}
