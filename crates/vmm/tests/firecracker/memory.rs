//! The memory of the fake's guest.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Pages of a guest.
pub struct Memory {
    at: *mut u8,
    /// Bytes.
    pub length: usize,
    /// Which pages were touched.
    pub touched: Vec<bool>,
}

// SAFETY: it is only reached through a lock.
unsafe impl Send for Memory {}

impl Memory {
    /// Anonymous, or a private mapping of a file.
    pub fn new(length: usize, file: Option<&File>) -> Self {
        let (flags, fd) = match file {
            Some(file) => (libc::MAP_PRIVATE, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, wherever the kernel has room, that is never unmapped.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), length, rights, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Self {
            at: at.cast(),
            length,
            touched: vec![false; length / PAGE],
        }
    }

    /// One page.
    pub fn page(&mut self, number: usize) -> &mut [u8] {
        assert!(number < self.length / PAGE);
        // SAFETY: within the mapping, which is borrowed as a whole.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(number * PAGE), PAGE) }
    }
}
