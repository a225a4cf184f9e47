//! Files with holes: where their data is, and copies that keep the holes.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;

use crate::error::{IoContext, Result};

/// Bytes that are read at a time.
const BUFFER: usize = 1 << 20;
/// What is zero in a copy's source stays a hole in pieces of this size.
const PIECE: usize = 4096;

/// Copies a file to a new one for this user alone: by reference where the file system shares blocks, else data only, so that
/// holes stay holes. On failure there is no target.
pub fn clone_file(from: &Path, to: &Path) -> Result<()> {
    let source = File::open(from).on("open", from)?;
    let target = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)
        .on("make the file", to)?;
    let copied = match ioctl_ficlone(&target, &source) {
        Ok(()) => Ok(()),
        Err(_) => copy(&source, &target).on("copy to", to),
    };
    copied.inspect_err(|_| {
        let _ = fs::remove_file(to);
    })
}

fn copy(source: &File, target: &File) -> io::Result<()> {
    target.set_len(source.metadata()?.len())?;
    let mut buffer = vec![0; BUFFER];
    for_data(source, |range| {
        let mut at = range.start;
        while at < range.end {
            let want = usize::try_from(range.end - at).map_or(BUFFER, |left| left.min(BUFFER));
            let piece = buffer.get_mut(..want).unwrap_or_default();
            let count = source.read_at(piece, at)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            super::write_sparse(target, at, piece.get(..count).unwrap_or_default())?;
            at += count as u64;
        }
        Ok(())
    })
}

/// Calls for every stretch of data, in order. Where the file system cannot tell, everything is data.
pub(crate) fn for_data(file: &File, mut each: impl FnMut(Range<u64>) -> io::Result<()>) -> io::Result<()> {
    let end = file.metadata()?.len();
    let mut at = 0;
    while at < end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => return each(at..end),
            Err(e) => return Err(e.into()),
        };
        let stop = seek(file, SeekFrom::Hole(start))?.min(end);
        if start >= stop {
            break;
        }
        each(start..stop)?;
        at = stop;
    }
    Ok(())
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let mut pieces = bytes.chunks_exact(PIECE);
    // A fold over a piece of fixed size becomes vector instructions; going on at the first one that is not zero is enough.
    pieces.all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
        && bytes.chunks_exact(PIECE).remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn copies_have_the_same_bytes_and_the_same_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len((64 << 20) + 5).unwrap();
        for at in [0, 9_999_999, (64 << 20) + 2] {
            file.write_all_at(b"abc", at).unwrap();
        }
        file.write_all_at(&vec![0; 4 << 20], 32 << 20).unwrap();
        clone_file(&from, &to).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        let meta = fs::metadata(&to).unwrap();
        assert_eq!(meta.mode() & 0o777, 0o600);
        assert!(meta.blocks() <= fs::metadata(&from).unwrap().blocks());
        // By hand as well, for file systems that share blocks.
        let by_hand = dir.path().join("by hand");
        copy(&File::open(&from).unwrap(), &File::create(&by_hand).unwrap()).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&by_hand).unwrap());
        assert!(fs::metadata(&by_hand).unwrap().blocks() < 200);
        assert!(clone_file(&from, &to).is_err(), "nothing is overwritten");
        assert!(to.exists());
        assert!(clone_file(&dir.path().join("missing"), &dir.path().join("x")).is_err());
        assert!(!dir.path().join("x").exists());
    }

    #[test]
    fn zeros_of_any_length() {
        for length in [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 7] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in [0, length / 2, length.saturating_sub(1)] {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = 1;
                    assert!(!is_zero(&bytes));
                    bytes[at] = 0;
                }
            }
        }
    }
}
