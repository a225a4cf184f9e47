//! The memory of a guest, read from outside of the engine process that maps it.
//!
//! A guest's memory is one stretch of its engine's address space: anonymous, or a private mapping of a file that others map as
//! well. What the guest has written since then is in pages of the process's own, and `/proc/PID/pagemap` says which those are. So
//! a copy is what the file had, if there was one, overwritten with those pages: the size of what was touched decides how long it
//! takes, not the size of the memory.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, ioctl_ficlone, seek};
use rustix::io::Errno;

use crate::sys;

/// Bytes of a page.
const PAGE: u64 = 4096;
const PAGE_USIZE: usize = 4096;
/// Most bytes that are read at a time.
const BATCH: u64 = 4 << 20;
/// Threads that read and write. The kernel takes one write to a file at a time, but looking for zeros and reading go on beside.
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

/// Overwrites a prepared file with the pages that are the process's own. The guest must stand still. Tells how many bytes those
/// were. Ends early, with an error, when `stop` is set.
pub(crate) fn copy(proc: &Path, place: &Place, target: &Target, stop: &AtomicBool) -> io::Result<u64> {
    let own = own_pages(proc, place)?;
    let total = own.iter().map(|run| run.end - run.start).sum::<u64>();
    let batches = batches(&own);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = || -> io::Result<()> {
        let mut buffer = Vec::new();
        while let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
            if stop.load(Ordering::Relaxed) || failed.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            transfer(place, batch, &mut buffer, target).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    };
    let outcomes: Vec<io::Result<()>> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..THREADS.min(batches.len())).map(|_| scope.spawn(&work)).collect();
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
        None => Ok(total),
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

fn transfer(place: &Place, batch: &[Range<u64>], buffer: &mut Vec<u8>, target: &Target) -> io::Result<()> {
    let total: u64 = batch.iter().map(|run| run.end - run.start).sum();
    buffer.resize(usize::try_from(total).map_err(io::Error::other)?, 0);
    let stretches: Vec<Range<u64>> = batch
        .iter()
        .map(|run| place.range.start + run.start..place.range.start + run.end)
        .collect();
    sys::read_memory(place.pid, &stretches, buffer)?;
    let mut rest = buffer.as_slice();
    for run in batch {
        let length = usize::try_from(run.end - run.start).map_err(io::Error::other)?;
        let (bytes, others) = rest.split_at_checked(length).ok_or(io::ErrorKind::InvalidData)?;
        write(target, run.start, bytes)?;
        rest = others;
    }
    Ok(())
}

/// Writes pages; those that are zero become, or stay, holes.
fn write(target: &Target, at: u64, bytes: &[u8]) -> io::Result<()> {
    let page = |from: usize| {
        bytes
            .get(from..bytes.len().min(from + PAGE_USIZE))
            .filter(|p| !p.is_empty())
    };
    let mut from = 0;
    while let Some(first) = page(from) {
        let zero = is_zero(first);
        let mut to = from + PAGE_USIZE;
        while page(to).is_some_and(|page| is_zero(page) == zero) {
            to += PAGE_USIZE;
        }
        let (start, piece) = (
            at + from as u64,
            bytes.get(from..to.min(bytes.len())).unwrap_or_default(),
        );
        if !zero {
            target.file.write_all_at(piece, start)?;
        } else if target.has_data(&(start..start + piece.len() as u64)) {
            target.clear(start, piece)?;
        }
        from = to;
    }
    Ok(())
}

impl Target {
    /// The same file, to be overwritten once more.
    pub(crate) fn again(&self) -> io::Result<Self> {
        let file = self.file.try_clone()?;
        Ok(Self {
            data: data(&file)?,
            file,
        })
    }

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
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn own_pages_are_told_by_three_bits() {
        assert!(is_own(PRESENT) && is_own(PRESENT | 7) && is_own(SWAPPED) && is_own(SWAPPED | OF_FILE));
        assert!(!is_own(0) && !is_own(OF_FILE) && !is_own(PRESENT | OF_FILE) && !is_own(1 << 55));
    }

    #[test]
    fn lines_of_maps() {
        let line = "7f0000000000-7f0020000000 rw-p 00001000 fe:00 1234567   /a b (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!(mapping.range, 0x7f00_0000_0000..0x7f00_2000_0000);
        assert_eq!(
            (mapping.private, mapping.offset, mapping.inode),
            (true, 0x1000, 1_234_567)
        );
        let line = "7f0000000000-7f0020000000 rw-s 00000000 00:00 0";
        assert!(!Mapping::parse(line).unwrap().private);
        for bad in ["", "7f-", "x-y rw-p 0 0 0", "1-2 rw-p", "1-2 rw-p 0 0:0 x"] {
            assert!(Mapping::parse(bad).is_none(), "{bad:?}");
        }
    }

    /// This process's memory as if it were a guest's.
    fn place(bytes: &[u8]) -> Place {
        let start = bytes.as_ptr().expose_provenance() as u64;
        Place {
            pid: std::process::id(),
            range: start..start + bytes.len() as u64,
        }
    }

    /// A part of a vector that begins and ends with a page.
    fn aligned(bytes: &mut [u8], pages: usize) -> &mut [u8] {
        let at = bytes.as_ptr().align_offset(PAGE_USIZE);
        &mut bytes[at..at + pages * PAGE_USIZE]
    }

    #[test]
    fn a_process_s_memory_becomes_a_sparse_file() {
        let proc = Path::new("/proc");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let pages = 5000;
        let mut space = vec![0; (pages + 1) * PAGE_USIZE];
        let memory = aligned(&mut space, pages);
        for page in (0..pages).step_by(7).chain(3000..4500) {
            memory[page * PAGE_USIZE + page % PAGE_USIZE] = 1;
        }
        let place = place(memory);
        check(proc, &place, None).unwrap();
        let target = prepare(&path, memory.len() as u64, None).unwrap();
        assert!(prepare(&path, 1, None).is_err(), "nothing is overwritten");
        let copied = copy(proc, &place, &target, &AtomicBool::new(false)).unwrap();
        assert!(copied >= 2000 * PAGE, "{copied}");
        assert!(fs::read(&path).unwrap() == memory);
        let meta = fs::metadata(&path).unwrap();
        assert_eq!(meta.mode() & 0o777, 0o600);
        assert!(meta.blocks() * 512 < (pages as u64 - 1000) * PAGE, "{}", meta.blocks());

        let stopped = copy(proc, &place, &target, &AtomicBool::new(true)).unwrap_err();
        assert_eq!(stopped.kind(), io::ErrorKind::Interrupted);
        // It is no mapping of that file, nor of another size.
        let error = check(proc, &place, Some(&path)).unwrap_err();
        assert!(error.to_string().contains("not started with"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Whatever the base had and whatever the process has written: the result is base, overwritten, and zeros take no space.
        #[test]
        fn base_and_own_pages_together(
            base in proptest::collection::vec(0u8..3, 1..200),
            runs in proptest::collection::vec((0usize..200, proptest::collection::vec(0u8..3, 1..40)), 0..8),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (from, to) = (dir.path().join("base"), dir.path().join("memory"));
            let size = base.len() * PAGE_USIZE;
            let file = File::create(&from).unwrap();
            file.set_len(size as u64).unwrap();
            let mut expected = vec![0; size];
            for (page, byte) in base.iter().enumerate().filter(|(_, byte)| **byte != 0) {
                let at = page * PAGE_USIZE;
                expected[at..at + PAGE_USIZE].fill(*byte);
                file.write_all_at(&expected[at..at + PAGE_USIZE], at as u64).unwrap();
            }
            let target = prepare(&to, size as u64, Some(&from)).unwrap();
            for (first, bytes) in &runs {
                let first = first % base.len();
                let bytes = &bytes[..bytes.len().min(base.len() - first)];
                let piece: Vec<u8> = bytes.iter().flat_map(|byte| vec![*byte; PAGE_USIZE]).collect();
                let at = first * PAGE_USIZE;
                expected[at..at + piece.len()].copy_from_slice(&piece);
                write(&target, at as u64, &piece).unwrap();
            }
            prop_assert!(fs::read(&to).unwrap() == expected);
            let used = expected.chunks(PAGE_USIZE).filter(|page| page[0] != 0).count() as u64;
            prop_assert!(fs::metadata(&to).unwrap().blocks() <= used * 8 + 8);
        }

        /// Every byte of every run is in one batch, in order, and no batch is too large.
        #[test]
        fn batches_hold_everything(runs in proptest::collection::vec((1u64..3, 1u64..3000), 0..50)) {
            let mut at = 0;
            let runs: Vec<Range<u64>> = runs.iter().map(|(gap, length)| {
                let start = at + gap * PAGE;
                at = start + length * PAGE;
                start..at
            }).collect();
            let batches = batches(&runs);
            for batch in &batches {
                let total: u64 = batch.iter().map(|run| run.end - run.start).sum();
                prop_assert!(0 < total && total <= BATCH);
            }
            let mut joined: Vec<Range<u64>> = Vec::new();
            for run in batches.concat() {
                match joined.last_mut().filter(|last| last.end == run.start) {
                    Some(last) => last.end = run.end,
                    None => joined.push(run),
                }
            }
            prop_assert_eq!(joined, runs);
        }
    }
}
