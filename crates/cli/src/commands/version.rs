//! `banger version`.

use std::sync::LazyLock;

use banger_proto::API_VERSION;
use banger_proto::api::VersionInfo;
use clap::Args;
use serde::Serialize;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::Client;
use crate::error::Result;
use crate::table;

/// The commit that this was built from, as the build says.
pub(crate) fn commit() -> &'static str {
    option_env!("BANGER_COMMIT")
        .filter(|c| !c.is_empty())
        .unwrap_or("unknown")
}

/// `v0.1.0 (commit 1234abcd)`.
pub(crate) fn one_line() -> &'static str {
    static LINE: LazyLock<String> = LazyLock::new(|| {
        let commit = commit();
        format!(
            "v{} (commit {})",
            env!("CARGO_PKG_VERSION"),
            commit.get(..8).unwrap_or(commit)
        )
    });
    &LINE
}

/// Show the versions of this program and of the running daemon
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger version --json")]
pub(crate) struct VersionArgs {
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Versions {
    version: String,
    commit: String,
    api_version: u32,
    /// The running daemon; null when there is none.
    daemon: Option<VersionInfo>,
}

impl VersionArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let daemon = context.block_on(async {
            let client = Client::passive(&context.places)?;
            Ok(client.get::<VersionInfo>("version").await.ok())
        });
        let versions = Versions {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: commit().to_owned(),
            api_version: API_VERSION,
            daemon: daemon.unwrap_or(None),
        };
        if self.output.json() {
            context.printer.json(&versioned(versions))?;
            return Ok(0);
        }
        let daemon = versions.daemon.map_or_else(
            || "not running".to_owned(),
            |d| format!("{} (commit {}, API {})", d.version, d.commit, d.api_version),
        );
        context.printer.data(table::pairs([
            ("version", versions.version),
            ("commit", versions.commit),
            ("api", API_VERSION.to_string()),
            ("daemon", daemon),
        ]))?;
        Ok(0)
    }
}
