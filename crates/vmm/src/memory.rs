//! The memory of a guest, read from outside of the engine process that maps it.
//!
//! A guest's memory is one stretch of its engine's address space: anonymous, or a private mapping of a file that others map as
//! well. What the guest has written since then is in pages of the process's own, and `/proc/PID/pagemap` says which those are. So
//! a copy is what the file had, if there was one, overwritten with those pages: the size of what was touched decides how long it
//! takes, not the size of the memory.
//!
//! A guest that is to stand still as briefly as possible is copied twice: once while it runs, and then, with what has changed since
//! found by comparing. Comparing is several times as fast as writing, and needs nothing of the kernel that some hosts lack.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, ioctl_ficlone, seek};
use rustix::io::Errno;

use crate::sys;

/// Bytes of a page.
const PAGE: u64 = 4096;
const PAGE_USIZE: usize = 4096;
/// Most bytes that are read at a time.
const BATCH: u64 = 1 << 20;
/// Threads that read and write. The kernel takes one write to a file at a time, but reading and comparing go on beside.
const THREADS: usize = 2;
/// Bits of an entry in `pagemap`.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// Where a guest's memory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The engine process.
    pub(crate) pid: u32,
    /// Addresses in it.
    pub(crate) range: Range<u64>,
}

/// Makes sure that a guest's memory is a private mapping of this file, or of none.
pub(crate) fn check(proc: &Path, place: &Place, base: Option<&Path>) -> io::Result<()> {
    let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let dir = proc.join(place.pid.to_string());
    let maps = fs::read_to_string(dir.join("maps"))?;
    let inode = match base {
        None => 0,
        Some(base) => {
            let meta = fs::metadata(base)?;
            // File systems with subvolumes show another device in `maps` than anywhere else; descriptors show the right one.
            let same = |entry: io::Result<fs::DirEntry>| {
                let found = fs::metadata(entry.ok()?.path()).ok()?;
                Some((found.dev(), found.ino()) == (meta.dev(), meta.ino()))
            };
            if !fs::read_dir(dir.join("fd"))?.any(|entry| same(entry) == Some(true)) {
                return Err(bad("the machine was not started with this memory"));
            }
            if meta.len() != place.range.end - place.range.start {
                return Err(bad("the memory that the machine was started with has another size"));
            }
            meta.ino()
        }
    };
    let mut at = place.range.start;
    for mapping in maps.lines().filter_map(Mapping::parse) {
        if at >= place.range.end {
            break;
        }
        if !mapping.range.contains(&at) {
            continue;
        }
        if !mapping.private {
            return Err(bad("the machine's memory is shared"));
        }
        if mapping.inode != inode {
            return Err(bad(match base {
                Some(_) => "the machine was not started with this memory",
                None => "the machine was started with a memory file",
            }));
        }
        if inode != 0 && at - mapping.range.start + mapping.offset != at - place.range.start {
            return Err(bad("the machine's memory is mapped in another order"));
        }
        at = mapping.range.end;
    }
    if at < place.range.end {
        return Err(bad("the machine's memory is not in one piece"));
    }
    Ok(())
}

/// Makes sure that a process maps all of this file privately, wherever: an engine that goes on from it.
pub(crate) fn check_maps(proc: &Path, pid: u32, base: &Path) -> io::Result<()> {
    let meta = fs::metadata(base)?;
    let maps = fs::read_to_string(proc.join(pid.to_string()).join("maps"))?;
    let of_base = |mapping: &Mapping| mapping.inode == meta.ino() && mapping.private;
    let mapped: u64 = maps
        .lines()
        .filter_map(Mapping::parse)
        .filter(of_base)
        .map(|mapping| mapping.range.end - mapping.range.start)
        .sum();
    if mapped == 0 || mapped != meta.len() {
        let why = "the machine was not started with this memory";
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(())
}

/// Gives back what a file keeps of zeros. Its content stays as it is, and so do its permissions: what came out of a jail is nobody's
/// to write.
pub(crate) fn punch_zeros(path: &Path) -> io::Result<()> {
    let permissions = fs::metadata(path)?.permissions();
    let mut writable = permissions.clone();
    writable.set_mode(permissions.mode() | 0o200);
    fs::set_permissions(path, writable)?;
    let file = OpenOptions::new().read(true).write(true).open(path);
    fs::set_permissions(path, permissions)?;
    let file = file?;
    let mut buffer = vec![0; 1 << 20];
    for range in data(&file)? {
        // Pages as the file has them, whatever the stretches are.
        let mut at = range.start / PAGE * PAGE;
        while at < range.end {
            let count = file.read_at(&mut buffer, at)?;
            if count == 0 {
                break;
            }
            let pages = buffer.get(..count).unwrap_or_default().chunks(PAGE_USIZE);
            let (mut run, mut here) = (None::<u64>, at);
            for page in pages.map(Some).chain(std::iter::once(None)) {
                let zero = page.is_some_and(|page| page.len() == PAGE_USIZE && is_zero(page));
                match (zero, run) {
                    (true, None) => run = Some(here),
                    (false, Some(start)) => {
                        punch(&file, start, here - start)?;
                        run = None;
                    }
                    _ => {}
                }
                here += page.map_or(0, |page| page.len() as u64);
            }
            at += count as u64;
        }
    }
    Ok(())
}

/// Makes a hole of what is zero. Where the file system has none, that is how it stays.
fn punch(file: &File, at: u64, length: u64) -> io::Result<()> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, hole, at, length) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        other => Ok(other?),
    }
}

/// A line of `/proc/PID/maps`.
struct Mapping {
    range: Range<u64>,
    private: bool,
    offset: u64,
    inode: u64,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let flags = words.next()?;
        let offset = hex(words.next()?)?;
        let inode = words.nth(1)?.parse().ok()?;
        Some(Self {
            range: hex(start)?..hex(end)?,
            private: flags.ends_with('p'),
            offset,
            inode,
        })
    }
}

/// A file that becomes a copy of a guest's memory.
#[derive(Debug)]
pub(crate) struct Target {
    file: File,
    /// Where it has data already, that of the base.
    data: Vec<Range<u64>>,
}

/// Makes a new file with what the guest was started with. Can be done while it runs: that does not change.
pub(crate) fn prepare(path: &Path, size: u64, base: Option<&Path>) -> io::Result<Target> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let filled = fill(&file, size, base).inspect_err(|_| {
        let _ = fs::remove_file(path);
    });
    Ok(Target { data: filled?, file })
}

fn fill(file: &File, size: u64, base: Option<&Path>) -> io::Result<Vec<Range<u64>>> {
    let Some(base) = base else {
        file.set_len(size)?;
        return Ok(Vec::new());
    };
    let source = File::open(base)?;
    if ioctl_ficlone(file, &source).is_err() {
        file.set_len(size)?;
        let mut buffer = vec![0; 1 << 20];
        for range in data(&source)? {
            let mut at = range.start;
            while at < range.end {
                let want = usize::try_from(range.end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
                let count = source.read_at(buffer.get_mut(..want).unwrap_or_default(), at)?;
                if count == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                file.write_all_at(buffer.get(..count).unwrap_or_default(), at)?;
                at += count as u64;
            }
        }
    }
    if file.metadata()?.len() != size {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the memory that the machine was started with has changed its size",
        ));
    }
    data(file)
}

/// Where a file has data. Where the file system cannot tell, everywhere.
fn data(file: &File) -> io::Result<Vec<Range<u64>>> {
    let end = file.metadata()?.len();
    let (mut found, mut at) = (Vec::new(), 0);
    while at < end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => return Ok(std::iter::once(at..end).collect()),
            Err(e) => return Err(e.into()),
        };
        let stop = seek(file, SeekFrom::Hole(start))?.min(end);
        if start >= stop {
            break;
        }
        found.push(start..stop);
        at = stop;
    }
    Ok(found)
}

/// Overwrites a prepared file with the pages that are the process's own, and says which those were. What an `earlier` call has
/// said is compared, and written where it differs. The last call must find the guest standing still. Ends early, with an error,
/// when `stop` is set.
pub(crate) fn copy(
    proc: &Path,
    place: &Place,
    target: &Target,
    earlier: Option<&[Range<u64>]>,
    stop: &AtomicBool,
) -> io::Result<Vec<Range<u64>>> {
    let own = own_pages(proc, place)?;
    // What a page that is not the process's own any more has become can be read as well.
    let own = earlier.map_or(own.clone(), |earlier| union(&own, earlier));
    let batches = batches(&own);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = || -> io::Result<()> {
        let mut buffers = Buffers::default();
        while let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
            if stop.load(Ordering::Relaxed) || failed.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            transfer(place, batch, &mut buffers, target, earlier.is_some())
                .inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    };
    let outcomes: Vec<io::Result<()>> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..THREADS.min(batches.len())).map(|_| scope.spawn(work)).collect();
        let mut outcomes = vec![work()];
        for other in others {
            outcomes.push(
                other
                    .join()
                    .unwrap_or_else(|_| Err(io::Error::other("a thread has panicked"))),
            );
        }
        outcomes
    });
    // What one of them found is the reason why the others were stopped.
    let mut stopped = None;
    for outcome in outcomes {
        match outcome {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => stopped = Some(e),
            other => other?,
        }
    }
    match stopped {
        Some(e) => Err(e),
        None => Ok(own),
    }
}

/// Stretches of the memory, in bytes from its start, that are the process's own.
fn own_pages(proc: &Path, place: &Place) -> io::Result<Vec<Range<u64>>> {
    let pagemap = File::open(proc.join(place.pid.to_string()).join("pagemap"))?;
    let (first, last) = (place.range.start / PAGE, place.range.end / PAGE);
    let mut buffer = vec![0; 512 << 10];
    let (mut found, mut at) = (Vec::<Range<u64>>::new(), first);
    while at < last {
        let want = usize::try_from((last - at) * 8).map_or(buffer.len(), |left| left.min(buffer.len()));
        let piece = buffer.get_mut(..want).unwrap_or_default();
        pagemap.read_exact_at(piece, at * 8)?;
        for entry in piece.as_chunks::<8>().0 {
            if is_own(u64::from_ne_bytes(*entry)) {
                let start = (at - first) * PAGE;
                match found.last_mut().filter(|run| run.end == start) {
                    Some(run) => run.end += PAGE,
                    None => found.push(start..start + PAGE),
                }
            }
            at += 1;
        }
    }
    Ok(found)
}

/// Whether a page is the process's own: it is there and of no file, or it is in swap space.
fn is_own(entry: u64) -> bool {
    entry & SWAPPED != 0 || entry & (PRESENT | OF_FILE) == PRESENT
}

/// Groups stretches so that each group has about as many bytes as are read at a time.
fn batches(runs: &[Range<u64>]) -> Vec<Vec<Range<u64>>> {
    let (mut out, mut batch, mut room) = (Vec::new(), Vec::new(), BATCH);
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            let end = run.end.min(at + room);
            batch.push(at..end);
            room -= end - at;
            at = end;
            if room == 0 {
                out.push(std::mem::take(&mut batch));
                room = BATCH;
            }
        }
    }
    if !batch.is_empty() {
        out.push(batch);
    }
    out
}

/// What is in either list of stretches.
fn union(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut all = [a, b].concat();
    all.sort_unstable_by_key(|run| run.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(all.len());
    for run in all {
        match joined.last_mut().filter(|last| run.start <= last.end) {
            Some(last) => last.end = last.end.max(run.end),
            None => joined.push(run),
        }
    }
    joined
}

/// Memory and what the file has in its place.
#[derive(Default)]
struct Buffers {
    memory: Vec<u8>,
    file: Vec<u8>,
}

fn transfer(
    place: &Place,
    batch: &[Range<u64>],
    buffers: &mut Buffers,
    target: &Target,
    compare: bool,
) -> io::Result<()> {
    let total: u64 = batch.iter().map(|run| run.end - run.start).sum();
    let total = usize::try_from(total).map_err(io::Error::other)?;
    buffers.memory.resize(total, 0);
    let stretches: Vec<Range<u64>> = batch
        .iter()
        .map(|run| place.range.start + run.start..place.range.start + run.end)
        .collect();
    sys::read_memory(place.pid, &stretches, &mut buffers.memory)?;
    let mut rest = buffers.memory.as_slice();
    for run in batch {
        let length = usize::try_from(run.end - run.start).map_err(io::Error::other)?;
        let (bytes, others) = rest.split_at_checked(length).ok_or(io::ErrorKind::InvalidData)?;
        let old = if compare {
            buffers.file.resize(length, 0);
            target.file.read_exact_at(&mut buffers.file, run.start)?;
            Some(buffers.file.as_slice())
        } else {
            None
        };
        write(target, run.start, bytes, old)?;
        rest = others;
    }
    Ok(())
}

/// What is done with a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Deed {
    Skip,
    Clear,
    Write,
}

/// Writes pages, those alone that differ from what is there, if that is known. Those that are zero become, or stay, holes.
fn write(target: &Target, at: u64, bytes: &[u8], old: Option<&[u8]>) -> io::Result<()> {
    let deed = |from: usize| {
        let page = from..bytes.len().min(from + PAGE_USIZE);
        let new = bytes.get(page.clone()).filter(|page| !page.is_empty())?;
        let there = at + from as u64;
        let same = match old {
            Some(old) => old.get(page) == Some(new),
            None => is_zero(new) && !target.has_data(&(there..there + new.len() as u64)),
        };
        Some(match (same, is_zero(new)) {
            (true, _) => Deed::Skip,
            (false, true) => Deed::Clear,
            (false, false) => Deed::Write,
        })
    };
    let (mut from, mut next) = (0, deed(0));
    while let Some(now) = next {
        let mut to = from;
        while next == Some(now) {
            to += PAGE_USIZE;
            next = deed(to);
        }
        let piece = bytes.get(from..to.min(bytes.len())).unwrap_or_default();
        match now {
            Deed::Skip => {}
            Deed::Clear => target.clear(at + from as u64, piece)?,
            Deed::Write => target.file.write_all_at(piece, at + from as u64)?,
        }
        from = to;
    }
    Ok(())
}

impl Target {
    /// Whether the base has data in this stretch.
    fn has_data(&self, range: &Range<u64>) -> bool {
        let first = self.data.partition_point(|data| data.end <= range.start);
        self.data.get(first).is_some_and(|data| data.start < range.end)
    }

    /// Makes a stretch zero.
    fn clear(&self, at: u64, zeros: &[u8]) -> io::Result<()> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, hole, at, zeros.len() as u64) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.file.write_all_at(zeros, at),
            other => Ok(other?),
        }
    }
}

fn is_zero(page: &[u8]) -> bool {
    page.iter().fold(0, |all, byte| all | byte) == 0
}

#[cfg(test)]
mod tests;
