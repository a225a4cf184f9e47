//! Inodes as bytes.

use super::layout::{BLOCK_USIZE, low16, low32, put16, put32};
use super::tree::{Meta, Run};

/// Extents in an inode, and in a block of them.
pub(super) const INLINE_EXTENTS: usize = 4;
pub(super) const LEAF_EXTENTS: usize = (BLOCK_USIZE - 12) / 12;

pub(super) fn set_size(inode: &mut [u8], size: u64) {
    put32(inode, 0x04, low32(size));
    put32(inode, 0x6c, low32(size >> 32));
}

/// The fields that all inodes have.
pub(super) fn common(inode: &mut [u8], mode: u16, links: u32, sectors: u64, meta: &Meta) {
    let (seconds, extra) = time(meta.mtime, meta.mtime_nsec);
    put16(inode, 0x00, mode);
    put16(inode, 0x02, low16(meta.uid.into()));
    put16(inode, 0x18, low16(meta.gid.into()));
    put16(inode, 0x78, low16(u64::from(meta.uid) >> 16));
    put16(inode, 0x7a, low16(u64::from(meta.gid) >> 16));
    put16(inode, 0x1a, low16(links.into()));
    put32(inode, 0x1c, low32(sectors));
    put16(inode, 0x74, low16(sectors >> 32));
    put16(inode, 0x80, 32);
    for (at, extra_at) in [(0x08, 0x8c), (0x0c, 0x84), (0x10, 0x88), (0x90, 0x94)] {
        put32(inode, at, seconds);
        put32(inode, extra_at, extra);
    }
}

/// Seconds and nanoseconds in ext4's 34 + 30 bits; times outside its range become the nearest one in it.
pub(super) fn time(seconds: i64, nanoseconds: u32) -> (u32, u32) {
    let seconds = seconds.clamp(-(1 << 31), (1 << 34) - (1 << 31) - 1);
    let low = low32(seconds.cast_unsigned());
    let epoch = low32(((seconds - i64::from(low.cast_signed())) >> 32).cast_unsigned()) & 3;
    (low, epoch | nanoseconds.min(999_999_999) << 2)
}

pub(super) fn put_extent_header(out: &mut [u8], entries: usize, max: usize, depth: u16) {
    put16(out, 0, 0xf30a);
    put16(out, 2, u16::try_from(entries).unwrap_or(0));
    put16(out, 4, u16::try_from(max).unwrap_or(0));
    put16(out, 6, depth);
}

pub(super) fn put_extents(out: &mut [u8], max: usize, list: &[(u64, Run)]) {
    put_extent_header(out, list.len(), max, 0);
    for (i, (logical, run)) in list.iter().enumerate() {
        let at = 12 + 12 * i;
        put32(out, at, low32(*logical));
        put16(out, at + 4, low16(run.blocks));
        put16(out, at + 6, low16(run.start >> 32));
        put32(out, at + 8, low32(run.start));
    }
}
