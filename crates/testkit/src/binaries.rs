//! Where the programs under test are.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The programs that have to stand side by side.
pub const PROGRAMS: [&str; 5] = ["banger", "bangerd", "banger-agent", "banger-shim", "banger-helper"];

/// Directory of the programs: `BANGER_TEST_BIN`, else the release directory of cargo's target directory, else its debug one.
pub fn directory() -> Result<&'static Path, String> {
    static DIR: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    DIR.get_or_init(find).as_deref().map_err(Clone::clone)
}

/// Path of one program.
pub fn program(name: &str) -> PathBuf {
    directory().unwrap_or_else(|e| panic!("{e}")).join(name)
}

fn find() -> Result<PathBuf, String> {
    let lacks = |dir: &Path| PROGRAMS.into_iter().find(|p| !dir.join(p).is_file());
    if let Some(dir) = std::env::var_os("BANGER_TEST_BIN") {
        let dir = PathBuf::from(dir);
        return match lacks(&dir) {
            None => Ok(dir),
            Some(program) => Err(format!("BANGER_TEST_BIN={} holds no {program}", dir.display())),
        };
    }
    // A test binary is <target>/<triple>/<profile>/deps/NAME-HASH, another program one directory higher.
    let me = std::env::current_exe().map_err(|e| format!("cannot tell where this program is: {e}"))?;
    let platform = me
        .ancestors()
        .find(|d| d.join("CACHEDIR.TAG").is_file() || d.ends_with("release") || d.ends_with("debug"))
        .and_then(|d| {
            if d.join("CACHEDIR.TAG").is_file() {
                Some(d)
            } else {
                d.parent()
            }
        })
        .ok_or_else(|| format!("{} is not in a cargo target directory", me.display()))?;
    ["release", "debug"]
        .map(|profile| platform.join(profile))
        .into_iter()
        .find(|dir| lacks(dir).is_none())
        .ok_or_else(|| {
            format!(
                "no complete set of programs below {}: run `cargo build --release` first",
                platform.display()
            )
        })
}

/// Cargo's target directory.
pub fn target() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let me = std::env::current_exe().expect("this program has a path");
        // The directory of a platform is tagged as well: the outermost is the one.
        me.ancestors()
            .filter(|d| d.join("CACHEDIR.TAG").is_file())
            .last()
            .unwrap_or_else(|| panic!("{} is not in a cargo target directory", me.display()))
            .to_owned()
    })
}
