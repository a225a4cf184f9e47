//! Closing what was inherited.
#![allow(unsafe_code)]

/// Closes every descriptor above standard error. Must come before anything is opened.
pub(crate) fn close_inherited() {
    // SAFETY: this program has opened nothing yet, so no owner of any of these descriptors exists.
    let done = unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0_u32) };
    if done == 0 {
        return;
    }
    // A kernel before 5.9.
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else {
        return;
    };
    let open: Vec<i32> = entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        // SAFETY: as above; the directory that listed them is closed again, closing its number once more does no harm.
        unsafe { libc::close(fd) };
    }
}
