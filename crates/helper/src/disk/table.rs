//! The tables of a machine's disk, and what a snapshot says of itself. No I/O.
//!
//! A disk is a `snapshot` of its base: what is written goes, chunk by chunk, to the changes; what is not there yet is read from the
//! base. A base that is smaller than the disk gets a device of its own first, on which `zero` follows the base's end: the origin of a
//! snapshot has to be as long as the snapshot.
//!
//! **The size of a chunk** ([`banger_system::disk::CHUNK`]) is 16 KiB. Smaller chunks copy less when a part of one is written; larger
//! ones need fewer entries in the table of changes (kept in the kernel's memory, and read when the disk is attached) and fewer commits.
//! Measured with 49 MB of small files, 150 scattered synchronous writes and 64 MB in one piece: the changes took 133 MiB with chunks of
//! 4 KiB, 135 with 16, 137 with 32, 142 with 64, the table of them 536, 160, 128, 128 KiB; times were within what the emulator scatters.

use banger_system::disk::{CHUNK, SECTOR};

/// One target of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// First sector.
    pub(super) start: u64,
    /// Sectors.
    pub(super) length: u64,
    /// Which kind.
    pub(super) kind: &'static str,
    /// Its parameters.
    pub(super) params: String,
}

/// `major:minor`, as device-mapper takes it.
pub(super) fn device(dev: u64) -> String {
    format!("{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev))
}

/// The base made as long as the disk. None where it is already.
pub(super) fn extended(base: &str, base_bytes: u64, bytes: u64) -> Option<Vec<Target>> {
    let (end, all) = (base_bytes / SECTOR, bytes / SECTOR);
    let tail = all.checked_sub(end).filter(|tail| *tail > 0)?;
    Some(vec![
        Target {
            start: 0,
            length: end,
            kind: "linear",
            params: format!("{base} 0"),
        },
        Target {
            start: end,
            length: tail,
            kind: "zero",
            params: String::new(),
        },
    ])
}

/// The disk.
pub(super) fn snapshot(origin: &str, changes: &str, bytes: u64) -> Vec<Target> {
    vec![Target {
        start: 0,
        length: bytes / SECTOR,
        kind: "snapshot",
        // Persistent: what has changed is found again in the file.
        params: format!("{origin} {changes} P {}", CHUNK / SECTOR),
    }]
}

/// Whether a snapshot's parameters, as the kernel works by them, have chunks of [`CHUNK`] bytes: `origin changes P sectors`.
pub(super) fn has_usual_chunks(params: &str) -> bool {
    params.split_whitespace().nth(3).and_then(|n| n.parse().ok()) == Some(CHUNK / SECTOR)
}

/// What a snapshot says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Usage {
    /// Bytes that are used, and that there are.
    Good {
        /// Used, metadata included.
        used: u64,
        /// All.
        total: u64,
    },
    /// It has lost changes: reads and writes fail.
    Invalid,
}

/// Reads the status line of a `snapshot` target: `used/total metadata`, or a word. What is no such line counts as invalid, since
/// nothing is known of it.
pub(super) fn usage(line: &str) -> Usage {
    let numbers = || {
        let (used, rest) = line.split_once('/')?;
        let total = rest.split_whitespace().next()?;
        let bytes = |text: &str| text.parse::<u64>().ok()?.checked_mul(SECTOR);
        Some((bytes(used.trim())?, bytes(total)?))
    };
    match numbers() {
        Some((used, total)) => Usage::Good { used, total },
        None => Usage::Invalid,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_snapshot_of_a_base_that_is_as_long() {
        assert_eq!(extended("7:3", 1 << 20, 1 << 20), None);
        assert_eq!(
            extended("7:3", 1 << 20, 1 << 10),
            None,
            "never shorter; the gate has refused it before"
        );
        let two = extended("7:3", 1 << 20, 4 << 20).unwrap();
        assert_eq!(
            (two[0].start, two[0].length, two[0].kind, two[0].params.as_str()),
            (0, 2048, "linear", "7:3 0")
        );
        assert_eq!(
            (two[1].start, two[1].length, two[1].kind, two[1].params.as_str()),
            (2048, 6144, "zero", "")
        );
        let one = snapshot("253:4", "7:9", 4 << 20);
        assert_eq!(
            (one[0].length, one[0].kind, one[0].params.clone()),
            (8192, "snapshot", format!("253:4 7:9 P {}", CHUNK / 512))
        );
    }

    #[test]
    fn the_size_of_chunks_is_read() {
        let whole = snapshot("253:4", "7:9", 4 << 20);
        assert!(has_usual_chunks(&whole[0].params));
        for other in ["253:4 7:9 P 2097152", "253:4 7:9 P", "253:4 7:9 P x", ""] {
            assert!(!has_usual_chunks(other), "{other}");
        }
    }

    #[test]
    fn what_a_snapshot_says() {
        assert_eq!(
            usage("16/409600 16"),
            Usage::Good {
                used: 8192,
                total: 409_600 * 512
            }
        );
        for lost in [
            "Invalid",
            "Overflow",
            "Merge failed",
            "Unknown",
            "",
            "x/y z",
            "1/",
            "99999999999999999999/1 1",
        ] {
            assert_eq!(usage(lost), Usage::Invalid, "{lost}");
        }
    }
}
