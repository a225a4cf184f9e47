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

/// Length of the part of the file that says what it is.
pub const HEADER: usize = 16;
/// How it begins.
const MAGIC: u32 = 0x7041_6e53;

/// Reads four bytes of a header.
fn word(header: [u8; HEADER], n: usize) -> u32 {
    u32::from_le_bytes([header[n * 4], header[n * 4 + 1], header[n * 4 + 2], header[n * 4 + 3]])
}

/// Whether the kernel may be given a file of changes with this header: an empty one, which it fills in, or one of chunks of [`CHUNK`]
/// bytes. What the header says is what the kernel goes by, whatever the table says: chunks of a gigabyte are buffers of a gigabyte.
pub fn is_usable(header: [u8; HEADER]) -> bool {
    let [magic, valid, version, sectors] = [0, 1, 2, 3].map(|n| word(header, n));
    magic == 0 || (magic == MAGIC && valid <= 1 && version == 1 && u64::from(sectors) == CHUNK / SECTOR)
}

/// The header of a file of changes that the kernel has given up on, made good again; none if it is good, or no such header.
///
/// When the host's disk is full, a change cannot be written, and the kernel marks all of them invalid, for good. Those that were written
/// before are whole. Once there is room again a stopped machine can go on with them: to the guest it is as if the power had failed.
pub fn revalidated(header: [u8; HEADER]) -> Option<[u8; HEADER]> {
    // Magic, valid, version, sectors of a chunk.
    if word(header, 0) != MAGIC || word(header, 1) != 0 || !is_usable(header) {
        return None;
    }
    let mut good = header;
    good[4] = 1;
    Some(good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_every_chunk_and_little_more() {
        for disk in [1, CHUNK, CHUNK + 1, 1 << 30, 10 << 30, MAX_DISK] {
            let file = changes(disk);
            assert!(file > disk && file.is_multiple_of(CHUNK));
            assert!(file < disk + disk / 500 + 5 * CHUNK, "{disk}: {file}");
        }
    }
    #[test]
    fn only_what_was_given_up_is_made_good() {
        let header = |words: [u32; 4]| {
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            <[u8; HEADER]>::try_from(bytes).unwrap()
        };
        let good = header([1_883_336_275, 1, 1, 32]);
        assert_eq!(revalidated(header([1_883_336_275, 0, 1, 32])), Some(good));
        for other in [
            [1_883_336_275, 1, 1, 32],
            [0, 0, 0, 0],
            [1_883_336_275, 0, 2, 32],
            [1_883_336_275, 0, 1, 0],
            [1_883_336_275, 0, 1, 64],
            [7, 0, 1, 32],
        ] {
            assert_eq!(revalidated(header(other)), None, "{other:?}");
        }
    }
    #[test]
    fn chunks_have_the_size_that_they_always_have() {
        let header = |words: [u32; 4]| {
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            <[u8; HEADER]>::try_from(bytes).unwrap()
        };
        for good in [[0; 4], [0, 9, 9, 9], [MAGIC, 1, 1, 32], [MAGIC, 0, 1, 32]] {
            assert!(is_usable(header(good)), "{good:?}");
        }
        for bad in [
            [MAGIC, 1, 1, 1 << 21],
            [MAGIC, 1, 1, 8],
            [MAGIC, 1, 1, 0],
            [MAGIC, 2, 1, 32],
            [MAGIC, 1, 2, 32],
            [7, 1, 1, 32],
        ] {
            assert!(!is_usable(header(bad)), "{bad:?}");
        }
    }
}
