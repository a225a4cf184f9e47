//! What machines need of the host beyond an engine's process: tap, block devices, rules, a scope of their own.
//!
//! In user mode there is nothing to do. In system mode the root helper does it ([`client`]); what is to be done is decided here, by
//! pure functions where there is something to decide ([`rules`], [`upstream`]).
//!
//! **What belongs to a machine is marked with its id by the helper**, so that it is found and removed by the id alone
//! ([`System::release`]), whatever the daemon still knows of it.
//!
//! **Taps and rules change one after the other, the whole table only alone**: [`System::setup`] makes all rules again, also after
//! somebody else has flushed them, and must know of every machine that has a tap just then.

pub mod checks;
pub mod client;
mod jail;
pub mod rules;
mod scope;
mod upkeep;
mod upstream;
mod ways;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use banger_core::config::NetworkConfig;
use banger_core::id::MachineId;
use banger_core::plan::DiskRole;
use banger_proto::agent::GuestNetwork;
use banger_proto::error::{ApiError, ErrorCode};
use banger_system::helper::{Answer, DiskStatus, EngineUser, HelperCode, HostObject, Request};
use banger_system::install::{Layout, Record};
use banger_system::net::{self, Network};
use banger_vmm::jail::Jail;
use tokio::sync::{Notify, RwLock, watch};

use client::{CallError, Client, descriptor};
use rules::{Member, Members};
pub use upkeep::watch;

use crate::blocking::blocking;
use crate::error;

/// How long the end of the daemon waits for the host's resolver to be told.
const FORGET: Duration = Duration::from_secs(2);

/// The host's part in machines.
#[derive(Debug)]
pub struct Host(Option<Arc<System>>);

/// The host's part in system mode.
#[derive(Debug)]
pub struct System {
    /// Where everything is.
    pub layout: Layout,
    /// The record of the installation.
    pub record: Record,
    /// The network of the machines: the one in the record.
    pub net: Network,
    /// The one that the configuration asks for, where that is another: the next installation writes it into the record.
    pub asked: Option<Network>,
    /// The root helper.
    pub client: Arc<Client>,
    dns: Option<Vec<Ipv4Addr>>,
    pool: u32,
    members: Mutex<Members>,
    /// Slots of machines that have no row.
    lent: Mutex<BTreeMap<MachineId, u32>>,
    turn: RwLock<()>,
    /// What is done for one machine is done one after the other.
    each: Mutex<BTreeMap<MachineId, Arc<tokio::sync::Mutex<()>>>>,
    due: Notify,
    /// How the last look at the network ended; nothing before the first.
    settled: watch::Sender<Option<Result<(), String>>>,
}

/// A block device that a machine is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Which disk.
    pub role: DiskRole,
    /// What is read.
    pub base: PathBuf,
    /// The file that takes the changes.
    pub changes: PathBuf,
    /// Size of the device in bytes.
    pub bytes: u64,
}

/// What a machine needs of the host before its engine starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wants {
    /// The machine.
    pub id: MachineId,
    /// Its tap.
    pub tap: Option<Member>,
    /// Its block devices.
    pub devices: Vec<Device>,
    /// Who opens both.
    pub user: EngineUser,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    /// User mode: nothing is needed of anybody.
    pub fn user() -> Self {
        Self(None)
    }

    /// System mode.
    pub fn system(layout: Layout, record: Record, config: &NetworkConfig) -> Self {
        Self(Some(Arc::new(System {
            client: Client::new(layout.helper_socket()),
            layout,
            net: record.network.clone(),
            asked: config.net.clone().filter(|asked| *asked != record.network),
            record,
            dns: config.dns.clone(),
            pool: config.tap_pool,
            members: Mutex::default(),
            lent: Mutex::default(),
            turn: RwLock::default(),
            each: Mutex::default(),
            due: Notify::new(),
            settled: watch::Sender::new(None),
        })))
    }

    /// System mode's part, in system mode.
    pub fn get(&self) -> Option<&Arc<System>> {
        self.0.as_ref()
    }

    /// `user` or `system`.
    pub fn mode(&self) -> &'static str {
        if self.0.is_some() { "system" } else { "user" }
    }

    /// The last slot that a machine can have; none where machines have no slots.
    pub fn last_slot(&self) -> Option<u32> {
        self.get().map(|system| system.net.last_slot())
    }

    /// Slots that machines without a row have.
    pub fn lent_slots(&self) -> Vec<u32> {
        self.get()
            .map(|system| lock(&system.lent).values().copied().collect())
            .unwrap_or_default()
    }

    /// Whether this host has device-mapper, for whoever may use it.
    pub fn device_mapper(&self) -> bool {
        self.0.is_some() && std::path::Path::new("/dev/mapper/control").exists()
    }

    /// The address of a slot's machine.
    pub fn address(&self, slot: Option<u32>) -> Option<Ipv4Addr> {
        self.get()?.net.address(slot?).ok()
    }

    /// Makes what a machine needs. What was made before a failure is cleared by [`Host::release`].
    pub async fn attach(&self, wants: Wants) -> Result<(), ApiError> {
        match self.get() {
            Some(system) => {
                // To its end whatever becomes of the caller, so that whoever clears up after it knows of everything.
                let own = system.clone();
                let work = tokio::spawn(crate::ops::part(async move { own.attach(wants).await }));
                work.await.unwrap_or_else(|e| {
                    Err(ApiError::new(
                        ErrorCode::Internal,
                        format!("the root helper's work broke off: {e}"),
                    ))
                })
            }
            None => Ok(()),
        }
    }

    /// Removes everything that the host has of a machine, its jailed engine included. Nothing there is fine.
    pub async fn release(&self, id: &MachineId) -> Result<(), ApiError> {
        match self.get() {
            Some(system) => system.release(id).await,
            None => Ok(()),
        }
    }
}

impl System {
    /// Who drivers of jailed engines talk to.
    pub fn jail(&self) -> Arc<dyn Jail> {
        Arc::new(jail::HelperJail::new(self.client.clone(), self.layout.clone()))
    }

    /// Name servers of the guests.
    pub fn dns(&self) -> Vec<Ipv4Addr> {
        match &self.dns {
            Some(dns) => dns.clone(),
            // Asked anew each time: a laptop changes its network.
            None => upstream::read(self.layout.root()),
        }
    }

    /// What the guest in a slot is told of the network.
    pub fn guest_network(&self, slot: u32) -> Result<GuestNetwork, ApiError> {
        let failed = |e: net::NetError| out_of_network(&e);
        Ok(GuestNetwork {
            address: self.net.address(slot).map_err(failed)?.to_string(),
            prefix: self.net.prefix(),
            gateway: self.net.gateway().to_string(),
            dns: self.dns().iter().map(ToString::to_string).collect(),
            mac: Some(self.net.mac(slot).map_err(failed)?),
        })
    }

    /// MAC address of a slot's machine.
    pub fn mac(&self, slot: u32) -> Result<String, ApiError> {
        self.net.mac(slot).map_err(|e| out_of_network(&e))
    }

    /// Lends a slot to a machine that has no row. `used` are those of rows.
    pub fn lend(&self, id: &MachineId, used: impl IntoIterator<Item = u32>) -> Result<u32, ApiError> {
        let mut lent = lock(&self.lent);
        let used: BTreeSet<u32> = used.into_iter().chain(lent.values().copied()).collect();
        let slot = rules::highest(&used, self.net.last_slot()).ok_or_else(|| full(&self.net))?;
        lent.insert(id.clone(), slot);
        Ok(slot)
    }

    /// Takes it back.
    pub fn take_back(&self, id: &MachineId) {
        lock(&self.lent).remove(id);
    }

    /// A machine that runs has a tap: told at the daemon's start, of every one that may.
    pub fn has_tap(&self, id: &MachineId, member: Member) {
        lock(&self.members).insert(id.clone(), member);
    }

    async fn call(&self, request: Request) -> Result<Answer, ApiError> {
        self.client.call(request).await.map_err(CallError::into_api)
    }

    fn one(&self, id: &MachineId) -> Arc<tokio::sync::Mutex<()>> {
        lock(&self.each).entry(id.clone()).or_default().clone()
    }

    async fn attach(&self, wants: Wants) -> Result<(), ApiError> {
        let one = self.one(&wants.id);
        let _one = one.lock().await;
        let done = self.all(&wants).await;
        if !matches!(&done, Err(e) if e.code == ErrorCode::Conflict) {
            return done;
        }
        // Something of an earlier engine of this machine, which is gone, could not be removed then.
        tracing::warn!(machine = %wants.id, "what is left of an earlier start is removed first");
        self.remove(&wants.id).await?;
        self.all(&wants).await
    }

    async fn all(&self, wants: &Wants) -> Result<(), ApiError> {
        let (tap, disks) = tokio::join!(self.tap(wants), self.disks(wants));
        tap.and(disks)
    }

    async fn tap(&self, wants: &Wants) -> Result<(), ApiError> {
        let Some(member) = wants.tap.clone() else { return Ok(()) };
        let slot = member.slot;
        lock(&self.members).insert(wants.id.clone(), member);
        let mut taken = self.take(wants).await;
        if matches!(&taken, Err(e) if e.code() == Some(HelperCode::NotFound)) {
            // Bridge or rules are gone: somebody has flushed them, or the host is new.
            tracing::warn!(machine = %wants.id, "the network of the machines is not as it has to be; it is made again");
            self.setup().await?;
            taken = self.take(wants).await;
        }
        // The next ones are made while this one starts.
        self.due.notify_one();
        match taken.map_err(CallError::into_api)? {
            Answer::Tap { name, .. } if name == net::tap(slot) => Ok(()),
            other => Err(odd(&other)),
        }
    }

    async fn take(&self, wants: &Wants) -> Result<Answer, CallError> {
        let _turn = self.turn.read().await;
        let Some(rules) = rules::of(&lock(&self.members), &wants.id) else {
            return Ok(Answer::Done);
        };
        let request = Request::TapTake {
            machine: wants.id.clone(),
            user: wants.user,
            rules,
        };
        self.client.call(request).await
    }

    async fn disks(&self, wants: &Wants) -> Result<(), ApiError> {
        for device in &wants.devices {
            let open = device.clone();
            let files = blocking(move || {
                let failed = |path: &PathBuf, e| error::io(format_args!("open {}", path.display()), e);
                let base = File::open(&open.base).map_err(|e| failed(&open.base, e))?;
                let changes = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(&open.changes)
                    .map_err(|e| failed(&open.changes, e))?;
                Ok::<_, ApiError>(vec![descriptor(base), descriptor(changes)])
            })
            .await?;
            let request = Request::DiskAttach {
                machine: wants.id.clone(),
                role: device.role,
                bytes: device.bytes,
                user: wants.user,
            };
            match self
                .client
                .call_with(request, files)
                .await
                .map_err(CallError::into_api)?
            {
                Answer::Disk { node: None } if wants.user != EngineUser::Owner => {}
                Answer::Disk { node: Some(node) } if node == self.layout.node(&wants.id, device.role) => {}
                other => return Err(odd(&other)),
            }
        }
        Ok(())
    }

    async fn release(&self, id: &MachineId) -> Result<(), ApiError> {
        let one = self.one(id);
        let released = {
            let _one = one.lock().await;
            let _turn = self.turn.read().await;
            self.remove(id).await
        };
        // Whoever waits for it has its own handle; the next one makes it anew.
        let mut each = lock(&self.each);
        if each.get(id).is_some_and(|known| Arc::strong_count(known) <= 2) {
            each.remove(id);
        }
        released
    }

    async fn remove(&self, id: &MachineId) -> Result<(), ApiError> {
        let request = Request::MachineRemove { machine: id.clone() };
        self.call(request).await?;
        lock(&self.members).remove(id);
        Ok(())
    }

    /// Removes everything that the host has of a machine if `idle` still says so once nobody else changes anything.
    pub async fn remove_if(&self, id: &MachineId, idle: impl FnOnce() -> bool) -> Result<bool, ApiError> {
        let _turn = self.turn.write().await;
        if !idle() {
            return Ok(false);
        }
        self.remove(id).await.map(|()| true)
    }

    /// Changes what a machine that has a tap reaches outside. One without is told at its next start.
    pub async fn set_nat(&self, id: &MachineId, nat: bool) -> Result<(), ApiError> {
        let _turn = self.turn.read().await;
        let rules = {
            let mut members = lock(&self.members);
            match members.get_mut(id) {
                Some(member) => member.nat = nat,
                None => return Ok(()),
            }
            rules::of(&members, id)
        };
        let Some(rules) = rules else { return Ok(()) };
        let request = Request::TapChange {
            machine: id.clone(),
            rules,
        };
        self.call(request).await.map(drop)
    }

    /// Bridge, addresses and all rules as they have to be.
    pub async fn setup(&self) -> Result<(), ApiError> {
        let _turn = self.turn.write().await;
        let taps = rules::all(&lock(&self.members));
        let request = Request::NetworkSetup { taps };
        self.call(request).await.map(drop)
    }

    /// A slot is free again, and the next machine that takes it: its tap is made now, not when it is taken.
    pub fn freed(&self) {
        self.due.notify_one();
    }

    /// How the last look at the network ended. Right after the daemon's start the first is waited for; none: it takes longer than that.
    pub async fn settled(&self, within: Duration) -> Option<Result<(), String>> {
        let mut settled = self.settled.subscribe();
        let looked = tokio::time::timeout(within, settled.wait_for(Option::is_some)).await;
        looked.ok()?.ok()?.clone()
    }

    /// Makes the taps ahead that are taken next.
    pub async fn warm(&self, used: BTreeSet<u32>) -> Result<(), ApiError> {
        let count = usize::try_from(self.pool).unwrap_or(0);
        let slots = rules::free(&used, self.net.last_slot(), count);
        if slots.is_empty() {
            return Ok(());
        }
        let _turn = self.turn.read().await;
        let request = Request::TapsWarm { slots };
        self.call(request).await.map(drop)
    }

    /// How the block devices of a machine are.
    pub async fn disks_status(&self, id: &MachineId) -> Result<Vec<DiskStatus>, ApiError> {
        match self.call(Request::DisksStatus { machine: id.clone() }).await? {
            Answer::Disks { disks } => Ok(disks),
            other => Err(odd(&other)),
        }
    }

    /// Every host object that carries banger's mark.
    pub async fn inventory(&self) -> Result<Vec<HostObject>, ApiError> {
        let request = Request::Inventory;
        match self.call(request).await? {
            Answer::Inventory { objects } => Ok(objects),
            other => Err(odd(&other)),
        }
    }

    /// The sockets of the name server at the port that is root's to bind: for datagrams, for connections.
    pub async fn name_sockets(&self) -> Result<(OwnedFd, OwnedFd), ApiError> {
        let (answer, fds) = self
            .client
            .call_for(Request::NameSockets)
            .await
            .map_err(CallError::into_api)?;
        let fds: Result<[OwnedFd; 2], _> = fds.try_into();
        match (answer, fds) {
            (Answer::NameSockets, Ok([datagrams, connections])) => Ok((datagrams, connections)),
            (other, _) => Err(odd(&other)),
        }
    }

    /// Has the host's resolver ask this daemon for names below `.vm`. False: it has none that can be told.
    pub async fn route_names(&self, port: u16) -> Result<bool, ApiError> {
        let request = Request::ResolverSet { port };
        match self.call(request).await? {
            Answer::Resolver { routed } => Ok(routed),
            other => Err(odd(&other)),
        }
    }

    /// The opposite, when nobody answers any more.
    pub async fn forget_names(&self) {
        let request = Request::ResolverClear;
        let told = tokio::time::timeout(FORGET, self.client.call(request)).await;
        if !matches!(told, Ok(Ok(_))) {
            tracing::debug!("the host's resolver is not told that names are not served any more");
        }
    }

    /// Whether the helper answers, and which it is.
    pub async fn ping(&self, within: Duration) -> Result<(String, u32), ApiError> {
        self.client.ping(within).await.map_err(CallError::into_api)
    }
}

fn out_of_network(e: &net::NetError) -> ApiError {
    ApiError::new(ErrorCode::Conflict, e.to_string())
        .hint("give [network] in the configuration a larger network, or the one that the machine was made in")
}

/// No slot is free.
pub fn full(net: &Network) -> ApiError {
    ApiError::new(
        ErrorCode::NoSpace,
        format!("every address of the network {} is taken", net.cidr()),
    )
    .hint("delete machines that are not needed, or give [network] in the configuration a larger network")
}

fn odd(answer: &Answer) -> ApiError {
    ApiError::new(ErrorCode::Internal, format!("the root helper answered {answer:?}"))
}
