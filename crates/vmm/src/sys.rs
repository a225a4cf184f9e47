//! The few system and processor interfaces that no safe wrapper covers.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use rustix::ioctl;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `KVM_GET_API_VERSION`: takes nothing, answers by its return value.
struct KvmGetApiVersion;

// SAFETY: the request `_IO(0xAE, 0x00)` takes no argument and writes no memory; its answer is the return value.
unsafe impl ioctl::Ioctl for KvmGetApiVersion {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> ioctl::Opcode {
        0xAE00
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(out: ioctl::IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

/// Asks an open `/dev/kvm` for its API version.
pub(crate) fn kvm_api_version(fd: impl AsFd) -> rustix::io::Result<i32> {
    // SAFETY: on a descriptor that is no KVM device the request number is unknown and refused.
    unsafe { ioctl::ioctl(fd, KvmGetApiVersion) }
}

/// Reads the time stamp counter, after everything before it has been done.
#[cfg(target_arch = "x86_64")]
pub(crate) fn time_stamp() -> Option<u64> {
    // SAFETY: every x86_64 processor has both instructions, and Linux lets programs use them unless asked not to (prctl),
    // which nothing here does.
    Some(unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    })
}

/// There is none.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn time_stamp() -> Option<u64> {
    None
}

/// The TSC frequency in kHz as the processor states it (leaves 0x15 and 0x16). Nobody promises that it is right in a virtual
/// machine.
#[cfg(target_arch = "x86_64")]
pub(crate) fn stated_tsc_khz() -> Option<u64> {
    // The intrinsics were `unsafe` in older toolchains and are safe in newer ones.
    #[allow(unused_unsafe)]
    let cpuid = |leaf| {
        // SAFETY: every x86_64 processor has the instruction.
        unsafe { core::arch::x86_64::__cpuid(leaf) }
    };
    let max = cpuid(0).eax;
    if max < 0x15 {
        return None;
    }
    let ratio = cpuid(0x15);
    if ratio.eax == 0 || ratio.ebx == 0 {
        return None;
    }
    if ratio.ecx != 0 {
        return Some(u64::from(ratio.ecx) * u64::from(ratio.ebx) / u64::from(ratio.eax) / 1000);
    }
    let base_mhz = if max >= 0x16 { cpuid(0x16).eax & 0xffff } else { 0 };
    (base_mhz != 0).then(|| u64::from(base_mhz) * 1000)
}

/// There is none.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn stated_tsc_khz() -> Option<u64> {
    None
}

/// Watches a descriptor for readability.
pub(crate) fn watch_readable(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the watch owns the descriptor, which so stays open and the same for as long as it is registered.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(std::io::Error::from)
}

/// The most stretches that one call reads.
const STRETCHES: usize = 1024;

/// Reads stretches of another process's memory, one after the other, into a buffer that holds exactly all of them.
pub(crate) fn read_memory(pid: u32, stretches: &[Range<u64>], buffer: &mut [u8]) -> io::Result<()> {
    let bad = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let pid = libc::pid_t::try_from(pid).map_err(bad)?;
    let mut remote = Vec::with_capacity(stretches.len());
    for stretch in stretches {
        remote.push(libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(usize::try_from(stretch.start).map_err(bad)?),
            iov_len: usize::try_from(stretch.end.saturating_sub(stretch.start)).map_err(bad)?,
        });
    }
    let (mut next, mut filled) = (0, 0);
    while let Some(room) = buffer.get_mut(filled..).filter(|room| !room.is_empty()) {
        let local = libc::iovec {
            iov_base: room.as_mut_ptr().cast(),
            iov_len: room.len(),
        };
        let rest = remote.get(next..).unwrap_or_default();
        let count = rest.len().min(STRETCHES) as libc::c_ulong;
        // SAFETY: the kernel writes to `local` alone, which is the rest of the buffer that is borrowed here. `rest` has at least
        // `count` elements; their addresses are those of another process, and one that is wrong is refused.
        let read = unsafe { libc::process_vm_readv(pid, &raw const local, 1, rest.as_ptr(), count, 0) };
        let mut read = match usize::try_from(read) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => read,
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => continue,
                e => return Err(e),
            },
        };
        filled += read;
        // A call may end early, within a stretch as well.
        while read > 0 {
            let Some(stretch) = remote.get_mut(next) else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            let part = read.min(stretch.iov_len);
            stretch.iov_len -= part;
            stretch.iov_base = stretch.iov_base.cast::<u8>().wrapping_add(part).cast();
            if stretch.iov_len == 0 {
                next += 1;
            }
            read -= part;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init)]
    fn memory_is_read_stretch_by_stretch() {
        let source: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
        let base = source.as_ptr().expose_provenance() as u64;
        // More stretches than one call takes.
        let stretches: Vec<Range<u64>> = (0..3000).map(|n| base + n * 300..base + n * 300 + 7).collect();
        let mut buffer = vec![0; 3000 * 7];
        read_memory(std::process::id(), &stretches, &mut buffer).unwrap();
        for (n, piece) in buffer.chunks(7).enumerate() {
            assert_eq!(piece, &source[n * 300..n * 300 + 7]);
        }
        let mut one = vec![0; source.len()];
        read_memory(std::process::id(), &[base..base + 1_000_000], &mut one).unwrap();
        assert!(one == source);
        read_memory(std::process::id(), &[], &mut []).unwrap();
        let mut byte = [0];
        assert!(read_memory(std::process::id(), &[16..17], &mut byte).is_err());
        assert!(read_memory(std::process::id(), &[], &mut byte).is_err());
        assert!(read_memory(u32::MAX, &[base..base + 1], &mut byte).is_err());
    }
}
