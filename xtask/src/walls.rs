//! The walls between crates (docs/architecture.md), and what must not stand in the tree.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use crate::metadata::{self, Package, Packages};

/// Crates of I/O, of runtimes and of the operating system, which pure crates do without.
const IO: &[&str] = &[
    "async-std",
    "axum",
    "futures-util",
    "http-body-util",
    "hyper",
    "hyper-util",
    "libc",
    "mio",
    "nix",
    "reqwest",
    "rusqlite",
    "rustix",
    "socket2",
    "tempfile",
    "tokio",
    "tokio-tungstenite",
    "tokio-util",
    "tracing-subscriber",
];

/// Crates without I/O and without unsafe code.
const PURE: &[&str] = &["banger-proto", "banger-core", "banger-system"];

/// Which crates of ours a crate may be built of, through others too. A crate that is not named here is a violation, so that
/// a new one gets its wall.
const ALLOWED: &[(&str, &[&str])] = &[
    ("banger-proto", &[]),
    ("banger-system", &[]),
    ("banger-core", &["banger-proto", "banger-system"]),
    ("banger-child", &[]),
    (
        "banger-vmm",
        &["banger-child", "banger-core", "banger-proto", "banger-system"],
    ),
    (
        "banger-image",
        &["banger-child", "banger-core", "banger-proto", "banger-system"],
    ),
    (
        "banger-daemon",
        &[
            "banger-child",
            "banger-core",
            "banger-image",
            "banger-proto",
            "banger-system",
            "banger-vmm",
        ],
    ),
    ("banger-copy", &[]),
    (
        "banger-cli",
        &["banger-copy", "banger-core", "banger-proto", "banger-system"],
    ),
    ("banger-agent", &["banger-copy", "banger-proto"]),
    ("banger-shim", &["banger-proto"]),
    ("banger-helper", &["banger-system"]),
    ("banger-testkit", &[]),
    ("banger-e2e", &["banger-testkit"]),
    ("xtask", &["banger-proto", "banger-system", "banger-testkit"]),
];

/// What small programs may be built of: everything else needs a reason and a line here.
const SMALL: &[(&str, &[&str])] = &[
    (
        "banger-helper",
        &["banger-system", "libc", "rustix", "serde", "serde_json", "thiserror"],
    ),
    (
        "banger-shim",
        &["banger-proto", "libc", "rustix", "serde", "serde_json"],
    ),
    (
        "banger-agent",
        &[
            "banger-copy",
            "banger-proto",
            "bytes",
            "futures-util",
            "getrandom",
            "http-body-util",
            "hyper",
            "hyper-util",
            "libc",
            "rustix",
            "serde",
            "serde_json",
            "tar",
            "thiserror",
            "tokio",
            "tokio-util",
        ],
    ),
];

/// Files longer than this are worth cutting.
const LONG_FILE: usize = 600;

/// Checks everything and prints what is wrong.
pub(crate) fn run(root: &Path) -> Result<(), String> {
    let packages = metadata::load(root)?;
    let mut wrong = dependencies(&packages);
    wrong.extend(sources(&packages));
    let files = tracked(root)?;
    for (name, text) in &files {
        wrong.extend(foreign(name, text));
        let lines = text.lines().count();
        if name.ends_with(".rs") && lines > LONG_FILE {
            eprintln!("warning: {name} has {lines} lines, more than {LONG_FILE}");
        }
    }
    if wrong.is_empty() {
        println!("walls hold: {} crates, {} files", packages.len(), files.len());
        return Ok(());
    }
    Err(format!("{} violations\n  {}", wrong.len(), wrong.join("\n  ")))
}

/// The walls between crates.
fn dependencies(packages: &Packages) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, package) in packages {
        let Some((_, allowed)) = ALLOWED.iter().find(|(n, _)| n == name) else {
            wrong.push(format!(
                "{name} has no wall: add it to xtask/src/walls.rs and docs/architecture.md"
            ));
            continue;
        };
        for reached in metadata::reaches(packages, name) {
            if !allowed.contains(&reached.as_str()) {
                wrong.push(format!("{name} is built of {reached}"));
            }
        }
        // What is for tests only stays out of programs, and the helper out of everything, tests included.
        if package.dev_dependencies.contains("banger-helper") {
            wrong.push(format!("{name} has banger-helper in its tests"));
        }
        if PURE.contains(&name.as_str()) {
            wrong.extend(any_of(package, IO).map(|d| format!("{name} does no I/O and needs no {d}")));
        }
        if let Some((_, small)) = SMALL.iter().find(|(n, _)| n == name) {
            let more = package.dependencies.iter().filter(|d| !small.contains(&d.as_str()));
            wrong.extend(more.map(|d| format!("{name} is to stay small and has {d}")));
        }
        // Root code is never a feature of a shared crate.
        let root = package
            .features
            .iter()
            .filter(|f| ["root", "helper", "privileged"].contains(&f.as_str()));
        wrong.extend(root.map(|f| format!("{name} has a feature `{f}`: code that runs as root is a crate of its own")));
    }
    wrong
}

fn any_of<'a>(package: &'a Package, list: &'a [&str]) -> impl Iterator<Item = &'a String> {
    package.dependencies.iter().filter(|d| list.contains(&d.as_str()))
}

/// What the sources of pure crates have to say.
fn sources(packages: &Packages) -> Vec<String> {
    let pure = packages.iter().filter(|(name, _)| PURE.contains(&name.as_str()));
    pure.flat_map(|(_, package)| &package.roots)
        .filter(|root| !std::fs::read_to_string(root).is_ok_and(|t| t.contains("#![forbid(unsafe_code)]")))
        .map(|root| format!("{root} does not forbid unsafe code"))
        .collect()
}

/// Tracked text files with their content.
fn tracked(root: &Path) -> Result<Vec<(String, String)>, String> {
    let output = Command::new("git")
        .current_dir(root)
        .args(["ls-files", "-z"])
        .output()
        .map_err(|e| format!("cannot run git: {e}"))?;
    if !output.status.success() {
        return Err(format!("git ls-files: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let names: BTreeSet<&str> = output
        .stdout
        .split(|&b| b == 0)
        .filter_map(|n| std::str::from_utf8(n).ok())
        .collect();
    Ok(names
        .into_iter()
        .filter(|n| !n.is_empty())
        // A file that is deleted but not committed yet, or is no text, has nothing to check.
        .filter_map(|n| Some((n.to_owned(), std::fs::read_to_string(root.join(n)).ok()?)))
        .collect())
}

/// Places of developers' machines, and registries other than the ones everybody has.
fn foreign(name: &str, text: &str) -> Vec<String> {
    // Written in two parts, so that this file does not hold them.
    let homes = [
        concat!("/ho", "me/"),
        concat!("/Us", "ers/"),
        concat!("/wo", "rk/"),
        concat!("/tmp/", "lab"),
    ];
    let mut wrong = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for place in homes {
            if line.match_indices(place).any(|(at, _)| is_place(line, at, place)) {
                wrong.push(format!(
                    "{name}:{}: a path of a developer's machine ({place})",
                    number + 1
                ));
            }
        }
        if name == "Cargo.lock"
            && line.starts_with("source = ")
            && !line.contains("registry+https://github.com/rust-lang/crates.io-index")
        {
            wrong.push(format!("{name}:{}: a source other than crates.io: {line}", number + 1));
        }
        if name.ends_with(".toml") && (line.starts_with("registry = ") || line.contains("replace-with")) {
            wrong.push(format!("{name}:{}: a registry of one's own: {line}", number + 1));
        }
    }
    wrong
}

/// A path begins here: not the middle of a longer one, and not one of the made-up users that examples and tests speak of.
fn is_place(line: &str, at: usize, place: &str) -> bool {
    let before = line[..at].chars().next_back();
    let rest = &line[at + place.len()..];
    let user: String = rest.chars().take_while(char::is_ascii_alphanumeric).collect();
    let middle = before.is_some_and(|c| c.is_alphanumeric() || "._-$}".contains(c));
    let made_up = ["user", "me", "u", "x", "someone", "alice", "bob", "you", "dev"].contains(&user.as_str());
    !middle && !made_up && !rest.starts_with('{')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(dependencies: &[&str]) -> Package {
        Package {
            dependencies: dependencies.iter().map(|d| (*d).to_owned()).collect(),
            ..Package::default()
        }
    }

    fn packages(list: &[(&str, &[&str])]) -> Packages {
        list.iter()
            .map(|(name, dependencies)| ((*name).to_owned(), package(dependencies)))
            .collect()
    }

    #[test]
    fn the_walls_hold() {
        run(&crate::root()).unwrap();
    }

    #[test]
    fn a_wall_is_seen_through_other_crates() {
        let packages = packages(&[
            ("banger-cli", &["banger-core", "clap"]),
            ("banger-core", &["banger-image"]),
            ("banger-image", &[]),
        ]);
        let wrong = dependencies(&packages);
        assert!(
            wrong.contains(&"banger-cli is built of banger-image".to_owned()),
            "{wrong:?}"
        );
        assert!(
            wrong.contains(&"banger-core is built of banger-image".to_owned()),
            "{wrong:?}"
        );
    }

    #[test]
    fn what_breaks_a_wall_is_named() {
        for (list, part) in [
            (
                &[("banger-core", &["tokio"] as &[&str])] as &[(&str, &[&str])],
                "needs no tokio",
            ),
            (&[("banger-shim", &["tokio"])], "stay small"),
            (&[("banger-new", &[])], "has no wall"),
            (
                &[("banger-daemon", &["banger-helper"]), ("banger-helper", &[])],
                "banger-daemon is built of banger-helper",
            ),
        ] {
            let wrong = dependencies(&packages(list));
            assert!(wrong.iter().any(|w| w.contains(part)), "{part}: {wrong:?}");
        }
        let mut package = package(&[]);
        package.features.insert("root".to_owned());
        assert_eq!(
            dependencies(&Packages::from([("banger-proto".to_owned(), package)])).len(),
            1
        );
    }

    #[test]
    fn foreign_places_are_found() {
        let home = concat!("/ho", "me/");
        assert_eq!(foreign("a.rs", &format!("x = \"{home}fritz/src\"")).len(), 1);
        assert!(foreign("a.rs", &format!("x = \"{home}user/src\" $HOME{home}")).is_empty());
        assert_eq!(
            foreign("Cargo.lock", "source = \"registry+https://example.invalid/index\"").len(),
            1
        );
        assert_eq!(foreign(".cargo/config.toml", "replace-with = \"mirror\"").len(), 1);
    }
}
