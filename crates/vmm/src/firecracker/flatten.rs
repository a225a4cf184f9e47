//! A disk's content in one file. Firecracker's disks stand alone, so that is a copy.

use std::path::Path;

use banger_core::plan::{Disk, DiskFormat};

use super::config::unsupported;
use crate::engine::EngineError;
use crate::memory;
use crate::saving::blocking;
use crate::start::io_error;

/// Copies a disk to a new raw and sparse file.
pub(super) async fn flatten(disk: &Disk, target: &Path) -> Result<(), EngineError> {
    if disk.format != DiskFormat::Raw || !disk.layers.is_empty() || disk.base.is_some() {
        return Err(unsupported(format!(
            "read {}: it is no raw disk that stands alone",
            disk.path.display()
        )));
    }
    let (source, copy) = (disk.path.clone(), target.to_owned());
    blocking(move || {
        let size = std::fs::metadata(&source)?.len();
        memory::prepare(&copy, size, Some(&source)).map(drop)
    })
    .await
    .map_err(|e| io_error(format!("copy {} to {}", disk.path.display(), target.display()), e))
}
