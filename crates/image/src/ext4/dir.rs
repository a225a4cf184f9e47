//! The blocks of a directory: one block of entries, or a hash tree over several.

use super::layout::{BLOCK_USIZE, put, put16, put32};
use super::{Ext4Error, Result};

/// Bytes of a leaf that are filled; the rest is room for what the guest adds.
const LEAF_FILL: usize = BLOCK_USIZE - 512;
/// Index entries of the root and of an inner node.
const ROOT_LIMIT: usize = (BLOCK_USIZE - 32) / 8;
const NODE_LIMIT: usize = (BLOCK_USIZE - 8) / 8;

/// An entry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    pub(super) ino: u32,
    pub(super) kind: u8,
}

/// A directory as bytes, whole blocks.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) bytes: Vec<u8>,
    /// It has a hash tree.
    pub(super) indexed: bool,
}

/// Bytes that an entry takes.
fn entry_size(name: &[u8]) -> usize {
    8 + name.len().next_multiple_of(4)
}

/// Makes the blocks of a directory.
pub(super) fn build(ino: u32, parent: u32, entries: &[Entry<'_>], seed: &[u8; 16]) -> Result<Directory> {
    let dot = [
        Entry {
            name: b".",
            ino,
            kind: 2,
        },
        Entry {
            name: b"..",
            ino: parent,
            kind: 2,
        },
    ];
    let total: usize = 24 + entries.iter().map(|e| entry_size(e.name)).sum::<usize>();
    if total <= BLOCK_USIZE {
        let all: Vec<Entry<'_>> = dot.iter().chain(entries).copied().collect();
        return Ok(Directory {
            bytes: leaf(&all),
            indexed: false,
        });
    }

    let mut hashed: Vec<(u32, u32, Entry<'_>)> = entries
        .iter()
        .map(|e| {
            let (major, minor) = half_md4(e.name, seed);
            (major, minor, *e)
        })
        .collect();
    hashed.sort_by(|a, b| (a.0, a.1, a.2.name).cmp(&(b.0, b.1, b.2.name)));

    // Leaves in the order of hashes. Where a run of equal hashes is cut, the lowest bit says that it goes on.
    let mut leaves: Vec<(u32, Vec<Entry<'_>>)> = Vec::new();
    let mut filled = usize::MAX;
    let mut previous = None;
    for (hash, _, entry) in hashed {
        let size = entry_size(entry.name);
        if filled.saturating_add(size) > LEAF_FILL {
            leaves.push((hash | u32::from(previous == Some(hash)), Vec::new()));
            filled = 0;
        }
        filled += size;
        previous = Some(hash);
        if let Some((_, leaf)) = leaves.last_mut() {
            leaf.push(entry);
        }
    }
    if leaves.len() > ROOT_LIMIT * NODE_LIMIT {
        return Err(Ext4Error::TooMany {
            what: "entries in a directory",
            limit: (ROOT_LIMIT * NODE_LIMIT) as u64,
        });
    }

    let nodes = if leaves.len() > ROOT_LIMIT {
        leaves.len().div_ceil(NODE_LIMIT)
    } else {
        0
    };
    let first_leaf = 1 + nodes;
    let index: Vec<(u32, usize)> = leaves
        .iter()
        .enumerate()
        .map(|(i, (hash, _))| (*hash, first_leaf + i))
        .collect();

    let mut bytes = Vec::with_capacity((first_leaf + leaves.len()) * BLOCK_USIZE);
    let mut root = vec![0; BLOCK_USIZE];
    put_entry(&mut root, 0, &dot[0], 12);
    put_entry(&mut root, 12, &dot[1], BLOCK_USIZE - 12);
    put(&mut root, 24, &[0, 0, 0, 0, 1, 8, u8::from(nodes > 0), 0]); // half MD4, length of this, levels
    if nodes == 0 {
        put_index(&mut root, 32, ROOT_LIMIT, &index);
        bytes.extend(root);
    } else {
        let chunks: Vec<&[(u32, usize)]> = index.chunks(NODE_LIMIT).collect();
        let tops: Vec<(u32, usize)> = chunks
            .iter()
            .enumerate()
            .map(|(i, chunk)| (chunk.first().map_or(0, |c| c.0), 1 + i))
            .collect();
        put_index(&mut root, 32, ROOT_LIMIT, &tops);
        bytes.extend(root);
        for chunk in chunks {
            let mut node = vec![0; BLOCK_USIZE];
            put16(&mut node, 4, small(BLOCK_USIZE));
            put_index(&mut node, 8, NODE_LIMIT, chunk);
            bytes.extend(node);
        }
    }
    for (_, entries) in &leaves {
        bytes.extend(leaf(entries));
    }
    Ok(Directory { bytes, indexed: true })
}

/// A block of entries; the last one reaches to its end.
fn leaf(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut block = vec![0; BLOCK_USIZE];
    let mut at = 0;
    for (i, entry) in entries.iter().enumerate() {
        let size = if i + 1 == entries.len() {
            BLOCK_USIZE - at
        } else {
            entry_size(entry.name)
        };
        put_entry(&mut block, at, entry, size);
        at += size;
    }
    block
}

fn put_entry(block: &mut [u8], at: usize, entry: &Entry<'_>, size: usize) {
    put32(block, at, entry.ino);
    put16(block, at + 4, small(size));
    put(
        block,
        at + 6,
        &[u8::try_from(entry.name.len()).unwrap_or(u8::MAX), entry.kind],
    );
    put(block, at + 8, entry.name);
}

/// Writes index entries; the hash of the first is implied, its place holds limit and count.
fn put_index(block: &mut [u8], at: usize, limit: usize, index: &[(u32, usize)]) {
    for (i, (hash, target)) in index.iter().enumerate() {
        put32(block, at + 8 * i, *hash);
        put32(block, at + 8 * i + 4, u32::try_from(*target).unwrap_or(0));
    }
    put16(block, at, small(limit));
    put16(block, at + 2, small(index.len()));
}

/// A number that is at most the size of a block.
fn small(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

/// The hash of a name: half MD4 with characters taken as unsigned.
fn half_md4(name: &[u8], seed: &[u8; 16]) -> (u32, u32) {
    let mut state = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
    if seed.iter().any(|b| *b != 0) {
        for (word, bytes) in state.iter_mut().zip(seed.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
    }
    let mut rest = name;
    while !rest.is_empty() {
        transform(&mut state, &words(rest));
        rest = rest.get(32..).unwrap_or_default();
    }
    let major = state[1] & !1;
    (if major == 0xffff_fffe { 0xffff_fffc } else { major }, state[2])
}

/// Up to 32 bytes of a name as eight words, padded with its length.
fn words(name: &[u8]) -> [u32; 8] {
    let len = u32::try_from(name.len()).unwrap_or(0);
    let pad = (len | len << 8).wrapping_mul(0x0001_0001);
    let mut out = [pad; 8];
    for (word, bytes) in out.iter_mut().zip(name.chunks(4)) {
        for byte in bytes {
            *word = u32::from(*byte).wrapping_add(*word << 8);
        }
    }
    out
}

fn transform(state: &mut [u32; 4], input: &[u32; 8]) {
    type Mix = fn(u32, u32, u32) -> u32;
    const ROUNDS: [(Mix, u32, [usize; 8], [u32; 4]); 3] = [
        (|x, y, z| z ^ (x & (y ^ z)), 0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]),
        (
            |x, y, z| (x & y).wrapping_add((x ^ y) & z),
            0x5a82_7999,
            [1, 3, 5, 7, 0, 2, 4, 6],
            [3, 5, 9, 13],
        ),
        (
            |x, y, z| x ^ y ^ z,
            0x6ed9_eba1,
            [3, 7, 2, 6, 1, 5, 0, 4],
            [3, 9, 11, 15],
        ),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (mix, constant, order, shifts) in ROUNDS {
        for (step, word) in order.into_iter().enumerate() {
            let sum = a
                .wrapping_add(mix(b, c, d))
                .wrapping_add(input[word])
                .wrapping_add(constant);
            // The four registers take turns.
            (a, b, c, d) = (d, sum.rotate_left(shifts[step % 4]), b, c);
        }
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(add);
    }
}
