//! A device-mapper snapshot read without device-mapper: the base, and over it what its file of changes lists.
//!
//! The form is the kernel's (`drivers/md/dm-snap-persistent.c`): a header of one chunk, then areas of a chunk that lists and the chunks
//! that it lists. An entry names a chunk of the disk and the chunk of the file that has its content; the first that names none ends
//! the list. The guest writes none of this, but a half-written file must not harm: everything is bounded by the file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use banger_image::disk;
use banger_proto::error::ApiError;

use crate::error::{self, IntoApi};
use crate::host::Device;

/// `SnAp`
const MAGIC: u32 = 0x7041_6e53;
/// The only version that there is.
const VERSION: u32 = 1;
const SECTOR: u64 = 512;
const ENTRY: u64 = 16;
/// Largest chunk that is read.
const MAX_CHUNK: u64 = 1 << 20;

/// Writes what the device shows to a new raw and sparse file.
pub(super) fn merge(device: &Device, target: &Path) -> Result<(), ApiError> {
    disk::clone_file(&device.base, target).map_err(IntoApi::into_api)?;
    let merged = apply(device, target);
    if merged.is_err() {
        let _ = std::fs::remove_file(target);
    }
    merged
}

fn apply(device: &Device, target: &Path) -> Result<(), ApiError> {
    let reading = |e| error::io(format_args!("read {}", device.changes.display()), e);
    let writing = |e| error::io(format_args!("write {}", target.display()), e);
    let changes = File::open(&device.changes).map_err(reading)?;
    let target = OpenOptions::new().write(true).open(target).map_err(writing)?;
    target.set_len(device.bytes).map_err(writing)?;
    let Some(chunk) = chunk_size(&changes).map_err(reading)? else {
        return Ok(());
    };
    let mut content = vec![0; usize::try_from(chunk).unwrap_or(0)];
    entries(&changes, chunk, |old, new| {
        let at = old
            .checked_mul(chunk)
            .filter(|at| *at < device.bytes)
            .ok_or_else(damaged)?;
        changes.read_exact_at(&mut content, new * chunk)?;
        let length = usize::try_from((device.bytes - at).min(chunk)).unwrap_or(0);
        target.write_all_at(content.get(..length).unwrap_or_default(), at)
    })
    .map_err(|e| match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => writing(e),
        _ => reading(e),
    })?;
    Ok(())
}

fn damaged() -> io::Error {
    io::Error::other("its list of changes is damaged")
}

/// Bytes of a chunk; `None` for changes that no device was ever made of.
fn chunk_size(changes: &File) -> io::Result<Option<u64>> {
    let mut header = [0; 16];
    changes.read_exact_at(&mut header, 0)?;
    let (words, _) = header.as_chunks::<4>();
    let mut words = words.iter().map(|w| u32::from_le_bytes(*w));
    let mut next = || words.next().unwrap_or(0);
    let (magic, valid, version, sectors) = (next(), next(), next(), next());
    if magic == 0 {
        return Ok(None);
    }
    let chunk = u64::from(sectors) * SECTOR;
    if magic != MAGIC || version != VERSION || !chunk.is_power_of_two() || !(4096..=MAX_CHUNK).contains(&chunk) {
        return Err(damaged());
    }
    if valid != 1 {
        return Err(io::Error::other(
            "changes are missing in it: at some time there was no space to write them",
        ));
    }
    Ok(Some(chunk))
}

/// Calls for every changed chunk: its number on the disk, and in the file.
fn entries(changes: &File, chunk: u64, mut each: impl FnMut(u64, u64) -> io::Result<()>) -> io::Result<()> {
    let chunks = changes.metadata()?.len() / chunk;
    let per_area = chunk / ENTRY;
    let mut list = vec![0; usize::try_from(chunk).unwrap_or(0)];
    let mut area = 1;
    while area < chunks {
        changes.read_exact_at(&mut list, area * chunk)?;
        let (numbers, _) = list.as_chunks::<8>();
        let (pairs, _) = numbers.as_chunks::<2>();
        for [old, new] in pairs {
            let (old, new) = (u64::from_le_bytes(*old), u64::from_le_bytes(*new));
            if new == 0 {
                return Ok(());
            }
            if new >= chunks {
                return Err(damaged());
            }
            each(old, new)?;
        }
        area += per_area + 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use banger_core::plan::DiskRole;
    use proptest::prelude::*;

    use super::*;

    const CHUNK: usize = 4096;

    /// A device over a base of `base` chunks of `b`, with these chunks changed, in a file as the kernel writes it.
    fn device(dir: &Path, base: usize, disk: usize, changed: &[(u64, u8)], valid: u32) -> Device {
        std::fs::write(dir.join("base"), vec![b'b'; base * CHUNK]).unwrap();
        let mut file = vec![0; CHUNK];
        for (at, word) in [MAGIC, valid, VERSION, (CHUNK / 512) as u32].iter().enumerate() {
            file[at * 4..at * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        for area in changed.chunks(CHUNK / 16).chain([[].as_slice()]) {
            let place = file.len() / CHUNK;
            let mut list = vec![0; CHUNK];
            let mut content = Vec::new();
            for (at, (old, byte)) in area.iter().enumerate() {
                list[at * 16..at * 16 + 8].copy_from_slice(&old.to_le_bytes());
                let new = (place + 1 + at) as u64;
                list[at * 16 + 8..at * 16 + 16].copy_from_slice(&new.to_le_bytes());
                content.extend(vec![*byte; CHUNK]);
            }
            file.extend(list);
            file.extend(content);
            if area.len() < CHUNK / 16 {
                break;
            }
        }
        std::fs::write(dir.join("changes"), file).unwrap();
        Device {
            role: DiskRole::Root,
            base: dir.join("base"),
            changes: dir.join("changes"),
            bytes: (disk * CHUNK) as u64,
        }
    }

    fn merged(dir: &Path, device: &Device) -> Result<Vec<u8>, ApiError> {
        let target = dir.join("target");
        let _ = std::fs::remove_file(&target);
        merge(device, &target).map(|()| std::fs::read(&target).unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn what_was_changed_is_over_what_was_not(changed in proptest::collection::btree_map(0u64..700, 1u8..255, 0..600)) {
            let tmp = tempfile::tempdir().unwrap();
            let changed: Vec<(u64, u8)> = changed.into_iter().collect();
            let device = device(tmp.path(), 500, 700, &changed, 1);
            let all = merged(tmp.path(), &device).unwrap();
            prop_assert_eq!(all.len(), 700 * CHUNK);
            for (at, chunk) in all.chunks(CHUNK).enumerate() {
                let expected = changed.iter().find(|(old, _)| *old == at as u64).map(|(_, byte)| *byte);
                let expected = expected.unwrap_or(if at < 500 { b'b' } else { 0 });
                prop_assert!(chunk.iter().all(|byte| *byte == expected), "chunk {}", at);
            }
        }

        #[test]
        fn damage_is_an_error_and_never_more(at in 0usize..3 * CHUNK, byte: u8) {
            let tmp = tempfile::tempdir().unwrap();
            let device = device(tmp.path(), 4, 8, &[(1, b'x'), (6, b'y')], 1);
            let mut file = std::fs::read(&device.changes).unwrap();
            if let Some(place) = file.get_mut(at) {
                *place = byte;
            }
            std::fs::write(&device.changes, file).unwrap();
            if let Ok(all) = merged(tmp.path(), &device) {
                prop_assert_eq!(all.len(), 8 * CHUNK);
            } else {
                prop_assert!(!tmp.path().join("target").exists());
            }
        }
    }

    #[test]
    fn changes_that_ran_out_of_space_are_refused_and_fresh_ones_are_none() {
        let tmp = tempfile::tempdir().unwrap();
        let broken = device(tmp.path(), 4, 8, &[(1, b'x')], 0);
        let error = merged(tmp.path(), &broken).unwrap_err();
        assert!(error.message.contains("no space"), "{}", error.message);
        std::fs::write(&broken.changes, vec![0; 16 * CHUNK]).unwrap();
        let all = merged(tmp.path(), &broken).unwrap();
        assert_eq!(all.iter().filter(|b| **b == b'b').count(), 4 * CHUNK);
        assert_eq!(all.len(), 8 * CHUNK);
    }
}
