//! A reader of tar streams: ustar, PAX and GNU names. Sparse files, multi-volume and other rarities are refused.

use std::io::{self, Read};

use super::TarError;

const BLOCK: usize = 512;
const BLOCK_U64: u64 = 512;

/// What is allowed.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Entries.
    pub entries: u64,
    /// Bytes of one file.
    pub file_bytes: u64,
    /// Bytes of all files.
    pub total_bytes: u64,
    /// Bytes of one extension header (long names, extended attributes).
    pub extension_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 4_000_000,
            file_bytes: 256 << 30,
            total_bytes: 512 << 30,
            extension_bytes: 1 << 20,
        }
    }
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file; its content can be read next.
    File,
    /// A directory.
    Directory,
    /// A symbolic link with its target.
    Symlink(Vec<u8>),
    /// Another name of an entry that came before.
    HardLink(Vec<u8>),
    /// Character device with its numbers.
    Char(u32, u32),
    /// Block device with its numbers.
    Block(u32, u32),
    /// Named pipe.
    Fifo,
}

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path as it stands in the archive.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last change.
    pub mtime: i64,
    /// Nanoseconds of it.
    pub mtime_nsec: u32,
    /// Bytes of content; 0 for all but files.
    pub size: u64,
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads a tar stream, entry by entry.
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    limits: Limits,
    entry: u64,
    total: u64,
    /// Bytes read from the stream.
    offset: u64,
    /// Bytes of the current entry's content not yet read.
    left: u64,
    /// Bytes after it up to the next header.
    padding: u64,
    done: bool,
}

/// What extension headers said about the next entry.
#[derive(Debug, Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<R: Read> Reader<R> {
    /// A reader of `inner`.
    pub fn new(inner: R, limits: Limits) -> Self {
        Self {
            inner,
            limits,
            entry: 0,
            total: 0,
            offset: 0,
            left: 0,
            padding: 0,
            done: false,
        }
    }

    /// Bytes read from the stream so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next entry; none at the end of the archive. What was not read of the content before is skipped. After the end, the
    /// stream is read to its own end, so that whoever writes it is not cut off in its padding.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        if self.done {
            return Ok(None);
        }
        self.skip_rest()?;
        let mut extensions = Extensions::default();
        loop {
            let mut header = [0; BLOCK];
            self.fill(&mut header)?;
            if header.iter().all(|b| *b == 0) {
                self.done = true;
                let mut rest = [0; 8192];
                while self.inner.read(&mut rest)? > 0 {}
                return Ok(None);
            }
            self.entry += 1;
            if self.entry > self.limits.entries {
                return Err(TarError::TooLarge {
                    what: "the number of entries",
                    limit: self.limits.entries,
                });
            }
            check_sum(&header).ok_or_else(|| self.malformed("its checksum is wrong"))?;
            let size = number(field(&header, 124, 12)).ok_or_else(|| self.malformed("its size is no number"))?;
            let size = u64::try_from(size).map_err(|_| self.malformed("its size is negative"))?;
            match header[156] {
                b'x' | b'g' | b'L' | b'K' => {
                    let data = self.extension(size)?;
                    match header[156] {
                        b'x' => self.pax(&data, &mut extensions)?,
                        b'g' => self.global(&data)?,
                        b'L' => extensions.path = Some(until_nul(&data).to_vec()),
                        _ => extensions.link = Some(until_nul(&data).to_vec()),
                    }
                }
                _ => return self.entry_of(&header, size, extensions).map(Some),
            }
        }
    }

    fn entry_of(&mut self, header: &[u8; BLOCK], size: u64, extensions: Extensions) -> Result<Entry, TarError> {
        let ustar = field(header, 257, 6) == b"ustar\0";
        let path = extensions.path.unwrap_or_else(|| {
            let name = until_nul(field(header, 0, 100));
            let prefix = until_nul(field(header, 345, 155));
            if ustar && !prefix.is_empty() {
                [prefix, b"/", name].concat()
            } else {
                name.to_vec()
            }
        });
        let link = extensions
            .link
            .unwrap_or_else(|| until_nul(field(header, 157, 100)).to_vec());
        let small = |at, len, why| -> Result<i64, TarError> {
            number(field(header, at, len)).ok_or_else(|| self.malformed(why))
        };
        let id = |given: Option<u32>, at| match given {
            Some(id) => Ok(id),
            None => u32::try_from(small(at, 8, "its owner is no number")?)
                .map_err(|_| self.malformed("its owner is out of range")),
        };
        let uid = id(extensions.uid, 108)?;
        let gid = id(extensions.gid, 116)?;
        let mode = u16::try_from(small(100, 8, "its mode is no number")? & 0o7777).unwrap_or(0);
        let (mtime, mtime_nsec) = match extensions.mtime {
            Some(mtime) => mtime,
            None => (small(136, 12, "its time is no number")?, 0),
        };
        let device = |at| {
            u32::try_from(small(at, 8, "its device number is no number")?)
                .map_err(|_| self.malformed("its device number is out of range"))
        };
        let kind = match header[156] {
            b'0' | 0 | b'7' if path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' => Kind::File,
            b'1' => Kind::HardLink(link),
            b'2' => Kind::Symlink(link),
            b'3' => Kind::Char(device(329)?, device(337)?),
            b'4' => Kind::Block(device(329)?, device(337)?),
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(TarError::Unsupported {
                    entry: self.entry,
                    what: format!("type `{}`", char::from(other).escape_debug()),
                });
            }
        };
        let size = extensions.size.unwrap_or(size);
        if kind != Kind::File && size != 0 && !matches!(kind, Kind::HardLink(_) | Kind::Directory) {
            return Err(self.malformed("it has content and is no file"));
        }
        // Some writers give directories and hard links a size without content.
        let size = if kind == Kind::File { size } else { 0 };
        if size > self.limits.file_bytes {
            return Err(TarError::TooLarge {
                what: "the size of a file",
                limit: self.limits.file_bytes,
            });
        }
        self.total = self.total.saturating_add(size);
        if self.total > self.limits.total_bytes {
            return Err(TarError::TooLarge {
                what: "the size of all files",
                limit: self.limits.total_bytes,
            });
        }
        self.left = size;
        self.padding = size.next_multiple_of(BLOCK_U64) - size;
        Ok(Entry {
            path,
            kind,
            mode,
            uid,
            gid,
            mtime,
            mtime_nsec,
            size,
            xattrs: extensions.xattrs,
        })
    }

    fn malformed(&self, why: &'static str) -> TarError {
        TarError::Malformed { entry: self.entry, why }
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<(), TarError> {
        self.inner.read_exact(buf)?;
        self.offset += buf.len() as u64;
        Ok(())
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        let mut left = self.left + self.padding;
        (self.left, self.padding) = (0, 0);
        let mut buf = [0; 16 * BLOCK];
        while left > 0 {
            let n = left.min(buf.len() as u64);
            let chunk = usize::try_from(n)
                .ok()
                .and_then(|n| buf.get_mut(..n))
                .unwrap_or_default();
            self.fill(chunk)?;
            left -= n;
        }
        Ok(())
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > self.limits.extension_bytes {
            return Err(TarError::TooLarge {
                what: "the size of an extension header",
                limit: self.limits.extension_bytes,
            });
        }
        let mut data = vec![0; usize::try_from(size.next_multiple_of(BLOCK_U64)).unwrap_or(0)];
        self.fill(&mut data)?;
        data.truncate(usize::try_from(size).unwrap_or(0));
        Ok(data)
    }

    fn pax(&self, data: &[u8], out: &mut Extensions) -> Result<(), TarError> {
        let bad = || self.malformed("its PAX header is malformed");
        for record in records(data) {
            let (key, value) = record.ok_or_else(bad)?;
            let text = || std::str::from_utf8(value).map_err(|_| bad());
            match key {
                b"path" => out.path = Some(value.to_vec()),
                b"linkpath" => out.link = Some(value.to_vec()),
                b"size" => out.size = Some(text()?.parse().map_err(|_| bad())?),
                b"uid" => out.uid = Some(text()?.parse().map_err(|_| bad())?),
                b"gid" => out.gid = Some(text()?.parse().map_err(|_| bad())?),
                b"mtime" => out.mtime = Some(pax_time(text()?).ok_or_else(bad)?),
                _ if key.starts_with(b"GNU.sparse.") => {
                    return Err(TarError::Unsupported {
                        entry: self.entry,
                        what: "sparse file".to_owned(),
                    });
                }
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        if name.is_empty() || name.len() > 255 || out.xattrs.len() >= 128 {
                            return Err(bad());
                        }
                        out.xattrs.push((name.to_vec(), value.to_vec()));
                    }
                }
            }
        }
        Ok(())
    }

    /// Global headers hold comments (git's commit id). One that would change entries is refused, as nobody writes them.
    fn global(&self, data: &[u8]) -> Result<(), TarError> {
        for record in records(data) {
            match record {
                Some((b"comment" | b"charset" | b"hdrcharset", _)) => {}
                Some((key, _)) => {
                    return Err(TarError::Unsupported {
                        entry: self.entry,
                        what: format!(
                            "global header `{}`",
                            String::from_utf8_lossy(key).escape_debug().take(60).collect::<String>()
                        ),
                    });
                }
                None => return Err(self.malformed("its PAX header is malformed")),
            }
        }
        Ok(())
    }
}

/// Reads the content of the current entry.
impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        let n = self.inner.read(buf.get_mut(..n).unwrap_or_default())?;
        self.left -= n as u64;
        self.offset += n as u64;
        Ok(n)
    }
}

fn field(header: &[u8; BLOCK], at: usize, len: usize) -> &[u8] {
    header.get(at..at + len).unwrap_or_default()
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|b| *b == 0).next().unwrap_or_default()
}

fn check_sum(header: &[u8; BLOCK]) -> Option<()> {
    let expected = number(field(header, 148, 8))?;
    let sum = |value: fn(u8) -> i64| -> i64 {
        header
            .iter()
            .enumerate()
            .map(|(i, b)| if (148..156).contains(&i) { 32 } else { value(*b) })
            .sum()
    };
    // Some old writers took bytes as signed.
    (expected == sum(i64::from) || expected == sum(|b| i64::from(b.cast_signed()))).then_some(())
}

/// Octal text, or GNU's binary form with the highest bit set. Empty is 0.
fn number(bytes: &[u8]) -> Option<i64> {
    let (first, rest) = bytes.split_first()?;
    if first & 0x80 != 0 {
        // Two's complement over all bits but the first.
        let mut value = i128::from(*first & 0x7f);
        if first & 0x40 != 0 {
            value -= 0x80;
        }
        for byte in rest {
            value = value.checked_mul(256)? + i128::from(*byte);
        }
        return i64::try_from(value).ok();
    }
    let text: &[u8] = until_nul(bytes).trim_ascii();
    let mut value = 0i64;
    for byte in text {
        let digit = byte.checked_sub(b'0').filter(|d| *d < 8)?;
        value = value.checked_mul(8)?.checked_add(digit.into())?;
    }
    Some(value)
}

/// The records of a PAX header: `LENGTH KEY=VALUE\n`. None stands for a malformed one, after which there is nothing.
fn records(data: &[u8]) -> impl Iterator<Item = Option<(&[u8], &[u8])>> {
    let mut rest = Some(data);
    std::iter::from_fn(move || {
        let data = rest?;
        if data.is_empty() {
            return None;
        }
        let parsed = record(data);
        rest = parsed.map(|(_, rest)| rest);
        Some(parsed.map(|(pair, _)| pair))
    })
}

type Pair<'a> = (&'a [u8], &'a [u8]);

fn record(data: &[u8]) -> Option<(Pair<'_>, &[u8])> {
    let space = data.iter().take(12).position(|b| *b == b' ')?;
    let len: usize = std::str::from_utf8(data.get(..space)?).ok()?.parse().ok()?;
    let body = data.get(space + 1..len)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|b| *b == b'=')?;
    Some(((body.get(..equals)?, body.get(equals + 1..)?), data.get(len..)?))
}

/// `SECONDS[.FRACTION]`, seconds may be negative.
fn pax_time(text: &str) -> Option<(i64, u32)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if fraction.len() > 100 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let mut nanos = 0;
    for i in 0..9 {
        nanos = nanos * 10 + fraction.as_bytes().get(i).map_or(0, |b| u32::from(b - b'0'));
    }
    if whole.starts_with('-') && nanos > 0 {
        Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos))
    } else {
        Some((seconds, nanos))
    }
}
