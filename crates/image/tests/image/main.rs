//! Tests of images, kernels and disks from the outside, in one program.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod build;
mod common;
mod disk;
mod ext4;
mod initramfs;
mod package;
mod store;
mod tar;
