//! Freezing the guest to be saved, and what a saved one is told before it goes on.

use std::sync::atomic::Ordering;

use banger_proto::agent::{Freeze, Renew};
use banger_proto::error::{ApiError, ErrorCode};

use crate::agent::{Agent, lock};
use crate::console::chain;
use crate::freezer::FreezeError;
use crate::handover::Known;
use crate::{boot_id, personalize, pid1, services};

impl Agent {
    /// Lets nothing run but the agent.
    pub(crate) async fn freeze(&self, wanted: Freeze) -> Result<(), ApiError> {
        self.require_guest()?;
        self.require_personalized()?;
        let _alone = self.handover.lock().await;
        if self.is_frozen() {
            return Ok(());
        }
        if wanted.template {
            self.require_idle()?;
            boot_id::cover().map_err(|e| ApiError::new(ErrorCode::Guest, format!("can't cover the boot id: {e}")))?;
            if self.system.is_systemd() {
                let away = services::put_away(&self.machine_id()).await?;
                self.no_journal.store(away, Ordering::Relaxed);
            }
            personalize::lay_out(std::path::Path::new("/"))
                .map_err(|e| ApiError::new(ErrorCode::Guest, format!("can't lay out files for copies: {e}")))?;
            // What is on the disk now, no copy has to write.
            rustix::fs::sync();
            self.require_idle()?;
            self.sessions.forget_all();
        }
        if wanted.sync {
            // It may take long, and the agent goes on answering meanwhile.
            let synced = tokio::task::spawn_blocking(rustix::fs::sync).await;
            synced.map_err(|e| ApiError::new(ErrorCode::Guest, format!("can't write out what is held back: {e}")))?;
        }
        // From here on nothing waits, so nothing is started any more.
        self.sessions.hold();
        let spare = pid1::is_ours().then_some(1);
        if let Err(e) = self.freezer.freeze(spare) {
            self.sessions.release();
            return Err(refused(&e));
        }
        if wanted.template {
            // The agent is in a new group, for which the kernel sets up much at the first write and the first program. What
            // it does here no copy has to do.
            personalize::rehearse(std::path::Path::new("/"));
            services::rehearse().await;
        }
        Ok(())
    }

    /// Takes up randomness, time and identity, and only then lets everything go on.
    pub(crate) async fn renew(&self, wanted: Renew) -> Result<(), ApiError> {
        self.require_guest()?;
        self.require_personalized()?;
        personalize::check_entropy(&wanted.entropy)?;
        if let Some(identity) = &wanted.identity {
            personalize::check(identity)?;
        }
        let _alone = self.handover.lock().await;
        let own = self.machine_id();
        if wanted.machine_id != own {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("this is the memory of machine {own}, not of {}", wanted.machine_id),
            ));
        }
        personalize::wake(wanted.time_ns, &wanted.entropy)?;
        if let Some(identity) = wanted.identity {
            let network = self.network();
            personalize::take_on(std::path::Path::new("/"), &identity, network.as_ref())?;
            let boot_id = boot_id::renew()
                .map_err(|e| ApiError::new(ErrorCode::Guest, format!("can't make the boot id a new one: {e}")))?;
            *lock(&self.boot_id) = Some(boot_id);
            // Those are the source's, and go on there.
            self.sessions.forget_all();
            self.end_connections();
            services::start_over(self.no_journal.swap(false, Ordering::Relaxed));
            self.set_known(Known {
                machine_id: identity.machine_id,
                init: self.system.has_init(),
                network: identity.network,
            });
        }
        self.freezer.thaw().map_err(|e| refused(&e))?;
        self.sessions.release();
        Ok(())
    }
}

fn refused(e: &FreezeError) -> ApiError {
    ApiError::new(ErrorCode::Guest, chain(e))
}
