//! Looking for bytes where they must not be.

use std::path::Path;

use rustix::fs::{SeekFrom, seek};

/// Which of the needles are in the files of a directory, and where.
pub(crate) fn in_tree(dir: &Path, needles: &[(String, Vec<u8>)]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .flatten()
    {
        let path = entry.path();
        if path.is_dir() {
            found.extend(in_tree(&path, needles));
            continue;
        }
        let bytes = data(&path);
        for (what, needle) in needles {
            if let Some(at) = positions(&bytes, needle).first() {
                found.push((what.clone(), format!("{} at {at} of its data", path.display())));
            }
        }
    }
    found
}

/// What is in a file, without its holes, which are most of a memory file and of a disk.
fn data(path: &Path) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut bytes = Vec::new();
    let mut at = 0;
    while let Ok(start) = seek(&file, SeekFrom::Data(at)) {
        let end = seek(&file, SeekFrom::Hole(start)).unwrap();
        let old = bytes.len();
        bytes.resize(old + usize::try_from(end - start).unwrap(), 0);
        file.read_exact_at(&mut bytes[old..], start).unwrap();
        at = end;
    }
    bytes
}

/// Where a text is in another one.
pub(crate) fn positions(text: &[u8], part: &[u8]) -> Vec<usize> {
    let Some((&first, rest)) = part.split_first() else {
        return Vec::new();
    };
    let begins = |(at, byte): (usize, &u8)| (*byte == first && text[at + 1..].starts_with(rest)).then_some(at);
    text.iter().enumerate().filter_map(begins).collect()
}

/// Bytes of their base64; what is none of its letters is passed over.
pub(crate) fn base64(text: &str) -> Vec<u8> {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits: Vec<u32> = text
        .bytes()
        .filter_map(|b| LETTERS.iter().position(|l| *l == b))
        .map(|d| u32::try_from(d).unwrap())
        .collect();
    let mut bytes = Vec::new();
    for group in digits.chunks(4) {
        let bits = group.iter().fold(0, |bits, d| bits << 6 | d) << (6 * (4 - group.len()));
        let whole = [(bits >> 16) as u8, (bits >> 8) as u8, bits as u8];
        bytes.extend_from_slice(&whole[..group.len() * 6 / 8]);
    }
    bytes
}
