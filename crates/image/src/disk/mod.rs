//! Disks of machines: the root disk, a copy-on-write layer over an image, the work disk, and layers over either.
//!
//! Both are ready when they are made: their file systems have the size asked for, and the guest grows nothing at its start. Only when
//! an existing disk is made larger, the guest's kernel has to grow the file system in it.

pub(crate) mod copy;
mod layer;
pub mod qcow2;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use banger_core::plan::DiskFormat;
pub use copy::clone_file;
pub use layer::create_layer;

use crate::error::{Error, IoContext, Result};
use crate::ext4::tree::Meta;
use crate::ext4::writer::{Finish, Limits, Size, Writer};
use crate::ext4::{Ext4Error, grow};

/// Smallest work disk.
pub const MIN_WORK_BYTES: u64 = 32 << 20;

/// How root disks are made. One driver now; reflink copies and device-mapper will be others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootDriver {
    /// A qcow2 overlay that names the image.
    Qcow2,
}

impl RootDriver {
    /// Format of the disks it makes.
    pub fn format(self) -> DiskFormat {
        match self {
            Self::Qcow2 => DiskFormat::Qcow2,
        }
    }

    /// Makes `target`, a disk of `size_bytes` with the content of `image`, whose file system fills it. On failure there is no
    /// target.
    pub fn create(self, image: &Path, target: &Path, size_bytes: u64) -> Result<()> {
        match self {
            Self::Qcow2 => create_root(image, target, size_bytes),
        }
    }

    /// Makes the disk larger, while no engine uses it. The guest has to grow the file system.
    pub fn grow(self, target: &Path, size_bytes: u64) -> Result<()> {
        match self {
            Self::Qcow2 => grow_root(target, size_bytes),
        }
    }
}

/// Makes a qcow2 overlay over `image` with a file system as large as the disk. See [`RootDriver::create`].
pub fn create_root(image: &Path, target: &Path, size_bytes: u64) -> Result<()> {
    let image = fs::canonicalize(image).on("find the image", image)?;
    let file = File::open(&image).on("open the image", &image)?;
    let (smallest, patches) = growth(&file, &image, size_bytes)?;
    if size_bytes < smallest {
        return Err(Error::DiskSize {
            size_bytes,
            why: format!("the image needs {} MiB", smallest.div_ceil(1 << 20)),
        });
    }
    let clusters = clusters(&file, &patches).on("read the image", &image)?;
    // Sectors are whole; what is lost is less than a block, which the file system could not use either.
    let size = size_bytes / 512 * 512;
    let overlay = qcow2::overlay(image.as_os_str().as_bytes(), size, &clusters).map_err(|e| Error::DiskSize {
        size_bytes,
        why: e.to_string(),
    })?;
    make(target, |file| {
        file.set_len(overlay.length)?;
        for (at, bytes) in &overlay.pieces {
            write_sparse(file, *at, bytes)?;
        }
        Ok(())
    })
}

/// Makes `target` a raw disk of `size_bytes` with the content of `image`, whose file system fills it: a copy, by reference where the file
/// system shares blocks. On failure there is no target.
pub fn create_whole(image: &Path, target: &Path, size_bytes: u64) -> Result<()> {
    let file = File::open(image).on("open the image", image)?;
    let (smallest, patches) = growth(&file, image, size_bytes)?;
    if size_bytes < smallest {
        return Err(Error::DiskSize {
            size_bytes,
            why: format!("the image needs {} MiB", smallest.div_ceil(1 << 20)),
        });
    }
    clone_file(image, target)?;
    let grown = OpenOptions::new().write(true).open(target).and_then(|disk| {
        disk.set_len(size_bytes / 512 * 512)?;
        patches
            .iter()
            .try_for_each(|patch| disk.write_all_at(&patch.bytes, patch.offset))
    });
    grown.on("write", target).inspect_err(|_| {
        let _ = fs::remove_file(target);
    })
}

/// The smallest disk that holds the image, and what makes its file system fill one of `size_bytes`. A file system that a machine has
/// used (an image made of its disk) is left as it is: the guest lets it grow when it mounts it.
fn growth(file: &File, image: &Path, size_bytes: u64) -> Result<(u64, Vec<grow::Patch>)> {
    let mut superblock = [0; grow::SUPER_BYTES];
    file.read_exact_at(&mut superblock, grow::SUPER_OFFSET)
        .on("read the image", image)?;
    let fs_error = |source| Error::FileSystem {
        path: image.to_owned(),
        source,
    };
    let smallest = match grow::size_of(&superblock) {
        Ok(smallest) => smallest,
        Err(Ext4Error::NotFresh(_)) if is_ext4(&superblock) => {
            let length = file.metadata().on("read the image", image)?.len();
            return Ok((length, Vec::new()));
        }
        Err(e) => return Err(fs_error(e)),
    };
    if size_bytes < smallest {
        return Ok((smallest, Vec::new()));
    }
    let mut descriptors = vec![0; 4096];
    let at = grow::descriptors_offset(&superblock).map_err(fs_error)?;
    file.read_exact_at(&mut descriptors, at).on("read the image", image)?;
    let patches = grow::patches(&superblock, &descriptors, size_bytes).map_err(fs_error)?;
    Ok((smallest, patches))
}

/// The magic number of ext4, as in the kernel's `struct ext4_super_block`.
fn is_ext4(superblock: &[u8]) -> bool {
    superblock.get(0x38..0x3a) == Some(&[0x53, 0xef])
}

/// The clusters of an overlay in which patches differ from the image.
fn clusters(image: &File, patches: &[grow::Patch]) -> io::Result<BTreeMap<u64, Vec<u8>>> {
    let mut out: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    for patch in patches {
        // A patch is at most a block and lies within one: never across the border of a cluster.
        let number = patch.offset / qcow2::CLUSTER;
        let inside = usize::try_from(patch.offset % qcow2::CLUSTER).unwrap_or(0);
        let cluster = match out.entry(number) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => entry.insert(read_cluster(image, number)?),
        };
        if let Some(place) = cluster.get_mut(inside..inside + patch.bytes.len()) {
            place.copy_from_slice(&patch.bytes);
        }
    }
    Ok(out)
}

/// A cluster of the image; zero after its end.
fn read_cluster(image: &File, number: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(qcow2::CLUSTER).unwrap_or(0)];
    let mut at = 0;
    while let Some(rest) = bytes.get_mut(at..).filter(|rest| !rest.is_empty()) {
        match image.read_at(rest, number * qcow2::CLUSTER + at as u64)? {
            0 => break,
            n => at += n,
        }
    }
    Ok(bytes)
}

/// Makes a root disk, or any layer, larger, while no engine uses it. What it adds reads as zeros.
pub fn grow_root(target: &Path, size_bytes: u64) -> Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(target)
        .on("open", target)?;
    let mut start = [0; qcow2::HEADER_BYTES];
    file.read_exact_at(&mut start, 0).on("read", target)?;
    let patches = qcow2::grown(&start, size_bytes / 512 * 512).map_err(|e| Error::DiskSize {
        size_bytes,
        why: e.to_string(),
    })?;
    for (at, bytes) in patches {
        file.write_all_at(&bytes, at).on("write", target)?;
    }
    file.sync_data().on("write", target)
}

/// Makes a work disk: an ext4 file system of its own with an empty root directory for user 0 alone.
pub fn create_work(target: &Path, size_bytes: u64, label: &'static str) -> Result<()> {
    if size_bytes < MIN_WORK_BYTES {
        return Err(Error::DiskSize {
            size_bytes,
            why: format!("at least {} MiB are needed", MIN_WORK_BYTES >> 20),
        });
    }
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let finish = Finish {
        size: Size::Exact(size_bytes),
        journal_blocks: journal_blocks(size_bytes),
        uuid: random_uuid()?,
        hash_seed: random_uuid()?,
        label,
        time: u32::try_from(time).unwrap_or(u32::MAX),
    };
    let fs_error = |source: Ext4Error| match source {
        Ext4Error::Size { why, .. } => Error::DiskSize {
            size_bytes,
            why: why.to_owned(),
        },
        Ext4Error::Write(source) => Error::io(format!("write {}", target.display()), source),
        source => Error::FileSystem {
            path: target.to_owned(),
            source,
        },
    };
    make_with(target, |file| {
        let copy = file.try_clone().on("open", target)?;
        let mut writer = Writer::new(
            copy,
            Limits {
                bytes: size_bytes,
                ..Limits::default()
            },
        )
        .map_err(fs_error)?;
        let meta = Meta {
            mode: 0o700,
            mtime: i64::from(finish.time),
            ..Meta::default()
        };
        writer.directory(&[], meta).map_err(fs_error)?;
        writer.finish(&finish).map_err(fs_error)?;
        // The device is exactly as large as asked for, though the file system may leave a little at its end.
        file.set_len(size_bytes / 512 * 512).on("write", target)
    })
}

/// Makes a work disk larger, while no engine uses it. The guest has to grow the file system.
pub fn grow_work(target: &Path, size_bytes: u64) -> Result<()> {
    let file = OpenOptions::new().write(true).open(target).on("open", target)?;
    let now = file.metadata().on("read", target)?.len();
    if size_bytes < now {
        return Err(Error::DiskSize {
            size_bytes,
            why: format!("it is {} MiB large, and disks only grow", now >> 20),
        });
    }
    file.set_len(size_bytes / 512 * 512).on("write", target)
}

/// A journal in proportion, as mke2fs does it.
pub(crate) fn journal_blocks(size_bytes: u64) -> u64 {
    match size_bytes >> 20 {
        0..128 => 1024,
        128..1024 => 4096,
        1024..2048 => 8192,
        _ => 16384,
    }
}

/// A random UUID, version 4.
fn random_uuid() -> Result<[u8; 16]> {
    let mut uuid = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut uuid))
        .doing(|| "read /dev/urandom")?;
    Ok(as_uuid(uuid))
}

/// Makes a valid UUID out of any bytes.
pub(crate) fn as_uuid(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

fn make(target: &Path, fill: impl FnOnce(&File) -> io::Result<()>) -> Result<()> {
    make_with(target, |file| fill(file).on("write", target))
}

/// Makes a file that must not be there yet, and takes it away again if it cannot be filled.
fn make_with(target: &Path, fill: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(target)
        .on("make the disk", target)?;
    fill(&file).inspect_err(|_| {
        let _ = fs::remove_file(target);
    })
}

/// Writes bytes but for blocks of zeros, which are holes.
fn write_sparse(file: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
    let mut at = at;
    for block in bytes.chunks(4096) {
        if block.iter().any(|b| *b != 0) {
            file.write_all_at(block, at)?;
        }
        at += block.len() as u64;
    }
    Ok(())
}
