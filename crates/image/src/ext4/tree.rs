//! What is in the file system, while it is being put together.

use std::collections::BTreeMap;

use super::{Ext4Error, Result};

/// Longest name of an entry.
pub const MAX_NAME: usize = 255;
/// Longest target of a symbolic link.
pub const MAX_TARGET: usize = 4095;
/// Most names that one inode can have.
const MAX_LINKS: u32 = 65_000;

/// What every entry has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permissions with set-user-id, set-group-id and sticky bits; no type.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last change, seconds since the epoch.
    pub mtime: i64,
    /// Nanoseconds of it.
    pub mtime_nsec: u32,
    /// Extended attributes by full name. Those outside `user.`, `trusted.` and `security.` are not kept.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A run of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: u64,
    pub(crate) blocks: u64,
}

/// A special file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// Character device with its numbers.
    Char(u32, u32),
    /// Block device with its numbers.
    Block(u32, u32),
    /// Named pipe.
    Fifo,
}

#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Dir {
        children: BTreeMap<Box<[u8]>, usize>,
        parent: usize,
    },
    File {
        size: u64,
        runs: Vec<Run>,
    },
    Symlink(Vec<u8>),
    Special(Special),
}

/// An inode to be.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) kind: Kind,
    pub(crate) meta: Meta,
    /// Names it has; 0 once all were replaced.
    pub(crate) links: u32,
}

/// The tree. Index 0 is the root.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) nodes: Vec<Node>,
    /// Types of the nodes as directory entries say them; kept apart because the writer takes the nodes apart.
    types: Vec<u8>,
    max_nodes: usize,
}

pub(crate) const ROOT: usize = 0;

impl Tree {
    pub(crate) fn new(max_nodes: usize) -> Self {
        let root = Node {
            kind: Kind::Dir {
                children: BTreeMap::new(),
                parent: ROOT,
            },
            meta: Meta {
                mode: 0o755,
                ..Meta::default()
            },
            links: 1,
        };
        Self {
            nodes: vec![root],
            types: vec![2],
            max_nodes,
        }
    }

    fn add(&mut self, kind: Kind, meta: Meta) -> Result<usize> {
        if self.nodes.len() >= self.max_nodes {
            return Err(Ext4Error::TooMany {
                what: "files",
                limit: self.max_nodes as u64,
            });
        }
        self.types.push(match kind {
            Kind::File { .. } => 1,
            Kind::Dir { .. } => 2,
            Kind::Special(Special::Char(..)) => 3,
            Kind::Special(Special::Block(..)) => 4,
            Kind::Special(Special::Fifo) => 5,
            Kind::Symlink(_) => 7,
        });
        self.nodes.push(Node { kind, meta, links: 1 });
        Ok(self.nodes.len() - 1)
    }

    fn child(&self, dir: usize, name: &[u8], path: &[Vec<u8>]) -> Result<Option<usize>> {
        match self.nodes.get(dir).map(|n| &n.kind) {
            Some(Kind::Dir { children, .. }) => Ok(children.get(name).copied()),
            _ => Err(conflict(path, "leads through something that is no directory")),
        }
    }

    fn set_child(&mut self, dir: usize, name: &[u8], node: usize) {
        if let Some(Node {
            kind: Kind::Dir { children, .. },
            ..
        }) = self.nodes.get_mut(dir)
        {
            children.insert(name.into(), node);
        }
    }

    /// The directory in which `path` is, made where it is not there, and the last name.
    fn parent<'p>(&mut self, path: &'p [Vec<u8>]) -> Result<(usize, &'p [u8])> {
        let Some((name, parents)) = path.split_last() else {
            return Err(conflict(path, "is the root directory"));
        };
        for name in path {
            if name.is_empty()
                || name.len() > MAX_NAME
                || name.contains(&b'/')
                || name.contains(&0)
                || name == b"."
                || name == b".."
            {
                return Err(conflict(path, "has an impossible name in it"));
            }
        }
        let mut dir = ROOT;
        for name in parents {
            dir = match self.child(dir, name, path)? {
                Some(node) => node,
                None => {
                    let node = self.add(
                        Kind::Dir {
                            children: BTreeMap::new(),
                            parent: dir,
                        },
                        Meta {
                            mode: 0o755,
                            ..Meta::default()
                        },
                    )?;
                    self.set_child(dir, name, node);
                    node
                }
            };
        }
        Ok((dir, name))
    }

    /// Enters a directory, or changes what is known of one that is there. The empty path is the root.
    pub(crate) fn directory(&mut self, path: &[Vec<u8>], meta: Meta) -> Result<()> {
        if path.is_empty() {
            if let Some(root) = self.nodes.get_mut(ROOT) {
                root.meta = meta;
            }
            return Ok(());
        }
        let (dir, name) = self.parent(path)?;
        match self.child(dir, name, path)? {
            None => {
                let node = self.add(
                    Kind::Dir {
                        children: BTreeMap::new(),
                        parent: dir,
                    },
                    meta,
                )?;
                self.set_child(dir, name, node);
                Ok(())
            }
            Some(node) => match self.nodes.get_mut(node) {
                Some(Node {
                    kind: Kind::Dir { .. },
                    meta: old,
                    ..
                }) => {
                    *old = meta;
                    Ok(())
                }
                _ => Err(conflict(path, "is a directory and something else")),
            },
        }
    }

    /// Enters anything but a directory. What had the name before gives way.
    pub(crate) fn insert(&mut self, path: &[Vec<u8>], kind: Kind, meta: Meta) -> Result<()> {
        let (dir, name) = self.parent(path)?;
        self.give_way(dir, name, path)?;
        let node = self.add(kind, meta)?;
        self.set_child(dir, name, node);
        Ok(())
    }

    /// Gives another name to something that is there.
    pub(crate) fn hard_link(&mut self, path: &[Vec<u8>], target: &[Vec<u8>]) -> Result<()> {
        let mut node = ROOT;
        for name in target {
            node = self
                .child(node, name, target)?
                .ok_or_else(|| conflict(target, "is the target of a hard link, and is not there"))?;
        }
        let links = match self.nodes.get(node) {
            Some(Node {
                kind: Kind::Dir { .. }, ..
            })
            | None => return Err(conflict(target, "is a directory and the target of a hard link")),
            Some(node) => node.links,
        };
        let (dir, name) = self.parent(path)?;
        if self.child(dir, name, path)? == Some(node) {
            return Ok(());
        }
        if links >= MAX_LINKS {
            return Err(Ext4Error::TooMany {
                what: "hard links to one file",
                limit: MAX_LINKS.into(),
            });
        }
        self.give_way(dir, name, path)?;
        if let Some(node) = self.nodes.get_mut(node) {
            node.links += 1;
        }
        self.set_child(dir, name, node);
        Ok(())
    }

    fn give_way(&mut self, dir: usize, name: &[u8], path: &[Vec<u8>]) -> Result<()> {
        let Some(old) = self.child(dir, name, path)? else {
            return Ok(());
        };
        match self.nodes.get_mut(old) {
            Some(Node {
                kind: Kind::Dir { .. }, ..
            }) => Err(conflict(path, "is a directory and something else")),
            Some(node) => {
                node.links = node.links.saturating_sub(1);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Type of a node as a directory entry says it.
    pub(crate) fn file_type(&self, node: usize) -> u8 {
        self.types.get(node).copied().unwrap_or(0)
    }

    /// Nodes that still have a name, but for the root.
    pub(crate) fn live(&self) -> impl Iterator<Item = usize> + '_ {
        self.nodes
            .iter()
            .enumerate()
            .skip(1)
            .filter(|(_, node)| node.links > 0)
            .map(|(i, _)| i)
    }
}

fn conflict(path: &[Vec<u8>], why: &'static str) -> Ext4Error {
    Ext4Error::Conflict { path: show(path), why }
}

/// A path for messages.
pub(crate) fn show(path: &[Vec<u8>]) -> String {
    let text = format!("/{}", String::from_utf8_lossy(&path.join(&b'/')).escape_debug());
    text.chars().take(300).collect()
}
