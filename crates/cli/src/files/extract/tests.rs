use std::os::unix::fs::{MetadataExt, PermissionsExt};

use proptest::prelude::*;
use tar::{Builder, Header};

use super::*;

/// An archive whose names are written as they are, with none of the library's checks.
#[derive(Default)]
struct Hostile {
    bytes: Vec<u8>,
}

impl Hostile {
    fn add(mut self, kind: EntryType, name: &str, link: &str, mode: u32, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..name.len()].copy_from_slice(name.as_bytes());
        gnu.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    fn dir(self, name: &str) -> Self {
        self.add(EntryType::Directory, name, "", 0o755, b"")
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.add(EntryType::Regular, name, "", 0o644, content.as_bytes())
    }

    fn link(self, name: &str, target: &str) -> Self {
        self.add(EntryType::Symlink, name, target, 0o777, b"")
    }

    fn hard(self, name: &str, target: &str) -> Self {
        self.add(EntryType::Link, name, target, 0o644, b"")
    }

    fn into(mut self, target: &Path, top: Top) -> Result<Report> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        extract(target, top, self.bytes.as_slice())
    }
}

fn named(name: &str) -> Top {
    Top::Named(name.into())
}

/// A target directory beside a victim.
fn place() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (target, victim) = (dir.path().join("target"), dir.path().join("victim"));
    std::fs::create_dir(&target).unwrap();
    std::fs::write(&victim, "mine").unwrap();
    (dir, target, victim)
}

#[test]
fn a_tree_comes_out_under_its_new_name() {
    let (_dir, target, _) = place();
    let report = Hostile::default()
        .dir("src")
        .file("src/a", "one")
        .dir("src/d")
        .add(EntryType::Regular, "src/d/run", "", 0o6755, b"two!")
        .link("src/d/up", "../a")
        .hard("src/hard", "src/a")
        .into(&target, named("dst"))
        .unwrap();
    assert_eq!((report.entries, report.bytes, report.skipped_count), (6, 7, 0));
    assert_eq!(std::fs::read_to_string(target.join("dst/d/up")).unwrap(), "one");
    let run = std::fs::metadata(target.join("dst/d/run")).unwrap();
    assert_eq!(run.permissions().mode() & 0o7000, 0, "no set-user-id");
    assert_eq!(run.mtime(), 1_000_000_000);
    let (a, hard) = (
        std::fs::metadata(target.join("dst/a")).unwrap(),
        std::fs::metadata(target.join("dst/hard")).unwrap(),
    );
    assert_eq!(a.ino(), hard.ino());
}

#[test]
fn content_goes_into_the_directory_itself() {
    let (_dir, target, _) = place();
    Hostile::default()
        .dir("src")
        .file("src/a", "x")
        .into(&target, Top::Content)
        .unwrap();
    assert_eq!(std::fs::read_to_string(target.join("a")).unwrap(), "x");
    Hostile::default()
        .dir("./")
        .file("./b", "y")
        .file("c", "z")
        .into(&target, Top::Content)
        .unwrap();
    assert_eq!(std::fs::read_to_string(target.join("c")).unwrap(), "z");
}

#[test]
fn names_that_lead_out_end_the_copy() {
    for name in [
        "../victim",
        "/etc/x",
        "src/../../victim",
        "other/x",
        "src/../src/x",
        "..",
    ] {
        let (_dir, target, victim) = place();
        let error = Hostile::default()
            .dir("src")
            .file(name, "evil")
            .into(&target, named("dst"))
            .unwrap_err();
        assert!(error.message.contains("which"), "{name}: {error}");
        assert_eq!(std::fs::read_to_string(victim).unwrap(), "mine");
    }
}

#[test]
fn links_to_elsewhere_are_left_out() {
    for target_of_link in [
        "/etc/passwd",
        "../../victim",
        "../..",
        "d/../../../victim",
        "../../target/dst/a",
    ] {
        let (_dir, target, _) = place();
        let report = Hostile::default()
            .dir("s")
            .dir("s/d")
            .link("s/d/evil", target_of_link)
            .into(&target, named("dst"));
        let inside = target_of_link == "../..";
        let report = report.unwrap();
        assert_eq!(report.skipped_count, 1, "{target_of_link} {inside}");
        assert!(
            std::fs::symlink_metadata(target.join("dst/d/evil")).is_err(),
            "{target_of_link}"
        );
    }
}

#[test]
fn nothing_is_written_through_a_link() {
    let (dir, target, victim) = place();
    // A link inside the copy is made, but nothing goes through it.
    let error = Hostile::default()
        .dir("s")
        .dir("s/d")
        .link("s/l", "d")
        .file("s/l/x", "evil")
        .into(&target, named("dst"))
        .unwrap_err();
    assert!(error.message.contains("through a link"), "{error}");
    // A link that stood in the target before is replaced, not written through.
    std::os::unix::fs::symlink(&victim, target.join("there")).unwrap();
    Hostile::default()
        .file("there", "new")
        .into(&target, named("there"))
        .unwrap();
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "mine");
    assert_eq!(std::fs::read_to_string(target.join("there")).unwrap(), "new");
    // A link to a directory that stood there before ends the copy.
    std::os::unix::fs::symlink(dir.path(), target.join("out")).unwrap();
    assert!(
        Hostile::default()
            .dir("s")
            .dir("s/out")
            .file("s/out/x", "evil")
            .into(&target, Top::Content)
            .is_err()
    );
    assert!(!dir.path().join("x").exists());
}

#[test]
fn a_directory_that_turns_into_a_link_is_not_entered_again() {
    let (_dir, target, _) = place();
    let result = Hostile::default()
        .dir("s")
        .dir("s/d")
        .dir("s/e")
        .file("s/d/one", "1")
        .link("s/d", "e")
        .file("s/d/two", "2")
        .into(&target, named("dst"));
    assert!(result.is_err(), "a directory cannot be replaced");
    assert!(!target.join("dst/e/two").exists());
}

#[test]
fn hard_links_reach_only_files_of_the_copy() {
    let (_dir, target, _) = place();
    assert!(
        Hostile::default()
            .dir("s")
            .hard("s/h", "/etc/passwd")
            .into(&target, named("a"))
            .is_err()
    );
    assert!(
        Hostile::default()
            .dir("s")
            .hard("s/h", "../victim")
            .into(&target, named("b"))
            .is_err()
    );
    assert!(
        Hostile::default()
            .dir("s")
            .hard("s/h", "s/none")
            .into(&target, named("c"))
            .is_err()
    );
    let report = Hostile::default()
        .dir("s")
        .dir("s/d")
        .hard("s/h", "s/d")
        .into(&target, named("e"))
        .unwrap();
    assert_eq!(report.skipped_count, 1);
    // A file that is linked and then replaced stays what it was.
    Hostile::default()
        .dir("s")
        .file("s/a", "first")
        .hard("s/b", "s/a")
        .file("s/b", "second")
        .into(&target, named("f"))
        .unwrap();
    assert_eq!(std::fs::read_to_string(target.join("f/a")).unwrap(), "first");
}

#[test]
fn special_files_are_left_out() {
    let (_dir, target, _) = place();
    let report = Hostile::default()
        .dir("s")
        .add(EntryType::Char, "s/null", "", 0o666, b"")
        .add(EntryType::Block, "s/sda", "", 0o666, b"")
        .add(EntryType::Fifo, "s/pipe", "", 0o666, b"")
        .into(&target, named("dst"))
        .unwrap();
    assert_eq!((report.entries, report.skipped_count), (1, 3));
    assert_eq!(std::fs::read_dir(target.join("dst")).unwrap().count(), 0);
}

#[test]
fn a_lone_link_is_left_out() {
    let (_dir, target, _) = place();
    let report = Hostile::default()
        .link("os-release", "../usr/lib/os-release")
        .into(&target, named("x"))
        .unwrap();
    assert_eq!((report.entries, report.skipped_count), (0, 1));
    // One that leads to what stands beside the copy as well, and nothing goes through it.
    std::fs::create_dir(target.join("beside")).unwrap();
    let report = Hostile::default()
        .link("l", "beside")
        .file("l/x", "evil")
        .into(&target, named("x"))
        .unwrap();
    assert_eq!((report.entries, report.skipped_count), (1, 1));
    assert!(!target.join("x").is_symlink());
    assert_eq!(std::fs::read_dir(target.join("beside")).unwrap().count(), 0);
}

#[test]
fn directories_have_their_permissions_and_times_at_the_end() {
    let (_dir, target, _) = place();
    std::fs::create_dir(target.join("old")).unwrap();
    std::fs::set_permissions(target.join("old"), std::fs::Permissions::from_mode(0o711)).unwrap();
    Hostile::default()
        .dir("s")
        .add(EntryType::Directory, "s/old", "", 0o755, b"")
        .add(EntryType::Directory, "s/private", "", 0o700, b"")
        .add(EntryType::Directory, "s/closed", "", 0o500, b"")
        .file("s/closed/f", "x")
        .add(EntryType::Directory, "s/open", "", 0o7777, b"")
        .into(&target, Top::Content)
        .unwrap();
    let found = |name: &str| {
        let meta = std::fs::metadata(target.join(name)).unwrap();
        (meta.mode() & 0o7777, meta.mtime() == 1_000_000_000)
    };
    assert_eq!(found("old"), (0o711, false), "it was there before");
    assert_eq!(found("private"), (0o700, true));
    assert_eq!(found("closed"), (0o500, true));
    let umask = {
        let probe = target.join("probe");
        std::fs::create_dir(&probe).unwrap();
        !std::fs::metadata(probe).unwrap().mode() & 0o777
    };
    assert_eq!(found("open"), (0o777 & !umask, true));
    std::fs::set_permissions(target.join("closed"), std::fs::Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn a_file_stays_as_it_is_until_the_new_one_is_complete() {
    let (_dir, target, _) = place();
    std::fs::write(target.join("f"), "old").unwrap();
    let mut whole = Hostile::default()
        .add(EntryType::Directory, "s", "", 0o750, b"")
        .file("s/f", &"x".repeat(3000))
        .bytes;
    whole.truncate(1024 + 2999);
    let error = extract(&target, Top::Content, whole.as_slice()).unwrap_err();
    assert!(error.message.contains("damaged"), "{error}");
    assert_eq!(std::fs::read_to_string(target.join("f")).unwrap(), "old");
    assert_eq!(
        std::fs::read_dir(&target).unwrap().count(),
        1,
        "something was left behind"
    );
}

/// A sparse entry: its extended headers, then the map and data.
fn sparse(size: &str, map: &str, data: &[u8]) -> Hostile {
    let record = |text: &str| {
        let mut length = text.len() + 3;
        while format!("{length} {text}\n").len() != length {
            length += 1;
        }
        format!("{length} {text}\n")
    };
    let headers = [
        "GNU.sparse.major=1",
        "GNU.sparse.minor=0",
        "GNU.sparse.name=s/big",
        &format!("GNU.sparse.realsize={size}"),
    ];
    let headers: String = headers.iter().map(|h| record(h)).collect();
    let mut content = map.as_bytes().to_vec();
    content.resize(content.len().next_multiple_of(512), 0);
    content.extend_from_slice(data);
    Hostile::default()
        .dir("s")
        .add(EntryType::XHeader, "x", "", 0o644, headers.as_bytes())
        .add(EntryType::Regular, "GNUSparseFile.0/big", "", 0o640, &content)
}

#[test]
fn sparse_files_stay_sparse_and_cost_what_they_hold() {
    let (_dir, target, _) = place();
    let report = sparse("1073741824", "2\n4096\n3\n1073741824\n0\n", b"abc")
        .into(&target, named("dst"))
        .unwrap();
    assert_eq!(report.bytes, 3);
    let big = std::fs::metadata(target.join("dst/big")).unwrap();
    assert_eq!((big.len(), big.mode() & 0o777), (1 << 30, 0o640));
    assert!(big.blocks() < 64);
    for (size, map, data) in [
        ("18446744073709551615", "1\n0\n3\n", "abc"),
        ("9223372036854775807", "1\n0\n3\n", "abc"),
        ("99999999999999999999", "1\n0\n3\n", "abc"),
        ("100", "1\n0\n4\n", "abc"),
        ("100", "1\n0\n2\n", "abc"),
        ("100", "1\n98\n3\n", "abc"),
        ("100", "2\n50\n1\n0\n2\n", "abc"),
        ("100", "2000000\n", "abc"),
        ("100", "1000000\n", "abc"),
        ("100", "", ""),
        ("x", "1\n0\n3\n", "abc"),
    ] {
        let (_dir, target, _) = place();
        let result = sparse(size, map, data.as_bytes()).into(&target, named("dst"));
        assert!(result.is_err(), "{size} {map:?}");
        assert!(!target.join("dst/big").exists());
        assert_eq!(
            std::fs::read_dir(target.join("dst")).unwrap().count(),
            0,
            "{size} {map:?}"
        );
    }
}

#[test]
fn what_the_machine_left_out_is_told() {
    let (_dir, target, _) = place();
    let mut builder = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Directory);
    header.set_mode(0o755);
    header.set_size(0);
    builder.append_data(&mut header, "s", io::empty()).unwrap();
    for n in 0..20 {
        send::note(
            &mut builder,
            Path::new(&format!("/run/pipe{n}\x1b[31m")),
            "a special file",
        )
        .unwrap();
    }
    let report = extract(&target, named("d"), builder.into_inner().unwrap().as_slice()).unwrap();
    assert_eq!(
        (report.entries, report.skipped_count, report.skipped.len()),
        (1, 20, 10)
    );
    assert_eq!(report.skipped[0], "/run/pipe0\\u{1b}[31m (a special file)");
}

#[test]
fn endless_headers_are_refused() {
    let (_dir, target, _) = place();
    for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader] {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(u64::MAX >> 12);
        header.set_cksum();
        let endless = header.as_bytes().as_slice().chain(io::repeat(b'a'));
        assert!(extract(&target, named("x"), endless).is_err());
    }
    let sparse = Hostile::default()
        .add(EntryType::GNUSparse, "s", "", 0o644, b"")
        .into(&target, named("x"));
    assert!(sparse.unwrap_err().message.contains("unknown kind"));
}

#[test]
fn long_names_are_read() {
    let (_dir, target, _) = place();
    let name = format!("s/{}", "n".repeat(200));
    let mut builder = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(2);
    header.set_mode(0o600);
    builder.append_data(&mut header, &name, &b"hi"[..]).unwrap();
    let bytes = builder.into_inner().unwrap();
    extract(&target, named("d"), bytes.as_slice()).unwrap();
    assert_eq!(
        std::fs::read_to_string(target.join("d").join("n".repeat(200))).unwrap(),
        "hi"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_stream_reaches_out_of_the_target(
        entries in prop::collection::vec(
            (
                prop::sample::select(vec![b'0', b'1', b'2', b'5', b'6', b'x', b'L', b'K', b'g', b'S', b'Z']),
                prop::sample::select(vec!["s", "s/a", "s/a/b", "s/l", "s/l/x", "../victim", "/tmp", "s/../..", "", ".", "s/."]),
                prop::sample::select(vec!["", "a", "..", "../..", "/", "s/a", "../../victim", "l", "a/../.."]),
                "[ -~]{0,12}",
            ),
            0..12,
        ),
        content in any::<bool>(),
    ) {
        let (dir, target, victim) = place();
        let mut archive = Hostile::default();
        for (kind, name, link, text) in entries {
            archive = archive.add(EntryType::new(kind), name, link, 0o755, text.as_bytes());
        }
        let _ = archive.into(&target, if content { Top::Content } else { named("dst") });
        prop_assert_eq!(std::fs::read_to_string(victim).unwrap(), "mine");
        prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        // Whatever links there are lead nowhere else.
        let mut open = vec![target.clone()];
        while let Some(next) = open.pop() {
            for entry in std::fs::read_dir(next).unwrap() {
                let path = entry.unwrap().path();
                let found = std::fs::symlink_metadata(&path).unwrap();
                if found.is_symlink() {
                    if let Ok(real) = path.canonicalize() {
                        prop_assert!(real.starts_with(target.canonicalize().unwrap()), "{:?}", path);
                    }
                } else if found.is_dir() {
                    open.push(path);
                }
            }
        }
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let (_dir, target, _) = place();
        let _ = extract(&target, named("x"), bytes.as_slice());
    }
}
