//! What every part of the daemon shares.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use banger_core::config::Config;
use banger_core::id::MachineId;
use banger_core::reference::{self, Candidate};
use banger_core::spec::{Place, Shape};
use banger_proto::error::{ApiError, ErrorCode};
use banger_vmm::Engine;
use banger_vmm::host::{HostFacts, Roots};
use tokio::sync::{OnceCell, watch};
use tokio_util::sync::CancellationToken;

use crate::db::Db;
use crate::dns::Dns;
use crate::engines::Engines;
use crate::error::IntoApi;
use crate::forwards::Forwards;
use crate::host::Host;
use crate::machine::Machine;
use crate::machine::disks::{self, Form};
use crate::ops::Ops;
use crate::paths::Paths;
use crate::recover;
use crate::ssh::Ssh;
use crate::stock::Stock;
use crate::templates::Templates;
use crate::tsc;

/// How long a request that only reads waits for the machines to be reconciled.
const SETTLE: std::time::Duration = std::time::Duration::from_secs(2);

/// What every part of the daemon shares.
pub struct Services {
    /// Directories.
    pub paths: Paths,
    /// Configuration.
    pub config: Config,
    /// Database.
    pub db: Db,
    /// Operations.
    pub ops: Arc<Ops>,
    /// Images and kernels.
    pub stock: Stock,
    /// Templates.
    pub templates: Templates,
    /// Keys and known hosts.
    pub ssh: Ssh,
    /// Ports of this host that lead to machines.
    pub forwards: Forwards,
    /// Names of machines on the bridge.
    pub dns: Dns,
    /// What machines need of root.
    pub hosting: Host,
    /// Directory of `banger-shim` and `banger-agent`.
    pub libexec: PathBuf,
    /// When the daemon started.
    pub started_at: String,
    /// Cancelled when the daemon is to stop.
    pub stopping: CancellationToken,
    /// True once all machines are reconciled.
    pub ready: watch::Sender<bool>,
    machines: RwLock<BTreeMap<MachineId, Arc<Machine>>>,
    host: OnceCell<HostFacts>,
    /// Engine drivers.
    pub engines: Engines,
}

impl std::fmt::Debug for Services {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Services")
            .field("paths", &self.paths)
            .finish_non_exhaustive()
    }
}

impl Services {
    /// Puts them together.
    pub fn new(
        paths: Paths,
        config: Config,
        db: Db,
        ops: Arc<Ops>,
        stock: Stock,
        hosting: Host,
        libexec: PathBuf,
    ) -> Self {
        let ssh = Ssh::new(paths.ssh());
        let templates = Templates::new(paths.templates(), ops.clone());
        Self {
            paths,
            config,
            db,
            ops,
            stock,
            templates,
            ssh,
            forwards: Forwards::default(),
            dns: Dns::default(),
            hosting,
            libexec,
            started_at: crate::time::now(),
            stopping: CancellationToken::new(),
            ready: watch::Sender::new(false),
            machines: RwLock::default(),
            host: OnceCell::new(),
            engines: Engines::default(),
        }
    }

    /// Facts of the host, read once.
    pub async fn host(&self) -> &HostFacts {
        self.host
            .get_or_init(|| async {
                let kept = self.paths.tsc();
                let read = move || {
                    let mut facts = HostFacts::read(&Roots::default());
                    facts.tsc = facts.tsc.map(|found| tsc::steadied(&kept, found));
                    facts
                };
                match tokio::task::spawn_blocking(read).await {
                    Ok(facts) => facts,
                    // The runtime is going down; nothing is started any more.
                    Err(_) => std::future::pending().await,
                }
            })
            .await
    }

    /// Size of the host, for defaults and limits.
    pub async fn shape(&self) -> Shape {
        let host = self.host().await;
        Shape {
            cpus: host.usable_cpus,
            memory_mib: host.memory_mib,
        }
    }

    /// Where machines are made.
    pub async fn place(&self) -> Place {
        Place {
            host: self.shape().await,
            bridge: self.hosting.get().is_some(),
        }
    }

    /// The engine driver of a name. One that is not installed is looked for again at every request.
    pub async fn engine(&self, name: &str) -> Result<Arc<dyn Engine>, ApiError> {
        self.engines.get(name, self).await
    }

    /// The form of the disks of a new machine of this engine.
    pub async fn form(&self, engine: &str) -> Result<Form, ApiError> {
        let reads_qcow2 = self.engine(engine).await?.capabilities().qcow2;
        let hosting = &self.hosting;
        Ok(disks::choose(
            hosting.get().is_some(),
            hosting.device_mapper(),
            reads_qcow2,
        ))
    }

    /// All machines, oldest first.
    pub fn machines(&self) -> Vec<Arc<Machine>> {
        let mut list: Vec<_> = self
            .machines
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect();
        list.sort_by_cached_key(|m| (m.row().created_at, m.id.clone()));
        list
    }

    /// Makes a machine known.
    pub fn remember(&self, machine: Arc<Machine>) {
        self.machines
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(machine.id.clone(), machine);
    }

    /// Forgets a machine that is no more.
    pub fn forget(&self, id: &MachineId) {
        self.machines.write().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    /// The machine that a reference means.
    pub fn find(&self, wanted: &str) -> Result<Arc<Machine>, ApiError> {
        self.look_up(wanted, |candidates| reference::find(wanted, candidates))
    }

    /// The same where something is lost: by a whole name, or a good part of an id.
    pub fn find_exact(&self, wanted: &str) -> Result<Arc<Machine>, ApiError> {
        self.look_up(wanted, |candidates| reference::find_exact(wanted, candidates))
    }

    fn look_up(
        &self,
        wanted: &str,
        find: impl FnOnce(Vec<Candidate<'_>>) -> Result<usize, reference::ReferenceError>,
    ) -> Result<Arc<Machine>, ApiError> {
        let machines = self.machines();
        let shown: Vec<_> = machines.iter().map(|m| m.show()).collect();
        let candidates = shown.iter().map(|m| Candidate {
            id: &m.id,
            name: &m.name,
            address: m.address.as_deref(),
        });
        let found = find(candidates.collect()).map_err(IntoApi::into_api);
        let index = found.map_err(|e| match e.code {
            ErrorCode::NotFound
                if recover::list(self)
                    .iter()
                    .any(|lost| lost.name == wanted || lost.id == wanted) =>
            {
                let message = format!("{}: its files are there, but it is not in the database", e.message);
                ApiError::new(ErrorCode::NotFound, message).hint(format!("take it back: banger vm recover {wanted}"))
            }
            _ => e,
        })?;
        Ok(machines[index].clone())
    }

    /// Waits a moment for the machines to be reconciled, so that what is read is what is true; one that does not answer holds up
    /// nobody for long.
    pub async fn settled(&self) {
        let _ = tokio::time::timeout(SETTLE, self.reconciled()).await;
    }

    /// Waits until every machine is reconciled. Requests that change something come after it.
    pub async fn reconciled(&self) -> Result<(), ApiError> {
        let mut ready = self.ready.subscribe();
        tokio::select! {
            ready = ready.wait_for(|ready| *ready) => match ready {
                Ok(_) => Ok(()),
                Err(_) => Err(ApiError::new(ErrorCode::Unavailable, "the daemon is stopping")),
            },
            () = self.stopping.cancelled() => Err(ApiError::new(ErrorCode::Unavailable, "the daemon is stopping")),
        }
    }
}
