//! What listens in a machine, and where that is reached from.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use banger_core::forward;
use banger_proto::agent::Port;
use banger_proto::api::{ListeningPort, Machine as Shown};
use banger_proto::error::ErrorBody;
use futures_util::StreamExt;
use serde::Serialize;
use tokio::time::Instant;
use utoipa::ToSchema;

use super::App;
use crate::agent::{Link, relay};
use crate::error::Failure;
use crate::machine::task;
use crate::reach::reach;

/// How long ports are asked whether they speak HTTP, all together.
const PROBE: Duration = Duration::from_secs(1);
/// Ports that are asked at once.
const PROBES: usize = 16;
/// Ports that are asked at all.
const MAX_PROBES: usize = 64;

/// What listens in a machine.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Ports {
    /// By port and address.
    ports: Vec<ListeningPort>,
}

/// TCP ports on which something in a machine listens, and where they are reached from this host. Only of a machine that runs.
#[utoipa::path(get, path = "/v1/machines/{ref}/ports", tag = "guest", params(("ref" = String, Path)),
    responses((status = 200, body = Ports), (status = "4XX", body = ErrorBody)))]
pub(super) async fn ports(State(app): State<App>, Path(reference): Path<String>) -> Result<Json<Ports>, Failure> {
    app.reconciled().await?;
    let m = app.find(&reference)?;
    // It is not woken only to be looked at.
    task::check_agent(&m)?;
    let (_used, link) = reach(&m).await?;
    let listening = link.ports().await?;
    let shown = m.show();
    let mut ports: Vec<ListeningPort> = listening.iter().map(|port| place(&shown, port)).collect();
    let reached: BTreeSet<u16> = ports.iter().filter(|p| p.endpoint.is_some()).map(|p| p.port).collect();
    let http = speak_http(&link, reached).await;
    for port in &mut ports {
        if http.contains(&port.port) {
            port.url = port.endpoint.as_ref().map(|endpoint| format!("http://{endpoint}/"));
        }
    }
    Ok(Json(Ports { ports }))
}

/// A port of a machine and where it is reached: by the machine's name where it has an address, by a forward otherwise.
fn place(machine: &Shown, port: &Port) -> ListeningPort {
    let by_name = || {
        let reached = machine.address.is_some() && !port.address.is_loopback();
        reached.then(|| format!("{}.vm:{}", machine.name, port.port))
    };
    let by_forward = || {
        let leads = |f: &&banger_proto::api::Forward| f.guest_port == port.port;
        machine.forwards.iter().find(leads).map(forward::endpoint)
    };
    ListeningPort {
        id: machine.id.clone(),
        machine: machine.name.clone(),
        port: port.port,
        address: port.address.to_string(),
        process: port.process.clone(),
        endpoint: by_name().or_else(by_forward),
        url: None,
    }
}

/// Those of the ports that answer as HTTP.
async fn speak_http(link: &Arc<Link>, ports: BTreeSet<u16>) -> BTreeSet<u16> {
    let by = Instant::now() + PROBE;
    let probes = ports.into_iter().take(MAX_PROBES).map(|port| async move {
        let answers = relay::is_http(link, port, by).await;
        matches!(answers, Ok(true)).then_some(port)
    });
    let answered: Vec<Option<u16>> = futures_util::stream::iter(probes)
        .buffer_unordered(PROBES)
        .collect()
        .await;
    answered.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use banger_proto::api::{Forward, MachineSpec, MachineState};

    use super::*;

    fn machine(address: Option<&str>) -> Shown {
        Shown {
            id: "0123456789abcdef".to_owned(),
            name: "web".to_owned(),
            state: MachineState::Running,
            cause: None,
            stalled: None,
            spec: MachineSpec {
                image: String::new(),
                image_digest: String::new(),
                kernel: String::new(),
                kernel_digest: String::new(),
                engine: String::new(),
                accel: String::new(),
                vcpu: 1,
                memory_mib: 1,
                disk_bytes: 1,
                network: String::new(),
                nat: true,
                net_group: None,
            },
            created_at: String::new(),
            started_at: None,
            pid: None,
            guest: None,
            workspace: None,
            boot: None,
            auto_remove: false,
            idle_suspend_after_ms: 0,
            on_panic: Default::default(),
            address: address.map(str::to_owned),
            forwards: vec![Forward {
                host_ip: "0.0.0.0".to_owned(),
                host_port: 8080,
                guest_port: 80,
            }],
        }
    }

    #[test]
    fn a_port_is_reached_by_name_or_by_a_forward() {
        let endpoint = |machine: &Shown, port: u16, address: &str| {
            let port = Port {
                port,
                address: address.parse().unwrap(),
                process: None,
            };
            place(machine, &port).endpoint
        };
        let some = |text: &str| Some(text.to_owned());
        let bridged = machine(Some("172.16.0.2"));
        assert_eq!(endpoint(&bridged, 80, "0.0.0.0"), some("web.vm:80"));
        assert_eq!(endpoint(&bridged, 22, "::"), some("web.vm:22"));
        assert_eq!(endpoint(&bridged, 80, "127.0.0.1"), some("127.0.0.1:8080"));
        assert_eq!(endpoint(&bridged, 81, "::1"), None);
        let user = machine(None);
        assert_eq!(endpoint(&user, 80, "::"), some("127.0.0.1:8080"));
        assert_eq!(endpoint(&user, 22, "0.0.0.0"), None);
    }
}
