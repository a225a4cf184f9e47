//! What cargo knows of the workspace.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// A crate of the workspace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Package {
    /// What it is built of: normal and build dependencies.
    pub(crate) dependencies: BTreeSet<String>,
    /// What its tests are built of besides.
    pub(crate) dev_dependencies: BTreeSet<String>,
    /// Its names of features.
    pub(crate) features: BTreeSet<String>,
    /// The root files of its libraries and programs.
    pub(crate) roots: Vec<String>,
}

/// Crates by name.
pub(crate) type Packages = BTreeMap<String, Package>;

/// Asks cargo.
pub(crate) fn load(root: &Path) -> Result<Packages, String> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(root)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .output()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    if !output.status.success() {
        return Err(format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let value = serde_json::from_slice(&output.stdout).map_err(|e| format!("cargo metadata: {e}"))?;
    Ok(read(&value))
}

fn read(value: &Value) -> Packages {
    list(&value["packages"])
        .map(|p| (text(&p["name"]), package(p)))
        .collect()
}

fn package(value: &Value) -> Package {
    let dependencies = |dev: bool| {
        list(&value["dependencies"])
            .filter(|d| (d["kind"] == "dev") == dev)
            .map(|d| text(&d["name"]))
            .collect()
    };
    Package {
        dependencies: dependencies(false),
        dev_dependencies: dependencies(true),
        features: value["features"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, _)| name.clone())
            .collect(),
        roots: list(&value["targets"])
            .filter(|t| list(&t["kind"]).any(|k| k == "lib" || k == "bin"))
            .map(|t| text(&t["src_path"]))
            .collect(),
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Everything of the workspace that a crate is built of, directly or through others.
pub(crate) fn reaches(packages: &Packages, name: &str) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut todo = vec![name];
    while let Some(next) = todo.pop() {
        for dependency in packages.get(next).into_iter().flat_map(|p| &p.dependencies) {
            if packages.contains_key(dependency) && seen.insert(dependency.clone()) {
                todo.push(dependency);
            }
        }
    }
    seen
}
