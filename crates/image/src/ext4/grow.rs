//! Which bytes make a fresh file system larger.
//!
//! New groups are in no use: their descriptors say so, and need no tables. So growth is a new superblock (and its copies), the
//! descriptors of the new groups, and the block bitmap of the last one: a few blocks whatever the size. It is only for file
//! systems that the writer of this crate has just made and nobody has mounted for writing; others grow in the guest.

use super::layout::{
    BLOCK, BLOCK_USIZE, BLOCKS_PER_GROUP, COMPAT, DESC_SIZE, Descriptor, Geometry, INCOMPAT, INODE_SIZE,
    INODES_PER_GROUP, META_GROUP, RO_COMPAT, block_bitmap, descriptor_block, has_super, leading_bitmap, low16, low32,
    overhead, put, put16, put32,
};
use super::writer::super_offset;
use super::{Ext4Error, Result};

/// Bytes at a place of the file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    /// Where.
    pub offset: u64,
    /// What.
    pub bytes: Vec<u8>,
}

/// Bytes of a superblock.
pub const SUPER_BYTES: usize = 1024;
/// Where the superblock is.
pub const SUPER_OFFSET: u64 = 1024;

/// Size of the file system whose superblock this is.
pub fn size_of(superblock: &[u8]) -> Result<u64> {
    fresh(superblock).map(Geometry::bytes)
}

/// Block that must be read and given to [`patches`] beside the superblock: the descriptors of the last meta group.
pub fn descriptors_offset(superblock: &[u8]) -> Result<u64> {
    let last_meta_group = (fresh(superblock)?.groups() - 1) / META_GROUP;
    Ok(descriptor_block(last_meta_group * META_GROUP).unwrap_or(0) * BLOCK)
}

/// What to write to make the file system as large as fits into `size_bytes`.
pub fn patches(superblock: &[u8], last_descriptors: &[u8], size_bytes: u64) -> Result<Vec<Patch>> {
    let old = fresh(superblock)?;
    let new = Geometry::for_size(size_bytes)?;
    if new.blocks() < old.blocks() {
        return Err(Ext4Error::Size {
            size_bytes,
            why: "smaller than the file system",
        });
    }
    if last_descriptors.len() != BLOCK_USIZE {
        return Err(Ext4Error::NotFresh("its descriptors are not a block"));
    }
    if new.groups() == old.groups() {
        return Ok(Vec::new());
    }
    let mut uuid = [0; 16];
    put(&mut uuid, 0, superblock.get(0x68..0x78).unwrap_or_default());

    let mut out = Vec::new();
    let mut free_blocks = 0;
    let old_meta = (old.groups() - 1) / META_GROUP;
    for meta in old_meta..=(new.groups() - 1) / META_GROUP {
        let first = meta * META_GROUP;
        let mut block = if meta == old_meta {
            last_descriptors.to_vec()
        } else {
            vec![0; BLOCK_USIZE]
        };
        for group in first.max(old.groups())..(first + META_GROUP).min(new.groups()) {
            let descriptor = Descriptor::empty(new, group);
            free_blocks += descriptor.free_blocks;
            put(
                &mut block,
                usize::try_from(group - first).unwrap_or(0) * DESC_SIZE,
                &descriptor.encode(&uuid),
            );
        }
        for at in (first..(first + META_GROUP).min(new.groups())).filter_map(descriptor_block) {
            out.push(Patch {
                offset: at * BLOCK,
                bytes: block.clone(),
            });
        }
    }
    let last = new.groups() - 1;
    out.push(Patch {
        offset: block_bitmap(last) * BLOCK,
        bytes: leading_bitmap(overhead(last), new.group_blocks(last)),
    });

    let mut sb = superblock.to_vec();
    let free_inodes = (new.groups() - old.groups()) * u64::from(INODES_PER_GROUP);
    put32(&mut sb, 0x00, low32(new.inodes()));
    put32(&mut sb, 0x04, low32(new.blocks()));
    put32(&mut sb, 0x0c, low32(u64::from(get32(superblock, 0x0c)) + free_blocks));
    put32(&mut sb, 0x10, low32(u64::from(get32(superblock, 0x10)) + free_inodes));
    for group in (0..new.groups()).filter(|g| has_super(*g)) {
        put16(&mut sb, 0x5a, low16(group));
        out.push(Patch {
            offset: super_offset(group),
            bytes: sb.clone(),
        });
    }
    Ok(out)
}

/// The shape of a fresh file system, if it is one.
fn fresh(sb: &[u8]) -> Result<Geometry> {
    let is = |ok: bool, why| if ok { Ok(()) } else { Err(Ext4Error::NotFresh(why)) };
    is(sb.len() == SUPER_BYTES, "the superblock is short")?;
    is(get16(sb, 0x38) == 0xef53, "there is no superblock")?;
    is(get16(sb, 0x3a) == 1, "it is not clean")?;
    is(
        (get32(sb, 0x5c), get32(sb, 0x60), get32(sb, 0x64)) == (COMPAT, INCOMPAT, RO_COMPAT),
        "its features are others",
    )?;
    is(
        get32(sb, 0x18) == 2 && u64::from(get32(sb, 0x20)) == BLOCKS_PER_GROUP && get32(sb, 0x28) == INODES_PER_GROUP,
        "its groups are others",
    )?;
    is(
        usize::from(get16(sb, 0x58)) == INODE_SIZE && get32(sb, 0x104) == 0 && get16(sb, 0xfe) == 0,
        "its tables are others",
    )?;
    is(get16(sb, 0x34) == 0, "it was mounted")?;
    let blocks = u64::from(get32(sb, 0x04));
    is(
        blocks > 0 && blocks % BLOCKS_PER_GROUP == 0,
        "its last group is not whole",
    )?;
    Geometry::for_size(blocks * BLOCK)
}

fn get16(bytes: &[u8], at: usize) -> u16 {
    match bytes.get(at..at + 2) {
        Some([a, b]) => u16::from_le_bytes([*a, *b]),
        _ => 0,
    }
}

fn get32(bytes: &[u8], at: usize) -> u32 {
    match bytes.get(at..at + 4) {
        Some([a, b, c, d]) => u32::from_le_bytes([*a, *b, *c, *d]),
        _ => 0,
    }
}
