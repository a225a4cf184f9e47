//! The output of a session: the last bytes of both streams in one sequence, by offset.
//!
//! Pure. The memory is bounded by construction: bytes by the capacity, the seams between the streams by [`MAX_SEAMS`].

use std::collections::VecDeque;

/// Seams kept at most. A program that alternates between its streams byte by byte loses history sooner, nothing else.
const MAX_SEAMS: usize = 16 * 1024;

/// One of the two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or the terminal.
    Out,
    /// Standard error.
    Err,
}

/// The last bytes of a session's output.
#[derive(Debug)]
pub struct OutputLog {
    bytes: VecDeque<u8>,
    /// Stretches of one stream, oldest first; their lengths add up to `bytes`.
    runs: VecDeque<(Stream, usize)>,
    start: u64,
    capacity: usize,
}

impl OutputLog {
    /// An empty log that keeps `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            runs: VecDeque::new(),
            start: 0,
            capacity,
        }
    }

    /// Offset of the oldest byte kept.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Offset behind the newest byte.
    pub fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// Bytes kept.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Adds output; drops the oldest bytes beyond the capacity.
    pub fn append(&mut self, stream: Stream, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        // What would fall out at once is counted, not copied.
        let kept = &bytes[bytes.len().saturating_sub(self.capacity)..];
        let skipped = bytes.len() - kept.len();
        let over = (self.bytes.len() + kept.len()).saturating_sub(self.capacity);
        self.drop_front(over);
        if skipped > 0 {
            self.start += skipped as u64;
        }
        self.bytes.extend(kept);
        match self.runs.back_mut() {
            Some((last, length)) if *last == stream => *length += kept.len(),
            _ => self.runs.push_back((stream, kept.len())),
        }
        while self.runs.len() > MAX_SEAMS {
            let oldest = self.runs.front().map_or(0, |r| r.1);
            self.drop_front(oldest);
        }
    }

    /// Gives back memory that a finished session no longer needs.
    pub fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
        self.runs.shrink_to_fit();
    }

    /// Up to `max` bytes of one stream from `offset` on, in the two halves of the ring. `None` at the end; an offset that is
    /// no longer kept counts as the oldest one that is.
    pub fn read(&self, offset: u64, max: usize) -> Option<(Stream, [&[u8]; 2])> {
        let mut at = usize::try_from(offset.saturating_sub(self.start)).ok()?;
        let from = at;
        for &(stream, length) in &self.runs {
            if at >= length {
                at -= length;
                continue;
            }
            let n = (length - at).min(max);
            let (front, back) = self.bytes.as_slices();
            let halves = if from >= front.len() {
                [&back[from - front.len()..from - front.len() + n], &[][..]]
            } else {
                let first = n.min(front.len() - from);
                [&front[from..from + first], &back[..n - first]]
            };
            return Some((stream, halves));
        }
        None
    }

    fn drop_front(&mut self, mut n: usize) {
        n = n.min(self.bytes.len());
        self.bytes.drain(..n);
        self.start += n as u64;
        while n > 0 {
            let Some((_, length)) = self.runs.front_mut() else {
                break;
            };
            if *length > n {
                *length -= n;
                break;
            }
            n -= *length;
            self.runs.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn drain(log: &OutputLog, mut offset: u64, max: usize) -> Vec<(Stream, u8)> {
        let mut out = Vec::new();
        offset = offset.max(log.start());
        while let Some((stream, halves)) = log.read(offset, max) {
            for half in halves {
                out.extend(half.iter().map(|&b| (stream, b)));
                offset += half.len() as u64;
            }
        }
        out
    }

    proptest! {
        #[test]
        fn it_is_the_end_of_everything_written(
            capacity in 1usize..64,
            writes in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..100)), 0..30),
            max in 1usize..20,
            offset in 0u64..2000,
        ) {
            let mut log = OutputLog::new(capacity);
            let mut model = Vec::new();
            for (out, bytes) in writes {
                let stream = if out { Stream::Out } else { Stream::Err };
                log.append(stream, &bytes);
                model.extend(bytes.into_iter().map(|b| (stream, b)));
                prop_assert!(log.len() <= capacity);
                prop_assert_eq!(log.end(), model.len() as u64);
                prop_assert_eq!(log.len(), model.len().min(capacity));
                prop_assert_eq!(log.runs.iter().map(|r| r.1).sum::<usize>(), log.len());
            }
            let from = (offset as usize).clamp(model.len() - log.len(), model.len());
            prop_assert_eq!(drain(&log, offset, max), &model[from..]);
        }
    }

    #[test]
    fn seams_are_bounded() {
        let mut log = OutputLog::new(1 << 20);
        for i in 0..(3 * MAX_SEAMS) {
            log.append(if i % 2 == 0 { Stream::Out } else { Stream::Err }, b"x");
        }
        assert!(log.runs.len() <= MAX_SEAMS);
        assert_eq!(log.end(), 3 * MAX_SEAMS as u64);
        assert_eq!(log.end() - log.start(), MAX_SEAMS as u64);
    }
}
