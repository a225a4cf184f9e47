//! Kernels out of Debian packages.
//!
//! * [`deb`]: the archive: `ar` around a compressed tar,
//! * [`bzimage`]: the ELF image inside a compressed kernel,
//! * [`modules`]: which modules a machine needs, and in what order,
//! * [`extract`]: a package into a directory of the store,
//! * [`fetch`]: the distribution's own kernel package by the system's package client,
//! * [`decompress`]: the compressions that all of them meet.

pub mod bzimage;
pub mod deb;
pub mod decompress;
pub mod extract;
pub mod fetch;
pub mod modules;
