//! The text of the rules, and what of it belongs to which slot. Pure.
//!
//! Two tables of banger's own. What passes is decided by their sets, so that a machine is a few elements:
//!
//! * `bridge banger`: `guests` (tap, MAC, address) is all that a machine may send as; `pairs` (tap, tap) who reaches whom,
//! * `ip banger`: `nat` are the addresses that reach what is outside; `uplinks` the interfaces by which they do; `forwarding` the
//!   interfaces that forward only because banger had them do so, from which nothing else is forwarded; `connections` how many each
//!   machine has.
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

/// Where clouds keep what they tell their machines, credentials among it, besides [`RESOLVER`]: the link-local range (nearly all of
/// them), Alibaba, Oracle's older cloud, Equinix Metal.
const METADATA: &str = "169.254.0.0/16, 100.100.100.200, 192.0.0.192, 192.80.8.124";
/// The same of Azure, where this address is the name server as well: port 53 stays open.
const RESOLVER: &str = "168.63.129.16";
/// Part of the table of connections that one machine can have, and its bounds.
const SHARE: u32 = 64;
const CONNECTIONS: (u32, u32) = (512, 4096);
/// Table of connections where the kernel does not say how large its own is.
const TABLE: u32 = 65_536;

/// How many connections one machine may have, from how many the kernel keeps for the whole host.
pub(crate) fn bound(kept: Option<u32>) -> u32 {
    (kept.unwrap_or(TABLE) / SHARE).clamp(CONNECTIONS.0, CONNECTIONS.1)
}

/// What is in the sets: by slots, and names of interfaces.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Elements {
    /// Slots whose machines may send.
    pub(crate) guests: BTreeSet<u32>,
    /// Slots whose machines reach what is outside.
    pub(crate) nat: BTreeSet<u32>,
    /// Slots of which the first reaches the second; both directions are in it.
    pub(crate) pairs: BTreeSet<(u32, u32)>,
    /// Interfaces by which machines reach what is outside.
    pub(crate) uplinks: BTreeSet<String>,
    /// Interfaces that forward because banger had them do so.
    pub(crate) forwarding: BTreeSet<String>,
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
pub(crate) fn tables(net: &Network, bound: u32, elements: &Elements) -> String {
    let mut text = remove();
    text.push_str(&rules(net, bound, &mark(net, bound)));
    text.push_str(&changes(net, &Elements::default(), elements));
    text
}

/// What says, as the comment of a rule, which rules these are: the same for the same rules of the same network.
pub(crate) fn mark(net: &Network, bound: u32) -> String {
    // FNV-1a: it tells releases and settings apart, nothing else hangs on it.
    let text = rules(net, bound, &net.cidr());
    let digest = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |digest, byte| {
        (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("rules {digest:016x}")
}

fn rules(net: &Network, bound: u32, mark: &str) -> String {
    let (bridge, gateway, t) = (net.bridge(), net.gateway(), NFT_TABLE);
    format!(
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
 set uplinks {{ type ifname; }}
 set forwarding {{ type ifname; }}
 set connections {{ type ipv4_addr; size 65535; flags dynamic; }}
 chain prerouting {{
  type filter hook prerouting priority -150; policy accept;
  iifname "{bridge}" ct state new add @connections {{ ip saddr ct count over {bound} }} drop
 }}
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
  iifname "{bridge}" oifname != @uplinks drop
  iifname "{bridge}" ip daddr {{ {METADATA} }} drop
  iifname "{bridge}" ip daddr {RESOLVER} th dport != 53 drop
  iifname "{bridge}" ct status dnat drop
  iifname "{bridge}" ip saddr @nat accept
  iifname "{bridge}" drop comment "{mark}"
  oifname "{bridge}" ct state established,related ip daddr @nat accept
  oifname "{bridge}" drop
  iifname @forwarding ct state established,related accept
  iifname @forwarding ct status dnat accept
  iifname @forwarding drop
 }}
 chain postrouting {{
  type nat hook postrouting priority 100; policy accept;
  oifname @uplinks ip saddr @nat masquerade
 }}
}}
"#
    )
}

/// How many rules both tables have.
pub(crate) fn count(net: &Network) -> usize {
    let text = rules(net, 0, "");
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
        for (set, from, to) in [
            ("uplinks", &from.uplinks, &to.uplinks),
            ("forwarding", &from.forwarding, &to.forwarding),
        ] {
            let names = to.difference(from).map(|name| format!("\"{name}\""));
            statement(&mut text, verb, "ip", set, names.collect());
        }
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

/// The interface of a key of a set of names; none where it is not one that can be written into a rule.
pub(crate) fn interface(key: &[u8]) -> Option<String> {
    Some(super::netlink::text(key)).filter(|name| writable(name))
}

/// Whether an interface's name can be written into a rule as it is: the kernel allows quotes and stars as well.
pub(crate) fn writable(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'@');
    !name.is_empty() && name.len() < NAME && name.bytes().all(plain)
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
