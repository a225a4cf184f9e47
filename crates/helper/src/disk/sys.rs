//! The calls of the loop driver and of device-mapper: the only unsafe code of the helper's disks.
//!
//! Everything is encoded and decoded elsewhere, in safe code; here are the structures as the kernel has them (`linux/loop.h`,
//! `linux/dm-ioctl.h`) and the calls.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Length of a loop's name, its end included.
pub(super) const LOOP_NAME: usize = 64;
/// The loop can only be read.
pub(super) const LO_READ_ONLY: u32 = 1;
/// The loop ends when nobody has it open any more.
pub(super) const LO_AUTOCLEAR: u32 = 4;
/// The loop goes past the page cache of its file.
pub(super) const LO_DIRECT_IO: u32 = 16;

const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A as libc::Ioctl;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05 as libc::Ioctl;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82 as libc::Ioctl;

/// `struct loop_info64`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct LoopInfo {
    /// Device of the file's file system.
    pub(super) device: u64,
    /// The file's inode.
    pub(super) inode: u64,
    rdevice: u64,
    /// Where in the file it begins.
    pub(super) offset: u64,
    /// Where it ends; zero is the file's end.
    pub(super) size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    /// `LO_…`
    pub(super) flags: u32,
    /// A free text: banger's mark.
    pub(super) name: [u8; LOOP_NAME],
    crypt_name: [u8; LOOP_NAME],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo {
    /// One in which nothing is set.
    pub(super) const fn zero() -> Self {
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            name: [0; LOOP_NAME],
            crypt_name: [0; LOOP_NAME],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// `struct loop_config`
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

fn check(result: libc::c_int) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The number of a loop that nobody uses.
pub(super) fn loop_free(control: impl AsFd) -> io::Result<u32> {
    // SAFETY: the call takes no argument.
    check(unsafe { libc::ioctl(control.as_fd().as_raw_fd(), LOOP_CTL_GET_FREE) })
}

/// Binds a loop to a file, in one step.
pub(super) fn loop_configure(device: impl AsFd, file: impl AsFd, block_size: u32, info: LoopInfo) -> io::Result<()> {
    let config = LoopConfig {
        fd: file.as_fd().as_raw_fd().cast_unsigned(),
        block_size,
        info,
        reserved: [0; 8],
    };
    // SAFETY: the argument is a `loop_config`, which lives as long as the call; the kernel only reads it.
    check(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), LOOP_CONFIGURE, &raw const config) }).map(drop)
}

/// What a loop is bound to.
pub(super) fn loop_status(device: impl AsFd) -> io::Result<LoopInfo> {
    let mut info = LoopInfo::zero();
    // SAFETY: the argument is a `loop_info64`, which lives as long as the call; any bytes make a valid one.
    check(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) })?;
    Ok(info)
}

/// Length of `struct dm_ioctl`.
pub(super) const DM_HEADER: usize = 312;
/// Where in it the length of the whole buffer is.
pub(super) const DM_DATA_SIZE: usize = 12;

/// `_IOWR(0xfd, command, struct dm_ioctl)`
pub(super) const fn dm_request(command: u8) -> u32 {
    (3 << 30) | ((DM_HEADER as u32) << 16) | (0xfd << 8) | command as u32
}

/// One call of device-mapper. The buffer begins with a `struct dm_ioctl`; its length is filled in here.
pub(super) fn dm(control: impl AsFd, command: u8, buffer: &mut [u64]) -> io::Result<()> {
    let length = size_of_val(buffer);
    let Ok(length) = u32::try_from(length) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if (length as usize) < DM_HEADER {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // The length shares its eight bytes with `version[2]`.
    let at = DM_DATA_SIZE / 8;
    let mut pair = buffer[at].to_ne_bytes();
    pair[DM_DATA_SIZE % 8..].copy_from_slice(&length.to_ne_bytes());
    buffer[at] = u64::from_ne_bytes(pair);
    // SAFETY: the buffer is aligned as `dm_ioctl` has to be, lives as long as the call, and the kernel reads and writes no more than
    // the `data_size` bytes that were written into it above: its length. Any bytes are valid in it.
    check(unsafe {
        libc::ioctl(
            control.as_fd().as_raw_fd(),
            dm_request(command) as libc::Ioctl,
            buffer.as_mut_ptr(),
        )
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_are_the_kernels() {
        assert_eq!((size_of::<LoopInfo>(), size_of::<LoopConfig>()), (232, 304));
        assert_eq!(std::mem::offset_of!(LoopInfo, flags), 52);
        assert_eq!(std::mem::offset_of!(LoopInfo, name), 56);
        // As `strace` shows them of `dmsetup`.
        assert_eq!(
            (dm_request(0), dm_request(3), dm_request(12)),
            (0xc138_fd00, 0xc138_fd03, 0xc138_fd0c)
        );
    }
}
