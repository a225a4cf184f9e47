//! A tree as a tar stream. It stays on one file system, and leaves out what a tar stream for another machine has no use for:
//! sockets, pipes and device nodes. What it leaves out is noted in the stream.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use banger_copy::send;
use rustix::fs::OFlags;
use tar::{Builder, EntryType, Header};

/// Files with several names that are remembered; beyond that each name becomes a file of its own.
const MAX_LINKS: usize = 200_000;

/// How deep a tree may be.
const MAX_DEPTH: usize = 512;

/// The name under which the root of a tree goes into the stream.
pub(super) fn root_name(path: &Path) -> PathBuf {
    path.file_name().map_or_else(|| PathBuf::from("."), PathBuf::from)
}

/// Writes what stands at `path` as `name`.
pub(super) fn pack<W: Write>(path: &Path, name: &Path, meta: &Metadata, writer: W) -> io::Result<()> {
    let mut packer = Packer {
        builder: Builder::new(writer),
        device: meta.dev(),
        links: HashMap::new(),
    };
    packer.entry(path, name, meta, 0)?;
    packer.builder.into_inner()?.flush()
}

struct Packer<W: Write> {
    builder: Builder<W>,
    device: u64,
    links: HashMap<u64, PathBuf>,
}

fn header(kind: EntryType, meta: &Metadata) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(meta.mode() & 0o7777);
    header.set_uid(u64::from(meta.uid()));
    header.set_gid(u64::from(meta.gid()));
    header.set_mtime(u64::try_from(meta.mtime()).unwrap_or(0));
    header.set_size(0);
    header
}

impl<W: Write> Packer<W> {
    fn entry(&mut self, path: &Path, name: &Path, meta: &Metadata, depth: usize) -> io::Result<()> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("`{}`: {e}", path.display()));
        let kind = meta.file_type();
        if kind.is_dir() {
            let mut header = header(EntryType::Directory, meta);
            self.builder.append_data(&mut header, name, io::empty())?;
            if meta.dev() == self.device {
                self.children(path, name, depth).map_err(named)?;
            } else {
                send::note(&mut self.builder, path, "the content of another file system")?;
            }
        } else if kind.is_symlink() {
            let target = fs::read_link(path).map_err(named)?;
            let mut header = header(EntryType::Symlink, meta);
            self.builder.append_link(&mut header, name, target)?;
        } else if kind.is_file() {
            self.file(path, name).map_err(named)?;
        } else {
            send::note(&mut self.builder, path, "a special file")?;
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, name: &Path) -> io::Result<()> {
        // What was a file a moment ago may be a pipe now, which must not be waited for, or a link.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let mut options = File::options();
        options
            .read(true)
            .custom_flags(i32::try_from(flags.bits()).unwrap_or(0));
        let opened = options.open(path).and_then(|file| Ok((file.metadata()?, file)));
        let (meta, file) = match opened {
            Ok((meta, file)) if meta.is_file() => (meta, file),
            Ok(_) => return send::note(&mut self.builder, path, "a special file"),
            // Gone since its directory was read.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return self.unreadable(path, name, e),
        };
        if meta.nlink() > 1 && meta.dev() == self.device {
            if let Some(first) = self.links.get(&meta.ino()) {
                let mut header = header(EntryType::Link, &meta);
                return self.builder.append_link(&mut header, name, first);
            }
            if self.links.len() < MAX_LINKS {
                self.links.insert(meta.ino(), name.to_path_buf());
            }
        }
        let header = header(EntryType::Regular, &meta);
        match send::file(&mut self.builder, name, &header, &file) {
            Err(e) if send::is_unsized(&file) && e.kind() != io::ErrorKind::BrokenPipe => {
                self.unreadable(path, name, e)
            }
            done => done,
        }
    }

    /// A file that can't be read ends the copy. Below `/proc` and `/sys` many can't be read even by root: in a tree they are left
    /// out. Their content is read before anything of them is sent.
    fn unreadable(&mut self, path: &Path, name: &Path, e: io::Error) -> io::Result<()> {
        let pseudo = path.parent().and_then(|p| File::open(p).ok());
        let alone = name.parent().is_none_or(|p| p.as_os_str().is_empty());
        if alone || !pseudo.is_some_and(|directory| send::is_unsized(&directory)) {
            return Err(e);
        }
        send::note(&mut self.builder, path, "it can't be read")
    }

    fn children(&mut self, path: &Path, name: &Path, depth: usize) -> io::Result<()> {
        if depth >= MAX_DEPTH {
            return Err(io::Error::other(format!("more than {MAX_DEPTH} directories deep")));
        }
        let mut names = fs::read_dir(path)?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<io::Result<Vec<_>>>()?;
        names.sort();
        for child in names {
            let (path, name) = (path.join(&child), name.join(&child));
            match fs::symlink_metadata(&path) {
                Ok(meta) => self.entry(&path, &name, &meta, depth + 1)?,
                // Gone since the directory was read.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(io::Error::new(e.kind(), format!("`{}`: {e}", path.display()))),
            }
        }
        Ok(())
    }
}
