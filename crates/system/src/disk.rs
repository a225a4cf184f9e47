//! The sizes of a disk's changes.
//!
//! In system mode a machine's disk is its base and a sparse file with what has changed ([`crate::helper::Request::DiskAttach`]). The
//! file is made by the daemon, as long as it can ever need to be, and read by the kernel.

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Bytes that are copied and counted at once.
pub const CHUNK: u64 = 16 << 10;
/// Bytes of one entry in the table of what has changed.
const ENTRY: u64 = 16;
/// The longest disk.
pub const MAX_DISK: u64 = 16 << 40;

/// Length of the file that has room for a change of every byte of a disk: a header, then by turns a chunk of entries and the chunks
/// that they are for, and one to spare, since the kernel counts the next free chunk as used. Sparse, it takes no more of the host than
/// what was changed.
pub const fn changes(disk: u64) -> u64 {
    let chunks = disk.div_ceil(CHUNK);
    let tables = chunks / (CHUNK / ENTRY) + 1;
    (1 + tables + chunks + 1) * CHUNK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_every_chunk_and_little_more() {
        for disk in [1, CHUNK, CHUNK + 1, 1 << 30, 10 << 30, MAX_DISK] {
            let file = changes(disk);
            assert!(file > disk && file % CHUNK == 0);
            assert!(file < disk + disk / 500 + 5 * CHUNK, "{disk}: {file}");
        }
    }
}
