//! The one thing about a qcow2 file that the driver reads itself: which image lies below it.
//!
//! The header is written on the host and out of the guest's reach, so its word is good. What lies below is always a raw
//! image; QEMU is told so, and not left to look at its content.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The longest name that the format allows.
const NAME: u32 = 1023;

/// Reads the name of the image below. A relative one is relative to the file's directory.
pub(super) fn backing(path: &Path) -> io::Result<Option<PathBuf>> {
    let mut file = File::open(path)?;
    let mut header = [0; 20];
    let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    file.read_exact(&mut header)
        .map_err(|_| bad("it is too short for a qcow2 file"))?;
    let word = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if header[..4] != *b"QFI\xfb" || !(2..=3).contains(&word(4)) {
        return Err(bad("it is not a qcow2 file of version 2 or 3"));
    }
    let offset = (u64::from(word(8)) << 32) | u64::from(word(12));
    let length = word(16);
    if offset == 0 || length == 0 {
        return Ok(None);
    }
    if length > NAME {
        return Err(bad("the name of the image below it is too long"));
    }
    let mut name = vec![0; length as usize];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut name)
        .map_err(|_| bad("the name of the image below it lies outside"))?;
    if name.contains(&0) || name.starts_with(b"json:") {
        return Err(bad("the name of the image below it is no path"));
    }
    let name = PathBuf::from(std::ffi::OsString::from_vec(name));
    Ok(Some(path.parent().unwrap_or(Path::new("/")).join(name)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn header(offset: u64, name: &[u8], length: u32) -> Vec<u8> {
        let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.resize(104, 0);
        bytes.extend_from_slice(name);
        bytes
    }

    #[test]
    fn the_name_is_found_or_the_file_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.qcow2");
        let read = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            backing(&path)
        };
        assert_eq!(read(&header(104, b"/i/a", 4)).unwrap(), Some("/i/a".into()));
        assert_eq!(read(&header(104, b"a.img", 5)).unwrap(), Some(dir.path().join("a.img")));
        assert_eq!(read(&header(0, b"", 0)).unwrap(), None);
        for bad in [
            &b""[..],
            b"QFI\xfb",
            &[0; 200],
            &header(104, b"/i/a", 5),
            &header(u64::MAX, b"/i/a", 4),
            &header(104, &[b'x'; 2000], 2000),
            &header(104, b"a\0b", 3),
            &header(104, b"json:{}", 7),
        ] {
            assert!(read(bad).is_err(), "{:?}", &bad[..bad.len().min(30)]);
        }
        assert!(backing(Path::new("/nonexistent/x")).is_err());
    }
}
