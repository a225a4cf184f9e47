//! Starting a machine from saved memory instead of booting it.
//!
//! ```text
//!   check the files ─▶ launch, paused ─▶ (nothing has run yet: may be taken back) ─▶ resume ─▶ agent ─▶ renew ─▶ running
//! ```
//!
//! Nothing of the guest but kernel and agent runs before the renew has given it fresh randomness, the time and its identity. A guest
//! that cannot be given them is ended, never handed over.

use std::sync::Arc;
use std::time::Duration;

use banger_core::state::Event;
use banger_proto::agent::Health;
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::{Still, space};

use super::checkpoint::Checkpoint;
use super::live::Live;
use super::record::Machine;
use super::stages::Stages;
use super::{save, start, stop};
use crate::agent::sanitize;
use crate::blocking::blocking;
use crate::error::{self, IntoApi};
use crate::failpoint;

/// How long a restored guest may take to go on. It only has to answer.
const RENEW: Duration = Duration::from_secs(30);

/// As whom the restored guest goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Becomes {
    /// Who it was.
    Itself,
    /// This machine, being a copy of another.
    ThisMachine,
}

/// Starts the engine with a checkpoint's memory, its processors stopped. The row says `starting` already, the disks are there.
pub async fn launch(m: &Arc<Machine>, stages: &mut Stages, from: &Checkpoint) -> Result<(), ApiError> {
    stages.enter("restore");
    stages.cancellable(from.check(&m.services)).await?;
    let mut saved = from.saved();
    settle(from).await?;
    let memory = m.paths.memory();
    stop::remove_file(&memory)?;
    std::fs::hard_link(&saved.memory, &memory)
        .map_err(|e| error::io(format_args!("link {}", saved.memory.display()), e))?;
    saved.memory = memory;
    // Keys are there when the guest asks who it is: making them takes a program of its own.
    let name = m.name();
    let keys = m.services.ssh.of_machine(&m.paths.state, &m.id, &name);
    let (launched, _) = tokio::join!(start::launch_engine(m, stages, Some(saved)), keys);
    launched
}

/// Makes sure that an engine that maps a checkpoint's memory is not ended for want of space: on tmpfs all of it gets its space now.
pub async fn settle(from: &Checkpoint) -> Result<(), ApiError> {
    let memory = from.saved().memory;
    blocking(move || {
        space::settle_mapped(&memory).map_err(|e| {
            let what = format!(
                "give all of the memory in {} its space, which tmpfs needs",
                memory.display()
            );
            error::io(what, e)
        })
    })
    .await
}

/// Lets it run, and makes it who it is to be.
pub async fn go_on(m: &Arc<Machine>, stages: &mut Stages, from: &Checkpoint, becomes: Becomes) -> Result<(), ApiError> {
    let live = start::live(m)?;
    stages.enter("agent");
    // The host's greeting is there when the guest looks.
    let by = stages.deadline() + start::GRACE;
    let connected = async {
        let (resumed, connected) =
            tokio::join!(live.engine.resume(&live.handles, Still::Loaded), live.link.connect(by));
        resumed.map_err(IntoApi::into_api)?;
        connected.map(drop).map_err(IntoApi::into_api)
    };
    stages
        .bounded(start::or_exit(m, &live, connected))
        .await
        .map_err(|e| start::explain(m, stages, e))?;
    failpoint::hit("restore.channel").await?;
    stages.enter("identity");
    let health = renew(m, stages, &live, &from.manifest.machine_id, becomes).await?;
    // Until it is `running` it can be taken back.
    failpoint::hit("restore.renewed").await?;
    stages.check()?;
    m.happen(Event::AgentReady, |_| {}).await?;
    m.set_guest(sanitize::guest_info(&health));
    Ok(())
}

async fn renew(
    m: &Arc<Machine>,
    stages: &Stages,
    live: &Live,
    whose: &str,
    becomes: Becomes,
) -> Result<Health, ApiError> {
    let health = stages
        .bounded(start::or_exit(m, live, async {
            let identity = match becomes {
                Becomes::Itself => None,
                Becomes::ThisMachine => Some(banger_proto::agent::Personalize {
                    // What was masked is masked.
                    mask_units: Vec::new(),
                    ..start::identity(m).await?
                }),
            };
            let renew = save::renew(whose, identity)?;
            live.link.renew(&renew, RENEW).await.map_err(IntoApi::into_api)
        }))
        .await
        .map_err(|e| start::explain(m, stages, e))?;
    if health.frozen || health.machine_id != m.id.as_str() {
        return Err(ApiError::new(
            ErrorCode::Guest,
            format!("the restored guest of machine {} did not become it", m.name()),
        ));
    }
    Ok(health)
}

/// Ends what a restore has come to, while the machine is still `starting`.
pub async fn take_back(m: &Arc<Machine>) -> Result<(), ApiError> {
    let ended = match m.live() {
        Some(live) => stop::kill_now(&live).await,
        None => Ok(()),
    };
    ended.and(stop::clean_up(m).await)
}
