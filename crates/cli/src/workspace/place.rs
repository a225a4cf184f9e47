//! Where a repository is: the work tree, its `.git` and the directory that holds its objects.
//!
//! A repository comes from anywhere and may claim to be any other one: by a `.git` file, by links, by `commondir`, by alternates.
//! Accepted are a `.git` directory in the work tree itself, and a linked work tree (`git worktree add`) that its repository knows
//! as well. Everything below is made of plain files and directories. So what leaves the host is what lies in these directories.

use std::fs::{FileType, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Longest small file of a repository's administration that is read (`HEAD`, `commondir`, a `.git` file).
const MAX_SMALL: u64 = 8 * 1024;

/// Files of git's own directory that are used. Each is a regular file, or is not there.
pub(crate) const OWN_FILES: &[&str] = &["HEAD", "index", "config.worktree", "logs/HEAD"];

/// Files of the common directory that are used.
pub(crate) const COMMON_FILES: &[&str] = &["config", "packed-refs", "shallow", "info/exclude", "info/attributes"];

/// Trees of the common directory that are used.
pub(crate) const COMMON_TREES: &[&str] = &["objects", "refs", "logs", "reftable", "info"];

/// A work tree with its repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The work tree.
    pub(crate) root: PathBuf,
    /// Its own directory: `.git`, or `.git/worktrees/NAME` of the repository that it is linked to.
    pub(crate) git_dir: PathBuf,
    /// The directory with objects, references and configuration; the same unless the work tree is linked.
    pub(crate) common: PathBuf,
}

impl Place {
    /// The work tree is one of several of its repository.
    pub(crate) fn is_linked(&self) -> bool {
        self.git_dir != self.common
    }

    /// The work tree that `here` (a canonical path) is in. Looks neither into `ceilings` nor above them, nor on another file system.
    pub(crate) fn find(here: &Path, ceilings: &[PathBuf]) -> Result<Self> {
        let device = looked(here)?.map(|m| m.dev());
        for dir in here.ancestors() {
            let passed = ceilings.iter().any(|ceiling| ceiling == dir) && dir != here;
            if passed || looked(dir)?.map(|m| m.dev()) != device {
                break;
            }
            if let Some(place) = Self::at(dir, here)? {
                place.check()?;
                return Ok(place);
            }
        }
        Err(Error::failed(format!("{} is not in a git work tree", here.display()))
            .hint("make it one with `git init` and a commit, or copy files with `banger vm cp`"))
    }

    fn at(dir: &Path, here: &Path) -> Result<Option<Self>> {
        let marker = dir.join(".git");
        let Some(found) = looked(&marker)? else {
            return if is_repository(dir)? {
                Err(no_work_tree(dir, here))
            } else {
                Ok(None)
            };
        };
        if found.is_symlink() {
            return Err(elsewhere(dir, "its .git is a symbolic link"));
        }
        if found.is_file() {
            return linked(dir, &marker).map(Some);
        }
        if !found.is_dir() {
            return Err(elsewhere(dir, "its .git is neither a directory nor a file"));
        }
        // As git has it: a directory that only has the name is passed over.
        if looked(&marker.join("HEAD"))?.is_none() {
            return Ok(None);
        }
        Ok(Some(Self {
            root: dir.to_owned(),
            git_dir: marker.clone(),
            common: marker,
        }))
    }

    /// Everything that will be read is in these directories.
    fn check(&self) -> Result<()> {
        if !self.is_linked() && looked(&self.git_dir.join("commondir"))?.is_some() {
            return Err(elsewhere(&self.root, "its .git has a file `commondir`"));
        }
        for (dir, files) in [(&self.git_dir, OWN_FILES), (&self.common, COMMON_FILES)] {
            for name in files {
                self.plain(&dir.join(name), FileType::is_file)?;
            }
        }
        for name in COMMON_TREES {
            let tree = self.common.join(name);
            if self.plain(&tree, FileType::is_dir)? {
                self.walk(&tree)?;
            }
        }
        if self.is_linked() {
            for name in ["logs", "reftable"] {
                let tree = self.git_dir.join(name);
                if self.plain(&tree, FileType::is_dir)? {
                    self.walk(&tree)?;
                }
            }
        }
        let alternates = self.common.join("objects/info/alternates");
        if looked(&alternates)?.is_some_and(|m| m.len() > 0) {
            return Err(Error::failed(format!(
                "{} borrows objects of other repositories (objects/info/alternates)",
                self.root.display()
            ))
            .hint("make it whole with `git repack -a -d`, then remove .git/objects/info/alternates"));
        }
        Ok(())
    }

    /// Whether something is there. What is there has to be of this kind, and no link.
    fn plain(&self, path: &Path, kind: fn(&FileType) -> bool) -> Result<bool> {
        match looked(path)? {
            None => Ok(false),
            Some(found) if kind(&found.file_type()) => Ok(true),
            Some(found) => Err(self.odd(path, found.file_type())),
        }
    }

    /// Everything below a directory is a directory or a regular file.
    fn walk(&self, top: &Path) -> Result<()> {
        let mut open = vec![top.to_owned()];
        while let Some(dir) = open.pop() {
            let entries = std::fs::read_dir(&dir).map_err(|e| Error::io("read", &dir, e))?;
            for entry in entries {
                let entry = entry.map_err(|e| Error::io("read", &dir, e))?;
                let kind = entry.file_type().map_err(|e| Error::io("look at", &entry.path(), e))?;
                if kind.is_dir() {
                    open.push(entry.path());
                } else if !kind.is_file() {
                    return Err(self.odd(&entry.path(), kind));
                }
            }
        }
        Ok(())
    }

    fn odd(&self, path: &Path, kind: FileType) -> Error {
        let what = if kind.is_symlink() {
            "a symbolic link"
        } else {
            "neither a file nor a directory of git"
        };
        elsewhere(&self.root, &format!("{} is {what}", path.display()))
    }

    /// Each directory that counts belongs to one of these users, as git asks for.
    pub(crate) fn is_owned_by(&self, users: &[u32]) -> Result<bool> {
        for path in [&self.root, &self.root.join(".git"), &self.git_dir, &self.common] {
            if looked(path)?.is_none_or(|m| !users.contains(&m.uid())) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// A linked work tree: its `.git` file names a directory `REPOSITORY/worktrees/NAME`, which names the work tree in turn.
fn linked(root: &Path, marker: &Path) -> Result<Place> {
    let refuse = |why: &str| elsewhere(root, why);
    let text = small(marker)?;
    let named = text
        .strip_prefix(b"gitdir: ")
        .ok_or_else(|| refuse("its .git is a file that names no directory"))?;
    let git_dir = canonical(root, named).ok_or_else(|| refuse("its .git names a directory that is not there"))?;
    let common = git_dir
        .parent()
        .filter(|above| above.file_name().is_some_and(|name| name == "worktrees"))
        .and_then(Path::parent)
        .ok_or_else(|| {
            refuse(&format!(
                "its .git is a file that leads to {}, and that is no work tree of a repository",
                git_dir.display()
            ))
        })?
        .to_owned();
    for (name, expected) in [("commondir", common.as_path()), ("gitdir", marker)] {
        let file = git_dir.join(name);
        if !looked(&file)?.is_some_and(|m| m.is_file()) {
            return Err(refuse(&format!("{} is not there", file.display())));
        }
        if canonical(&git_dir, &small(&file)?).as_deref() != Some(expected) {
            let message = format!("{} does not lead back to {}", file.display(), expected.display());
            return Err(refuse(&message).hint("was it moved? `git worktree repair` sets both ends right"));
        }
    }
    Ok(Place {
        root: root.to_owned(),
        git_dir,
        common,
    })
}

/// A path as a file of git has it: from `base` on, ended by a line feed.
fn canonical(base: &Path, text: &[u8]) -> Option<PathBuf> {
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    if text.is_empty() || text.contains(&0) {
        return None;
    }
    base.join(std::ffi::OsStr::from_bytes(text)).canonicalize().ok()
}

/// The content of a small regular file.
pub(crate) fn small(path: &Path) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let mut file = std::fs::File::open(path).map_err(|e| Error::io("open", path, e))?;
    let read = (&mut file).take(MAX_SMALL + 1).read_to_end(&mut text);
    read.map_err(|e| Error::io("read", path, e))?;
    if text.len() as u64 > MAX_SMALL {
        return Err(Error::failed(format!("{} is too long for what it is", path.display())));
    }
    Ok(text)
}

/// What stands at a path, a link itself.
fn looked(path: &Path) -> Result<Option<Metadata>> {
    match std::fs::symlink_metadata(path) {
        Ok(found) => Ok(Some(found)),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(Error::io("look at", path, e)),
    }
}

/// A directory that is itself what `.git` is elsewhere.
fn is_repository(dir: &Path) -> Result<bool> {
    for (name, is_dir) in [("HEAD", false), ("objects", true), ("refs", true)] {
        if looked(&dir.join(name))?.is_none_or(|m| m.is_dir() != is_dir) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn no_work_tree(dir: &Path, here: &Path) -> Error {
    if dir.file_name().is_some_and(|name| name == ".git") {
        let message = format!("{} is inside a repository's .git, not in its work tree", here.display());
        return Error::failed(message).hint("name the work tree");
    }
    let message = format!("{} is a bare repository, it has no files to work on", dir.display());
    Error::failed(message).hint("clone it and name the clone")
}

fn elsewhere(root: &Path, why: &str) -> Error {
    Error::failed(format!(
        "{} could take files of another repository along: {why}",
        root.display()
    ))
    .hint(
        "a workspace is a directory with a .git directory of its own, or one made by `git worktree add`; `git clone` makes one of any other",
    )
}
