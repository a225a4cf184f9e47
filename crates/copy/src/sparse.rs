//! Maps of sparse files, in the format 1.0 of GNU tar: the map is decimal text before the file's data, padded to a block.
//!
//! ```text
//! 2\n0\n4096\n1048576\n4096\n  zeros to the end of the block, then 8192 bytes of data
//! ```

use std::io;

/// Size of a block of a tar stream, in bytes.
pub const BLOCK: usize = 512;

/// Most pieces of one file that are sent. A file with more goes as if it had no more holes behind the last piece.
pub const MAX_SENT: usize = 1 << 16;

/// Most pieces of one file that are accepted. The map takes 16 bytes of memory for each.
pub const MAX_ACCEPTED: u64 = 1 << 20;

/// Largest file that is accepted, in bytes: the limit of ext4. A larger one is a trap for every program that reads it.
pub const MAX_SIZE: u64 = 1 << 44;

/// Key of the format's major version among the extended headers.
pub const MAJOR: &str = "GNU.sparse.major";
/// Key of the format's minor version.
pub const MINOR: &str = "GNU.sparse.minor";
/// Key of the file's name.
pub const NAME: &str = "GNU.sparse.name";
/// Key of the file's size with its holes.
pub const REAL_SIZE: &str = "GNU.sparse.realsize";

/// A run of data in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins, in bytes from the beginning of the file.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// What of a file is data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    size: u64,
    pieces: Vec<Piece>,
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Map {
    /// A map of pieces that are in order, apart from each other, and within `size` bytes.
    ///
    /// # Errors
    /// `InvalidData` where they are not, and where `size` exceeds [`MAX_SIZE`].
    pub fn new(size: u64, pieces: Vec<Piece>) -> io::Result<Self> {
        if size > MAX_SIZE {
            return Err(invalid("a sparse file of more than 16 TiB"));
        }
        let mut end = 0;
        for piece in &pieces {
            let next = piece.offset.checked_add(piece.length);
            match next {
                Some(next) if piece.offset >= end && next <= size => end = next,
                _ => return Err(invalid("the map of a sparse file is out of order or exceeds the file")),
            }
        }
        Ok(Self { size, pieces })
    }

    /// Size of the file with its holes, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its data.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Bytes of data.
    pub fn stored(&self) -> u64 {
        self.pieces.iter().map(|p| p.length).sum()
    }

    /// The text before the data. A file that ends in a hole has an empty piece at its end, as the format wants it.
    pub fn encode(&self) -> Vec<u8> {
        let end = self.pieces.last().map_or(0, |p| p.offset + p.length);
        let last = (end < self.size || self.pieces.is_empty()).then_some(Piece {
            offset: self.size,
            length: 0,
        });
        let count = self.pieces.len() + usize::from(last.is_some());
        let mut text = format!("{count}\n");
        for piece in self.pieces.iter().chain(&last) {
            text.push_str(&format!("{}\n{}\n", piece.offset, piece.length));
        }
        let mut bytes = text.into_bytes();
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    /// Reads the text before the data, and nothing behind it.
    ///
    /// # Errors
    /// `InvalidData` for a text that is no map, that has more than [`MAX_ACCEPTED`] pieces, or that [`Map::new`] refuses.
    /// Errors of the reader.
    pub fn decode(size: u64, reader: &mut impl io::Read) -> io::Result<Self> {
        let mut numbers = Numbers {
            reader,
            block: [0; BLOCK],
            at: BLOCK,
        };
        let count = numbers.next()?;
        if count > MAX_ACCEPTED {
            return Err(invalid("the map of a sparse file has too many pieces"));
        }
        let mut pieces = Vec::new();
        for _ in 0..count {
            let (offset, length) = (numbers.next()?, numbers.next()?);
            pieces.push(Piece { offset, length });
        }
        Self::new(size, pieces)
    }
}

struct Numbers<'r, R> {
    reader: &'r mut R,
    block: [u8; BLOCK],
    at: usize,
}

impl<R: io::Read> Numbers<'_, R> {
    fn next(&mut self) -> io::Result<u64> {
        let mut number: Option<u64> = None;
        loop {
            if self.at == BLOCK {
                self.reader.read_exact(&mut self.block)?;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            match byte {
                b'0'..=b'9' => {
                    let grown = number.unwrap_or(0).checked_mul(10);
                    let grown = grown.and_then(|n| n.checked_add(u64::from(byte - b'0')));
                    number = Some(grown.ok_or_else(|| invalid("a number in the map of a sparse file is too large"))?);
                }
                b'\n' => return number.ok_or_else(|| invalid("the map of a sparse file is damaged")),
                _ => return Err(invalid("the map of a sparse file is damaged")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn piece(offset: u64, length: u64) -> Piece {
        Piece { offset, length }
    }

    #[test]
    fn a_map_is_read_as_it_was_written() {
        let pieces = vec![piece(0, 4096), piece(1 << 20, 1)];
        let map = Map::new(1 << 30, pieces.clone()).unwrap();
        let mut text = map.encode();
        assert!(text.starts_with(b"3\n0\n4096\n1048576\n1\n1073741824\n0\n\0"));
        assert_eq!(text.len(), BLOCK);
        text.extend_from_slice(b"data");
        let mut reader = text.as_slice();
        let read = Map::decode(1 << 30, &mut reader).unwrap();
        assert_eq!(read.pieces()[..2], pieces);
        assert_eq!((read.size(), read.stored()), (1 << 30, 4097));
        assert_eq!(reader, b"data", "nothing behind the map is read");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (size, text) in [
            (10, "1\n0\n11\n"),
            (10, "2\n5\n2\n6\n1\n"),
            (10, "1\n18446744073709551615\n1\n"),
            (10, "1\n18446744073709551616\n1\n"),
            (10, "1\n-1\n1\n"),
            (10, "1\n\n1\n"),
            (10, "x"),
            (10, "1048577\n0\n0\n"),
            (u64::MAX, "1\n0\n1\n"),
            (MAX_SIZE + 1, "0\n"),
        ] {
            let mut bytes = text.as_bytes().to_vec();
            bytes.resize(BLOCK, 0);
            let error = Map::decode(size, &mut bytes.as_slice()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{text:?}");
        }
        // A map that promises a million pieces and does not have them takes no memory for them.
        let error = Map::decode(10, &mut &b"1048576\n"[..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(size in any::<u64>(), bytes in prop::collection::vec(prop::sample::select(b"0123456789\n\0x".to_vec()), 0..2048)) {
            if let Ok(map) = Map::decode(size, &mut bytes.as_slice()) {
                prop_assert!(map.stored() <= map.size());
            }
        }
    }
}
