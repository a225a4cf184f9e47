//! Taps: made ahead, taken, changed, dropped. Only those whose name has a slot and whose alias is banger's are touched.

use std::collections::BTreeSet;
use std::io;

use banger_system::helper::{EngineUser, HelperCode, HelperError, TapRules};
use banger_system::id::MachineId;
use banger_system::names::{ALIAS_POOL, alias, of_alias};
use banger_system::net::{Network, jail_uid, tap, tap_slot};

use super::links::{Link, Links};
use super::nft::{Tables, apply};
use super::rules::{self, Elements};
use super::tun::Tap;
use super::{bridge, unread};
use crate::ctx::{Ctx, error, failed};
use crate::dispatch::{Locks, collected};

/// How many taps are made at the same time.
const MAKERS: usize = 4;

/// Whose a tap is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Whose {
    Nobodys,
    Machines(MachineId),
}

/// Whose a tap is; refused where it is not banger's.
fn whose(link: &Link) -> Result<Whose, HelperError> {
    if link.kind == "tun" && tap_slot(&link.name).is_some() {
        if link.alias == ALIAS_POOL {
            return Ok(Whose::Nobodys);
        }
        if let Some(machine) = of_alias(&link.alias) {
            return Ok(Whose::Machines(machine));
        }
    }
    Err(error(
        HelperCode::Denied,
        format!("the interface `{}` is not banger's", link.name),
    ))
}

/// Slots of banger's taps: all, and those of nobody.
pub(crate) fn slots(all: &[Link], net: &Network) -> (BTreeSet<u32>, BTreeSet<u32>) {
    let ours = |link: &Link| {
        let slot = tap_slot(&link.name).filter(|slot| net.check(*slot).is_ok())?;
        Some((slot, whose(link).ok()?))
    };
    let found: Vec<(u32, Whose)> = all.iter().filter_map(ours).collect();
    let idle = found.iter().filter(|(_, whose)| *whose == Whose::Nobodys);
    (
        found.iter().map(|(slot, _)| *slot).collect(),
        idle.map(|(slot, _)| *slot).collect(),
    )
}

/// Has every tap of banger's be a port of the bridge and up, after somebody removed the bridge, say.
pub(crate) fn attach_all(links: &mut Links, net: &Network, all: &[Link], bridge: u32) -> Result<(), HelperError> {
    for link in all.iter().filter(|link| whose(link).is_ok()) {
        let Some(slot) = tap_slot(&link.name).filter(|slot| net.check(*slot).is_ok()) else {
            continue;
        };
        if link.master != Some(bridge) || !link.up {
            let done = attach(links, net, slot, link.index, &link.alias, bridge);
            bridge::gone(done).map_err(|e| failed(format_args!("attach `{}`", link.name), e))?;
        }
    }
    Ok(())
}

/// What the sets hold; the tables have to be whole.
fn elements(tables: &mut Tables, net: &Network) -> Result<Elements, HelperError> {
    let whole = tables.own_rules().map_err(unread)? == rules::count(net);
    let found = tables.elements(net).map_err(unread)?;
    found.filter(|_| whole).ok_or_else(|| {
        error(
            HelperCode::NotFound,
            "banger's rules are not there, or not all of them; network_setup makes them",
        )
    })
}

/// Has a slot's rules be these; nothing is started where they are already.
fn let_pass(locks: &Locks, tables: &mut Tables, net: &Network, rules: &TapRules) -> Result<(), HelperError> {
    let _held = locks.rules();
    let have = elements(tables, net)?;
    if have.has(rules) {
        return Ok(());
    }
    let mut want = have.clone();
    want.set(rules);
    apply(&rules::changes(net, &have, &want))
}

/// Has some slots' rules be those of idle taps, in one batch.
fn let_idle_pass(locks: &Locks, tables: &mut Tables, net: &Network, slots: &[u32]) -> Result<(), HelperError> {
    let _held = locks.rules();
    let have = elements(tables, net)?;
    let mut want = have.clone();
    slots.iter().for_each(|slot| want.set(&rules::idle(*slot)));
    apply(&rules::changes(net, &have, &want))
}

/// Has some slots have no rules. Where the tables are gone there is nothing to do.
fn close(locks: &Locks, net: &Network, slots: &[u32]) -> Result<(), HelperError> {
    let _held = locks.rules();
    let mut tables = Tables::open().map_err(unread)?;
    let Some(have) = tables.elements(net).map_err(unread)? else {
        return Ok(());
    };
    let mut want = have.clone();
    slots.iter().for_each(|slot| want.clear(*slot));
    apply(&rules::changes(net, &have, &want))
}

/// Makes a tap a port of the bridge: what is for its machine goes to it alone.
fn attach(links: &mut Links, net: &Network, slot: u32, index: u32, alias: &str, bridge: u32) -> io::Result<()> {
    links.put_up(index, alias, Some(bridge))?;
    links.pin(index, &rules::mac(net, slot).ok_or(io::ErrorKind::InvalidInput)?)
}

/// Makes a tap. Until its last step it goes with this process.
fn make(ctx: &Ctx, links: &mut Links, net: &Network, slot: u32, whose: (&str, u32)) -> io::Result<u32> {
    let (alias, uid) = whose;
    let bridge = links.named(net.bridge())?.ok_or(io::ErrorKind::NotFound)?.index;
    let name = tap(slot);
    let held = Tap::make(&name)?;
    let link = links.named(&name)?.ok_or(io::ErrorKind::NotFound)?;
    bridge::optional(bridge::sysctl(ctx, &format!("ipv6/conf/{name}/disable_ipv6"), "1"))?;
    held.give(uid)?;
    attach(links, net, slot, link.index, alias, bridge)?;
    links.set_isolated(link.index, true)?;
    held.keep()?;
    Ok(link.index)
}

/// Makes idle taps.
pub(crate) fn warm(ctx: &Ctx, locks: &Locks, net: &Network, slots: &[u32]) -> Result<(), HelperError> {
    let mut links = Links::open().map_err(unread)?;
    bridge::there(&mut links, net)?;
    let there: BTreeSet<String> = links.all().map_err(unread)?.into_iter().map(|link| link.name).collect();
    let missing: BTreeSet<u32> = slots
        .iter()
        .copied()
        .filter(|slot| !there.contains(&tap(*slot)))
        .collect();
    let missing: Vec<u32> = missing.into_iter().collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut tables = Tables::open().map_err(unread)?;
    elements(&mut tables, net)?;
    let share = missing.len().div_ceil(MAKERS);
    let (made, failures) = std::thread::scope(|scope| {
        let work = |slots: &[u32]| -> Vec<Result<u32, String>> {
            let mut links = match Links::open() {
                Ok(links) => links,
                Err(e) => return vec![Err(e.to_string())],
            };
            let one = |slot: &u32| {
                let made = make(ctx, &mut links, net, *slot, (ALIAS_POOL, jail_uid(*slot)));
                made.map(|_| *slot).map_err(|e| format!("{}: {e}", tap(*slot)))
            };
            slots.iter().map(one).collect()
        };
        let threads: Vec<_> = missing
            .chunks(share)
            .map(|slots| scope.spawn(move || work(slots)))
            .collect();
        let results: Vec<Result<u32, String>> = threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_default())
            .collect();
        let made: Vec<u32> = results.iter().filter_map(|result| result.clone().ok()).collect();
        (made, results.into_iter().filter_map(Result::err).collect::<Vec<_>>())
    });
    let mut failures = failures;
    failures.extend(
        let_idle_pass(locks, &mut tables, net, &made)
            .err()
            .map(|e| e.to_string()),
    );
    collected("cannot make all idle taps".to_owned(), failures)
}

/// Makes a slot's tap a machine's. True: it had been made ahead.
pub(crate) fn take(
    ctx: &Ctx,
    locks: &Locks,
    net: &Network,
    machine: &MachineId,
    user: EngineUser,
    rules: &TapRules,
) -> Result<bool, HelperError> {
    let name = tap(rules.slot);
    let cannot = |e: io::Error| failed(format_args!("take the tap `{name}`"), e);
    let uid = match user {
        EngineUser::Owner => ctx.record.owner.uid,
        EngineUser::Jail(slot) => jail_uid(slot),
    };
    let mut links = Links::open().map_err(unread)?;
    let mut tables = Tables::open().map_err(unread)?;
    let bridge = bridge::there(&mut links, net)?.index;
    let Some(link) = links.named(&name).map_err(unread)? else {
        elements(&mut tables, net)?;
        let index = make(ctx, &mut links, net, rules.slot, (&alias(machine), uid)).map_err(cannot)?;
        let done = let_pass(locks, &mut tables, net, rules)
            .and_then(|()| links.set_isolated(index, rules.peers.is_empty()).map_err(cannot));
        if let Err(e) = done {
            let _ = links.delete(index);
            return Err(e);
        }
        return Ok(false);
    };
    let pooled = match whose(&link)? {
        Whose::Nobodys => true,
        Whose::Machines(whose) if whose == *machine => false,
        Whose::Machines(whose) => {
            let text = format!("the tap `{name}` is the machine {whose}'s");
            return Err(error(HelperCode::Conflict, text));
        }
    };
    let_pass(locks, &mut tables, net, rules)?;
    if link.owner != Some(uid) {
        Tap::open(&name).and_then(|held| held.give(uid)).map_err(cannot)?;
    }
    if !pooled || !rules.peers.is_empty() {
        links.set_isolated(link.index, rules.peers.is_empty()).map_err(cannot)?;
    }
    if link.master == Some(bridge) && link.up {
        links.set_alias(link.index, &alias(machine)).map_err(cannot)?;
    } else {
        links
            .put_up(link.index, &alias(machine), Some(bridge))
            .map_err(cannot)?;
    }
    Ok(pooled)
}

/// Changes the rules of a machine's tap.
pub(crate) fn change(locks: &Locks, net: &Network, machine: &MachineId, rules: &TapRules) -> Result<(), HelperError> {
    let name = tap(rules.slot);
    let mut links = Links::open().map_err(unread)?;
    bridge::there(&mut links, net)?;
    let absent = || {
        error(
            HelperCode::NotFound,
            format!("the machine {machine} has no tap `{name}`"),
        )
    };
    let link = links.named(&name).map_err(unread)?.ok_or_else(absent)?;
    if whose(&link)? != Whose::Machines(machine.clone()) {
        return Err(absent());
    }
    let_pass(locks, &mut Tables::open().map_err(unread)?, net, rules)?;
    links
        .set_isolated(link.index, rules.peers.is_empty())
        .map_err(|e| failed(format_args!("change the tap `{name}`"), e))
}

/// Removes a machine's tap and its rules. One that is not there, or nobody's, is fine.
pub(crate) fn drop(locks: &Locks, net: &Network, machine: &MachineId, slot: u32) -> Result<(), HelperError> {
    let mut links = Links::open().map_err(unread)?;
    match links.named(&tap(slot)).map_err(unread)? {
        None => close(locks, net, &[slot]),
        Some(link) => match whose(&link)? {
            Whose::Nobodys => Ok(()),
            Whose::Machines(whose) if whose == *machine => delete(locks, &mut links, net, &[(slot, link)]),
            Whose::Machines(_) => {
                let text = format!("the tap `{}` is not the machine {machine}'s", link.name);
                Err(error(HelperCode::Denied, text))
            }
        },
    }
}

/// Slots of a machine's taps.
pub(crate) fn of_machine(machine: &MachineId) -> Result<Vec<u32>, HelperError> {
    let all = Links::open().and_then(|mut links| links.all()).map_err(unread)?;
    let theirs = all
        .iter()
        .filter(|link| of_alias(&link.alias).as_ref() == Some(machine));
    Ok(theirs.filter_map(|link| tap_slot(&link.name)).collect())
}

/// Removes all taps of a machine and their rules.
pub(crate) fn drop_all(locks: &Locks, net: &Network, machine: &MachineId) -> Result<(), HelperError> {
    let mut links = Links::open().map_err(unread)?;
    let all = links.all().map_err(unread)?;
    let theirs = all.into_iter().filter_map(|link| {
        let slot = tap_slot(&link.name)?;
        (whose(&link).ok()? == Whose::Machines(machine.clone())).then_some((slot, link))
    });
    let theirs: Vec<(u32, Link)> = theirs.collect();
    if theirs.is_empty() {
        Ok(())
    } else {
        delete(locks, &mut links, net, &theirs)
    }
}

/// Removes taps of banger's, and their rules. All steps are tried.
pub(crate) fn delete(locks: &Locks, links: &mut Links, net: &Network, taps: &[(u32, Link)]) -> Result<(), HelperError> {
    let mut failures = Vec::new();
    for (_, link) in taps {
        let done = bridge::gone(links.delete(link.index));
        failures.extend(done.err().map(|e| format!("{}: {e}", link.name)));
    }
    let slots: Vec<u32> = taps.iter().map(|(slot, _)| *slot).collect();
    let closed = close(locks, net, &slots);
    failures.extend(closed.err().map(|e| format!("rules: {e}")));
    collected("cannot remove taps and their rules".to_owned(), failures)
}
