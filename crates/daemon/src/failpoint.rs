//! Named places where a test can make the daemon fail.
//!
//! `BANGER_FAILPOINT="create.launched=abort,stop.exited=delay:500"` is read once at start. Actions: `abort` (the daemon dies
//! there as by `kill -9`), `error` (the stage fails), `delay:MS`. Without the variable a point costs one look at an empty
//! table. The names stand in [`NAMES`]; an unknown one is refused at start, so that a test never waits for a point that is
//! not there.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Duration;

use banger_proto::error::{ApiError, ErrorCode};

/// Every point, in the order of a machine's life.
pub const NAMES: &[&str] = &[
    "create.row",
    "create.stock",
    "create.disks",
    "template.row",
    "template.launched",
    "template.booted",
    "template.saved",
    "restore.disks",
    "restore.channel",
    "restore.renewed",
    "start.row",
    "start.attached",
    "start.launched",
    "start.handles",
    "start.channel",
    "start.personalized",
    "start.system",
    "save.begun",
    "save.frozen",
    "save.saved",
    "suspend.row",
    "suspend.saved",
    "suspend.sealed",
    "suspend.committed",
    "suspend.ended",
    "wake.launched",
    "wake.spent",
    "snapshot.begun",
    "snapshot.saved",
    "snapshot.committed",
    "snapshot.unlinked",
    "rollback.prepared",
    "rollback.journaled",
    "rollback.stopping",
    "rollback.killed",
    "rollback.stopped",
    "rollback.exchanged",
    "rollback.memory",
    "rollback.row",
    "rollback.placed",
    "restart.begun",
    "restart.stopped",
    "grow.disk",
    "rename.row",
    "fork.begun",
    "fork.saved",
    "fork.disks",
    "stop.row",
    "stop.asked",
    "stop.exited",
    "delete.row",
    "delete.stopped",
    "delete.files",
    "adopt.found",
];

/// What happens at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The process ends at once, as by `kill -9`.
    Abort,
    /// The stage fails.
    Error,
    /// The stage takes longer.
    Delay(Duration),
}

static POINTS: OnceLock<BTreeMap<String, Action>> = OnceLock::new();

/// Reads the value of `BANGER_FAILPOINT`.
pub fn parse(text: &str) -> Result<BTreeMap<String, Action>, String> {
    let mut points = BTreeMap::new();
    for item in text.split(',').map(str::trim).filter(|i| !i.is_empty()) {
        let (name, action) = item
            .split_once('=')
            .ok_or_else(|| format!("failpoint `{item}` lacks an action"))?;
        if !NAMES.contains(&name) {
            return Err(format!(
                "there is no failpoint `{name}`; there are: {}",
                NAMES.join(", ")
            ));
        }
        let action = match action.split_once(':') {
            None if action == "abort" => Action::Abort,
            None if action == "error" => Action::Error,
            Some(("delay", ms)) => Action::Delay(Duration::from_millis(
                ms.parse()
                    .map_err(|_| format!("failpoint `{name}`: `{ms}` is no number"))?,
            )),
            _ => return Err(format!("failpoint `{name}`: unknown action `{action}`")),
        };
        points.insert(name.to_owned(), action);
    }
    Ok(points)
}

/// Arms the points of this process.
pub fn init(text: Option<&str>) -> Result<(), String> {
    let points = parse(text.unwrap_or_default())?;
    if !points.is_empty() {
        tracing::warn!(?points, "failpoints are armed");
    }
    let _ = POINTS.set(points);
    Ok(())
}

/// Passes a point.
pub async fn hit(name: &'static str) -> Result<(), ApiError> {
    debug_assert!(NAMES.contains(&name), "failpoint {name} stands in the list");
    match POINTS.get().and_then(|p| p.get(name)) {
        None => Ok(()),
        Some(Action::Abort) => {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            std::future::pending().await
        }
        Some(Action::Error) => Err(ApiError::new(ErrorCode::Internal, format!("failpoint {name}"))),
        Some(Action::Delay(time)) => {
            tokio::time::sleep(*time).await;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn points_are_read() {
        let points = parse("create.row=abort, stop.exited=delay:20,delete.files=error").unwrap();
        assert_eq!(points["create.row"], Action::Abort);
        assert_eq!(points["stop.exited"], Action::Delay(Duration::from_millis(20)));
        assert_eq!(points["delete.files"], Action::Error);
        assert!(parse("").unwrap().is_empty());
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for text in [
            "nowhere=abort",
            "create.row",
            "create.row=explode",
            "create.row=delay:x",
            "create.row=delay",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in ".{0,80}") {
            let _ = parse(&text);
        }
    }
}
