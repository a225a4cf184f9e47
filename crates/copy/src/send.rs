//! An open file as an entry of a tar stream: without its holes, with content where the file system tells no size, and whole
//! though it changes meanwhile.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use tar::{Builder, EntryType, Header};

use crate::sparse::{self, Map, Piece};

/// Largest content that is read before it is sent, in bytes, where the size is not known beforehand.
const MAX_UNSIZED: u64 = 64 << 20;

/// How often a file is sent that became shorter meanwhile.
const ATTEMPTS: u32 = 4;

/// Key of a note in a global extended header. Readers of tar streams ignore comments.
const COMMENT: &str = "comment";

/// What a note of ours begins with.
const LEFT_OUT: &[u8] = b"banger left out: ";

/// What pieces of a sparse file begin and end at, in bytes.
const ALIGNED: u64 = sparse::BLOCK as u64;

/// Longest note, in bytes.
const MAX_NOTE: usize = 8 * 1024;

/// Types of file systems whose files have no size, or a wrong one, before they are read: proc, sysfs, debugfs, tracefs,
/// securityfs, both of cgroup, configfs, bpf, selinuxfs, pstore, efivarfs.
const UNSIZED: [u64; 12] = [
    0x9fa0,
    0x6265_6572,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0x0027_e0eb,
    0x6367_7270,
    0x6265_6570,
    0xcafe_4a11,
    0xf97c_ff8c,
    0x6165_676c,
    0xde5e_81e4,
];

/// Whether a file is one of those whose size is only known once it was read.
pub fn is_unsized(file: &File) -> bool {
    let size_is_true = |kind: u64| !UNSIZED.contains(&(kind & 0xffff_ffff));
    // The type's width differs between architectures.
    rustix::fs::fstatfs(file).is_ok_and(|found| !size_is_true(u64::try_from(found.f_type).unwrap_or(0)))
}

/// Writes a regular file as `name`. Of `header` the kind, mode and owner are used; size and time of change are the file's own.
///
/// What was announced is what is sent: a file that grows is cut. One that became shorter is sent once more, so that a reader of
/// the stream ends up with the file as it is.
///
/// # Errors
/// Errors of reading and writing; `InvalidData` where the file becomes shorter again and again, or is larger than 64 MiB though
/// its file system told no size.
pub fn file<W: Write>(builder: &mut Builder<W>, name: &Path, header: &Header, file: &File) -> io::Result<()> {
    for _ in 0..ATTEMPTS {
        if once(builder, name, header.clone(), file)? {
            return Ok(());
        }
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        "it became shorter again and again while it was read",
    ))
}

fn once<W: Write>(builder: &mut Builder<W>, name: &Path, mut header: Header, file: &File) -> io::Result<bool> {
    let meta = file.metadata()?;
    header.set_entry_type(EntryType::Regular);
    header.set_mtime(u64::try_from(meta.mtime()).unwrap_or(0));
    let size = meta.len();
    if size == 0 || meta.blocks() == 0 && is_unsized(file) {
        let mut content = Vec::new();
        // A former attempt may have moved it; a file that can't be moved has only one.
        let _ = rustix::fs::seek(file, SeekFrom::Start(0));
        let read = Read::take(file, MAX_UNSIZED + 1).read_to_end(&mut content)?;
        if read as u64 > MAX_UNSIZED {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "its size is not known beforehand, and it is larger than 64 MiB",
            ));
        }
        header.set_size(read as u64);
        builder.append_data(&mut header, name, content.as_slice())?;
        return Ok(true);
    }
    if meta.blocks().saturating_mul(512) < size
        && size <= sparse::MAX_SIZE
        && let Some(map) = map(file, size)?
    {
        return sparsely(builder, name, &header, file, &map);
    }
    header.set_size(size);
    let whole = [Piece {
        offset: 0,
        length: size,
    }];
    let mut exact = Exact::new(file, &whole);
    builder.append_data(&mut header, name, &mut exact)?;
    Ok(!exact.short)
}

fn sparsely<W: Write>(
    builder: &mut Builder<W>,
    name: &Path,
    like: &Header,
    file: &File,
    map: &Map,
) -> io::Result<bool> {
    // Behind extended headers GNU tar wants a header of POSIX, not of its own older format.
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(like.mode()?);
    header.set_uid(like.uid()?);
    header.set_gid(like.gid()?);
    header.set_mtime(like.mtime()?);
    let text = map.encode();
    header.set_size(text.len() as u64 + map.stored());
    builder.append_pax_extensions([
        (sparse::MAJOR, b"1".as_slice()),
        (sparse::MINOR, b"0"),
        (sparse::NAME, name.as_os_str().as_bytes()),
        (sparse::REAL_SIZE, map.size().to_string().as_bytes()),
    ])?;
    // The true name is the one above. This one is shown by programs that do not know the format.
    let base = name.file_name().unwrap_or_default().to_string_lossy();
    let base: String = base.chars().take(20).collect();
    header.set_path(Path::new("GNUSparseFile.0").join(base))?;
    header.set_cksum();
    let mut exact = Exact::new(file, map.pieces());
    builder.append(&header, text.as_slice().chain(&mut exact))?;
    Ok(!exact.short)
}

/// What of a file is data; `None` where it has no hole after all, or its file system can't tell.
fn map(file: &File, size: u64) -> io::Result<Option<Map>> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut at = 0;
    while at < size {
        let begin = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(begin) if begin < size => begin,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let end = match rustix::fs::seek(file, SeekFrom::Hole(begin)) {
            _ if pieces.len() + 1 >= sparse::MAX_SENT => size,
            Ok(end) => end.min(size),
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        // In whole blocks, as GNU tar expects; what is more are zeros.
        let begin = begin - begin % ALIGNED;
        let end = end.next_multiple_of(ALIGNED).min(size);
        match pieces.last_mut() {
            Some(last) if last.offset + last.length >= begin => last.length = end - last.offset,
            _ => pieces.push(Piece {
                offset: begin,
                length: end - begin,
            }),
        }
        at = end;
    }
    let whole = matches!(pieces.as_slice(), [only] if only.offset == 0 && only.length == size);
    if whole {
        Ok(None)
    } else {
        Map::new(size, pieces).map(Some)
    }
}

/// Exactly the bytes of some pieces of a file; zeros where the file has become shorter.
struct Exact<'f> {
    file: &'f File,
    pieces: std::slice::Iter<'f, Piece>,
    now: Piece,
    short: bool,
}

impl<'f> Exact<'f> {
    fn new(file: &'f File, pieces: &'f [Piece]) -> Self {
        Self {
            file,
            pieces: pieces.iter(),
            now: Piece { offset: 0, length: 0 },
            short: false,
        }
    }
}

impl Read for Exact<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.now.length == 0 {
            match self.pieces.next() {
                Some(piece) => self.now = *piece,
                None => return Ok(0),
            }
        }
        let most = usize::try_from(self.now.length).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let n = match self.file.read_at(&mut buffer[..most], self.now.offset)? {
            0 => {
                self.short = true;
                buffer[..most].fill(0);
                most
            }
            n => n,
        };
        self.now.offset += n as u64;
        self.now.length -= n as u64;
        Ok(n)
    }
}

/// Writes a note that something was left out. It is a comment in the stream, which only [`read_note`] reads.
///
/// # Errors
/// Errors of writing.
pub fn note<W: Write>(builder: &mut Builder<W>, path: &Path, why: &str) -> io::Result<()> {
    let path = path.as_os_str().as_bytes();
    let path = &path[..path.len().min(MAX_NOTE / 2)];
    let value = [LEFT_OUT, path, b" (", why.as_bytes(), b")"].concat();
    // A record begins with its own length.
    let rest = COMMENT.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    let record = [format!("{length} {COMMENT}=").as_bytes(), &value, b"\n"].concat();
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::XGlobalHeader);
    header.set_path("pax_global_header")?;
    header.set_mode(0o644);
    header.set_size(record.len() as u64);
    header.set_cksum();
    builder.append(&header, record.as_slice())
}

/// What a record of a global extended header says was left out, with the reason. `None` for any other record.
pub fn read_note<'v>(key: &[u8], value: &'v [u8]) -> Option<&'v [u8]> {
    let note = (key == COMMENT.as_bytes()).then_some(value)?.strip_prefix(LEFT_OUT)?;
    (note.len() <= MAX_NOTE).then_some(note)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::process::{Command, Stdio};

    use super::*;

    fn header() -> Header {
        let mut header = Header::new_gnu();
        header.set_mode(0o640);
        header.set_uid(0);
        header.set_gid(0);
        header
    }

    fn stream(file: &File, name: &str) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        super::file(&mut builder, Path::new(name), &header(), file).unwrap();
        builder.into_inner().unwrap()
    }

    /// Unpacks with the system's tar.
    fn with_tar(bytes: &[u8], dir: &Path) {
        let mut tar = Command::new("tar")
            .args(["-x", "--no-same-owner", "-C"])
            .arg(dir)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin.take().unwrap().write_all(bytes).unwrap();
        let done = tar.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&done.stderr), "");
        assert!(done.status.success());
    }

    #[test]
    fn a_sparse_file_is_sent_without_its_holes_and_tar_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        let file = File::create_new(&path).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"middle", 300 << 20).unwrap();
        file.set_len(400 << 20).unwrap();
        let file = File::open(&path).unwrap();
        let name = format!("to/{}", "long".repeat(40));
        let bytes = stream(&file, &name);
        assert!(bytes.len() < 64 * 1024, "{}", bytes.len());
        with_tar(&bytes, dir.path());
        let out = File::open(dir.path().join(&name)).unwrap();
        let meta = out.metadata().unwrap();
        assert_eq!(meta.len(), 400 << 20);
        assert!(meta.blocks() * 512 < 1 << 20);
        let mut text = [0; 6];
        out.read_exact_at(&mut text, 300 << 20).unwrap();
        assert_eq!(&text, b"middle");
        assert_eq!(
            (meta.mode() & 0o777, meta.mtime()),
            (0o640, file.metadata().unwrap().mtime())
        );
    }

    #[test]
    fn nothing_but_a_hole_and_nothing_at_all() {
        let dir = tempfile::tempdir().unwrap();
        for size in [0, 1 << 30] {
            let path = dir.path().join("f");
            File::create(&path).unwrap().set_len(size).unwrap();
            let bytes = stream(&File::open(&path).unwrap(), "out");
            with_tar(&bytes, dir.path());
            assert_eq!(std::fs::metadata(dir.path().join("out")).unwrap().len(), size);
        }
    }

    #[test]
    fn a_pseudo_file_has_its_content() {
        for path in [
            "/proc/self/status",
            "/proc/cpuinfo",
            "/sys/kernel/mm/transparent_hugepage/enabled",
        ] {
            let Ok(expected) = std::fs::read(path) else { continue };
            let bytes = stream(&File::open(path).unwrap(), "f");
            let mut archive = tar::Archive::new(bytes.as_slice());
            let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            assert!(!content.is_empty(), "{path}");
            if !path.contains("self") && !path.contains("cpuinfo") {
                assert_eq!(content, expected, "{path}");
            }
        }
        // It has no end, or none that is near.
        if let Ok(endless) = File::open("/dev/zero") {
            let mut builder = Builder::new(io::sink());
            let error = file(&mut builder, Path::new("f"), &header(), &endless).unwrap_err();
            assert!(error.to_string().contains("64 MiB"), "{error}");
        }
    }

    /// Changes a file while it is read: once this much was written.
    struct Changing<F>(u64, Option<F>);

    impl<F: FnOnce()> Write for Changing<F> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self.0.saturating_sub(bytes.len() as u64);
            if self.0 == 0
                && let Some(change) = self.1.take()
            {
                change();
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_file_that_becomes_shorter_is_sent_again_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let file = File::open(&path).unwrap();
        let all = std::cell::RefCell::new(Vec::new());
        struct Tee<'a, W>(&'a std::cell::RefCell<Vec<u8>>, W);
        impl<W: Write> Write for Tee<'_, W> {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.borrow_mut().extend_from_slice(bytes);
                self.1.write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let cut = Changing(
            100_000,
            Some(|| {
                File::options()
                    .write(true)
                    .open(&path)
                    .unwrap()
                    .set_len(200_000)
                    .unwrap()
            }),
        );
        let mut builder = Builder::new(Tee(&all, cut));
        super::file(&mut builder, Path::new("out"), &header(), &file).unwrap();
        builder.into_inner().unwrap();
        with_tar(&all.borrow(), dir.path());
        assert!(std::fs::read(dir.path().join("out")).unwrap() == vec![7; 200_000]);
        // One that never stops ends the copy.
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        struct Always<'a>(&'a Path);
        impl Write for Always<'_> {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let file = File::options().write(true).open(self.0)?;
                file.set_len(file.metadata()?.len().saturating_sub(1).max(1))?;
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut builder = Builder::new(Always(&path));
        let error = super::file(&mut builder, Path::new("out"), &header(), &file).unwrap_err();
        assert!(error.to_string().contains("shorter"), "{error}");
    }

    #[test]
    fn notes_are_read_back_and_tar_ignores_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut builder = Builder::new(Vec::new());
        for length in [1, 50, 51, 52, 53, 54, 55, 950, 960, 4000] {
            note(&mut builder, Path::new(&"n".repeat(length)), "a pipe").unwrap();
        }
        let bytes = builder.into_inner().unwrap();
        with_tar(&bytes, dir.path());
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut count = 0;
        for entry in archive.entries().unwrap().raw(true) {
            let mut entry = entry.unwrap();
            let mut record = Vec::new();
            entry.read_to_end(&mut record).unwrap();
            let pair = tar::PaxExtensions::new(&record).next().unwrap().unwrap();
            let text = read_note(pair.key_bytes(), pair.value_bytes()).unwrap();
            assert!(text.starts_with(b"n") && text.ends_with(b" (a pipe)"));
            count += 1;
        }
        assert_eq!(count, 10);
        assert_eq!(read_note(b"comment", b"something else"), None);
        assert_eq!(read_note(b"path", b"banger left out: x"), None);
    }
}
