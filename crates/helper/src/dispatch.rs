//! From a call to the module that carries it out: gates that concern every method, and who waits for whom.
//!
//! Calls of different connections run side by side. What changes a machine holds that machine; what changes a tap holds its slot, so
//! that taking one does not wait for others that are made or removed; what changes the whole network waits for all of these. What
//! only reads, and a signal (a launch that hangs must not keep its engine from being killed), holds nothing.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use banger_system::helper::{
    Answer, Call, DiskRole, HelperCode, HelperError, JailFile, MAX_SLOTS, Request, TapRules, VERSION,
};
use banger_system::id::MachineId;
use banger_system::net::Network;

use crate::ctx::{Ctx, error};
use crate::{disk, engine, inventory, net};

/// What calls are changing just now.
#[derive(Debug, Default)]
pub(crate) struct Locks {
    machines: Set<MachineId>,
    slots: Set<u32>,
    network: RwLock<()>,
    /// Held while the elements of the rules are read and changed.
    rules: Mutex<()>,
}

/// Things of which each is held by one call at most.
#[derive(Debug)]
struct Set<T> {
    held: Mutex<BTreeSet<T>>,
    freed: Condvar,
}

impl<T> Default for Set<T> {
    fn default() -> Self {
        Self {
            held: Mutex::default(),
            freed: Condvar::new(),
        }
    }
}

/// Some of them, held.
struct Held<'a, T: Ord>(&'a Set<T>, Vec<T>);

impl<T: Ord + Clone> Set<T> {
    /// Waits until nobody has any of them, and takes them all at once.
    fn hold(&self, wanted: &[T]) -> Held<'_, T> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        while wanted.iter().any(|one| held.contains(one)) {
            held = self.freed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        held.extend(wanted.iter().cloned());
        Held(self, wanted.to_vec())
    }
}

impl<T: Ord> Drop for Held<'_, T> {
    fn drop(&mut self) {
        let mut held = self.0.held.lock().unwrap_or_else(PoisonError::into_inner);
        self.1.iter().for_each(|one| {
            held.remove(one);
        });
        self.0.freed.notify_all();
    }
}

impl Locks {
    fn machine(&self, id: &MachineId) -> Held<'_, MachineId> {
        self.machines.hold(std::slice::from_ref(id))
    }

    /// The whole network.
    fn network(&self) -> RwLockWriteGuard<'_, ()> {
        self.network.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The taps of some slots.
    fn taps(&self, slots: &[u32]) -> (RwLockReadGuard<'_, ()>, Held<'_, u32>) {
        let network = self.network.read().unwrap_or_else(PoisonError::into_inner);
        (network, self.slots.hold(slots))
    }

    /// The rules' elements.
    pub(crate) fn rules(&self) -> MutexGuard<'_, ()> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Carries out a call with the descriptors that came with it. The answer may have some, too.
pub(crate) fn dispatch(
    ctx: &Ctx,
    locks: &Locks,
    call: Call,
    fds: Vec<OwnedFd>,
) -> Result<(Answer, Vec<OwnedFd>), HelperError> {
    if call.version != VERSION {
        let text = format!("the helper speaks version {VERSION}, the daemon {}", call.version);
        return Err(error(HelperCode::BadVersion, text));
    }
    if fds.len() != descriptors(&call.request) {
        let text = format!(
            "{} takes {} descriptors, {} came",
            call.request.name(),
            descriptors(&call.request),
            fds.len()
        );
        return Err(error(HelperCode::BadRequest, text));
    }
    match call.request {
        Request::NameSockets => net::name_sockets().map(|sockets| (Answer::NameSockets, sockets)),
        request => act(ctx, locks, request, fds).map(|answer| (answer, Vec::new())),
    }
}

fn act(ctx: &Ctx, locks: &Locks, request: Request, fds: Vec<OwnedFd>) -> Result<Answer, HelperError> {
    let net = &ctx.record.network;
    match request {
        // Answered with descriptors, by `dispatch`.
        Request::NameSockets => Err(error(HelperCode::BadRequest, "this call has descriptors in its answer")),
        Request::Ping => Ok(Answer::Pong {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
        }),
        Request::NetworkSetup { taps } => {
            bounded(taps.len())?;
            taps.iter().try_for_each(|rules| check_rules(net, rules))?;
            let _held = locks.network();
            done(net::setup(ctx, net, &taps))
        }
        Request::NetworkRemove => {
            let _held = locks.network();
            done(net::remove(ctx, locks, net))
        }
        Request::TapsWarm { slots } => {
            bounded(slots.len())?;
            slots.iter().try_for_each(|slot| check_slot(net, *slot))?;
            let _held = locks.taps(&slots);
            done(net::warm(ctx, locks, net, &slots))
        }
        Request::TapTake { machine, user, rules } => {
            check_rules(net, &rules)?;
            check_user(user, Some(rules.slot))?;
            let _machine = locks.machine(&machine);
            let _held = locks.taps(&[rules.slot]);
            net::take(ctx, locks, net, &machine, user, &rules)
        }
        Request::TapChange { machine, rules } => {
            check_rules(net, &rules)?;
            let _machine = locks.machine(&machine);
            let _held = locks.taps(&[rules.slot]);
            done(net::change(locks, net, &machine, &rules))
        }
        Request::TapDrop { machine, slot } => {
            check_slot(net, slot)?;
            let _machine = locks.machine(&machine);
            let _held = locks.taps(&[slot]);
            done(net::drop(locks, net, &machine, slot))
        }
        Request::ResolverSet { port } => {
            if port == 0 {
                return Err(error(HelperCode::BadRequest, "port 0 is no port"));
            }
            let _held = locks.network();
            net::resolver_set(ctx, net, port).map(|routed| Answer::Resolver { routed })
        }
        Request::ResolverClear => {
            let _held = locks.network();
            net::resolver_clear(ctx, net).map(|()| Answer::Done)
        }
        Request::DiskAttach {
            machine,
            role,
            bytes,
            user,
        } => {
            check_user(user, None)?;
            let _machine = locks.machine(&machine);
            disk::attach(ctx, &machine, role, bytes, user, fds).map(|node| Answer::Disk { node })
        }
        Request::DisksDetach { machine } => {
            let _machine = locks.machine(&machine);
            done(engine::check_none(ctx, &machine).and_then(|()| disk::detach(ctx, &machine)))
        }
        Request::DisksStatus { machine } => disk::status(ctx, &machine).map(|disks| Answer::Disks { disks }),
        Request::EngineLaunch {
            machine,
            slot,
            vcpu,
            memory_mib,
            files,
            disks,
        } => {
            check_user(banger_system::helper::EngineUser::Jail(slot), None)?;
            check_lists(&files, &disks)?;
            let _machine = locks.machine(&machine);
            let launch = engine::Launch {
                machine,
                slot,
                vcpu,
                memory_mib,
                files,
                disks,
            };
            engine::launch(ctx, &launch, fds).map(|(pid, start_time)| Answer::Engine { pid, start_time })
        }
        Request::EngineSignal { machine, signal } => done(engine::signal(ctx, &machine, signal)),
        Request::EngineEnded { machine } => Ok(Answer::Ended {
            end: engine::ended(&machine),
        }),
        Request::EngineOpen { machine } => {
            let _machine = locks.machine(&machine);
            done(engine::open(ctx, &machine))
        }
        Request::EngineCollect { machine } => {
            let _machine = locks.machine(&machine);
            done(engine::collect(ctx, &machine, fds))
        }
        Request::EngineScope {
            machine,
            pid,
            start_time,
            memory_mib,
        } => {
            let _machine = locks.machine(&machine);
            let process = engine::Theirs { pid, start_time };
            engine::scope(ctx, &machine, process, memory_mib).map(|unit| Answer::Scope { unit })
        }
        Request::ShimScope {
            machine,
            pid,
            start_time,
        } => {
            let _machine = locks.machine(&machine);
            let process = engine::Theirs { pid, start_time };
            engine::shim_scope(ctx, &machine, process).map(|unit| Answer::Scope { unit })
        }
        Request::MachineRemove { machine } => {
            let _machine = locks.machine(&machine);
            done(remove(ctx, locks, net, &machine))
        }
        Request::Inventory => inventory::all(ctx, net).map(|objects| Answer::Inventory { objects }),
    }
}

/// How many descriptors a request needs.
fn descriptors(request: &Request) -> usize {
    match request {
        Request::DiskAttach { .. } => 2,
        Request::EngineLaunch { files, .. } => 1 + files.len(),
        Request::EngineCollect { .. } => 1,
        _ => 0,
    }
}

fn done(result: Result<(), HelperError>) -> Result<Answer, HelperError> {
    result.map(|()| Answer::Done)
}

/// Everything of a machine, which is held. All steps are tried, what failed is collected; but a jail is not taken from under an engine that
/// lives, nor disks from a jail whose nodes lead to them.
fn remove(ctx: &Ctx, locks: &Locks, net: &Network, machine: &MachineId) -> Result<(), HelperError> {
    let mut failures = Vec::new();
    let mut step = |what: &str, result: Result<(), HelperError>| match result {
        Ok(()) => true,
        Err(e) => {
            failures.push(format!("{what}: {e}"));
            failures.extend(e.details.into_iter().map(|detail| format!("{what}: {detail}")));
            false
        }
    };
    let left = |why: &str| Err(error(HelperCode::Conflict, why));
    let ended = step("engine", engine::end(ctx, machine));
    step("scope", engine::end_scope(ctx, machine));
    step("tap", {
        // A machine that is held gets no other tap meanwhile.
        net::slots(machine).and_then(|slots| {
            let _held = locks.taps(&slots);
            net::drop_all(locks, net, machine)
        })
    });
    let gone = match ended {
        true => engine::remove_jail(ctx, machine),
        false => left("left as it is, since the engine is still there"),
    };
    let gone = step("jail", gone);
    let detached = match gone {
        true => disk::detach(ctx, machine),
        false => left("left as they are, since the jail is still there"),
    };
    step("disks", detached);
    collected(format!("cannot remove everything of machine {machine}"), failures)
}

/// No failures, or one error that has them all.
pub(crate) fn collected(message: String, failures: Vec<String>) -> Result<(), HelperError> {
    if failures.is_empty() {
        return Ok(());
    }
    Err(HelperError {
        details: failures,
        ..error(HelperCode::Failed, message)
    })
}

fn bounded(count: usize) -> Result<(), HelperError> {
    if count <= MAX_SLOTS {
        Ok(())
    } else {
        Err(error(
            HelperCode::BadRequest,
            format!("{count} slots in one call; {MAX_SLOTS} are the most"),
        ))
    }
}

fn check_slot(net: &Network, slot: u32) -> Result<(), HelperError> {
    net.check(slot)
        .map_err(|e| error(HelperCode::BadRequest, e.to_string()))
}

fn check_rules(net: &Network, rules: &TapRules) -> Result<(), HelperError> {
    bounded(rules.peers.len())?;
    check_slot(net, rules.slot)?;
    rules.peers.iter().try_for_each(|peer| check_slot(net, *peer))?;
    if rules.peers.contains(&rules.slot) {
        let text = format!("slot {} cannot be its own peer", rules.slot);
        return Err(error(HelperCode::BadRequest, text));
    }
    Ok(())
}

/// A jail's user must be one that there is, and, where a slot is spoken of, that slot's.
fn check_user(user: banger_system::helper::EngineUser, slot: Option<u32>) -> Result<(), HelperError> {
    use banger_system::helper::EngineUser::{Jail, Owner};
    match user {
        Owner => Ok(()),
        Jail(jail) if jail <= banger_system::net::MAX_SLOT && slot.is_none_or(|slot| slot == jail) => Ok(()),
        Jail(jail) => Err(error(
            HelperCode::BadRequest,
            format!("jail {jail} is not this machine's"),
        )),
    }
}

/// A file or disk is named once.
fn check_lists(files: &[JailFile], disks: &[DiskRole]) -> Result<(), HelperError> {
    let twice = |what: &str| error(HelperCode::BadRequest, format!("a {what} is named twice"));
    if files.iter().enumerate().any(|(n, file)| files[..n].contains(file)) {
        return Err(twice("file"));
    }
    if disks.iter().enumerate().any(|(n, disk)| disks[..n].contains(disk)) {
        return Err(twice("disk"));
    }
    Ok(())
}
