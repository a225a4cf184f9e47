//! Writes a file system in one pass: content of files goes to its final place as it comes, the metadata follows at the end.

use std::fs::File;
use std::io::Read;

use super::dir::{self, Entry};
use super::inode::{INLINE_EXTENTS, LEAF_EXTENTS, common, put_extent_header, put_extents, set_size};
use super::layout::{self, BLOCK_UNINIT};
use super::layout::{
    BLOCK, BLOCK_USIZE, BLOCKS_PER_GROUP, DESC_SIZE, Descriptor, FIRST_INO, Geometry, INODE_SIZE, INODE_UNINIT,
    INODES_PER_GROUP, JOURNAL_INO, META_GROUP, ROOT_INO, Super, descriptor_block, first_block, has_super, inode_bitmap,
    inode_table, leading_bitmap, low16, low32, overhead, put, put16, put32, set_bit,
};
use super::sink::{BUFFER, Sink};
use super::tree::{Kind, MAX_TARGET, Meta, ROOT, Run, Special, Tree, show};
use super::xattr;
use super::{Ext4Error, Result};

/// What bounds a file system.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Files and directories, replaced ones included.
    pub nodes: usize,
    /// Bytes of the file system.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            nodes: 4_000_000,
            bytes: 1 << 40,
        }
    }
}

/// How large the file system becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// As large as the content, with at least this many bytes free, in whole groups.
    Fit {
        /// Bytes left free.
        slack: u64,
    },
    /// What fits into this many bytes.
    Exact(u64),
}

/// What a file system is called and made of beside its content.
#[derive(Debug, Clone)]
pub struct Finish {
    /// How large it becomes.
    pub size: Size,
    /// Blocks of the journal, at least 1024.
    pub journal_blocks: u64,
    /// Its UUID.
    pub uuid: [u8; 16],
    /// Seed of the hashes of directories.
    pub hash_seed: [u8; 16],
    /// Its label, cut to 16 bytes.
    pub label: &'static str,
    /// When it was made, seconds since the epoch.
    pub time: u32,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of the file system.
    pub size_bytes: u64,
    /// Bytes of it that are free.
    pub free_bytes: u64,
    /// Files and directories in it.
    pub files: u64,
}

/// Puts a file system together.
#[derive(Debug)]
pub struct Writer {
    out: Sink,
    tree: Tree,
    cursor: u64,
    limits: Limits,
}

impl Writer {
    /// A writer into an empty file.
    pub fn new(file: File, limits: Limits) -> Result<Self> {
        let mut tree = Tree::new(limits.nodes);
        // The first inode that is not reserved: where repairs look for it.
        tree.directory(
            &[b"lost+found".to_vec()],
            Meta {
                mode: 0o700,
                ..Meta::default()
            },
        )?;
        Ok(Self {
            out: Sink::new(file),
            tree,
            cursor: 0,
            limits,
        })
    }

    /// Enters a directory; its parents are made where they are missing. The empty path is the root.
    pub fn directory(&mut self, path: &[Vec<u8>], meta: Meta) -> Result<()> {
        self.tree.directory(path, meta)
    }

    /// Enters a file and reads its `size` bytes.
    pub fn file(&mut self, path: &[Vec<u8>], meta: Meta, size: u64, content: &mut dyn Read) -> Result<()> {
        let runs = self.allocate(size.div_ceil(BLOCK))?;
        let mut left = size;
        let mut buffer = vec![0; BUFFER.min(usize::try_from(left.next_multiple_of(BLOCK)).unwrap_or(BUFFER))];
        for run in &runs {
            let mut at = run.start;
            let end = run.start + run.blocks;
            while at < end {
                let room = (end - at).saturating_mul(BLOCK).min(buffer.len() as u64);
                let want = usize::try_from(room.min(left)).unwrap_or(0);
                let chunk = buffer.get_mut(..want).unwrap_or_default();
                content.read_exact(chunk).map_err(|source| Ext4Error::Content {
                    path: show(path),
                    source,
                })?;
                // Whole blocks, so that the next file's are neighbours.
                let whole = want.next_multiple_of(BLOCK_USIZE);
                buffer.get_mut(want..whole).unwrap_or_default().fill(0);
                self.out
                    .write_sparse(at * BLOCK, buffer.get(..whole).unwrap_or_default())?;
                left -= want as u64;
                at += (want as u64).div_ceil(BLOCK);
                if want == 0 {
                    break;
                }
            }
        }
        self.tree.insert(path, Kind::File { size, runs }, meta)
    }

    /// Enters a symbolic link.
    pub fn symlink(&mut self, path: &[Vec<u8>], meta: Meta, target: &[u8]) -> Result<()> {
        if target.is_empty() || target.len() > MAX_TARGET || target.contains(&0) {
            return Err(Ext4Error::Conflict {
                path: show(path),
                why: "is a symbolic link with an impossible target",
            });
        }
        self.tree.insert(path, Kind::Symlink(target.to_vec()), meta)
    }

    /// Enters a special file.
    pub fn special(&mut self, path: &[Vec<u8>], meta: Meta, special: Special) -> Result<()> {
        if let Special::Char(major, minor) | Special::Block(major, minor) = special
            && (major >= 1 << 12 || minor >= 1 << 20)
        {
            return Err(Ext4Error::Conflict {
                path: show(path),
                why: "is a device with impossible numbers",
            });
        }
        self.tree.insert(path, Kind::Special(special), meta)
    }

    /// Gives another name to a file that is there.
    pub fn hard_link(&mut self, path: &[Vec<u8>], target: &[Vec<u8>]) -> Result<()> {
        self.tree.hard_link(path, target)
    }

    /// Writes the metadata.
    pub fn finish(mut self, finish: &Finish) -> Result<Summary> {
        let numbers = self.number()?;
        let last_ino = numbers.iter().copied().max().unwrap_or(0).max(FIRST_INO - 1);
        let mut inodes: Vec<(u32, Vec<u8>)> = Vec::with_capacity(self.tree.nodes.len() + 1);
        let mut used: Vec<Run> = Vec::new();
        let mut directories: Vec<u32> = Vec::new();

        for index in std::iter::once(ROOT).chain(self.tree.live().collect::<Vec<_>>()) {
            let Some(ino) = numbers.get(index).copied() else {
                continue;
            };
            let inode = self.inode(index, ino, &numbers, finish, &mut used)?;
            if matches!(self.tree.nodes.get(index).map(|n| &n.kind), Some(Kind::Dir { .. })) {
                directories.push(ino);
            }
            inodes.push((ino, inode));
        }
        let (journal, journal_backup) = self.journal(finish, &mut used)?;
        inodes.push((JOURNAL_INO, journal));
        inodes.sort_by_key(|(ino, _)| *ino);

        let geometry = self.geometry(finish.size, last_ino)?;
        for (ino, bytes) in &inodes {
            let index = u64::from(ino - 1);
            let per_group = u64::from(INODES_PER_GROUP);
            let table = inode_table(index / per_group) * BLOCK;
            self.out.write(table + index % per_group * INODE_SIZE as u64, bytes)?;
        }
        let descriptors = self.bitmaps(geometry, &used, last_ino, &directories)?;
        let sb = Super {
            geometry,
            free_blocks: descriptors.iter().map(|d| d.free_blocks).sum(),
            free_inodes: descriptors.iter().map(|d| u64::from(d.free_inodes)).sum(),
            uuid: finish.uuid,
            hash_seed: finish.hash_seed,
            label: label(finish.label),
            time: finish.time,
            journal_backup,
        };
        for (offset, bytes) in descriptor_writes(geometry, &descriptors, &sb.uuid) {
            self.out.write(offset, &bytes)?;
        }
        for group in (0..geometry.groups()).filter(|g| has_super(*g)) {
            self.out.write(super_offset(group), &sb.encode(group))?;
        }
        self.out.flush()?;
        self.out.file.set_len(geometry.bytes()).map_err(Ext4Error::Write)?;
        Ok(Summary {
            size_bytes: geometry.bytes(),
            free_bytes: sb.free_blocks * BLOCK,
            files: inodes.len() as u64 - 1,
        })
    }

    /// Numbers of the nodes' inodes; 0 for those without a name.
    fn number(&self) -> Result<Vec<u32>> {
        let mut numbers = vec![0; self.tree.nodes.len()];
        let mut next = FIRST_INO;
        for index in self.tree.live() {
            if let Some(number) = numbers.get_mut(index) {
                *number = next;
            }
            next = next.checked_add(1).ok_or(Ext4Error::TooMany {
                what: "files",
                limit: u32::MAX.into(),
            })?;
        }
        if let Some(root) = numbers.get_mut(ROOT) {
            *root = ROOT_INO;
        }
        Ok(numbers)
    }

    /// Takes blocks, in runs between the tables of groups.
    fn allocate(&mut self, mut blocks: u64) -> Result<Vec<Run>> {
        if (self.cursor.saturating_add(blocks)).saturating_mul(BLOCK) > self.limits.bytes {
            return Err(Ext4Error::TooMany {
                what: "bytes",
                limit: self.limits.bytes,
            });
        }
        let mut runs: Vec<Run> = Vec::new();
        while blocks > 0 {
            let group = self.cursor / BLOCKS_PER_GROUP;
            self.cursor = self.cursor.max(first_block(group) + overhead(group));
            let take = blocks.min(first_block(group + 1) - self.cursor);
            runs.push(Run {
                start: self.cursor,
                blocks: take,
            });
            self.cursor += take;
            blocks -= take;
        }
        Ok(runs)
    }

    /// Takes blocks and writes `bytes` (whole blocks) into them.
    fn place(&mut self, bytes: &[u8], used: &mut Vec<Run>) -> Result<Vec<Run>> {
        let runs = self.allocate((bytes.len() as u64).div_ceil(BLOCK))?;
        let mut rest = bytes;
        for run in &runs {
            let n = rest
                .len()
                .min(usize::try_from(run.blocks * BLOCK).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at(n);
            self.out.write(run.start * BLOCK, now)?;
            rest = later;
        }
        used.extend(&runs);
        Ok(runs)
    }

    /// The bytes of a node's inode. What it needs beside them is written.
    fn inode(
        &mut self,
        index: usize,
        ino: u32,
        numbers: &[u32],
        finish: &Finish,
        used: &mut Vec<Run>,
    ) -> Result<Vec<u8>> {
        let mut inode = vec![0; INODE_SIZE];
        let Some(node) = self.tree.nodes.get_mut(index) else {
            return Ok(inode);
        };
        let meta = std::mem::take(&mut node.meta);
        let links = node.links;
        // The content is taken out: nobody looks at it again but for the children of directories.
        let kind = match &node.kind {
            Kind::Dir { .. } => None,
            _ => Some(std::mem::replace(&mut node.kind, Kind::Special(Special::Fifo))),
        };
        let mut sectors = 0;
        let (file_type, link_count) = match kind {
            None => {
                let (directory, subdirectories) = self.directory_blocks(index, ino, numbers, finish)?;
                let runs = self.place(&directory.bytes, used)?;
                sectors += self.extents(&mut inode, &runs, used)?;
                set_size(&mut inode, directory.bytes.len() as u64);
                put32(&mut inode, 0x20, 0x8_0000 | if directory.indexed { 0x1000 } else { 0 });
                (0o040_000, if subdirectories > 64_998 { 1 } else { 2 + subdirectories })
            }
            Some(Kind::File { size, runs }) => {
                used.extend(&runs);
                sectors += self.extents(&mut inode, &runs, used)?;
                set_size(&mut inode, size);
                put32(&mut inode, 0x20, 0x8_0000);
                (0o100_000, links)
            }
            Some(Kind::Symlink(target)) => {
                set_size(&mut inode, target.len() as u64);
                if target.len() < 60 {
                    put(&mut inode, 0x28, &target);
                } else {
                    let mut block = vec![0; BLOCK_USIZE];
                    put(&mut block, 0, &target);
                    let runs = self.place(&block, used)?;
                    sectors += self.extents(&mut inode, &runs, used)?;
                    put32(&mut inode, 0x20, 0x8_0000);
                }
                (0o120_000, links)
            }
            Some(Kind::Special(special)) => {
                let (file_type, numbers) = match special {
                    Special::Char(major, minor) => (0o020_000, Some((major, minor))),
                    Special::Block(major, minor) => (0o060_000, Some((major, minor))),
                    Special::Fifo => (0o010_000, None),
                };
                match numbers {
                    Some((major, minor)) if major < 256 && minor < 256 => put32(&mut inode, 0x28, major << 8 | minor),
                    Some((major, minor)) => put32(
                        &mut inode,
                        0x2c,
                        (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
                    ),
                    None => {}
                }
                (file_type, links)
            }
            Some(Kind::Dir { .. }) => (0, 0),
        };
        let attributes = xattr::encode(&meta.xattrs)?;
        if let Some(block) = attributes.block {
            let run = self.place(&block, used)?;
            put32(&mut inode, 0x68, low32(run.first().map_or(0, |r| r.start)));
            sectors += BLOCK / 512;
        }
        common(&mut inode, file_type | meta.mode & 0o7777, link_count, sectors, &meta);
        put(&mut inode, 160, &attributes.inode);
        Ok(inode)
    }

    /// The blocks of a directory, and how many directories are in it.
    fn directory_blocks(
        &self,
        index: usize,
        ino: u32,
        numbers: &[u32],
        finish: &Finish,
    ) -> Result<(dir::Directory, u32)> {
        let Some(Kind::Dir { children, parent }) = self.tree.nodes.get(index).map(|n| &n.kind) else {
            return Ok((dir::build(ino, ino, &[], &finish.hash_seed)?, 0));
        };
        let number = |node: usize| numbers.get(node).copied().unwrap_or(0);
        let mut subdirectories = 0;
        let mut entries = Vec::with_capacity(children.len());
        for (name, child) in children {
            let child_ino = number(*child);
            let kind = self.tree.file_type(*child);
            subdirectories += u32::from(kind == 2);
            entries.push(Entry {
                name,
                ino: child_ino,
                kind,
            });
        }
        Ok((
            dir::build(ino, number(*parent), &entries, &finish.hash_seed)?,
            subdirectories,
        ))
    }

    /// Writes the runs of a file into its inode; returns the sectors that it takes in all.
    fn extents(&mut self, inode: &mut [u8], runs: &[Run], used: &mut Vec<Run>) -> Result<u64> {
        let mut logical = 0;
        let mut list = Vec::with_capacity(runs.len());
        for run in runs {
            list.push((logical, *run));
            logical += run.blocks;
        }
        let mut blocks = logical;
        let mut root = vec![0; 60];
        if list.len() <= INLINE_EXTENTS {
            put_extents(&mut root, INLINE_EXTENTS, &list);
        } else {
            let leaves: Vec<_> = list.chunks(LEAF_EXTENTS).collect();
            if leaves.len() > INLINE_EXTENTS {
                return Err(Ext4Error::TooMany {
                    what: "pieces of one file",
                    limit: (INLINE_EXTENTS * LEAF_EXTENTS) as u64,
                });
            }
            put_extent_header(&mut root, leaves.len(), INLINE_EXTENTS, 1);
            for (i, leaf) in leaves.iter().enumerate() {
                let mut block = vec![0; BLOCK_USIZE];
                put_extents(&mut block, LEAF_EXTENTS, leaf);
                let at = self.place(&block, used)?.first().map_or(0, |r| r.start);
                put32(&mut root, 12 + 12 * i, low32(leaf.first().map_or(0, |e| e.0)));
                put32(&mut root, 16 + 12 * i, low32(at));
                put16(&mut root, 20 + 12 * i, low16(at >> 32));
                blocks += 1;
            }
        }
        put(inode, 0x28, &root);
        Ok(blocks * (BLOCK / 512))
    }

    /// Makes the journal: its inode and the copy of it in the superblock.
    fn journal(&mut self, finish: &Finish, used: &mut Vec<Run>) -> Result<(Vec<u8>, [u32; 17])> {
        let blocks = finish.journal_blocks.max(1024);
        let runs = self.allocate(blocks)?;
        used.extend(&runs);
        let mut header = vec![0; BLOCK_USIZE];
        let big = |value: u64| low32(value).to_be_bytes();
        put(&mut header, 0, &big(0xc03b_3998));
        put(&mut header, 4, &big(4));
        put(&mut header, 12, &big(BLOCK));
        put(&mut header, 16, &big(blocks));
        put(&mut header, 20, &big(1));
        put(&mut header, 24, &big(1));
        put(&mut header, 48, &finish.uuid);
        put(&mut header, 64, &big(1));
        self.out.write(runs.first().map_or(0, |r| r.start) * BLOCK, &header)?;

        let mut inode = vec![0; INODE_SIZE];
        let sectors = self.extents(&mut inode, &runs, used)?;
        set_size(&mut inode, blocks * BLOCK);
        put32(&mut inode, 0x20, 0x8_0000);
        common(
            &mut inode,
            0o100_600,
            1,
            sectors,
            &Meta {
                mtime: finish.time.into(),
                ..Meta::default()
            },
        );
        let mut backup = [0; 17];
        for (word, bytes) in backup
            .iter_mut()
            .zip(inode.get(0x28..0x64).unwrap_or_default().chunks_exact(4))
        {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        backup[15] = low32((blocks * BLOCK) >> 32);
        backup[16] = low32(blocks * BLOCK);
        Ok((inode, backup))
    }

    fn geometry(&self, size: Size, last_ino: u32) -> Result<Geometry> {
        let for_inodes = u64::from(last_ino).div_ceil(INODES_PER_GROUP.into());
        match size {
            Size::Fit { slack } => {
                let mut groups = (self.cursor.div_ceil(BLOCKS_PER_GROUP)).max(for_inodes).max(1);
                loop {
                    let tables: u64 = (self.cursor / BLOCKS_PER_GROUP + 1..groups).map(overhead).sum();
                    if (groups * BLOCKS_PER_GROUP - self.cursor).saturating_sub(tables) * BLOCK >= slack {
                        return Geometry::of_groups(groups);
                    }
                    groups += 1;
                }
            }
            Size::Exact(size_bytes) => {
                let geometry = Geometry::for_size(size_bytes)?;
                if self.cursor > geometry.blocks() || for_inodes > geometry.groups() {
                    return Err(Ext4Error::Size {
                        size_bytes,
                        why: "too small for the content",
                    });
                }
                Ok(geometry)
            }
        }
    }

    /// Writes bitmaps where groups are in use, and describes all groups.
    fn bitmaps(
        &mut self,
        geometry: Geometry,
        used: &[Run],
        last_ino: u32,
        directories: &[u32],
    ) -> Result<Vec<Descriptor>> {
        let groups = usize::try_from(geometry.groups()).unwrap_or(0);
        let mut taken: Vec<Vec<Run>> = vec![Vec::new(); groups];
        for run in used {
            // Runs never cross the border of a group: its tables are in between.
            let group = usize::try_from(run.start / BLOCKS_PER_GROUP).unwrap_or(usize::MAX);
            if let Some(list) = taken.get_mut(group) {
                list.push(*run);
            }
        }
        let mut descriptors = Vec::with_capacity(groups);
        for (group, runs) in (0..geometry.groups()).zip(taken) {
            let mut descriptor = Descriptor::empty(geometry, group);
            let first_ino = low32(group * u64::from(INODES_PER_GROUP)) + 1;
            let inodes = (last_ino + 1).saturating_sub(first_ino).min(INODES_PER_GROUP);
            if inodes > 0 {
                descriptor.flags &= !INODE_UNINIT;
                descriptor.free_inodes -= inodes;
                descriptor.unused_inodes -= inodes;
                let bitmap = leading_bitmap(inodes.into(), INODES_PER_GROUP.into());
                self.out.write(inode_bitmap(group) * BLOCK, &bitmap)?;
            }
            if inodes > 0 || !runs.is_empty() {
                descriptor.flags &= !BLOCK_UNINIT;
            }
            if descriptor.flags & BLOCK_UNINIT == 0 {
                let mut bitmap = leading_bitmap(overhead(group), geometry.group_blocks(group));
                for run in &runs {
                    descriptor.free_blocks = descriptor.free_blocks.saturating_sub(run.blocks);
                    for block in run.start..run.start + run.blocks {
                        set_bit(&mut bitmap, block % BLOCKS_PER_GROUP);
                    }
                }
                self.out.write(layout::block_bitmap(group) * BLOCK, &bitmap)?;
            }
            descriptor.directories = u32::try_from(
                directories
                    .iter()
                    .filter(|ino| (**ino - 1) / INODES_PER_GROUP == (first_ino - 1) / INODES_PER_GROUP)
                    .count(),
            )
            .unwrap_or(0);
            descriptors.push(descriptor);
        }
        Ok(descriptors)
    }
}

/// Where a copy of the superblock is.
pub(super) fn super_offset(group: u64) -> u64 {
    if group == 0 { 1024 } else { first_block(group) * BLOCK }
}

/// The blocks of descriptors and all places they go to. `descriptors` begin at a meta group's first group.
pub(super) fn descriptor_writes(
    geometry: Geometry,
    descriptors: &[Descriptor],
    uuid: &[u8; 16],
) -> Vec<(u64, Vec<u8>)> {
    let mut writes = Vec::new();
    for chunk in descriptors.chunks(usize::try_from(META_GROUP).unwrap_or(1)) {
        let Some(first) = chunk.first().map(|d| d.group) else {
            continue;
        };
        let mut block = vec![0; BLOCK_USIZE];
        for (i, descriptor) in chunk.iter().enumerate() {
            put(&mut block, i * DESC_SIZE, &descriptor.encode(uuid));
        }
        for at in (first..(first + META_GROUP).min(geometry.groups())).filter_map(descriptor_block) {
            writes.push((at * BLOCK, block.clone()));
        }
    }
    writes
}

fn label(text: &str) -> [u8; 16] {
    let mut out = [0; 16];
    let n = text.len().min(16);
    put(&mut out, 0, text.as_bytes().get(..n).unwrap_or_default());
    out
}
