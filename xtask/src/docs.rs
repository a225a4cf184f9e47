//! Whether the generated documents are current. The generators are tests of the crates that own them.

use std::path::Path;
use std::process::Command;

/// Runs the generators in their checking mode.
pub(crate) fn run(root: &Path) -> Result<(), String> {
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(root)
        .env_remove("BLESS")
        .args([
            "test",
            "--release",
            "--quiet",
            "-p",
            "banger-cli",
            "-p",
            "banger-daemon",
            "generated",
        ])
        .status()
        .map_err(|e| format!("cannot run cargo: {e}"))?;
    if !status.success() {
        return Err("the generated documents are not current; `make docs` writes them".to_owned());
    }
    for file in ["docs/cli.md", "docs/openapi.json"] {
        if !root.join(file).is_file() {
            return Err(format!("{file} is missing; `make docs` writes it"));
        }
    }
    Ok(())
}
