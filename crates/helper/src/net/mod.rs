//! Bridge, taps and rules of machines, in the network namespace that the helper runs in.
//!
//! * [`netlink`]: the socket; [`links`]: interfaces over it; [`tun`]: what only `/dev/net/tun` can,
//! * [`bridge`], [`taps`]: what is banger's among them, and nothing else,
//! * [`rules`]: text and elements, pure; [`nft`]: reading and changing them,
//! * [`uplinks`]: by which interfaces machines reach what is outside,
//! * [`foreign`]: what others' firewalls are told; [`resolver`]: the host's resolver.
//!
//! Nothing is remembered: whose an interface is says its alias, what may pass say the sets, and both are read anew by every call.

mod bridge;
mod foreign;
mod links;
mod netlink;
mod nft;
mod resolver;
mod rules;
mod taps;
mod tun;
mod uplinks;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;

use banger_system::helper::{Answer, EngineUser, HelperError, HostObject, ObjectKind, TapRules};
use banger_system::id::MachineId;
use banger_system::names::{ALIAS_PREFIX, NFT_TABLE, of_alias};
use banger_system::net::{Network, tap, tap_slot};

use crate::ctx::{Ctx, failed};
use crate::dispatch::{Locks, collected};
use links::{Link, Links};
use nft::{Family, Tables};
use rules::Elements;

/// The kernel did not say what is there.
fn unread(e: std::io::Error) -> HelperError {
    failed("look at the interfaces and rules", e)
}

/// Bridge, forwarding and rules, as they have to be.
pub(crate) fn setup(ctx: &Ctx, net: &Network, told: &[TapRules]) -> Result<(), HelperError> {
    let mut links = Links::open().map_err(unread)?;
    bridge::find(&mut links, net)?;
    bridge::check_network(ctx, &mut links, net)?;
    bridge::remove_others(&mut links, net)?;
    // The rules are there before the bridge carries anything, and before anything is forwarded.
    let all = links.all().map_err(unread)?;
    let (there, idle) = taps::slots(&all, net);
    let uplinks = uplinks::names(&links.defaults().map_err(unread)?, &all);
    let mut tables = Tables::open().map_err(unread)?;
    let have = tables.elements(net).map_err(unread)?;
    let had = have.clone().unwrap_or_default();
    let forwarding = uplinks::look(ctx, &had.forwarding, &uplinks).map_err(unread)?;
    let want = Elements {
        uplinks,
        forwarding: forwarding.noted.clone(),
        ..rules::wanted(told, &there, &idle, &had)
    };
    // Rules that are right stay: with them the kernel would forget how many connections each machine has.
    let bound = rules::bound(connections(ctx));
    let right = tables.own_are(net, bound).map_err(unread)?;
    nft::apply(&match have.filter(|_| right) {
        Some(have) => rules::changes(net, &have, &want),
        None => rules::tables(net, bound, &want),
    })?;
    let bridge = bridge::ensure(ctx, &mut links, net)?;
    taps::attach_all(&mut links, net, &all, bridge)?;
    let mut failures = uplinks::apply(ctx, &forwarding);
    if failures.is_empty() && !forwarding.off.is_empty() {
        let mut less = want.clone();
        less.forwarding.retain(|name| !forwarding.off.contains(name));
        failures.extend(
            nft::apply(&rules::changes(net, &want, &less))
                .err()
                .map(|e| e.to_string()),
        );
    }
    let told = foreign::let_through(&mut tables, net, &want.uplinks);
    failures.extend(told.err().map(|e| e.to_string()));
    collected("cannot set up all of the network".to_owned(), failures)
}

/// How many connections the kernel keeps for the whole host; none where it does not say.
fn connections(ctx: &Ctx) -> Option<u32> {
    let file = ctx.proc.join("sys/net/netfilter/nf_conntrack_max");
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// The opposite. Refused while a machine's tap is there.
pub(crate) fn remove(ctx: &Ctx, locks: &Locks, net: &Network) -> Result<(), HelperError> {
    let mut links = Links::open().map_err(unread)?;
    let bridge = bridge::find(&mut links, net)?;
    let all = links.all().map_err(unread)?;
    bridge::check_unused(&all, bridge.as_ref())?;
    let (there, _) = taps::slots(&all, net);
    let idle = all.into_iter().filter_map(|link| {
        let slot = tap_slot(&link.name).filter(|slot| there.contains(slot))?;
        Some((slot, link))
    });
    let idle: Vec<(u32, Link)> = idle.collect();
    let mut failures = Vec::new();
    let mut step = |result: Result<(), HelperError>| {
        if let Err(e) = result {
            failures.push(e.to_string());
            failures.extend(e.details);
        }
    };
    step(taps::delete(locks, &mut links, net, &idle));
    if let Some(link) = bridge {
        let done = bridge::gone(links.delete(link.index));
        step(done.map_err(|e| failed(format_args!("remove the bridge `{}`", link.name), e)));
    }
    let mut tables = Tables::open().map_err(unread)?;
    // What banger switched on and nobody else has taken over is switched off, as long as the rules that hold it are there.
    let noted = tables.elements(net).map_err(unread)?.unwrap_or_default().forwarding;
    let forwarding = uplinks::look(ctx, &noted, &BTreeSet::new()).map_err(unread)?;
    let forwarded = uplinks::apply(ctx, &forwarding);
    step(collected("cannot switch off forwarding".to_owned(), forwarded));
    step(nft::apply(&rules::remove()));
    failures.extend(foreign::take_back(&mut tables, net));
    collected("cannot remove all of the network".to_owned(), failures)
}

/// Makes idle taps.
pub(crate) fn warm(ctx: &Ctx, locks: &Locks, net: &Network, slots: &[u32]) -> Result<(), HelperError> {
    taps::warm(ctx, locks, net, slots)
}

/// Makes a slot's tap a machine's.
pub(crate) fn take(
    ctx: &Ctx,
    locks: &Locks,
    net: &Network,
    machine: &MachineId,
    user: EngineUser,
    rules: &TapRules,
) -> Result<Answer, HelperError> {
    let pooled = taps::take(ctx, locks, net, machine, user, rules)?;
    Ok(Answer::Tap {
        name: tap(rules.slot),
        pooled,
    })
}

/// Changes the rules of a machine's tap.
pub(crate) fn change(locks: &Locks, net: &Network, machine: &MachineId, rules: &TapRules) -> Result<(), HelperError> {
    taps::change(locks, net, machine, rules)
}

/// Removes a machine's tap and its rules.
pub(crate) fn drop(locks: &Locks, net: &Network, machine: &MachineId, slot: u32) -> Result<(), HelperError> {
    taps::drop(locks, net, machine, slot)
}

/// Slots of a machine's taps.
pub(crate) fn slots(machine: &MachineId) -> Result<Vec<u32>, HelperError> {
    taps::of_machine(machine)
}

/// Removes all taps of a machine.
pub(crate) fn drop_all(locks: &Locks, net: &Network, machine: &MachineId) -> Result<(), HelperError> {
    taps::drop_all(locks, net, machine)
}

/// The sockets of the daemon's name server.
pub(crate) fn name_sockets() -> Result<Vec<OwnedFd>, HelperError> {
    resolver::sockets()
}

/// Has the host's resolver ask the daemon. False: there is none to tell.
pub(crate) fn resolver_set(ctx: &Ctx, net: &Network, port: u16) -> Result<bool, HelperError> {
    bridge::there(&mut Links::open().map_err(unread)?, net)?;
    resolver::set(ctx, net, port)
}

/// The opposite. Without the bridge there is nothing left of it.
pub(crate) fn resolver_clear(ctx: &Ctx, net: &Network) -> Result<(), HelperError> {
    match bridge::find(&mut Links::open().map_err(unread)?, net)? {
        Some(_) => resolver::clear(ctx, net),
        None => Ok(()),
    }
}

/// Interfaces and rules that are banger's.
pub(crate) fn inventory(net: &Network) -> Result<Vec<HostObject>, HelperError> {
    let object = |kind, name: String, machine: Option<MachineId>| HostObject { kind, name, machine };
    let mut objects = Vec::new();
    let mut machines: BTreeMap<u32, MachineId> = BTreeMap::new();
    for link in Links::open().and_then(|mut links| links.all()).map_err(unread)? {
        if !link.alias.starts_with(ALIAS_PREFIX) {
            continue;
        }
        let machine = of_alias(&link.alias);
        if let (Some(slot), Some(machine)) = (tap_slot(&link.name), &machine) {
            machines.insert(slot, machine.clone());
        }
        objects.push(object(ObjectKind::Interface, link.name, machine));
    }
    let mut tables = Tables::open().map_err(unread)?;
    for (family, word) in [(Family::Bridge, "bridge"), (Family::Ip, "ip")] {
        if tables.has_table(family, NFT_TABLE).map_err(unread)? {
            objects.push(object(ObjectKind::Rule, format!("table {word} {NFT_TABLE}"), None));
        }
    }
    let elements = tables.elements(net).map_err(unread)?.unwrap_or_default();
    let mut rule = |set: &str, slot: u32, more: String| {
        let name = format!("{set} {}{more}", tap(slot));
        objects.push(object(ObjectKind::Rule, name, machines.get(&slot).cloned()));
    };
    elements
        .guests
        .iter()
        .for_each(|slot| rule("guests", *slot, String::new()));
    elements.nat.iter().for_each(|slot| rule("nat", *slot, String::new()));
    for (a, b) in &elements.pairs {
        rule("pairs", *a, format!(" {}", tap(*b)));
    }
    for comment in foreign::marked(&mut tables).map_err(unread)? {
        objects.push(object(ObjectKind::Rule, comment, None));
    }
    Ok(objects)
}
