//! What this build is.

use banger_proto::API_VERSION;
use banger_proto::api::VersionInfo;

/// Release.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Commit, as the build was told.
pub const COMMIT: &str = match option_env!("BANGER_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// What this build is, as the API says it.
pub fn info() -> VersionInfo {
    VersionInfo {
        version: VERSION.to_owned(),
        commit: COMMIT.to_owned(),
        api_version: API_VERSION,
    }
}
