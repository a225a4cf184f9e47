//! Where an installation stands, and which programs go into it.

use std::path::{Path, PathBuf};

use banger_system::install::Layout;

use crate::error::{Error, Kind, Result};

/// Where an installation stands.
#[derive(Debug, Clone)]
pub(crate) struct Ground {
    /// Where everything is. The host's own files (`/etc/passwd`, `/sys`, …) are looked for below the same root.
    pub(crate) layout: Layout,
    /// User and group that own what is root's. Others than 0 in tests.
    pub(crate) root: (u32, u32),
    /// The programs.
    pub(crate) programs: Vec<Program>,
}

impl Ground {
    /// A path of the host.
    pub(crate) fn host(&self, path: &str) -> PathBuf {
        self.layout.root().join(path)
    }
}

/// A program of an installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    /// Its name.
    pub(crate) name: &'static str,
    /// Nobody calls it by hand.
    pub(crate) internal: bool,
    /// Where it is copied from.
    pub(crate) source: PathBuf,
}

impl Program {
    /// Where it is installed.
    pub(crate) fn path(&self, layout: &Layout) -> PathBuf {
        let dir = if self.internal { layout.libexec() } else { layout.bin() };
        dir.join(self.name)
    }
}

/// The programs, and whether nobody calls them by hand.
pub(crate) const PROGRAMS: [(&str, bool); 5] = [
    ("banger", false),
    ("bangerd", false),
    ("banger-helper", true),
    ("banger-shim", true),
    ("banger-agent", true),
];

/// Finds the programs: those that are with `own`, the one that runs now.
pub(crate) fn programs(own: &Path) -> Result<Vec<Program>> {
    let beside = own.parent().unwrap_or(Path::new("/"));
    PROGRAMS
        .into_iter()
        .map(|(name, internal)| {
            let mut places = vec![beside.join(name), beside.join("../lib/banger").join(name)];
            if name == "banger" {
                places = vec![own.to_owned()];
            } else if !internal {
                places.truncate(1);
            }
            let source = places.iter().find(|p| p.is_file()).ok_or_else(|| {
                let message = format!("`{name}` is not where `banger` is: no {}", places[0].display());
                Error::new(Kind::NotFound, message).hint("build or unpack all of banger's programs into one directory")
            })?;
            Ok(Program {
                name,
                internal,
                source: source.clone(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_beside_or_in_lib() {
        let dir = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        };
        for path in [
            "bin/banger",
            "bin/bangerd",
            "lib/banger/banger-agent",
            "lib/banger/banger-shim",
        ] {
            make(path);
        }
        let own = dir.path().join("bin/banger");
        let error = programs(&own).unwrap_err();
        assert!(error.message.contains("banger-helper"), "{error}");
        make("bin/banger-helper");
        let found = programs(&own).unwrap();
        assert!(found[2].source.ends_with("bin/banger-helper") && found[4].source.ends_with("lib/banger/banger-agent"));
        let layout = Layout::default();
        assert_eq!(found[1].path(&layout), Path::new("/usr/local/bin/bangerd"));
        assert_eq!(found[2].path(&layout), Path::new("/usr/local/lib/banger/banger-helper"));
    }
}
