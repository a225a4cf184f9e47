//! By which interfaces machines reach what is outside, and that these forward.
//!
//! **An uplink** is an interface by which a route to everywhere leads, in any table of routes: there may be several, and they change
//! (another network, a VPN that takes all traffic). Everything else that the host is connected to, networks of containers and of other
//! virtual machines above all, is not outside: machines would arrive there as the host.
//!
//! **Forwarding** is switched on for the bridge and the uplinks alone (`net.ipv4.conf.INTERFACE.forwarding`), not for the whole host
//! (`net.ipv4.ip_forward`): other networks of the host are not connected by it, and other programs that look at `ip_forward` (Docker,
//! which closes what it opens) find what they would find without banger. What was switched on is noted in a set of the rules, in which
//! nothing but what concerns machines is forwarded from these interfaces. Once somebody has the whole host forward, that is theirs:
//! the note goes, and nothing is switched off again.

use std::collections::BTreeSet;
use std::io;

use banger_system::names::ALIAS_PREFIX;

use super::bridge::{optional, sysctl};
use super::links::Link;
use super::netlink::{each, u32_at};
use super::rules::writable;
use crate::ctx::Ctx;

/// Bytes of `struct rtmsg` and of `struct rtnexthop`.
const ROUTE: usize = 12;
const NEXT_HOP: usize = 8;

/// `struct rtmsg` that asks for all routes of IPv4.
pub(crate) fn routes() -> [u8; ROUTE] {
    let mut bytes = [0; ROUTE];
    bytes[0] = libc::AF_INET as u8;
    bytes
}

/// Whether a route leads everywhere. Two halves do too: VPNs leave the default route in its place and lay these over it.
pub(crate) fn everywhere(body: &[u8]) -> bool {
    matches!(body, [family, length, _, _, _, _, _, kind, ..]
        if i32::from(*family) == libc::AF_INET && *length <= 1 && *kind == libc::RTN_UNICAST)
}

/// Numbers of the interfaces by which a route leads: one, or several with weights.
pub(crate) fn interfaces(body: &[u8]) -> Vec<u32> {
    let mut found = Vec::new();
    for (kind, value) in each(body.get(ROUTE..).unwrap_or(&[])) {
        match kind {
            libc::RTA_OIF => found.extend(u32_at(value, 0)),
            libc::RTA_MULTIPATH => found.extend(hops(value)),
            _ => {}
        }
    }
    found
}

fn hops(mut left: &[u8]) -> Vec<u32> {
    let mut found = Vec::new();
    while let [low, high, ..] = left {
        let length = usize::from(u16::from_ne_bytes([*low, *high]));
        if length < NEXT_HOP {
            break;
        }
        found.extend(u32_at(left, 4));
        left = left.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    found
}

/// Names of the uplinks: of the interfaces with a route to everywhere those that are neither banger's nor the host's own loopback.
pub(crate) fn names(defaults: &BTreeSet<u32>, all: &[Link]) -> BTreeSet<String> {
    let uplink = |link: &&Link| {
        defaults.contains(&link.index)
            && !link.alias.starts_with(ALIAS_PREFIX)
            && link.name != "lo"
            && writable(&link.name)
    };
    all.iter().filter(uplink).map(|link| link.name.clone()).collect()
}

/// What has to be done so that uplinks forward.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Plan {
    /// What is noted as switched on by banger, before it is done.
    pub(crate) noted: BTreeSet<String>,
    /// To be switched on.
    on: Vec<String>,
    /// To be switched off: no uplinks any more. They stay noted until it is done.
    pub(crate) off: Vec<String>,
}

/// Makes it: `whole` says whether the whole host forwards, `noted` what banger had switched on, `forwards` how an interface is (none:
/// it has gone).
fn plan(
    whole: bool,
    noted: &BTreeSet<String>,
    uplinks: &BTreeSet<String>,
    forwards: impl Fn(&str) -> Option<bool>,
) -> Plan {
    let mut plan = Plan::default();
    if whole {
        return plan;
    }
    for name in uplinks {
        match forwards(name) {
            Some(false) => plan.on.push(name.clone()),
            // It forwards by somebody else's will.
            Some(true) if !noted.contains(name) => continue,
            Some(true) => {}
            None => continue,
        }
        plan.noted.insert(name.clone());
    }
    for name in noted.difference(uplinks).filter(|name| forwards(name) == Some(true)) {
        plan.noted.insert(name.clone());
        plan.off.push(name.clone());
    }
    plan
}

/// The plan for the host as it is.
pub(crate) fn look(ctx: &Ctx, noted: &BTreeSet<String>, uplinks: &BTreeSet<String>) -> io::Result<Plan> {
    let read = |name: &str| std::fs::read_to_string(ctx.proc.join("sys/net/ipv4").join(name));
    let whole = read("ip_forward")?.trim() != "0";
    let forwards = |name: &str| read(&setting(name)).ok().map(|text| text.trim() != "0");
    Ok(plan(whole, noted, uplinks, forwards))
}

/// Carries out a plan. All steps are tried; what failed is told.
pub(crate) fn apply(ctx: &Ctx, plan: &Plan) -> Vec<String> {
    let mut failures = Vec::new();
    for (names, value) in [(&plan.on, "1"), (&plan.off, "0")] {
        for name in names {
            let done = optional(sysctl(ctx, &format!("ipv4/{}", setting(name)), value));
            failures.extend(done.err().map(|e| e.to_string()));
        }
    }
    failures
}

/// A setting of an interface, as a path: a dot in its name is one.
fn setting(name: &str) -> String {
    format!("conf/{name}/forwarding")
}

#[cfg(test)]
mod tests {
    use super::super::netlink::attributes;
    use super::*;

    fn route(length: u8, kind: u8, attributes: &[u8]) -> Vec<u8> {
        let mut body = routes().to_vec();
        (body[1], body[7]) = (length, kind);
        body.extend_from_slice(attributes);
        body
    }

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn routes_to_everywhere_name_their_interfaces() {
        let one = attributes(&[
            (libc::RTA_TABLE, &51_820u32.to_ne_bytes()),
            (libc::RTA_OIF, &7u32.to_ne_bytes()),
        ]);
        let body = route(0, libc::RTN_UNICAST, &one);
        assert!(everywhere(&body) && interfaces(&body) == [7]);
        assert!(everywhere(&route(1, libc::RTN_UNICAST, &one)), "half of everything");
        assert!(!everywhere(&route(8, libc::RTN_UNICAST, &one)));
        assert!(!everywhere(&route(0, libc::RTN_UNREACHABLE, &[])));
        let hop = |index: u32| [&16u16.to_ne_bytes()[..], &[0, 0], &index.to_ne_bytes(), &[0; 8]].concat();
        let several = attributes(&[(libc::RTA_MULTIPATH, &[hop(3), hop(4)].concat())]);
        assert_eq!(interfaces(&route(0, libc::RTN_UNICAST, &several)), [3, 4]);
        for bad in [&b""[..], &[2, 0], &[0; 12]] {
            assert!(!everywhere(bad) && interfaces(bad).is_empty());
        }
        let cut = attributes(&[(libc::RTA_MULTIPATH, &[0, 0, 0, 0])]);
        assert!(interfaces(&route(0, libc::RTN_UNICAST, &cut)).is_empty());
    }

    #[test]
    fn only_what_can_be_written_and_is_not_bangers_is_an_uplink() {
        let link = |index, name: &str, alias: &str| Link {
            index,
            name: name.to_owned(),
            alias: alias.to_owned(),
            ..Link::default()
        };
        let all = [
            link(1, "lo", ""),
            link(2, "eth0.5", ""),
            link(3, "br-fc", "banger:bridge"),
            link(4, "a\" } accept", ""),
            link(5, "eth*", ""),
            link(6, "docker0", ""),
        ];
        assert_eq!(names(&(1..6).collect(), &all), set(&["eth0.5"]));
    }

    #[test]
    fn only_what_banger_switched_on_is_noted_and_switched_off() {
        let forwards = |on: &'static [&'static str], gone: &'static [&'static str]| {
            move |name: &str| (!gone.contains(&name)).then(|| on.contains(&name))
        };
        // One that does not forward yet, one that does by somebody else's will, one that has gone.
        let first = plan(
            false,
            &set(&[]),
            &set(&["eth0", "wlan0", "ppp0"]),
            forwards(&["wlan0"], &["ppp0"]),
        );
        assert_eq!(
            (first.noted.clone(), first.on, first.off),
            (set(&["eth0"]), vec!["eth0".to_owned()], vec![])
        );
        // Again: nothing is to be done, and it stays noted.
        let again = plan(
            false,
            &first.noted,
            &set(&["eth0", "wlan0"]),
            forwards(&["eth0", "wlan0"], &[]),
        );
        assert_eq!((again.noted, again.on, again.off), (set(&["eth0"]), vec![], vec![]));
        // Another network: the old one is switched off, and noted until that is done.
        let moved = plan(false, &set(&["eth0"]), &set(&["wlan0"]), forwards(&["eth0"], &[]));
        assert_eq!(
            (moved.noted, moved.off),
            (set(&["eth0", "wlan0"]), vec!["eth0".to_owned()])
        );
        // The whole host forwards by somebody else's will: nothing is banger's any more.
        let whole = plan(true, &set(&["eth0"]), &set(&["eth0"]), forwards(&["eth0"], &[]));
        assert_eq!(whole, Plan::default());
    }
}
