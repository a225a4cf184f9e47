//! The few system and processor interfaces that no safe wrapper covers.
#![allow(unsafe_code)]

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
