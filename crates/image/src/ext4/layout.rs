//! Where things are in a file system, and the superblock and group descriptors as bytes.

use super::{Ext4Error, Result};

/// Bytes of a block.
pub const BLOCK: u64 = 4096;
/// [`BLOCK`] for lengths in memory.
pub(crate) const BLOCK_USIZE: usize = 4096;
/// Blocks of a group: what one block of bitmap covers.
pub const BLOCKS_PER_GROUP: u64 = 32768;
/// Inodes of a group: one for 16 KiB.
pub const INODES_PER_GROUP: u32 = 8192;
/// Bytes of an inode.
pub const INODE_SIZE: usize = 256;
/// Bytes of a group.
pub const GROUP_BYTES: u64 = BLOCK * BLOCKS_PER_GROUP;
/// Blocks of a group's inode table.
pub(crate) const TABLE_BLOCKS: u64 = INODES_PER_GROUP as u64 * INODE_SIZE as u64 / BLOCK;
/// Bytes of a group descriptor.
pub(crate) const DESC_SIZE: usize = 32;
/// Groups of a meta group: what one block of descriptors covers.
pub(crate) const META_GROUP: u64 = BLOCK / DESC_SIZE as u64;
/// Fewer blocks than this beside its own tables make a last group useless.
const MIN_LAST_GROUP_DATA: u64 = 64;
/// The format without 64-bit block numbers ends here.
const MAX_BLOCKS: u64 = 1 << 32;

/// Number of the root directory's inode.
pub(crate) const ROOT_INO: u32 = 2;
/// Number of the journal's inode.
pub(crate) const JOURNAL_INO: u32 = 8;
/// Number of the first inode that is not reserved; `lost+found` here.
pub(crate) const FIRST_INO: u32 = 11;

pub(crate) const COMPAT: u32 = 0x4 | 0x8 | 0x20; // has_journal, ext_attr, dir_index
pub(crate) const INCOMPAT: u32 = 0x2 | 0x10 | 0x40; // filetype, meta_bg, extents
pub(crate) const RO_COMPAT: u32 = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40; // sparse_super, large_file, huge_file, uninit_bg, dir_nlink, extra_isize

/// The inode table of a group is not in use.
pub(crate) const INODE_UNINIT: u16 = 1;
/// The block bitmap of a group is not in use.
pub(crate) const BLOCK_UNINIT: u16 = 2;
/// The inode table of a group is known to be zero where unused.
pub(crate) const INODE_ZEROED: u16 = 4;

/// The shape of a file system: a number of blocks, from which all else follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    blocks: u64,
}

impl Geometry {
    /// The largest file system that fits into `size_bytes`.
    pub fn for_size(size_bytes: u64) -> Result<Self> {
        let bad = |why| Ext4Error::Size { size_bytes, why };
        let mut blocks = size_bytes / BLOCK;
        if blocks >= MAX_BLOCKS {
            return Err(bad("16 TiB is the limit"));
        }
        let tail = blocks % BLOCKS_PER_GROUP;
        let last = blocks / BLOCKS_PER_GROUP;
        if tail != 0 && tail < overhead(last) + MIN_LAST_GROUP_DATA {
            blocks -= tail;
        }
        if blocks == 0 {
            return Err(bad("too small for a file system"));
        }
        Ok(Self { blocks })
    }

    /// A number of whole groups.
    pub fn of_groups(groups: u64) -> Result<Self> {
        Self::for_size(groups.saturating_mul(GROUP_BYTES))
    }

    /// Blocks.
    pub fn blocks(self) -> u64 {
        self.blocks
    }

    /// Bytes.
    pub fn bytes(self) -> u64 {
        self.blocks * BLOCK
    }

    /// Groups.
    pub fn groups(self) -> u64 {
        self.blocks.div_ceil(BLOCKS_PER_GROUP)
    }

    /// Inodes.
    pub fn inodes(self) -> u64 {
        self.groups() * u64::from(INODES_PER_GROUP)
    }

    /// Blocks of one group.
    pub fn group_blocks(self, group: u64) -> u64 {
        (self.blocks - (group * BLOCKS_PER_GROUP).min(self.blocks)).min(BLOCKS_PER_GROUP)
    }

    /// Whether a group is the last one, whose block bitmap is always written because it may end in the middle.
    pub(crate) fn is_last(self, group: u64) -> bool {
        group + 1 == self.groups()
    }
}

/// Whether a group begins with a copy of the superblock.
pub(crate) fn has_super(group: u64) -> bool {
    let power_of = |base: u64| {
        let mut n = base;
        while n < group {
            n *= base;
        }
        n == group
    };
    group <= 1 || power_of(3) || power_of(5) || power_of(7)
}

/// Whether a group holds a copy of the descriptors of its meta group.
pub(crate) fn has_descriptors(group: u64) -> bool {
    matches!(group % META_GROUP, 0 | 1) || group % META_GROUP == META_GROUP - 1
}

/// First block of a group.
pub(crate) fn first_block(group: u64) -> u64 {
    group * BLOCKS_PER_GROUP
}

/// Block of a group's copy of the descriptors, if it holds one.
pub(crate) fn descriptor_block(group: u64) -> Option<u64> {
    has_descriptors(group).then(|| first_block(group) + u64::from(has_super(group)))
}

/// Block of a group's block bitmap.
pub(crate) fn block_bitmap(group: u64) -> u64 {
    first_block(group) + u64::from(has_super(group)) + u64::from(has_descriptors(group))
}

/// Block of a group's inode bitmap.
pub(crate) fn inode_bitmap(group: u64) -> u64 {
    block_bitmap(group) + 1
}

/// First block of a group's inode table.
pub(crate) fn inode_table(group: u64) -> u64 {
    block_bitmap(group) + 2
}

/// Blocks at the start of a group that are its own tables.
pub(crate) fn overhead(group: u64) -> u64 {
    inode_table(group) + TABLE_BLOCKS - first_block(group)
}

/// A group descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) group: u64,
    pub(crate) free_blocks: u64,
    pub(crate) free_inodes: u32,
    pub(crate) directories: u32,
    pub(crate) flags: u16,
    pub(crate) unused_inodes: u32,
}

impl Descriptor {
    /// A group in which nothing is used but its own tables.
    pub(crate) fn empty(geometry: Geometry, group: u64) -> Self {
        let block_uninit = if geometry.is_last(group) { 0 } else { BLOCK_UNINIT };
        Self {
            group,
            free_blocks: geometry.group_blocks(group).saturating_sub(overhead(group)),
            free_inodes: INODES_PER_GROUP,
            directories: 0,
            flags: INODE_UNINIT | INODE_ZEROED | block_uninit,
            unused_inodes: INODES_PER_GROUP,
        }
    }

    /// Its bytes, with their checksum.
    pub(crate) fn encode(&self, uuid: &[u8; 16]) -> [u8; DESC_SIZE] {
        let mut out = [0; DESC_SIZE];
        put32(&mut out, 0, low32(block_bitmap(self.group)));
        put32(&mut out, 4, low32(inode_bitmap(self.group)));
        put32(&mut out, 8, low32(inode_table(self.group)));
        put16(&mut out, 12, low16(self.free_blocks));
        put16(&mut out, 14, low16(self.free_inodes.into()));
        put16(&mut out, 16, low16(self.directories.into()));
        put16(&mut out, 18, self.flags);
        put16(&mut out, 28, low16(self.unused_inodes.into()));
        let sum = crc16(
            crc16(crc16(0xffff, uuid), &low32(self.group).to_le_bytes()),
            out.get(..30).unwrap_or_default(),
        );
        put16(&mut out, 30, sum);
        out
    }
}

/// The bitmap block of a group in which `used` blocks at its start are taken, padded after its end.
pub(crate) fn leading_bitmap(used: u64, size: u64) -> Vec<u8> {
    let mut bitmap = vec![0; BLOCK_USIZE];
    for bit in (0..used).chain(size..BLOCKS_PER_GROUP) {
        set_bit(&mut bitmap, bit);
    }
    bitmap
}

/// Sets a bit of a bitmap.
pub(crate) fn set_bit(bitmap: &mut [u8], bit: u64) {
    if let Some(byte) = usize::try_from(bit / 8).ok().and_then(|i| bitmap.get_mut(i)) {
        *byte |= 1 << (bit % 8);
    }
}

/// What the superblock says beside the geometry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Super {
    pub(crate) geometry: Geometry,
    pub(crate) free_blocks: u64,
    pub(crate) free_inodes: u64,
    pub(crate) uuid: [u8; 16],
    pub(crate) hash_seed: [u8; 16],
    pub(crate) label: [u8; 16],
    pub(crate) time: u32,
    /// `i_block` of the journal's inode, its size high and low.
    pub(crate) journal_backup: [u32; 17],
}

impl Super {
    /// The 1024 bytes of the superblock, or of its copy in `group`.
    pub(crate) fn encode(&self, group: u64) -> Vec<u8> {
        let mut sb = vec![0; 1024];
        put32(&mut sb, 0x00, low32(self.geometry.inodes()));
        put32(&mut sb, 0x04, low32(self.geometry.blocks()));
        put32(&mut sb, 0x0c, low32(self.free_blocks));
        put32(&mut sb, 0x10, low32(self.free_inodes));
        put32(&mut sb, 0x18, 2); // 4 KiB blocks
        put32(&mut sb, 0x1c, 2);
        put32(&mut sb, 0x20, low32(BLOCKS_PER_GROUP));
        put32(&mut sb, 0x24, low32(BLOCKS_PER_GROUP));
        put32(&mut sb, 0x28, INODES_PER_GROUP);
        put32(&mut sb, 0x30, self.time);
        put16(&mut sb, 0x36, 0xffff);
        put16(&mut sb, 0x38, 0xef53);
        put16(&mut sb, 0x3a, 1); // clean
        put16(&mut sb, 0x3c, 1); // continue on errors
        put32(&mut sb, 0x40, self.time);
        put32(&mut sb, 0x4c, 1);
        put32(&mut sb, 0x54, FIRST_INO);
        put16(&mut sb, 0x58, low16(INODE_SIZE as u64));
        put16(&mut sb, 0x5a, low16(group));
        put32(&mut sb, 0x5c, COMPAT);
        put32(&mut sb, 0x60, INCOMPAT);
        put32(&mut sb, 0x64, RO_COMPAT);
        put(&mut sb, 0x68, &self.uuid);
        put(&mut sb, 0x78, &self.label);
        put32(&mut sb, 0xe0, JOURNAL_INO);
        put(&mut sb, 0xec, &self.hash_seed);
        put(&mut sb, 0xfc, &[1, 1]); // half MD4; the journal's inode is backed up below
        put32(&mut sb, 0x100, 0x4 | 0x8); // user_xattr, acl
        put32(&mut sb, 0x108, self.time);
        for (i, word) in self.journal_backup.iter().enumerate() {
            put32(&mut sb, 0x10c + 4 * i, *word);
        }
        put16(&mut sb, 0x15c, 32);
        put16(&mut sb, 0x15e, 32);
        put32(&mut sb, 0x160, 2); // directory hashes take characters as unsigned
        sb
    }
}

/// CRC-16 (ANSI) as ext4 uses it for descriptors.
fn crc16(mut crc: u16, bytes: &[u8]) -> u16 {
    for byte in bytes {
        crc ^= u16::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xa001 } else { crc >> 1 };
        }
    }
    crc
}

/// Writes bytes into a structure. Offsets are constants of the format, within the structure by construction.
pub(crate) fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = out.get_mut(at..).and_then(|rest| rest.get_mut(..bytes.len())) {
        place.copy_from_slice(bytes);
    }
}

pub(crate) fn put16(out: &mut [u8], at: usize, value: u16) {
    put(out, at, &value.to_le_bytes());
}

pub(crate) fn put32(out: &mut [u8], at: usize, value: u32) {
    put(out, at, &value.to_le_bytes());
}

/// The low half of a number whose high half the format keeps elsewhere or excludes.
#[allow(clippy::cast_possible_truncation)]
pub(crate) fn low32(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

/// As [`low32`].
#[allow(clippy::cast_possible_truncation)]
pub(crate) fn low16(value: u64) -> u16 {
    (value & 0xffff) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblock_copies_are_where_sparse_super_wants_them() {
        let with: Vec<u64> = (0..130).filter(|g| has_super(*g)).collect();
        assert_eq!(with, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }

    #[test]
    fn crc16_check_value() {
        // CRC-16/MODBUS of "123456789".
        assert_eq!(crc16(0xffff, b"123456789"), 0x4b37);
    }

    #[test]
    fn a_useless_tail_is_left_out() {
        let whole = Geometry::of_groups(3).unwrap();
        assert_eq!(Geometry::for_size(whole.bytes() + 100 * BLOCK).unwrap(), whole);
        assert_eq!(Geometry::for_size(whole.bytes() + 1000 * BLOCK).unwrap().groups(), 4);
        assert!(Geometry::for_size(0).is_err());
        assert!(Geometry::for_size(100 * BLOCK).is_err());
        assert!(Geometry::for_size(u64::MAX).is_err());
    }
}
