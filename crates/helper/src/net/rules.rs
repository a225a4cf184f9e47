//! The text of the rules, and what of it belongs to which slot. Pure.
//!
//! Two tables of banger's own. What passes is decided by their sets, so that a machine is a few elements:
//!
//! * `bridge banger`: `guests` (tap, MAC, address) is all that a machine may send as; `pairs` (tap, tap) who reaches whom,
//! * `ip banger`: `nat` are the addresses that reach what is outside.
//!
//! What has no element is dropped, so a tap whose elements are missing is closed, not open.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use banger_system::helper::TapRules;
use banger_system::names::NFT_TABLE;
use banger_system::net::{Network, TAP_PREFIX, tap, tap_slot};

/// Says, on its way through the host's own hooks (`br_netfilter`), that a frame between two machines may pass.
const PAIR_MARK: u32 = 0x6261_6e67;
/// Bytes of an interface's name in a set.
const NAME: usize = 16;
/// Bytes of a key of `guests`: name, MAC with its padding, address.
pub(crate) const GUEST_KEY: usize = NAME + 8 + 4;
/// Bytes of a key of `pairs`.
const PAIR_KEY: usize = 2 * NAME;

/// What is in the sets, by slots.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Elements {
    /// Slots whose machines may send.
    pub(crate) guests: BTreeSet<u32>,
    /// Slots whose machines reach what is outside.
    pub(crate) nat: BTreeSet<u32>,
    /// Slots of which the first reaches the second; both directions are in it.
    pub(crate) pairs: BTreeSet<(u32, u32)>,
}

impl Elements {
    /// Has a slot's rules be these.
    pub(crate) fn set(&mut self, rules: &TapRules) {
        self.clear(rules.slot);
        self.guests.insert(rules.slot);
        if rules.nat {
            self.nat.insert(rules.slot);
        }
        for peer in &rules.peers {
            self.pairs.insert((rules.slot, *peer));
            self.pairs.insert((*peer, rules.slot));
        }
    }

    /// Has a slot have no rules: nothing passes.
    pub(crate) fn clear(&mut self, slot: u32) {
        self.guests.remove(&slot);
        self.nat.remove(&slot);
        self.pairs.retain(|(a, b)| *a != slot && *b != slot);
    }

    /// Whether a slot's rules are these.
    pub(crate) fn has(&self, rules: &TapRules) -> bool {
        let mut changed = self.clone();
        changed.set(rules);
        changed == *self
    }
}

/// What an idle tap has: address translation, no peers.
pub(crate) fn idle(slot: u32) -> TapRules {
    TapRules {
        slot,
        nat: true,
        peers: Vec::new(),
    }
}

/// The elements of all taps for a setup: `told` by the daemon for those that are there, `had` for what it did not tell about. A pair
/// is one when nobody who was told about denies it.
pub(crate) fn wanted(told: &[TapRules], there: &BTreeSet<u32>, idle_taps: &BTreeSet<u32>, had: &Elements) -> Elements {
    let mut all = Elements::default();
    for slot in there {
        match told.iter().find(|rules| rules.slot == *slot) {
            Some(rules) => {
                all.guests.insert(*slot);
                all.nat.extend(rules.nat.then_some(*slot));
            }
            None if idle_taps.contains(slot) => {
                all.guests.insert(*slot);
                all.nat.insert(*slot);
            }
            None => {
                all.guests.insert(*slot);
                all.nat.extend(had.nat.contains(slot).then_some(*slot));
            }
        }
    }
    let says = |a: u32, b: u32| match told.iter().find(|rules| rules.slot == a) {
        Some(rules) => Some(rules.peers.contains(&b)),
        None if idle_taps.contains(&a) => Some(false),
        None => None,
    };
    let told_pairs = told
        .iter()
        .flat_map(|rules| rules.peers.iter().map(|peer| (rules.slot, *peer)));
    let candidates: BTreeSet<(u32, u32)> = told_pairs.chain(had.pairs.iter().copied()).collect();
    for (a, b) in candidates {
        if a == b || !there.contains(&a) || !there.contains(&b) {
            continue;
        }
        if says(a, b) != Some(false) && says(b, a) != Some(false) {
            all.pairs.insert((a, b));
            all.pairs.insert((b, a));
        }
    }
    all
}

/// Text of both tables with their elements: they are replaced at one stroke, nothing passes unfiltered meanwhile.
pub(crate) fn tables(net: &Network, elements: &Elements) -> String {
    let (bridge, gateway, t) = (net.bridge(), net.gateway(), NFT_TABLE);
    let mut text = remove();
    let _ = write!(
        text,
        r#"table bridge {t} {{
 set guests {{ type ifname . ether_addr . ipv4_addr; }}
 set pairs {{ type ifname . ifname; }}
 chain prerouting {{
  type filter hook prerouting priority -300; policy accept;
  iifname != "{TAP_PREFIX}*" accept
  ether type ip ip daddr 169.254.0.0/16 drop
  ether type ip iifname . ether saddr . ip saddr @guests accept
  ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 iifname . ether saddr . arp saddr ip @guests iifname . arp saddr ether . arp saddr ip @guests accept
  drop
 }}
 chain forward {{
  type filter hook forward priority -200; policy accept;
  iifname . oifname @pairs meta mark set {PAIR_MARK:#x} accept
  iifname "{TAP_PREFIX}*" drop
  oifname "{TAP_PREFIX}*" drop
 }}
}}
table ip {t} {{
 set nat {{ type ipv4_addr; }}
 chain input {{
  type filter hook input priority -10; policy accept;
  iifname != "{bridge}" accept
  ct state established,related accept
  icmp type echo-request ip daddr {gateway} accept
  drop
 }}
 chain forward {{
  type filter hook forward priority -10; policy accept;
  iifname "{bridge}" oifname "{bridge}" meta mark {PAIR_MARK:#x} accept
  iifname "{bridge}" ip daddr 169.254.0.0/16 drop
  iifname "{bridge}" ct status dnat drop
  iifname "{bridge}" oifname != "{bridge}" ip saddr @nat accept
  iifname "{bridge}" drop
  oifname "{bridge}" ct state established,related ip daddr @nat accept
  oifname "{bridge}" drop
 }}
 chain postrouting {{
  type nat hook postrouting priority 100; policy accept;
  oifname != "{bridge}" ip saddr @nat masquerade
 }}
}}
"#
    );
    text.push_str(&changes(net, &Elements::default(), elements));
    text
}

/// How many rules both tables have.
pub(crate) fn count(net: &Network) -> usize {
    let text = tables(net, &Elements::default());
    text.lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("  type "))
        .count()
}

/// Text that removes both tables, whether they are there or not.
pub(crate) fn remove() -> String {
    let mut text = String::new();
    for family in ["bridge", "ip"] {
        let _ = writeln!(text, "table {family} {NFT_TABLE}\ndelete table {family} {NFT_TABLE}");
    }
    text
}

/// Text that makes the elements `want` of the elements `have`; empty when they are the same.
pub(crate) fn changes(net: &Network, have: &Elements, want: &Elements) -> String {
    let mut text = String::new();
    let mut all = |verb: &str, from: &Elements, to: &Elements| {
        let guests = to.guests.difference(&from.guests).filter_map(|slot| guest(net, *slot));
        statement(&mut text, verb, "bridge", "guests", guests.collect());
        let nat = to.nat.difference(&from.nat).filter_map(|slot| net.address(*slot).ok());
        statement(
            &mut text,
            verb,
            "ip",
            "nat",
            nat.map(|address| address.to_string()).collect(),
        );
        let pairs = to.pairs.difference(&from.pairs);
        let pairs = pairs.map(|(a, b)| format!("\"{}\" . \"{}\"", tap(*a), tap(*b)));
        statement(&mut text, verb, "bridge", "pairs", pairs.collect());
    };
    all("delete", want, have);
    all("add", have, want);
    text
}

fn guest(net: &Network, slot: u32) -> Option<String> {
    let (mac, address) = (net.mac(slot).ok()?, net.address(slot).ok()?);
    Some(format!("\"{}\" . {mac} . {address}", tap(slot)))
}

fn statement(text: &mut String, verb: &str, family: &str, set: &str, elements: Vec<String>) {
    if !elements.is_empty() {
        let _ = writeln!(
            text,
            "{verb} element {family} {NFT_TABLE} {set} {{ {} }}",
            elements.join(", ")
        );
    }
}

/// The MAC of a slot, as bytes.
pub(crate) fn mac(net: &Network, slot: u32) -> Option<[u8; 6]> {
    let text = net.mac(slot).ok()?;
    let mut bytes = [0; 6];
    for (to, from) in bytes.iter_mut().zip(text.split(':')) {
        *to = u8::from_str_radix(from, 16).ok()?;
    }
    Some(bytes)
}

/// The key of a slot in `guests`.
pub(crate) fn guest_key(net: &Network, slot: u32) -> Option<[u8; GUEST_KEY]> {
    let address = net.address(slot).ok()?.octets();
    let mut key = [0; GUEST_KEY];
    key[..NAME].copy_from_slice(&name_key(&tap(slot)));
    key[NAME..NAME + 6].copy_from_slice(&mac(net, slot)?);
    key[NAME + 8..].copy_from_slice(&address);
    Some(key)
}

/// The slot of a key of `guests`; none where it is not one that this network has.
pub(crate) fn guest_slot(net: &Network, key: &[u8]) -> Option<u32> {
    let slot = name_slot(key.get(..NAME)?)?;
    (guest_key(net, slot)? == *key).then_some(slot)
}

/// The slot of a key of `nat`.
pub(crate) fn nat_slot(net: &Network, key: &[u8]) -> Option<u32> {
    let octets: [u8; 4] = key.try_into().ok()?;
    slot_of(net, octets.into())
}

/// The slots of a key of `pairs`.
pub(crate) fn pair_slots(key: &[u8]) -> Option<(u32, u32)> {
    if key.len() != PAIR_KEY {
        return None;
    }
    Some((name_slot(&key[..NAME])?, name_slot(&key[NAME..])?))
}

/// The slot of an address.
pub(crate) fn slot_of(net: &Network, address: Ipv4Addr) -> Option<u32> {
    let distance = u32::from(address).checked_sub(u32::from(net.address(0).ok()?))?;
    // The bridge's own address may lie between.
    let near = [distance.checked_sub(1), Some(distance)];
    near.into_iter()
        .flatten()
        .find(|slot| net.address(*slot) == Ok(address))
}

fn name_key(name: &str) -> [u8; NAME] {
    let mut key = [0; NAME];
    for (to, from) in key.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    key
}

fn name_slot(key: &[u8]) -> Option<u32> {
    tap_slot(&super::netlink::text(key))
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
