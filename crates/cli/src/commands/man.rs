//! `banger man`.

use std::path::PathBuf;

use clap::Args;

use crate::cli::{Context, tree};
use crate::error::{Error, Result};

/// Write the man pages of all commands into a directory
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger man ~/.local/share/man/man1")]
pub(crate) struct ManArgs {
    /// Directory; made when it is not there
    #[arg(value_hint = clap::ValueHint::DirPath)]
    directory: PathBuf,
}

impl ManArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let directory = &self.directory;
        std::fs::create_dir_all(directory).map_err(|e| Error::io("make", directory, e))?;
        clap_mangen::generate_to(tree(), directory).map_err(|e| Error::io("write man pages to", directory, e))?;
        context
            .printer
            .note(format!("man pages written to {}", directory.display()));
        Ok(0)
    }
}
