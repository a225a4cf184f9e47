//! What `/proc/PID/mountinfo` says.

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// What of its file system it shows.
    pub(super) root: PathBuf,
    /// Where it is.
    pub(super) at: PathBuf,
}

/// The mounts of a `mountinfo`.
pub(super) fn parse(text: &str) -> Vec<Mount> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(3);
            let root = unescape(fields.next()?);
            let at = unescape(fields.next()?);
            Some(Mount { root, at })
        })
        .collect()
}

/// The mounts that are below a directory, or on it.
pub(super) fn below(text: &str, dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = parse(text)
        .into_iter()
        .map(|mount| mount.at)
        .filter(|at| at.starts_with(dir))
        .collect();
    // A mount of the jails' base itself is the administrator's: that is where jails are.
    found.retain(|at| at != dir);
    found
}

/// Blanks, tabs, line ends and backslashes are written as three octal digits.
fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = (*first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "22 1 254:1 / / rw,noatime shared:1 - ext4 /dev/vda rw\n\
        99 22 254:1 /var/lib/banger/jail/firecracker/00112233aabbccdd/root /var/lib/banger/jail/x\\040y rw - ext4 /dev/vda rw\n\
        100 22 0:40 / /var/lib/banger/jail rw - tmpfs t rw\n\
        101 22 0:41 / /var/lib/banger/jailor rw - tmpfs t rw\nnonsense\n";

    #[test]
    fn mounts_below_a_directory() {
        assert_eq!(
            below(TEXT, Path::new("/var/lib/banger/jail")),
            [PathBuf::from("/var/lib/banger/jail/x y")]
        );
        assert!(below("", Path::new("/")).is_empty());
        assert_eq!(
            parse(TEXT)[1].root,
            Path::new("/var/lib/banger/jail/firecracker/00112233aabbccdd/root")
        );
        assert_eq!(unescape("a\\1"), PathBuf::from("a\\1"));
    }
}
