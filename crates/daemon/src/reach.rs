//! The way to a machine's guest for whoever wants something of it.

use std::sync::Arc;

use banger_proto::api::{MachineState, StartMachine};
use banger_proto::error::{ApiError, ErrorCode};

use crate::agent::Link;
use crate::idle::{self, Use};
use crate::machine::{Machine, request, task};

/// The link of a machine that runs, and the machine's use for as long as it is held. A machine that is suspended is woken.
pub async fn reach(m: &Arc<Machine>) -> Result<(Use, Arc<Link>), ApiError> {
    // Before its state is looked at: whoever suspends what is idle sees the use, or is seen.
    let used = idle::begin(m);
    let wait = match m.state() {
        MachineState::Suspended | MachineState::Suspending => true,
        // Until its engine is there nobody answers, and in one that is restored nothing runs yet.
        MachineState::Starting => m.live().is_none() || m.paths.memory().exists(),
        _ => false,
    };
    if wait {
        wake(m).await?;
    }
    task::check_agent(m)?;
    let Some(live) = m.live() else {
        let why = m.show().cause.unwrap_or_else(|| "its engine is not up yet".to_owned());
        return Err(ApiError::new(
            ErrorCode::WrongState,
            format!("machine `{}` cannot be talked to: {why}", m.name()),
        ));
    };
    Ok((used, live.link))
}

/// Wakes a machine. Whoever comes second waits for the same.
async fn wake(m: &Arc<Machine>) -> Result<(), ApiError> {
    let op = request::ask(m, request::Request::Start(StartMachine::default())).await?;
    let mut state = op.subscribe();
    let ended = state.wait_for(|o| o.ended_at.is_some()).await;
    match ended.map(|o| o.error.clone()) {
        Ok(Some(e)) => Err(e),
        _ => Ok(()),
    }
}
