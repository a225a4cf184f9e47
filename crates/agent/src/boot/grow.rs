//! A file system that is smaller than its disk: the disk was grown on the host while the machine was stopped, and the file system
//! follows when it is mounted.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::console::say;
use crate::sys;

/// Where the superblock is, and how much of it is looked at.
const SUPERBLOCK: u64 = 1024;
const LOOKED_AT: usize = 0x158;

/// Lets the file system mounted at `at` fill its device. A failure is told and is no reason not to start.
pub(super) fn fill(device: &Path, at: &Path) {
    match grow(device, at) {
        Ok(None) => {}
        Ok(Some(blocks)) => say(&format!("{} now has {blocks} blocks", device.display())),
        Err(e) => say(&format!("can't let the file system fill {}: {e}", device.display())),
    }
}

/// Grows the file system if there is room; says to how many blocks.
fn grow(device: &Path, at: &Path) -> io::Result<Option<u64>> {
    let disk = File::open(device)?;
    let mut superblock = [0; LOOKED_AT];
    disk.read_exact_at(&mut superblock, SUPERBLOCK)?;
    let bytes = rustix::fs::seek(&disk, rustix::fs::SeekFrom::End(0))?;
    let Some(blocks) = wanted(&superblock, bytes) else {
        return Ok(None);
    };
    sys::resize_ext4(File::open(at)?, blocks)?;
    Ok(Some(blocks))
}

/// How many blocks the file system should have, if it should have more than it has.
///
/// Offsets as in the kernel's `struct ext4_super_block`.
fn wanted(superblock: &[u8; LOOKED_AT], device_bytes: u64) -> Option<u64> {
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| superblock[at + i]));
    let magic = u16::from_le_bytes([superblock[0x38], superblock[0x39]]);
    // Block sizes beyond 64 KiB don't exist.
    let block_size = 1024_u64.checked_shl(word(0x18)).filter(|size| *size <= 65536)?;
    let has_64bit = word(0x60) & 0x80 != 0;
    let high = if has_64bit { word(0x150) } else { 0 };
    let blocks = u64::from(word(0x04)) | u64::from(high) << 32;
    let room = device_bytes.checked_div(block_size)?;
    // A handful of blocks is not worth it: the last group has to be large enough for its own tables.
    (magic == 0xef53 && room > blocks + 4096).then_some(room)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock(blocks: u32, log_size: u32) -> [u8; LOOKED_AT] {
        let mut out = [0; LOOKED_AT];
        out[0x04..0x08].copy_from_slice(&blocks.to_le_bytes());
        out[0x18..0x1c].copy_from_slice(&log_size.to_le_bytes());
        out[0x38..0x3a].copy_from_slice(&0xef53_u16.to_le_bytes());
        out
    }

    #[test]
    fn only_a_larger_device_is_filled() {
        let gib = 1_u64 << 30;
        assert_eq!(wanted(&superblock(262_144, 2), gib), None);
        assert_eq!(wanted(&superblock(262_144, 2), 2 * gib), Some(524_288));
        assert_eq!(
            wanted(&superblock(262_144, 2), gib / 2),
            None,
            "a smaller one is left alone"
        );
        assert_eq!(
            wanted(&superblock(262_144, 2), gib + 8192),
            None,
            "a few blocks are not worth it"
        );
    }

    #[test]
    fn what_is_no_ext4_is_left_alone() {
        assert_eq!(wanted(&[0; LOOKED_AT], 1 << 40), None);
        assert_eq!(wanted(&[0xff; LOOKED_AT], u64::MAX), None);
        assert_eq!(wanted(&superblock(1, 40), 1 << 40), None);
    }

    #[test]
    fn large_file_systems_have_a_high_word() {
        let mut large = superblock(0, 2);
        large[0x60] = 0x80;
        large[0x150] = 1;
        assert_eq!(wanted(&large, 1 << 44), None);
        assert_eq!(wanted(&large, 1 << 45), Some(1 << 33));
    }
}
