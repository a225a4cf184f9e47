//! A copy-on-write overlay (qcow2, version 3) as bytes, pure.
//!
//! An overlay of ours holds a few clusters from the start: those in which the grown file system differs from the image. Its
//! layout is fixed: header, refcount table, refcount block, first-level table, then second-level tables and data.

use std::collections::BTreeMap;

use banger_core::plan::DiskFormat;

/// Bytes of a cluster.
pub const CLUSTER: u64 = 1 << CLUSTER_BITS;
const CLUSTER_BITS: u32 = 16;
const CLUSTER_USIZE: usize = 1 << CLUSTER_BITS;
/// Clusters that a second-level table covers.
const L2_ENTRIES: u64 = CLUSTER / 8;
/// Clusters that a refcount block covers.
const REFCOUNTS: u64 = CLUSTER / 2;
/// Where the first-level table begins.
const L1_OFFSET: u64 = 3 * CLUSTER;
/// Longest name of a backing file.
pub const MAX_BACKING: usize = 1023;
/// Bytes of the header without extensions.
pub const HEADER_BYTES: usize = 104;
/// Marks an entry whose cluster belongs to nobody else.
const COPIED: u64 = 1 << 63;

/// What is wrong with an overlay.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Qcow2Error {
    /// The backing file's name does not fit.
    #[error("the path of the image is longer than {MAX_BACKING} bytes")]
    BackingTooLong,
    /// The size cannot be had.
    #[error("an overlay of {0} bytes is not possible")]
    Size(u64),
    /// It is not an overlay that was made here.
    #[error("it is not an overlay made by banger: {0}")]
    Foreign(&'static str),
}

/// Pieces of a file: offsets and bytes. Everything else is zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pieces {
    /// Bytes of the file in all.
    pub length: u64,
    /// What is in it.
    pub pieces: Vec<(u64, Vec<u8>)>,
}

/// An overlay of `size` bytes over the raw file `backing`, in which `clusters` (by their number) have content of their own.
pub fn overlay(backing: &[u8], size: u64, clusters: &BTreeMap<u64, Vec<u8>>) -> Result<Pieces, Qcow2Error> {
    build(backing, DiskFormat::Raw, size, clusters)
}

/// An empty overlay of `size` bytes over the file `backing`.
pub fn layer(backing: &[u8], format: DiskFormat, size: u64) -> Result<Pieces, Qcow2Error> {
    build(backing, format, size, &BTreeMap::new())
}

fn build(
    backing: &[u8],
    format: DiskFormat,
    size: u64,
    clusters: &BTreeMap<u64, Vec<u8>>,
) -> Result<Pieces, Qcow2Error> {
    if backing.is_empty() || backing.len() > MAX_BACKING {
        return Err(Qcow2Error::BackingTooLong);
    }
    if size == 0 || !size.is_multiple_of(512) || size > l1_capacity(CLUSTER) {
        return Err(Qcow2Error::Size(size));
    }
    if clusters.keys().any(|n| n.saturating_mul(CLUSTER) >= size) || clusters.values().any(|c| c.len() != CLUSTER_USIZE)
    {
        return Err(Qcow2Error::Size(size));
    }
    let mut next = 4;
    let mut take = || {
        next += 1;
        (next - 1) * CLUSTER
    };
    let mut l1 = vec![0; CLUSTER_USIZE];
    let mut pieces = Vec::new();
    let mut tables: BTreeMap<u64, (u64, Vec<u8>)> = BTreeMap::new();
    for (number, bytes) in clusters {
        let (top, index) = (number / L2_ENTRIES, number % L2_ENTRIES);
        let (_, table) = tables.entry(top).or_insert_with(|| {
            let at = take();
            put(&mut l1, top * 8, &(at | COPIED).to_be_bytes());
            (at, vec![0; CLUSTER_USIZE])
        });
        let at = take();
        put(table, index * 8, &(at | COPIED).to_be_bytes());
        pieces.push((at, bytes.clone()));
    }
    pieces.extend(tables.into_values());
    if next > REFCOUNTS {
        return Err(Qcow2Error::Size(size));
    }

    let mut refcounts = vec![0; CLUSTER_USIZE];
    for cluster in 0..next {
        put(&mut refcounts, cluster * 2, &1u16.to_be_bytes());
    }
    pieces.push((0, header(backing, format, size)));
    pieces.push((CLUSTER, (2 * CLUSTER).to_be_bytes().to_vec()));
    pieces.push((2 * CLUSTER, refcounts));
    pieces.push((L1_OFFSET, l1));
    pieces.sort_by_key(|(at, _)| *at);
    Ok(Pieces {
        length: next * CLUSTER,
        pieces,
    })
}

/// The header with its extension and the backing file's name. Its format is named, so that nobody ever probes it.
fn header(backing: &[u8], format: DiskFormat, size: u64) -> Vec<u8> {
    let format: &[u8] = match format {
        DiskFormat::Raw | DiskFormat::Device => b"raw",
        DiskFormat::Qcow2 => b"qcow2",
    };
    let name_at = HEADER_BYTES as u64 + 8 + 8 + 8;
    let mut out = Vec::with_capacity(HEADER_BYTES + 24 + backing.len());
    let big = |n: u64| low32(n).to_be_bytes();
    out.extend(b"QFI\xfb");
    out.extend(big(3));
    out.extend(name_at.to_be_bytes());
    out.extend(big(backing.len() as u64));
    out.extend(CLUSTER_BITS.to_be_bytes());
    out.extend(size.to_be_bytes());
    out.extend(big(0)); // no encryption
    out.extend(big(l1_entries(size)));
    out.extend(L1_OFFSET.to_be_bytes());
    out.extend(CLUSTER.to_be_bytes()); // refcount table
    out.extend(big(1));
    out.extend(big(0)); // no snapshots
    out.extend([0; 8]);
    out.extend([0; 24]); // no features
    out.extend(big(4)); // 16-bit refcounts
    out.extend(big(HEADER_BYTES as u64));
    out.extend(big(0xe279_2aca)); // format of the backing file
    out.extend(big(format.len() as u64));
    out.extend(format);
    out.resize(out.len().next_multiple_of(8), 0);
    out.extend([0; 8]); // end of extensions
    out.extend(backing);
    out
}

/// What to write at the start of an overlay to make it `size` bytes large: offsets and bytes. `start` is its first bytes.
pub fn grown(start: &[u8], size: u64) -> Result<Vec<(u64, Vec<u8>)>, Qcow2Error> {
    let foreign = Qcow2Error::Foreign;
    let word = |at: usize| {
        start
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map(u32::from_be_bytes)
            .ok_or(foreign("it is too short"))
    };
    let long = |at: usize| {
        start
            .get(at..at + 8)
            .and_then(|b| b.try_into().ok())
            .map(u64::from_be_bytes)
            .ok_or(foreign("it is too short"))
    };
    if start.get(..8) != Some(b"QFI\xfb\0\0\0\x03") || word(20)? != CLUSTER_BITS {
        return Err(foreign("its header is another"));
    }
    if long(40)? != L1_OFFSET || long(72)? != 0 || word(60)? != 0 {
        return Err(foreign(
            "its tables are elsewhere, it has snapshots, or it was not closed",
        ));
    }
    if size < long(24)? || !size.is_multiple_of(512) || size > l1_capacity(CLUSTER) {
        return Err(Qcow2Error::Size(size));
    }
    Ok(vec![
        (24, size.to_be_bytes().to_vec()),
        (36, low32(l1_entries(size)).to_be_bytes().to_vec()),
    ])
}

/// The size that an overlay shows to the guest.
pub fn virtual_size(start: &[u8]) -> Option<u64> {
    (start.get(..4)? == b"QFI\xfb").then_some(())?;
    Some(u64::from_be_bytes(start.get(24..32)?.try_into().ok()?))
}

fn l1_entries(size: u64) -> u64 {
    size.div_ceil(CLUSTER * L2_ENTRIES)
}

/// Bytes that a first-level table of this many bytes covers.
fn l1_capacity(bytes: u64) -> u64 {
    bytes / 8 * CLUSTER * L2_ENTRIES
}

fn low32(n: u64) -> u32 {
    u32::try_from(n & 0xffff_ffff).unwrap_or(0)
}

fn put(out: &mut [u8], at: u64, bytes: &[u8]) {
    if let Some(place) = usize::try_from(at)
        .ok()
        .and_then(|at| out.get_mut(at..)?.get_mut(..bytes.len()))
    {
        place.copy_from_slice(bytes);
    }
}
