//! Keeps the process small: one module, because it calls the C library's allocator by hand.
//!
//! A daemon that built an image has touched hundreds of MiB in short-lived buffers. glibc gives such memory back only from the
//! end of its heaps, and keeps a heap per thread; both are limited here.
#![allow(unsafe_code)]

use std::ffi::c_int;

unsafe extern "C" {
    fn mallopt(parameter: c_int, value: c_int) -> c_int;
    fn malloc_trim(pad: usize) -> c_int;
}

// Numbers of `malloc.h`.
const M_TRIM_THRESHOLD: c_int = -1;
const M_MMAP_THRESHOLD: c_int = -3;
const M_ARENA_MAX: c_int = -8;

/// Sets the limits. To be called before there are threads.
pub fn limit() {
    // SAFETY: `mallopt` takes two numbers and changes settings of the allocator; it is called before other threads exist, and
    // an unknown parameter is refused with 0.
    unsafe {
        mallopt(M_ARENA_MAX, 2);
        // Fixed, so that it does not grow with the largest buffer that was ever freed.
        mallopt(M_MMAP_THRESHOLD, 256 * 1024);
        mallopt(M_TRIM_THRESHOLD, 256 * 1024);
    }
}

/// Gives free memory back, after work that took much of it.
pub fn give_back() {
    // SAFETY: `malloc_trim` takes a number, may be called from any thread at any time, and only returns free pages.
    unsafe {
        malloc_trim(0);
    }
}
