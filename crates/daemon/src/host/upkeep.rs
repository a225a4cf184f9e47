//! What is looked after while the daemon runs: that the network is as it has to be (at once when the host's routes change), that idle
//! taps are there, that no machine's changes of disk have run out of space.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use banger_proto::api::MachineState;
use banger_proto::error::ApiError;
use banger_system::helper::DiskStatus;
use tokio::time::Instant;

use super::System;
use super::ways::Ways;
use crate::dns;
use crate::machine::Machine;
use crate::services::Services;

/// How often everything is looked at.
const OFTEN: Duration = Duration::from_secs(10);
/// Time between two looks, at least, when routes change.
const SPACING: Duration = Duration::from_secs(1);
/// How often the host's resolver is told again: it may have been restarted.
const SELDOM: Duration = Duration::from_secs(60);

/// Looks after the host until the daemon stops.
pub async fn watch(services: Arc<Services>) {
    let Some(system) = services.hosting.get().cloned() else {
        return;
    };
    let ways = Ways::listen();
    let mut told = None;
    let mut routed: Option<(bool, Instant)> = None;
    loop {
        let done = system.setup().await;
        let outcome = done.as_ref().map(|_| ()).map_err(|e| e.message.clone());
        system.settled.send_replace(Some(outcome));
        tell_once(&mut told, done);
        let due = routed.is_none_or(|(_, at)| at.elapsed() >= SELDOM);
        if told.is_none() && due && matches!(services.dns.state(), dns::State::Listening(_)) {
            match system.route_names(services.config.network.dns_port).await {
                Ok(now) => {
                    if routed.map(|(was, _)| was) != Some(now) {
                        tracing::info!(routed = now, "names below .vm");
                    }
                    routed = Some((now, Instant::now()));
                }
                Err(e) => tracing::warn!(error = %e.message, "the host's resolver is not told of names below .vm"),
            }
        }
        // Between two such looks only the taps that were taken are made up for: whoever takes one finds the rules whole, or says so.
        let (soonest, next) = (Instant::now() + SPACING, Instant::now() + OFTEN);
        disks(&services, &system).await;
        loop {
            tell_once(&mut told, system.warm(used(&services)).await);
            tokio::select! {
                () = tokio::time::sleep_until(next) => break,
                () = system.due.notified() => {}
                () = async { ways.changed().await; tokio::time::sleep_until(soonest).await } => break,
                () = services.stopping.cancelled() => return,
            }
        }
    }
}

/// Slots that somebody has.
fn used(services: &Services) -> BTreeSet<u32> {
    let rows = services.machines().into_iter().filter_map(|m| m.row().slot);
    rows.chain(services.hosting.lent_slots()).collect()
}

/// The same failure is told once.
fn tell_once(told: &mut Option<String>, done: Result<(), ApiError>) {
    match done {
        Ok(()) => *told = None,
        Err(e) if told.as_ref() == Some(&e.message) => {}
        Err(e) => {
            tracing::error!(error = %e.message, details = ?e.details, "the network of the machines is not as it has to be");
            *told = Some(e.message);
        }
    }
}

async fn disks(services: &Services, system: &System) {
    for m in services.machines() {
        let runs = matches!(m.state(), MachineState::Running | MachineState::Paused);
        if !runs || !crate::machine::disks::on_devices(&m.paths.disks()) {
            continue;
        }
        match system.disks_status(&m.id).await {
            Ok(disks) => tell(&m, &disks).await,
            Err(e) => tracing::debug!(machine = %m.id, error = %e.message, "its disks are not known"),
        }
    }
}

async fn tell(m: &Machine, disks: &[DiskStatus]) {
    let Some(cause) = cause(disks) else { return };
    if m.row().cause.as_ref() == Some(&cause) {
        return;
    }
    tracing::error!(machine = %m.id, cause, "a machine's disk has failed");
    let told = m.change(|row| {
        row.cause = Some(cause);
        Ok(())
    });
    if let Err(e) = told.await {
        tracing::warn!(machine = %m.id, error = %e.message, "cause not written");
    }
}

/// What is wrong with a machine's disks, in words.
fn cause(disks: &[DiskStatus]) -> Option<String> {
    let broken: Vec<&str> = disks.iter().filter(|d| d.invalid).map(|d| d.role.as_str()).collect();
    (!broken.is_empty()).then(|| {
        format!(
            "its changes could not be written to the host's disk (no space?): the {} disk fails; its snapshots are untouched",
            broken.join(" and the ")
        )
    })
}

#[cfg(test)]
mod tests {
    use banger_core::plan::DiskRole;

    use super::*;

    #[test]
    fn only_what_is_broken_is_told() {
        let disk = |role, invalid| DiskStatus {
            role,
            used: 1,
            total: 2,
            invalid,
        };
        assert_eq!(cause(&[disk(DiskRole::Root, false), disk(DiskRole::Work, false)]), None);
        assert_eq!(cause(&[]), None);
        let one = cause(&[disk(DiskRole::Root, false), disk(DiskRole::Work, true)]).unwrap();
        assert!(one.contains("the work disk") && !one.contains("root"));
    }
}
