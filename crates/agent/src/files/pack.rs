//! A tree as a tar stream. It stays on one file system, and leaves out what a tar stream for another machine has no use for:
//! sockets, pipes and device nodes.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

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

impl<W: Write> Packer<W> {
    fn entry(&mut self, path: &Path, name: &Path, meta: &Metadata, depth: usize) -> io::Result<()> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("`{}`: {e}", path.display()));
        let mut header = Header::new_gnu();
        header.set_metadata_in_mode(meta, tar::HeaderMode::Complete);
        header.set_size(0);
        let kind = meta.file_type();
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            self.builder.append_data(&mut header, name, io::empty())?;
            if meta.dev() == self.device {
                self.children(path, name, depth).map_err(named)?;
            }
        } else if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            self.builder
                .append_link(&mut header, name, fs::read_link(path).map_err(named)?)?;
        } else if kind.is_file() {
            if meta.nlink() > 1 {
                if let Some(first) = self.links.get(&meta.ino()) {
                    header.set_entry_type(EntryType::Link);
                    return self.builder.append_link(&mut header, name, first);
                }
                if self.links.len() < MAX_LINKS {
                    self.links.insert(meta.ino(), name.to_path_buf());
                }
            }
            let file = File::open(path).map_err(named)?;
            header.set_size(meta.len());
            // The file may grow or shrink meanwhile: what was announced is what is sent.
            let exact = file.chain(io::repeat(0)).take(meta.len());
            self.builder.append_data(&mut header, name, exact).map_err(named)?;
        }
        Ok(())
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
