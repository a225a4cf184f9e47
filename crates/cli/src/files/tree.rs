//! A file or directory of this host, on its way into a machine.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FileType;

use crate::error::{Error, Result};
use crate::files::beneath::Root;
use crate::files::pack::{Packer, Permissions};

/// Deepest directory that is entered.
const MAX_DEPTH: usize = 512;

/// What is to be copied.
#[derive(Debug)]
pub(crate) struct List {
    /// Directory that the paths are below.
    base: PathBuf,
    /// Directories, files and links, the former before what is in them.
    items: Vec<Item>,
    /// Special files, which stay behind.
    pub(crate) skipped: Vec<String>,
    single: bool,
}

#[derive(Debug)]
struct Item {
    path: PathBuf,
    kind: FileType,
    size: u64,
    mode: u32,
}

/// Lists a file, or a directory with everything in it. Only the argument itself is followed where it is a link.
pub(crate) fn list(path: &Path, directory: bool) -> Result<List> {
    let real = path.canonicalize().map_err(|e| Error::io("find", path, e))?;
    if !directory {
        let base = real.parent().unwrap_or(Path::new("/")).to_owned();
        let name = PathBuf::from(real.file_name().unwrap_or_default());
        let size = std::fs::metadata(&real)
            .map_err(|e| Error::io("look at", path, e))?
            .len();
        let items = vec![Item {
            path: name,
            kind: FileType::RegularFile,
            size,
            mode: 0,
        }];
        return Ok(List {
            base,
            items,
            skipped: Vec::new(),
            single: true,
        });
    }
    let mut list = List {
        base: real,
        items: Vec::new(),
        skipped: Vec::new(),
        single: false,
    };
    list.walk(Path::new(""), 0)?;
    Ok(list)
}

impl List {
    fn walk(&mut self, below: &Path, depth: usize) -> Result<()> {
        use std::os::unix::fs::MetadataExt;
        let directory = self.base.join(below);
        if depth > MAX_DEPTH {
            return Err(Error::failed(format!("{} is nested too deep", directory.display())));
        }
        let entries = std::fs::read_dir(&directory).map_err(|e| Error::io("read", &directory, e))?;
        let mut names = Vec::new();
        for entry in entries {
            names.push(entry.map_err(|e| Error::io("read", &directory, e))?.file_name());
        }
        names.sort();
        for name in names {
            let path = below.join(&name);
            let full = self.base.join(&path);
            let found = std::fs::symlink_metadata(&full).map_err(|e| Error::io("look at", &full, e))?;
            let kind = FileType::from_raw_mode(found.mode());
            match kind {
                FileType::Directory => {
                    self.items.push(Item {
                        path: path.clone(),
                        kind,
                        size: 0,
                        mode: found.mode() & 0o777,
                    });
                    self.walk(&path, depth + 1)?;
                }
                FileType::RegularFile => self.items.push(Item {
                    path,
                    kind,
                    size: found.len(),
                    mode: 0,
                }),
                FileType::Symlink => self.items.push(Item {
                    path,
                    kind,
                    size: 0,
                    mode: 0,
                }),
                _ => self.skipped.push(format!("{} (a special file)", path.display())),
            }
        }
        Ok(())
    }

    /// Bytes of the tar stream, about.
    pub(crate) fn total(&self) -> u64 {
        self.items.iter().map(|i| 512 + i.size.next_multiple_of(512)).sum()
    }

    /// Writes it as `top`: the name of the file, or of the directory; empty for a directory's content.
    pub(crate) fn pack(&self, top: &Path, sink: impl Write) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let mut root = Root::open(&self.base).map_err(|e| Error::io("open", &self.base, e))?;
        let mut packer = Packer::new(sink);
        if !self.single && !top.as_os_str().is_empty() {
            packer.directory(top, 0o755, now)?;
        }
        for item in &self.items {
            let name = if self.single {
                top.to_owned()
            } else {
                top.join(&item.path)
            };
            let full = self.base.join(&item.path);
            match item.kind {
                FileType::Directory => packer.directory(&name, item.mode, now)?,
                FileType::Symlink => {
                    let target = root.read_link(&item.path).map_err(|e| Error::io("read", &full, e))?;
                    packer.link(&name, &target, now)?;
                }
                _ => {
                    let file = root.read(&item.path).map_err(|e| Error::io("open", &full, e))?;
                    if file.metadata().is_ok_and(|m| m.is_file()) {
                        packer.open_file(&name, file, Permissions::Exact)?;
                    }
                }
            }
        }
        packer.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &List, top: &str) -> Vec<String> {
        let mut bytes = Vec::new();
        list.pack(Path::new(top), &mut bytes).unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        archive
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect()
    }

    #[test]
    fn trees_and_files_are_packed_under_their_new_name() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("t");
        std::fs::create_dir_all(top.join("d")).unwrap();
        std::fs::write(top.join("d/f"), "x").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", top.join("l")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            top.join("p"),
            FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        let whole = list(&top, true).unwrap();
        assert_eq!(names(&whole, "new"), ["new", "new/d", "new/d/f", "new/l"]);
        assert_eq!(names(&whole, ""), ["d", "d/f", "l"]);
        assert_eq!(whole.skipped, ["p (a special file)"]);
        assert_eq!(names(&list(&top.join("d/f"), false).unwrap(), "g"), ["g"]);
    }
}
