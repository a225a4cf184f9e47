//! Removing a machine: engine, files, names, and the row last. Every step runs, errors are collected.

use std::sync::Arc;

use banger_core::state::{self, Event};
use banger_proto::error::ApiError;

use super::record::Machine;
use super::start::remove_dir;
use super::stop;
use super::{adopt, description};
use crate::blocking::blocking;
use crate::error::IntoApi;
use crate::failpoint;
use crate::ops::Op;

/// Removes the machine. On failure the row stays, in state `deleting`, so that a second delete goes on with what is left.
pub async fn delete(m: &Arc<Machine>, op: &Op) -> Result<(), ApiError> {
    let before = m.state();
    m.happen(Event::DeleteBegins, |_| {}).await?;
    failpoint::hit("delete.row").await?;
    let mut errors = Vec::new();
    if m.live().is_none() && state::may_have_engine(before) {
        // What was lost sight of would run on without an owner.
        keep(&mut errors, adopt::find_lost(m).await);
    }
    if let Some(live) = m.live() {
        op.stage("end");
        // What it would write is removed next, so it is not asked.
        keep(&mut errors, stop::kill_now(&live).await);
    }
    keep(&mut errors, failpoint::hit("delete.stopped").await);
    op.stage("files");
    keep(&mut errors, stop::clean_up(m).await);
    keep(&mut errors, m.services.ssh.forget(&m.id).await);
    // Half a directory is nothing that could be taken back.
    keep(&mut errors, stop::remove_file(&description::path(&m.paths)));
    let state = m.paths.state.clone();
    keep(&mut errors, blocking(move || remove_dir(&state)).await);
    keep(&mut errors, failpoint::hit("delete.files").await);
    if let Some(first) = errors.first().cloned() {
        let details: Vec<String> = errors.iter().map(|e| e.message.clone()).collect();
        let cause = format!("not wholly removed: {}", first.message);
        m.change(|row| {
            row.cause = Some(cause);
            Ok(())
        })
        .await?;
        let message = format!("machine {} is not wholly removed", m.name());
        return Err(ApiError::new(first.code, message)
            .hint("delete it again")
            .details(details));
    }
    let db = &m.services.db;
    db.delete_machine(m.id.clone()).await.map_err(IntoApi::into_api)?;
    db.keep_room().await;
    // Before the operation ends, so that who waited for its end does not find the machine any more.
    m.services.forget(&m.id);
    if let Some(system) = m.services.hosting.get() {
        system.freed();
    }
    m.set_gone();
    Ok(())
}

fn keep(errors: &mut Vec<ApiError>, result: Result<(), ApiError>) {
    if let Err(e) = result {
        tracing::warn!(error = %e.message, "a step of the removal failed");
        errors.push(e);
    }
}
