//! A daemon of another build than this program.

use banger_proto::API_VERSION;
use banger_proto::api::VersionInfo;

use crate::commands::version;
use crate::error::Error;

/// How a daemon of another build is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Renew {
    /// It is stopped; the next command starts one of this build.
    Stop,
    /// This build is installed.
    Install,
}

impl Renew {
    fn words(self) -> &'static str {
        match self {
            Self::Stop => "stop it with `banger daemon stop`; machines run on and the next one adopts them",
            Self::Install => {
                "install this one with `sudo banger system install`; machines run on and the new daemon adopts them"
            }
        }
    }
}

/// The error for a daemon of another API version.
pub(crate) fn skew(daemon: &VersionInfo, renew: Renew) -> Option<Error> {
    if daemon.api_version == API_VERSION {
        return None;
    }
    let message = format!(
        "the running daemon is version {} (API {}), this is {} (API {API_VERSION})",
        daemon.version,
        daemon.api_version,
        env!("CARGO_PKG_VERSION"),
    );
    Some(Error::unavailable(message).hint(renew.words()))
}

/// A refusal by a daemon of another build gets the hint that this may be why.
pub(super) fn of_another_build(mut error: Error, daemon: &VersionInfo, renew: Renew) -> Error {
    let same = daemon.version == env!("CARGO_PKG_VERSION") && daemon.commit == version::commit();
    if !same && error.hint.is_none() {
        error.hint = Some(format!("the running daemon is of another build: {}", renew.words()));
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_api_version_is_explained() {
        let version = VersionInfo {
            version: "9.0.0".into(),
            commit: "unknown".into(),
            api_version: API_VERSION,
        };
        assert_eq!(skew(&version, Renew::Stop), None);
        let hint = of_another_build(Error::failed("unknown field `cold`"), &version, Renew::Stop).hint;
        assert!(hint.unwrap().contains("another build"));
        let newer = VersionInfo {
            api_version: API_VERSION + 1,
            ..version
        };
        for (renew, words) in [(Renew::Stop, "banger daemon stop"), (Renew::Install, "system install")] {
            assert!(skew(&newer, renew).unwrap().hint.unwrap().contains(words));
        }
    }
}
