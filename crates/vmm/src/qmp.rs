//! QEMU's control protocol.
