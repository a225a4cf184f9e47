//! A writer of ext4 file systems into plain files: no root, no mount, no other program, nothing unpacked onto the host.
//!
//! * [`layout`]: where groups, tables and descriptors are; superblock and descriptors as bytes,
//! * [`tree`]: what is in the file system, while it is being put together,
//! * [`writer`]: takes entries in any order, streams file content straight to its final place, and writes the metadata last,
//! * [`grow`]: which few bytes make a file system that was just written larger, a pure function.
//!
//! The format is the plain one that every kernel since 3.6 mounts and `e2fsck` checks: 4 KiB blocks, extents, journal, hashed
//! directories, 256-byte inodes, descriptor checksums. Descriptors live in meta groups (`meta_bg`), so that a file system grows
//! to any size with nothing kept in reserve: neither the host (see [`grow`]) nor the guest (`EXT4_IOC_RESIZE_FS`) has to move
//! anything. There are no flexible groups, so the tables of a group are where its number says and groups that were never used need
//! no bytes at all.

pub mod grow;
pub mod layout;
pub mod tree;
pub mod writer;

mod dir;
mod inode;
mod sink;
mod xattr;

use std::io;

/// What went wrong while making a file system.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Ext4Error {
    /// The file could not be written.
    #[error("cannot write it")]
    Write(#[source] io::Error),
    /// The content of a file could not be read.
    #[error("cannot read the content of `{path}`")]
    Content {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something that is no directory is used as one, or the other way round.
    #[error("`{path}` {why}")]
    Conflict {
        /// The path.
        path: String,
        /// What is wrong.
        why: &'static str,
    },
    /// More than the format or a limit allows.
    #[error("too many {what} (at most {limit})")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The size asked for cannot be had.
    #[error("{size_bytes} bytes is not a possible size: {why}")]
    Size {
        /// Size asked for.
        size_bytes: u64,
        /// Why not.
        why: &'static str,
    },
    /// A file system to grow is not one that this module wrote and nobody used.
    #[error("it is not a fresh file system: {0}")]
    NotFresh(&'static str),
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Ext4Error>;

/// How full a file system is, by its superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Free bytes.
    pub(crate) free_bytes: u64,
    /// Inodes in use.
    pub(crate) files: u64,
}

/// Reads the superblock of a file system. Offsets as in the kernel's `struct ext4_super_block`; the high half of the count of free
/// blocks matters only beyond 16 TiB.
pub(crate) fn usage(disk: &std::fs::File) -> std::io::Result<Usage> {
    use std::os::unix::fs::FileExt;
    let mut superblock = [0; grow::SUPER_BYTES];
    disk.read_exact_at(&mut superblock, grow::SUPER_OFFSET)?;
    let word = |at: usize| u64::from(u32::from_le_bytes([0, 1, 2, 3].map(|i| superblock[at + i])));
    let magic = [superblock[0x38], superblock[0x39]];
    if magic != [0x53, 0xef] || word(0x18) > 6 {
        return Err(std::io::Error::other("it holds no ext4 file system"));
    }
    Ok(Usage {
        free_bytes: word(0x0c) * (1024 << word(0x18)),
        files: word(0x00).saturating_sub(word(0x10)),
    })
}
