//! Writes that are gathered, and holes where there is nothing.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::layout::BLOCK_USIZE;
use super::{Ext4Error, Result};

/// Bytes that are gathered before they are written.
pub(super) const BUFFER: usize = 1 << 20;

/// Gathers neighbouring writes.
#[derive(Debug)]
pub(super) struct Sink {
    pub(super) file: File,
    buffer: Vec<u8>,
    at: u64,
}

impl Sink {
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            buffer: Vec::with_capacity(BUFFER),
            at: 0,
        }
    }

    pub(super) fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        if at != self.at + self.buffer.len() as u64 || self.buffer.len() + bytes.len() > BUFFER {
            self.flush()?;
            self.at = at;
        }
        if bytes.len() >= BUFFER {
            self.file.write_all_at(bytes, at).map_err(Ext4Error::Write)?;
            self.at = at + bytes.len() as u64;
        } else {
            self.buffer.extend_from_slice(bytes);
        }
        Ok(())
    }

    /// Writes content, and leaves holes where whole blocks are zero.
    pub(super) fn write_sparse(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut at = at;
        for block in bytes.chunks(BLOCK_USIZE) {
            if block.iter().any(|b| *b != 0) {
                self.write(at, block)?;
            }
            at += block.len() as u64;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        if !self.buffer.is_empty() {
            self.file
                .write_all_at(&self.buffer, self.at)
                .map_err(Ext4Error::Write)?;
            self.at += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(())
    }
}
