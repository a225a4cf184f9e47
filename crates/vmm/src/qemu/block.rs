//! The nodes of a disk: a pure function.
//!
//! Every file and every format is named, and what lies below what: neither a guest nor an image nor the header of a layer can
//! make a file be opened, or be read as something else.

use std::path::Path;

use banger_core::plan::{Disk, DiskFormat};
use serde_json::{Value, json};

use super::args::{text, unsupported};
use crate::engine::EngineError;

/// What is done with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// A guest writes to it.
    Write,
    /// It is only read.
    Read,
}

/// Everything that a disk consists of, in the order in which it must be added: base, layers, and last the node that is the
/// disk. That one has the disk's serial as its name; others are `SERIAL-base`, `SERIAL-1` (the topmost layer) and so on, each
/// with `-file` for the file itself.
pub(super) fn nodes(disk: &Disk, access: Access) -> Result<Vec<Value>, EngineError> {
    let name = disk.serial.serial();
    if disk.format != DiskFormat::Qcow2 && (disk.base.is_some() || !disk.layers.is_empty()) {
        return Err(unsupported("put a raw disk over an image"));
    }
    let mut nodes = Vec::new();
    let mut below = None;
    if let Some(base) = &disk.base {
        let (node, file) = (format!("{name}-base"), format!("{name}-base-file"));
        nodes.push(reading(&file, base)?);
        nodes.push(json!({ "node-name": node, "driver": "raw", "file": file, "read-only": true }));
        below = Some(node);
    }
    for (at, layer) in disk.layers.iter().enumerate().rev() {
        let (node, file) = (format!("{name}-{}", at + 1), format!("{name}-{}-file", at + 1));
        nodes.push(reading(&file, layer)?);
        nodes.push(json!({
            "node-name": node, "driver": "qcow2", "file": file, "backing": below, "read-only": true,
        }));
        below = Some(node);
    }
    let file = format!("{name}-file");
    let mut top = match disk.format {
        DiskFormat::Raw | DiskFormat::Device => json!({ "node-name": name, "driver": "raw", "file": file }),
        DiskFormat::Qcow2 => json!({ "node-name": name, "driver": "qcow2", "file": file, "backing": below }),
    };
    match access {
        Access::Write => {
            let mut below = writing(&file, &disk.path)?;
            if disk.format == DiskFormat::Device {
                below["driver"] = json!("host_device");
            }
            nodes.push(below);
            top["discard"] = json!("unmap");
        }
        Access::Read => {
            nodes.push(reading(&file, &disk.path)?);
            top["read-only"] = json!(true);
        }
    }
    nodes.push(top);
    Ok(nodes)
}

/// The node of a fresh layer that takes the writes of a disk: to begin with it lies above nothing.
pub(super) fn fresh(node: &str, path: &Path) -> Result<[Value; 2], EngineError> {
    let file = format!("{node}-file");
    Ok([
        writing(&file, path)?,
        json!({ "node-name": node, "driver": "qcow2", "file": file, "backing": null, "discard": "unmap" }),
    ])
}

/// The page cache is used and a guest's flush reaches the disk. Space that the guest gives up goes back to the host.
fn writing(node: &str, path: &Path) -> Result<Value, EngineError> {
    Ok(json!({ "node-name": node, "driver": "file", "filename": text(path)?, "discard": "unmap" }))
}

fn reading(node: &str, path: &Path) -> Result<Value, EngineError> {
    Ok(json!({ "node-name": node, "driver": "file", "filename": text(path)?, "read-only": true }))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use banger_core::plan::DiskRole;
    use proptest::prelude::*;

    use super::*;

    fn disk(format: DiskFormat, layers: usize, base: bool) -> Disk {
        Disk {
            serial: DiskRole::Root,
            path: "/s/root.qcow2".into(),
            format,
            layers: (0..layers).map(|n| PathBuf::from(format!("/s/{n}.qcow2"))).collect(),
            base: base.then(|| "/i/image,\"1\".ext4".into()),
        }
    }

    #[test]
    fn a_raw_disk_stands_alone() {
        let nodes = nodes(&disk(DiskFormat::Raw, 0, false), Access::Write).unwrap();
        assert_eq!(nodes.len(), 2);
        assert_eq!(
            (&nodes[1]["driver"], &nodes[0]["discard"]),
            (&json!("raw"), &json!("unmap"))
        );
        for other in [disk(DiskFormat::Raw, 0, true), disk(DiskFormat::Raw, 1, false)] {
            assert!(super::nodes(&other, Access::Write).is_err());
        }
    }

    proptest! {
        /// Whatever a disk consists of: every node names its driver and comes after what it lies upon, the chain is that of the
        /// plan from top to bottom, and only the top is written to.
        #[test]
        fn the_chain_is_that_of_the_plan(layers in 0usize..40, base: bool, write: bool) {
            let disk = disk(DiskFormat::Qcow2, layers, base);
            let access = if write { Access::Write } else { Access::Read };
            let nodes = nodes(&disk, access).unwrap();
            let at = |name: &Value| nodes.iter().position(|n| n["node-name"] == *name);
            let mut files = Vec::new();
            let mut node = nodes.last().unwrap();
            prop_assert_eq!(&node["node-name"], &json!("root"));
            let mut place = nodes.len() - 1;
            loop {
                let file = &nodes[at(&node["file"]).unwrap()];
                prop_assert!(at(&node["file"]).unwrap() < place);
                prop_assert_eq!(&file["driver"], &json!("file"));
                let top = files.is_empty();
                for n in [node, file] {
                    prop_assert_eq!(n.get("read-only") == Some(&json!(true)), !(top && write));
                }
                files.push(PathBuf::from(file["filename"].as_str().unwrap()));
                let expected = if base && files.len() == layers + 2 { "raw" } else { "qcow2" };
                prop_assert_eq!(&node["driver"], &json!(expected));
                if expected == "raw" {
                    break;
                }
                // Present also where nothing is below: else the header would be asked.
                let below = node.get("backing").unwrap();
                if below.is_null() {
                    break;
                }
                let next = at(below).unwrap();
                prop_assert!(next < place);
                (place, node) = (next, &nodes[next]);
            }
            let plan: Vec<PathBuf> = std::iter::once(disk.path.clone()).chain(disk.layers).chain(disk.base).collect();
            prop_assert_eq!(files, plan);
        }
    }
}
