//! Layers: empty copy-on-write files over something that is not written to any more.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use banger_core::plan::DiskFormat;

use super::{make, qcow2, write_sparse};
use crate::error::{Error, IoContext, Result};

/// Makes `target`, an empty layer of the same size as `below`. On failure there is no target.
///
/// Its header names what lies below, for whoever looks: the file name alone when that is in the same directory, so that the two
/// can be moved and linked together. Engines are told by other means.
pub fn create_layer(below: &Path, format: DiskFormat, target: &Path) -> Result<()> {
    let file = File::open(below).on("open", below)?;
    let size = match format {
        DiskFormat::Raw | DiskFormat::Device => file.metadata().on("read", below)?.len().next_multiple_of(512),
        DiskFormat::Qcow2 => {
            let mut start = [0; qcow2::HEADER_BYTES];
            file.read_exact_at(&mut start, 0).on("read", below)?;
            qcow2::virtual_size(&start).ok_or_else(|| Error::Damaged {
                path: below.to_owned(),
                why: "it is not a qcow2 file".to_owned(),
            })?
        }
    };
    let below = fs::canonicalize(below).on("find", below)?;
    let parent = target
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let parent = fs::canonicalize(parent).on("find", parent)?;
    let name = match below.file_name() {
        // A name that could be taken for another protocol's is given in full.
        Some(name) if below.parent() == Some(&parent) && !name.as_bytes().contains(&b':') => Path::new(name),
        _ => &below,
    };
    let layer = qcow2::layer(name.as_os_str().as_bytes(), format, size).map_err(|e| Error::DiskSize {
        size_bytes: size,
        why: e.to_string(),
    })?;
    make(target, |file| {
        file.set_len(layer.length)?;
        for (at, bytes) in &layer.pieces {
            write_sparse(file, *at, bytes)?;
        }
        Ok(())
    })
}
