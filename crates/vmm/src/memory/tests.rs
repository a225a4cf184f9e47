//! Copies of this process's own memory.

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
    let go = AtomicBool::new(false);
    let first = copy(proc, &place, &target, None, &go).unwrap();
    let copied: u64 = first.iter().map(|run| run.end - run.start).sum();
    assert!(copied >= 2000 * PAGE, "{copied}");
    assert!(fs::read(&path).unwrap() == memory);
    // Then again, with what has changed.
    memory[3100 * PAGE_USIZE..3200 * PAGE_USIZE].fill(0);
    memory[4990 * PAGE_USIZE + 17] = 9;
    memory[3300 * PAGE_USIZE + 17] = 9;
    copy(proc, &place, &target, Some(&first), &go).unwrap();
    assert!(fs::read(&path).unwrap() == memory);
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(meta.mode() & 0o777, 0o600);
    assert!(meta.blocks() * 512 < (pages as u64 - 1000) * PAGE, "{}", meta.blocks());

    let stopped = copy(proc, &place, &target, None, &AtomicBool::new(true)).unwrap_err();
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
        for (n, (first, bytes)) in runs.iter().enumerate() {
            let first = first % base.len();
            let bytes = &bytes[..bytes.len().min(base.len() - first)];
            let piece: Vec<u8> = bytes.iter().flat_map(|byte| vec![*byte; PAGE_USIZE]).collect();
            let at = first * PAGE_USIZE;
            // Only the first time is it known without looking what the file has.
            let old = expected[at..at + piece.len()].to_vec();
            write(&target, at as u64, &piece, (n > 0).then_some(&old)).unwrap();
            expected[at..at + piece.len()].copy_from_slice(&piece);
        }
        prop_assert!(fs::read(&to).unwrap() == expected);
        let used = expected.chunks(PAGE_USIZE).filter(|page| page[0] != 0).count() as u64;
        prop_assert!(fs::metadata(&to).unwrap().blocks() <= used * 8 + 8);
    }

    #[test]
    fn unions_hold_what_either_has(lists in proptest::collection::vec(proptest::collection::vec((0u64..3, 1u64..4), 0..20), 2)) {
        let lists: Vec<Vec<Range<u64>>> = lists.iter().map(|list| {
            let mut at = 0;
            list.iter().map(|(gap, length)| {
                let start = at + gap;
                at = start + length;
                start..at
            }).collect()
        }).collect();
        let joined = union(&lists[0], &lists[1]);
        prop_assert!(joined.windows(2).all(|w| w[0].end < w[1].start));
        let has = |list: &[Range<u64>], n: u64| list.iter().any(|run| run.contains(&n));
        for n in 0..200 {
            prop_assert_eq!(has(&joined, n), has(&lists[0], n) || has(&lists[1], n));
        }
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
