//! Looking for bytes where they must not be.

use std::path::Path;

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
        let bytes = std::fs::read(&path).unwrap();
        for (what, needle) in needles {
            if let Some(at) = positions(&bytes, needle).first() {
                found.push((what.clone(), format!("{} at {at}", path.display())));
            }
        }
    }
    found
}

/// Where a text is in another one. Holes, which are most of a memory file, are passed over quickly.
pub(crate) fn positions(text: &[u8], part: &[u8]) -> Vec<usize> {
    let Some(&first) = part.iter().find(|b| **b != 0) else {
        return Vec::new();
    };
    let skip = part.iter().position(|b| *b == first).unwrap_or_default();
    let mut found = Vec::new();
    let mut at = skip;
    while at < text.len() {
        let block = &text[at..text.len().min(at + 4096)];
        if !block.iter().fold(false, |any, b| any | (*b != 0)) {
            at += block.len();
            continue;
        }
        for (i, _) in block.iter().enumerate().filter(|(_, b)| **b == first) {
            if text[at + i - skip..].starts_with(part) {
                found.push(at + i - skip);
            }
        }
        at += block.len();
    }
    found
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
