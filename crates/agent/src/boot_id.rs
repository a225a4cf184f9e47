//! The boot id of a copy. The kernel makes one per boot, and a copy has not booted, so it gets a file with one of its own over
//! the kernel's, as in a container.
//!
//! The mount is made once and only its file is written anew: a change of the mounts makes an init look through all of them.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;

use rustix::rand::GetRandomFlags;

/// Where everybody looks for it.
pub(crate) const PATH: &str = "/proc/sys/kernel/random/boot_id";

/// What lies over that.
const COVER: &str = "/run/banger/boot_id";

/// Puts a file over the kernel's boot id that says the same, if there is none yet.
pub(crate) fn cover() -> io::Result<()> {
    if is_covered()? {
        return Ok(());
    }
    write(&std::fs::read_to_string(PATH)?)?;
    Ok(rustix::mount::mount_bind(COVER, PATH)?)
}

/// What it is now.
pub(crate) fn read() -> String {
    std::fs::read_to_string(PATH).unwrap_or_default().trim().to_owned()
}

/// Makes the machine's boot id a fresh one, from the kernel's generator.
pub(crate) fn renew() -> io::Result<String> {
    let mut bytes = [0; 16];
    let n = rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty())?;
    if n < bytes.len() {
        return Err(io::Error::other("too few random bytes"));
    }
    let covered = is_covered()?;
    let mut text = uuid(bytes);
    write(&text)?;
    if !covered {
        rustix::mount::mount_bind(COVER, PATH)?;
    }
    text.truncate(text.trim_end().len());
    Ok(text)
}

fn is_covered() -> io::Result<bool> {
    Ok(rustix::fs::statfs(PATH)?.f_type != rustix::fs::PROC_SUPER_MAGIC)
}

/// In place: the mount is of this very file, and every id has the same length.
fn write(text: &str) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o444)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(COVER)?;
    file.write_all(text.as_bytes())
}

/// A random UUID (version 4) in the kernel's form.
fn uuid(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut out = String::with_capacity(37);
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            out.push('-');
        }
        for digit in [byte >> 4, byte & 15] {
            out.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
        }
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids() {
        assert_eq!(uuid([0; 16]), "00000000-0000-4000-8000-000000000000\n");
        assert_eq!(uuid([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff\n");
        assert_eq!(uuid([0x1a; 16]).len(), 37);
    }
}
