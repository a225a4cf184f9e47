//! Writing tar streams for a machine: everything belongs to root, links are links, special files stay behind.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use banger_copy::send;
use tar::{Builder, EntryType, Header};

use crate::error::{Error, Result};
use crate::files::upload::aborted;

/// Which permissions a file is sent with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Permissions {
    /// Its own: a private key stays private.
    Exact,
    /// What git keeps of them: whether it can be run.
    AsGit,
}

/// A tar stream under way.
pub(crate) struct Packer<W: Write> {
    builder: Builder<W>,
    /// The directories that were written last, from the outside in.
    directories: Vec<PathBuf>,
    /// The directory that everything is in.
    top: PathBuf,
    /// User and group that everything belongs to.
    owner: (u32, u32),
}

impl<W: Write> Packer<W> {
    /// A stream into `sink`.
    pub(crate) fn new(sink: W) -> Self {
        Self {
            builder: Builder::new(sink),
            directories: Vec::new(),
            top: PathBuf::new(),
            owner: (0, 0),
        }
    }

    /// Puts everything into a directory of this name, and gives it to a user and a group.
    pub(crate) fn within(mut self, top: &Path, owner: (u32, u32)) -> Self {
        self.top = top.to_owned();
        self.owner = owner;
        self
    }

    fn header(&self, kind: EntryType, mode: u32, mtime: u64, size: u64) -> Header {
        let mut header = header(kind, mode, mtime, size);
        header.set_uid(self.owner.0.into());
        header.set_gid(self.owner.1.into());
        header
    }

    /// A directory.
    pub(crate) fn directory(&mut self, path: &Path, mode: u32, mtime: u64) -> Result<()> {
        let mut header = self.header(EntryType::Directory, mode, mtime, 0);
        self.builder
            .append_data(&mut header, self.top.join(path), io::empty())
            .map_err(|e| unpackable(path, &e))
    }

    /// The directories above `path` that have not been written since the last file.
    pub(crate) fn parents(&mut self, path: &Path) -> Result<()> {
        let mut above: Vec<&Path> = path.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()).collect();
        above.reverse();
        let known = self
            .directories
            .iter()
            .zip(&above)
            .take_while(|(a, b)| a.as_path() == **b)
            .count();
        self.directories.truncate(known);
        for directory in &above[known..] {
            self.directory(directory, 0o755, 0)?;
            self.directories.push((*directory).to_owned());
        }
        Ok(())
    }

    /// A symbolic link.
    pub(crate) fn link(&mut self, path: &Path, target: &[u8], mtime: u64) -> Result<()> {
        let mut header = self.header(EntryType::Symlink, 0o777, mtime, 0);
        let target = Path::new(std::ffi::OsStr::from_bytes(target));
        self.builder
            .append_link(&mut header, self.top.join(path), target)
            .map_err(|e| unpackable(path, &e))
    }

    /// A file of exactly `size` bytes.
    pub(crate) fn file(&mut self, path: &Path, mode: u32, mtime: u64, size: u64, content: impl Read) -> Result<()> {
        let mut header = self.header(EntryType::Regular, mode, mtime, size);
        self.builder
            .append_data(&mut header, self.top.join(path), content)
            .map_err(|e| unpackable(path, &e))
    }

    /// An open file as it is now, without its holes.
    pub(crate) fn open_file(&mut self, path: &Path, file: File, permissions: Permissions) -> Result<()> {
        let found = file.metadata().map_err(|e| Error::io("look at", path, e))?;
        let mode = match permissions {
            Permissions::Exact => found.mode() & 0o777,
            Permissions::AsGit if found.mode() & 0o100 == 0 => 0o644,
            Permissions::AsGit => 0o755,
        };
        let header = self.header(EntryType::Regular, mode, 0, 0);
        send::file(&mut self.builder, &self.top.join(path), &header, &file).map_err(|e| unpackable(path, &e))
    }

    /// One more name of a file that the stream has already.
    pub(crate) fn hard_link(&mut self, path: &Path, first: &Path) -> Result<()> {
        let mut header = self.header(EntryType::Link, 0o644, 0, 0);
        self.builder
            .append_link(&mut header, self.top.join(path), self.top.join(first))
            .map_err(|e| unpackable(path, &e))
    }

    /// Ends the stream.
    pub(crate) fn finish(self) -> Result<()> {
        self.builder
            .into_inner()
            .and_then(|mut sink| sink.flush())
            .map_err(|_| aborted())
    }
}

fn header(kind: EntryType, mode: u32, mtime: u64, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(mtime);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn unpackable(path: &Path, error: &io::Error) -> Error {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return aborted();
    }
    Error::failed(format!(
        "cannot pack {}: {}",
        path.display(),
        crate::error::reason(error)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_written_once_in_a_row() {
        let mut packer = Packer::new(Vec::new());
        for path in ["a/b/x", "a/b/y", "a/c/z", "q"] {
            packer.parents(Path::new(path)).unwrap();
            packer.file(Path::new(path), 0o644, 0, 0, io::empty()).unwrap();
        }
        let bytes = packer.builder.into_inner().unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let names: Vec<String> = archive
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(names, ["a", "a/b", "a/b/x", "a/b/y", "a/c", "a/c/z", "q"]);
    }
}
