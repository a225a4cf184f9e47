//! A file or directory of this host, on its way into a machine.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use crate::error::{Error, Result};
use crate::files::beneath::Root;
use crate::files::pack::{Packer, Permissions};

/// Files with several names that are remembered; beyond that each name becomes a file of its own.
const MAX_LINKS: usize = 200_000;

/// Deepest directory that is entered.
const MAX_DEPTH: usize = 512;

/// What is to be copied.
#[derive(Debug)]
pub(crate) struct List {
    /// Directory that the paths are below.
    base: PathBuf,
    /// Directories, files and links, the former before what is in them.
    items: Vec<Item>,
    /// The directory itself; nothing where a single file is copied.
    top: Option<Item>,
    /// Special files, which stay behind.
    pub(crate) skipped: Vec<String>,
}

#[derive(Debug)]
struct Item {
    path: PathBuf,
    kind: FileType,
    size: u64,
    mode: u32,
    /// Seconds since the epoch.
    mtime: u64,
}

impl Item {
    fn new(path: PathBuf, found: &std::fs::Metadata) -> Self {
        Self {
            path,
            kind: FileType::from_raw_mode(found.mode()),
            size: if found.is_file() { found.len() } else { 0 },
            mode: found.mode() & 0o777,
            mtime: u64::try_from(found.mtime()).unwrap_or(0),
        }
    }
}

/// Lists a file, or a directory with everything in it. Only the argument itself is followed where it is a link.
pub(crate) fn list(path: &Path, directory: bool) -> Result<List> {
    let real = path.canonicalize().map_err(|e| Error::io("find", path, e))?;
    let found = std::fs::metadata(&real).map_err(|e| Error::io("look at", path, e))?;
    if !directory {
        let name = PathBuf::from(real.file_name().unwrap_or_default());
        return Ok(List {
            base: real.parent().unwrap_or(Path::new("/")).to_owned(),
            items: vec![Item::new(name, &found)],
            top: None,
            skipped: Vec::new(),
        });
    }
    let mut list = List {
        top: Some(Item::new(PathBuf::new(), &found)),
        base: real,
        items: Vec::new(),
        skipped: Vec::new(),
    };
    list.walk(Path::new(""), 0)?;
    Ok(list)
}

impl List {
    fn walk(&mut self, below: &Path, depth: usize) -> Result<()> {
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
            let found = match std::fs::symlink_metadata(&full) {
                Ok(found) => found,
                // Gone since the directory was read.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(Error::io("look at", &full, e)),
            };
            let item = Item::new(path.clone(), &found);
            match item.kind {
                FileType::Directory => {
                    self.items.push(item);
                    self.walk(&path, depth + 1)?;
                }
                FileType::RegularFile | FileType::Symlink => self.items.push(item),
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
        let mut root = Root::open(&self.base).map_err(|e| Error::io("open", &self.base, e))?;
        let mut packer = Packer::new(sink);
        let mut links: HashMap<(u64, u64), PathBuf> = HashMap::new();
        if let Some(item) = &self.top
            && !top.as_os_str().is_empty()
        {
            packer.directory(top, item.mode, item.mtime)?;
        }
        let single = self.top.is_none();
        for item in &self.items {
            let name = if single { top.to_owned() } else { top.join(&item.path) };
            let full = self.base.join(&item.path);
            match item.kind {
                FileType::Directory => packer.directory(&name, item.mode, item.mtime)?,
                FileType::Symlink => {
                    let target = root.read_link(&item.path).map_err(|e| Error::io("read", &full, e))?;
                    packer.link(&name, &target, item.mtime)?;
                }
                _ => {
                    let file = match root.read(&item.path) {
                        Ok(file) => file,
                        // Gone since it was listed.
                        Err(rustix::io::Errno::NOENT) if !single => continue,
                        Err(e) => return Err(Error::io("open", &full, e)),
                    };
                    let found = file.metadata().map_err(|e| Error::io("look at", &full, e))?;
                    if !found.is_file() {
                        continue;
                    }
                    if found.nlink() > 1 {
                        let inode = (found.dev(), found.ino());
                        if let Some(first) = links.get(&inode) {
                            packer.hard_link(&name, first)?;
                            continue;
                        }
                        if links.len() < MAX_LINKS {
                            links.insert(inode, name.clone());
                        }
                    }
                    packer.open_file(&name, file, Permissions::Exact)?;
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

    #[test]
    fn directories_links_and_twins_are_what_they_are() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("t");
        std::fs::create_dir_all(top.join("d")).unwrap();
        std::fs::write(top.join("a"), "x").unwrap();
        std::fs::hard_link(top.join("a"), top.join("d/b")).unwrap();
        let hour = std::time::UNIX_EPOCH + std::time::Duration::from_secs(3600);
        for path in ["d", ""] {
            let path = top.join(path);
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
            std::fs::File::open(&path).unwrap().set_modified(hour).unwrap();
        }
        let mut bytes = Vec::new();
        list(&top, true).unwrap().pack(Path::new("new"), &mut bytes).unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let found: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|e| {
                let e = e.unwrap();
                let header = e.header();
                (
                    e.path().unwrap().display().to_string(),
                    header.entry_type(),
                    header.mode().unwrap(),
                    header.mtime().unwrap(),
                )
            })
            .collect();
        assert_eq!(found[0], ("new".into(), tar::EntryType::Directory, 0o700, 3600));
        assert_eq!(found[2], ("new/d".into(), tar::EntryType::Directory, 0o700, 3600));
        assert_eq!((found[3].0.as_str(), found[3].1), ("new/d/b", tar::EntryType::Link));
    }
}
