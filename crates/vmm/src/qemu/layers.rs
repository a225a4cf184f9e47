//! Disks of a running engine: what takes their writes, and letting a fresh layer take them.
//!
//! The node that a guest writes to has its disk's serial as name, and after a switch that of the serial and a number. So the
//! engine itself says what is on top: nothing here is remembered between calls.

use std::collections::BTreeSet;
use std::path::PathBuf;

use banger_core::plan::DiskRole;
use serde::Deserialize;
use serde_json::{Value, json};

use super::block;
use crate::engine::{EngineError, FreshLayer};
use crate::qmp::{Client, QmpError};

const ROLES: [DiskRole; 2] = [DiskRole::Root, DiskRole::Work];

/// One answer of `query-block`.
#[derive(Deserialize)]
struct Device {
    inserted: Option<Inserted>,
}

#[derive(Deserialize)]
struct Inserted {
    #[serde(rename = "node-name")]
    node: Option<String>,
}

/// One answer of `query-named-block-nodes`.
#[derive(Deserialize)]
struct Node {
    #[serde(rename = "node-name")]
    name: Option<String>,
    file: PathBuf,
}

/// What a running engine's disks are.
#[derive(Debug)]
pub(super) struct Active {
    /// The node that each disk writes to.
    tops: Vec<(DiskRole, String)>,
    /// All nodes with their files.
    nodes: Vec<(String, PathBuf)>,
}

/// Asks the engine.
pub(super) async fn active(client: &mut Client) -> Result<Active, QmpError> {
    let devices: Vec<Device> = client.execute("query-block", None).await?;
    let nodes: Vec<Node> = client
        .execute("query-named-block-nodes", Some(json!({ "flat": true })))
        .await?;
    let tops = devices.into_iter().filter_map(|d| d.inserted?.node);
    Ok(Active {
        tops: tops.filter_map(|node| Some((role(&node)?, node))).collect(),
        nodes: nodes.into_iter().filter_map(|n| Some((n.name?, n.file))).collect(),
    })
}

/// Whose disk a node on top is.
pub(super) fn role(node: &str) -> Option<DiskRole> {
    ROLES.into_iter().find(|role| {
        node.strip_prefix(role.serial()).is_some_and(|rest| {
            rest.is_empty()
                || rest
                    .strip_prefix("-s")
                    .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        })
    })
}

impl Active {
    /// The files that take the writes.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let file = |top: &String| {
            let name = format!("{top}-file");
            self.nodes
                .iter()
                .find(|(node, _)| *node == name)
                .map(|(_, file)| file.clone())
        };
        self.tops.iter().filter_map(|(_, top)| file(top)).collect()
    }

    /// A name for the next node on top of a disk.
    fn fresh_name(&self, serial: DiskRole) -> String {
        let used: BTreeSet<&str> = self.nodes.iter().map(|(name, _)| name.as_str()).collect();
        (1_u64..)
            .map(|n| format!("{}-s{n}", serial.serial()))
            .find(|name| !used.contains(name.as_str()) && !used.contains(format!("{name}-file").as_str()))
            .unwrap_or_default()
    }
}

/// Fresh layers that were added to an engine and take no writes yet.
#[derive(Debug, Default)]
pub(super) struct Added {
    /// For each the node that it goes over, and its own.
    pairs: Vec<(String, String)>,
    /// Everything that was added, in that order.
    nodes: Vec<String>,
}

/// What was added before it went wrong, and why it did.
#[derive(Debug)]
pub(super) enum LayerFault {
    Qmp(QmpError),
    Plan(EngineError),
}

impl From<QmpError> for LayerFault {
    fn from(error: QmpError) -> Self {
        Self::Qmp(error)
    }
}

/// Adds fresh layers. Nothing is written to them.
pub(super) async fn add(client: &mut Client, layers: &[FreshLayer]) -> Result<Added, LayerFault> {
    let mut added = Added::default();
    if layers.is_empty() {
        return Ok(added);
    }
    let outcome = add_each(client, layers, &mut added).await;
    match outcome {
        Ok(()) => Ok(added),
        Err(fault) => {
            drop_added(client, added).await;
            Err(fault)
        }
    }
}

async fn add_each(client: &mut Client, layers: &[FreshLayer], added: &mut Added) -> Result<(), LayerFault> {
    let active = active(client).await?;
    for layer in layers {
        let name = layer.serial.serial();
        let Some((_, top)) = active.tops.iter().find(|(role, _)| *role == layer.serial) else {
            return Err(LayerFault::Plan(super::args::unsupported(&format!(
                "find the disk `{name}` of the machine"
            ))));
        };
        let node = active.fresh_name(layer.serial);
        for blockdev in block::fresh(&node, &layer.path).map_err(LayerFault::Plan)? {
            let name = blockdev
                .get("node-name")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned();
            client.execute::<Value>("blockdev-add", Some(blockdev)).await?;
            added.nodes.push(name);
        }
        added.pairs.push((top.clone(), node));
    }
    Ok(())
}

/// Lets the fresh layers take the writes, all at once or none.
pub(super) async fn switch(client: &mut Client, added: &Added) -> Result<(), QmpError> {
    if added.pairs.is_empty() {
        return Ok(());
    }
    let actions: Vec<Value> = added
        .pairs
        .iter()
        .map(|(node, overlay)| json!({ "type": "blockdev-snapshot", "data": { "node": node, "overlay": overlay } }))
        .collect();
    client
        .execute::<Value>("transaction", Some(json!({ "actions": actions })))
        .await
        .map(drop)
}

/// Whether the fresh layers take the writes.
pub(super) async fn switched(client: &mut Client, added: &Added) -> bool {
    let tops = active(client).await.map(|active| active.tops).unwrap_or_default();
    let on_top = |overlay: &String| tops.iter().any(|(_, top)| top == overlay);
    !added.pairs.is_empty() && added.pairs.iter().all(|(_, overlay)| on_top(overlay))
}

/// Takes fresh layers away that take no writes.
pub(super) async fn drop_added(client: &mut Client, added: Added) {
    for node in added.nodes.iter().rev() {
        if let Err(e) = client
            .execute::<Value>("blockdev-del", Some(json!({ "node-name": node })))
            .await
        {
            tracing::warn!(node, error = %e, "cannot take a layer away again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_on_top_are_told_by_their_names() {
        assert_eq!(role("root"), Some(DiskRole::Root));
        assert_eq!(role("work-s12"), Some(DiskRole::Work));
        for other in [
            "",
            "root-1",
            "root-base",
            "root-file",
            "root-s1-file",
            "roots",
            "root-s",
            "#block123",
        ] {
            assert_eq!(role(other), None, "{other}");
        }
    }

    #[test]
    fn names_are_not_used_twice_and_files_are_found() {
        let node = |name: &str| (name.to_owned(), PathBuf::from(format!("/f/{name}")));
        let active = Active {
            tops: vec![
                (DiskRole::Root, "root-s1".to_owned()),
                (DiskRole::Work, "work".to_owned()),
            ],
            nodes: [
                "root",
                "root-file",
                "root-s1",
                "root-s1-file",
                "root-s2-file",
                "work",
                "work-file",
            ]
            .map(node)
            .into(),
        };
        assert_eq!(active.fresh_name(DiskRole::Root), "root-s3");
        assert_eq!(active.fresh_name(DiskRole::Work), "work-s1");
        assert_eq!(
            active.files(),
            [PathBuf::from("/f/root-s1-file"), "/f/work-file".into()]
        );
    }

    fn answers() -> Vec<(&'static str, Result<Value, &'static str>)> {
        let devices = json!([
            { "device": "", "inserted": { "node-name": "root" } },
            { "device": "", "inserted": { "node-name": "work-s1" } },
            { "device": "floppy0" },
        ]);
        let node = |name: &str| json!({ "node-name": name, "file": format!("/f/{name}"), "drv": "x" });
        let nodes = ["root", "root-file", "work", "work-file", "work-s1", "work-s1-file"].map(node);
        vec![
            ("query-block", Ok(devices)),
            ("query-named-block-nodes", Ok(json!(nodes))),
        ]
    }

    fn fresh() -> [FreshLayer; 2] {
        [(DiskRole::Root, "/l/root"), (DiskRole::Work, "/l/work")].map(|(serial, path)| FreshLayer {
            serial,
            path: path.into(),
        })
    }

    #[tokio::test]
    async fn layers_are_added_and_switched_together() {
        let mut script = answers();
        script.extend((0..4).map(|_| ("blockdev-add", Ok(json!({})))));
        script.push(("transaction", Ok(json!({}))));
        let (mut client, other) = crate::qmp::fake::client(script).await;
        let added = add(&mut client, &fresh()).await.unwrap();
        switch(&mut client, &added).await.unwrap();
        let heard = other.await.unwrap();
        let names: Vec<&str> = heard[3..7].iter().map(|a| a["node-name"].as_str().unwrap()).collect();
        assert_eq!(names, ["root-s1-file", "root-s1", "work-s2-file", "work-s2"]);
        assert_eq!(
            heard[7]["actions"],
            json!([
                { "type": "blockdev-snapshot", "data": { "node": "root", "overlay": "root-s1" } },
                { "type": "blockdev-snapshot", "data": { "node": "work-s1", "overlay": "work-s2" } },
            ])
        );
    }

    #[tokio::test]
    async fn what_was_added_goes_when_one_is_refused() {
        let mut script = answers();
        script.extend((0..3).map(|_| ("blockdev-add", Ok(json!({})))));
        script.push(("blockdev-add", Err("it is no qcow2 file")));
        // That one of them stays is no reason to keep the others.
        script.push(("blockdev-del", Ok(json!({}))));
        script.push(("blockdev-del", Err("busy")));
        script.push(("blockdev-del", Ok(json!({}))));
        let (mut client, other) = crate::qmp::fake::client(script).await;
        let fault = add(&mut client, &fresh()).await.unwrap_err();
        assert!(matches!(fault, LayerFault::Qmp(QmpError::Refused { command, .. }) if command == "blockdev-add"));
        let heard = other.await.unwrap();
        let gone: Vec<&str> = heard[7..].iter().map(|a| a["node-name"].as_str().unwrap()).collect();
        assert_eq!(gone, ["work-s2-file", "root-s1", "root-s1-file"]);
    }

    #[tokio::test]
    async fn a_refused_switch_is_no_switch() {
        let added = Added {
            pairs: vec![("root".to_owned(), "root-s1".to_owned())],
            nodes: Vec::new(),
        };
        let mut script = vec![("transaction", Err("no"))];
        script.extend(answers());
        let (mut client, other) = crate::qmp::fake::client(script).await;
        assert!(matches!(
            switch(&mut client, &added).await,
            Err(QmpError::Refused { .. })
        ));
        assert!(!switched(&mut client, &added).await);
        other.await.unwrap();
        let added = Added {
            pairs: vec![("work".to_owned(), "work-s1".to_owned())],
            nodes: Vec::new(),
        };
        let (mut client, _other) = crate::qmp::fake::client(answers()).await;
        assert!(switched(&mut client, &added).await);
        // Of one that has gone nothing is known.
        assert!(!switched(&mut client, &added).await);
    }

    #[tokio::test]
    async fn a_disk_that_the_machine_lacks() {
        let devices = json!([{ "device": "", "inserted": { "node-name": "root" } }]);
        let script = vec![("query-block", Ok(devices)), ("query-named-block-nodes", Ok(json!([])))];
        let (mut client, _other) = crate::qmp::fake::client(script).await;
        let fault = add(&mut client, &fresh()[1..]).await.unwrap_err();
        assert!(matches!(fault, LayerFault::Plan(EngineError::Unsupported { .. })));
    }
}
