//! The archive that starts a machine: the agent as `/init`, and the modules it loads.
//!
//! A `newc` cpio archive, uncompressed (unpacking it costs an emulated guest nothing that way), and the same bytes for the same
//! input: `/init`, `/modules/*.ko`, `/modules/order` (file names in load order, one a line), `/modules/later` (the same for modules
//! that come along for those who want them), `/dev/console` and the empty directories `/dev`, `/proc`, `/sys`, `/newroot`.

use std::collections::BTreeMap;

/// Raised whenever the layout changes.
pub const FORMAT: u32 = 1;

/// What stands in the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node<'a> {
    /// A directory.
    Directory,
    /// A file with its permissions and content.
    File(u32, &'a [u8]),
    /// A character device with its permissions and numbers.
    Char(u32, u32, u32),
}

/// A list of modules as a file: names of files, one a line.
pub fn list(modules: &[String]) -> String {
    modules.iter().map(|name| format!("{name}.ko\n")).collect()
}

/// The nodes of an initramfs. `modules` are file names with contents, `lists` the files `order` and `later`.
pub fn nodes<'a>(
    agent: &'a [u8],
    modules: &'a BTreeMap<String, Vec<u8>>,
    lists: &[&'a [u8]; 2],
) -> BTreeMap<String, Node<'a>> {
    let mut out = BTreeMap::new();
    for dir in ["dev", "modules", "newroot", "proc", "sys"] {
        out.insert(dir.to_owned(), Node::Directory);
    }
    out.insert("dev/console".to_owned(), Node::Char(0o600, 5, 1));
    out.insert("init".to_owned(), Node::File(0o755, agent));
    out.insert("modules/order".to_owned(), Node::File(0o644, lists[0]));
    out.insert("modules/later".to_owned(), Node::File(0o644, lists[1]));
    for (name, bytes) in modules {
        out.insert(format!("modules/{name}"), Node::File(0o644, bytes));
    }
    out
}

/// The archive as bytes. The map's order puts every directory before what is in it.
pub fn archive(nodes: &BTreeMap<String, Node<'_>>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut ino = 0;
    for (name, node) in nodes {
        ino += 1;
        match node {
            Node::Directory => entry(&mut out, ino, 0o040_755, 2, (0, 0), name, &[]),
            Node::File(mode, bytes) => entry(&mut out, ino, 0o100_000 | mode, 1, (0, 0), name, bytes),
            Node::Char(mode, major, minor) => entry(&mut out, ino, 0o020_000 | mode, 1, (*major, *minor), name, &[]),
        }
    }
    entry(&mut out, 0, 0, 1, (0, 0), "TRAILER!!!", &[]);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn entry(out: &mut Vec<u8>, ino: u32, mode: u32, links: u32, device: (u32, u32), name: &str, content: &[u8]) {
    // Neither can be larger: names are ours, content is an agent or a module, both bounded.
    let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
    let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
    out.extend_from_slice(b"070701");
    for field in [ino, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0] {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(4), 0);
}
