//! A machine whose engine can't be verified: looked at again and again, and ended only when a user asks for that by its name.

use std::sync::Arc;
use std::time::Duration;

use banger_proto::api::MachineState as State;
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::Handles;
use tokio::sync::mpsc;

use super::adopt::{Fate, carry_out, decide, look};
use super::record::{Machine, Presence};
use super::request::{Ask, Request};
use super::work::Ended;
use super::{delete, stop};
use crate::error::IntoApi;

/// Pause before an engine that can't be verified is looked at again.
const AGAIN: Duration = Duration::from_secs(10);

/// Why a machine's engine can't be verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doubt {
    /// What is wrong.
    pub why: String,
    /// The process, where it is identified by everything but its answer: it may be ended by the machine's name.
    pub process: Option<Handles>,
}

/// Looks at an engine that can't be verified until it can, or is gone, or is ended at a user's wish.
pub async fn look_again(m: Arc<Machine>, mut doubt: Doubt, mut forced: mpsc::Receiver<Ask>) -> Ended {
    loop {
        m.set_known(Presence::doubtful(&doubt));
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => {}
            Some(ask) = forced.recv() => match force(&m, &doubt, ask).await {
                Some(ended) => return ended,
                None => continue,
            },
        }
        let fate = decide(m.state(), look(&m).await);
        if let Fate::LookAgain(again) = fate {
            doubt = again;
            continue;
        }
        let rest = carry_out(&m, fate).await;
        m.set_known(Presence::Known);
        return match rest {
            Some(rest) => rest.work.await,
            None => Ended::Still,
        };
    }
}

/// Ends an engine that is identified by everything but its answer. `None` where it was not ended.
async fn force(m: &Arc<Machine>, doubt: &Doubt, ask: Ask) -> Option<Ended> {
    let Some(handles) = doubt.process.clone() else {
        let message = format!(
            "no process can be told to be the engine of machine `{}`: {}",
            m.name(),
            doubt.why
        );
        let hint = "the daemon looks again every few seconds; `banger audit` shows what there is";
        let _ = ask
            .reply
            .send(Err(ApiError::new(ErrorCode::Engine, message).hint(hint)));
        return None;
    };
    let deletes = matches!(ask.request, Request::Delete);
    let op = m.services.ops.begin(ask.request.operation(), &m.name());
    let _ = ask.reply.send(Ok(op.clone()));
    let work = async {
        op.stage("signal");
        let engine = m.services.engine(&handles.engine).await?;
        engine.signal(&handles, 9).await.map_err(IntoApi::into_api)?;
        let gone = tokio::time::timeout(stop::KILL, engine.wait_exit(&handles)).await;
        gone.map_err(|_| {
            let message = format!(
                "the engine (process {}) did not end within {:?} after signal 9",
                handles.pid,
                stop::KILL
            );
            ApiError::new(ErrorCode::Engine, message)
        })?;
        let cause = format!("ended by request though its engine did not answer ({})", doubt.why);
        if m.state() != State::Deleting {
            stop::engine_gone(m, Some(cause)).await?;
        }
        m.set_known(Presence::Known);
        if deletes { delete::delete(m, &op).await } else { Ok(()) }
    };
    let done = m.services.ops.run(&op, work).await;
    match done {
        Ok(()) if deletes => Some(Ended::Gone),
        // What failed after the engine's end is the machine's task's to do again.
        _ if m.is_known() => Some(Ended::Still),
        _ => None,
    }
}
