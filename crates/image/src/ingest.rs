//! A tar stream into an image.
//!
//! Nothing is unpacked onto the host: every entry goes through the policy of [`crate::tar`] into the writer of
//! [`crate::ext4`]. The digest of an image is taken over what went in, so the same content has the same name.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::digest::{Digest, Hasher};
use crate::disk::as_uuid;
use crate::error::{Error, IoContext, Result};
use crate::ext4::Ext4Error;
use crate::ext4::tree::{Meta, Special};
use crate::ext4::writer::{Finish, Limits, Size, Summary, Writer};
use crate::progress::{Progress, Step};
use crate::tar::{self, Entry, Kind, Reader, Scrub, TarError, Verdict, policy};

/// Free bytes in a stored image: little, as disks of machines are made larger when they are made.
const SLACK: u64 = 32 << 20;
/// Journal of an image, for the machines that grow out of it: 64 MiB.
const JOURNAL_BLOCKS: u64 = 16_384;
/// Bytes between two reports.
const REPORT_EVERY: u64 = 4 << 20;

/// What became of a tar stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ingested {
    /// Digest of the content.
    pub digest: Digest,
    /// Init system of the image.
    pub init: Option<String>,
    /// The file system.
    pub summary: Summary,
}

/// Writes the file system `target` from a tar stream. `what` names it in errors.
pub fn ingest(stream: impl Read, what: &str, scrub: Scrub, target: &Path, progress: &Progress) -> Result<Ingested> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(target)
        .on("make the image", target)?;
    let sync = file.try_clone().on("open", target)?;
    let tar_error = |source| Error::Tar {
        what: what.to_owned(),
        source,
    };
    let fs_error = |error: Ext4Error| ext4_error(error, what, target);

    let mut writer = Writer::new(file, Limits::default()).map_err(fs_error)?;
    let mut reader = Reader::new(stream, tar::Limits::default());
    let mut hasher = Hasher::new();
    let mut init = InitSearch::default();
    let mut reported = 0;
    hasher.update(b"banger image 1\n");
    while let Some(entry) = reader.next_entry().map_err(tar_error)? {
        if reader.offset() >= reported + REPORT_EVERY {
            reported = reader.offset();
            progress.bytes(Step::WriteImage, reported, 0);
        }
        let path = policy::components(&entry.path).map_err(tar_error)?;
        let verdict = scrub.verdict(&path, entry.kind == Kind::Directory);
        if verdict == Verdict::Drop {
            continue;
        }
        init.see(&path, &entry.kind);
        enter(&mut writer, &mut reader, &mut hasher, &path, entry, verdict).map_err(|e| match e {
            EnterError::Tar(source) => tar_error(source),
            EnterError::Ext4(source) => fs_error(source),
        })?;
    }
    let digest = hasher.finish();
    let seed = |from: usize| {
        let mut out = [0; 16];
        out.iter_mut()
            .zip(digest.as_bytes().iter().skip(from))
            .for_each(|(o, b)| *o = *b);
        out
    };
    let finish = Finish {
        size: Size::Fit { slack: SLACK },
        journal_blocks: JOURNAL_BLOCKS,
        uuid: as_uuid(seed(0)),
        hash_seed: as_uuid(seed(16)),
        label: "root",
        time: 0,
    };
    let summary = writer.finish(&finish).map_err(fs_error)?;
    sync.sync_data().on("write", target)?;
    progress.bytes(Step::WriteImage, reader.offset(), reader.offset());
    Ok(Ingested {
        digest,
        init: init.found(),
        summary,
    })
}

enum EnterError {
    Tar(TarError),
    Ext4(Ext4Error),
}

impl From<TarError> for EnterError {
    fn from(error: TarError) -> Self {
        Self::Tar(error)
    }
}

impl From<Ext4Error> for EnterError {
    fn from(error: Ext4Error) -> Self {
        Self::Ext4(error)
    }
}

/// Enters one entry, and hashes it with its content.
fn enter(
    writer: &mut Writer,
    content: &mut impl Read,
    hasher: &mut Hasher,
    path: &[Vec<u8>],
    mut entry: Entry,
    verdict: Verdict,
) -> Result<(), EnterError> {
    entry.xattrs.sort();
    hash_entry(hasher, path, &entry, verdict);
    let meta = Meta {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        mtime_nsec: entry.mtime_nsec,
        xattrs: entry.xattrs,
    };
    match entry.kind {
        Kind::Directory => writer.directory(path, meta)?,
        Kind::File if verdict == Verdict::Empty => writer.file(path, meta, 0, &mut io::empty())?,
        Kind::File => writer.file(path, meta, entry.size, &mut Hashing { inner: content, hasher })?,
        Kind::Symlink(target) => writer.symlink(path, meta, &target)?,
        Kind::HardLink(target) => writer.hard_link(path, &policy::components(&target)?)?,
        Kind::Char(major, minor) => writer.special(path, meta, Special::Char(major, minor))?,
        Kind::Block(major, minor) => writer.special(path, meta, Special::Block(major, minor))?,
        Kind::Fifo => writer.special(path, meta, Special::Fifo)?,
    }
    Ok(())
}

/// Adds everything that makes an entry what it is to the digest of the image.
fn hash_entry(hasher: &mut Hasher, path: &[Vec<u8>], entry: &Entry, verdict: Verdict) {
    hasher.field(&path.join(&b'/'));
    let (kind, text, numbers) = match &entry.kind {
        Kind::File => (b'f', [].as_slice(), (0, 0)),
        Kind::Directory => (b'd', [].as_slice(), (0, 0)),
        Kind::Symlink(target) => (b'l', target.as_slice(), (0, 0)),
        Kind::HardLink(target) => (b'h', target.as_slice(), (0, 0)),
        Kind::Char(major, minor) => (b'c', [].as_slice(), (*major, *minor)),
        Kind::Block(major, minor) => (b'b', [].as_slice(), (*major, *minor)),
        Kind::Fifo => (b'p', [].as_slice(), (0, 0)),
    };
    hasher.update(&[kind]);
    hasher.field(text);
    let size = if verdict == Verdict::Empty { 0 } else { entry.size };
    for number in [
        u64::from(numbers.0),
        numbers.1.into(),
        entry.mode.into(),
        entry.uid.into(),
        entry.gid.into(),
        entry.mtime_nsec.into(),
        size,
    ] {
        hasher.update(&number.to_le_bytes());
    }
    hasher.update(&entry.mtime.to_le_bytes());
    hasher.update(&(entry.xattrs.len() as u64).to_le_bytes());
    for (name, value) in &entry.xattrs {
        hasher.field(name);
        hasher.field(value);
    }
}

struct Hashing<'a, R> {
    inner: &'a mut R,
    hasher: &'a mut Hasher,
}

impl<R: Read> Read for Hashing<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.hasher.update(buf.get(..n).unwrap_or_default());
        Ok(n)
    }
}

/// Content that ends too early is the archive's fault, a full disk is the host's, the rest is the file system's.
fn ext4_error(error: Ext4Error, what: &str, target: &Path) -> Error {
    match error {
        Ext4Error::Content { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof => Error::Tar {
            what: what.to_owned(),
            source: TarError::Truncated,
        },
        Ext4Error::Write(source) => Error::io(format!("write {}", target.display()), source),
        source => Error::FileSystem {
            path: target.to_owned(),
            source,
        },
    }
}

/// Looks for an init system while entries pass by.
#[derive(Debug, Default)]
struct InitSearch {
    init: bool,
    systemd: bool,
}

impl InitSearch {
    fn see(&mut self, path: &[Vec<u8>], kind: &Kind) {
        if *kind == Kind::Directory {
            return;
        }
        let names: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
        match names.strip_prefix(&[b"usr".as_slice()]).unwrap_or(&names) {
            [b"sbin", b"init"] => self.init = true,
            [b"lib", b"systemd", b"systemd"] => self.systemd = true,
            _ => {}
        }
    }

    fn found(&self) -> Option<String> {
        let path = if self.systemd {
            "/lib/systemd/systemd"
        } else if self.init {
            "/sbin/init"
        } else {
            return None;
        };
        Some(path.to_owned())
    }
}
