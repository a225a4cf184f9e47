//! Extended attributes: in the inode where they fit, else in a block.

use super::layout::{BLOCK_USIZE, put, put16, put32};
use super::{Ext4Error, Result};

const MAGIC: u32 = 0xea02_0000;
/// Bytes of an inode behind its fixed fields.
pub(super) const IN_INODE: usize = super::layout::INODE_SIZE - 160;

/// Where the attributes of an inode went.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Encoded {
    /// The bytes behind the inode's fixed fields; empty if there are none.
    pub(super) inode: Vec<u8>,
    /// A block of its own.
    pub(super) block: Option<Vec<u8>>,
}

/// Splits a full name into the index of its prefix and the rest. None for those that this format keeps in another form.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
    PREFIXES
        .iter()
        .find_map(|(prefix, index)| name.strip_prefix(*prefix).map(|rest| (*index, rest)))
}

/// Whether an attribute of this name can be kept.
pub(super) fn can_keep(name: &[u8]) -> bool {
    split(name).is_some_and(|(_, rest)| !rest.is_empty() && rest.len() <= 255 && !rest.contains(&0))
}

/// Encodes attributes, given by their full names. Those that cannot be kept are left out.
pub(super) fn encode(attributes: &[(Vec<u8>, Vec<u8>)]) -> Result<Encoded> {
    let mut list: Vec<(u8, &[u8], &[u8])> = attributes
        .iter()
        .filter(|(name, _)| can_keep(name))
        .filter_map(|(name, value)| split(name).map(|(index, rest)| (index, rest, value.as_slice())))
        .collect();
    list.sort_by(|a, b| (a.0, a.1.len(), a.1).cmp(&(b.0, b.1.len(), b.1)));
    list.dedup_by(|b, a| (a.0, a.1) == (b.0, b.1));
    if list.is_empty() {
        return Ok(Encoded::default());
    }
    let size: usize = list
        .iter()
        .map(|(_, name, value)| 16 + name.len().next_multiple_of(4) + value.len().next_multiple_of(4))
        .sum::<usize>()
        + 4;
    if 4 + size <= IN_INODE {
        let mut bytes = vec![0; IN_INODE];
        put32(&mut bytes, 0, MAGIC);
        // Offsets of values count from behind the magic number.
        fill(&mut bytes, 4, 4, &list);
        return Ok(Encoded {
            inode: bytes,
            block: None,
        });
    }
    if 32 + size > BLOCK_USIZE {
        return Err(Ext4Error::TooMany {
            what: "bytes of extended attributes of one file",
            limit: (BLOCK_USIZE - 32) as u64,
        });
    }
    let mut block = vec![0; BLOCK_USIZE];
    put32(&mut block, 0, MAGIC);
    put32(&mut block, 4, 1);
    put32(&mut block, 8, 1);
    let mut hash = 0u32;
    for (_, name, value) in &list {
        hash = hash.rotate_left(16) ^ entry_hash(name, value);
    }
    put32(&mut block, 12, hash);
    fill(&mut block, 32, 0, &list);
    Ok(Encoded {
        inode: Vec::new(),
        block: Some(block),
    })
}

/// Entries from `at` on, values from the end down, offsets of values counted from `base`.
fn fill(out: &mut [u8], mut at: usize, base: usize, list: &[(u8, &[u8], &[u8])]) {
    let mut end = out.len();
    for (index, name, value) in list {
        end -= value.len().next_multiple_of(4);
        put(out, at, &[u8::try_from(name.len()).unwrap_or(0), *index]);
        put16(
            out,
            at + 2,
            if value.is_empty() {
                0
            } else {
                u16::try_from(end - base).unwrap_or(0)
            },
        );
        put32(out, at + 8, u32::try_from(value.len()).unwrap_or(0));
        put32(out, at + 12, entry_hash(name, value));
        put(out, at + 16, name);
        put(out, end, value);
        at += 16 + name.len().next_multiple_of(4);
    }
}

fn entry_hash(name: &[u8], value: &[u8]) -> u32 {
    let mut hash = 0u32;
    for byte in name {
        hash = hash.rotate_left(5) ^ u32::from(*byte);
    }
    for chunk in value.chunks(4) {
        let mut word = [0; 4];
        put(&mut word, 0, chunk);
        hash = hash.rotate_left(16) ^ u32::from_le_bytes(word);
    }
    hash
}
