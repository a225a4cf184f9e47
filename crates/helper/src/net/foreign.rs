//! What others' firewalls are told, in the places that they have for it, and nothing else of theirs is touched:
//!
//! * Docker drops what is forwarded and not its own. Its chain `DOCKER-USER` is where others' rules go. An acceptance there is final in
//!   Docker's table, so those of banger, which carry its comment, are about bridge and uplinks alone: what machines send to containers is
//!   Docker's to judge (and dropped before, by banger's own tables, which decide about the rest as well).
//! * firewalld gets the bridge into its zone `trusted`, until it is restarted: a zone is all that it has for an interface without asking
//!   for its configuration to be changed. What the zone allows more than machines may, banger's own tables drop.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::time::Duration;

use banger_system::helper::HelperError;
use banger_system::net::Network;

use super::nft::{self, Commented, Family, Tables};
use crate::ctx::failed;

/// Where `firewall-cmd` is.
const FIREWALL_CMD: &[&str] = &["/usr/bin/firewall-cmd"];
/// How long it may take; it waits for a service.
const LIMIT: Duration = Duration::from_secs(10);
/// Docker's table and chain.
const TABLE: &str = "filter";
const CHAIN: &str = "DOCKER-USER";
/// What the comment of banger's rules begins with.
const COMMENT: &str = "banger ";

/// Tells them about the bridge.
pub(crate) fn let_through(tables: &mut Tables, net: &Network, uplinks: &BTreeSet<String>) -> Result<(), HelperError> {
    let unread = |e: io::Error| failed("read the rules of other firewalls", e);
    if tables.has_chain(Family::Ip, TABLE, CHAIN).map_err(unread)? {
        let marked = tables.commented(Family::Ip, TABLE, CHAIN).map_err(unread)?;
        nft::apply(&docker(Some((net, uplinks)), &marked))?;
    }
    if tables.has_table(Family::Inet, "firewalld").map_err(unread)? {
        firewalld("--add-interface", net)?;
    }
    Ok(())
}

/// Takes it back. Each step that fails is told.
pub(crate) fn take_back(tables: &mut Tables, net: &Network) -> Vec<String> {
    let mut failures = Vec::new();
    let marked = tables
        .commented(Family::Ip, TABLE, CHAIN)
        .map_err(|e| failed("read Docker's rules", e));
    let done = marked.and_then(|marked| nft::apply(&docker(None, &marked)));
    failures.extend(done.err().map(|e| e.to_string()));
    if tables.has_table(Family::Inet, "firewalld").unwrap_or(false) {
        failures.extend(firewalld("--remove-interface", net).err().map(|e| e.to_string()));
    }
    failures
}

/// Names of banger's rules in others' chains.
pub(crate) fn marked(tables: &mut Tables) -> io::Result<Vec<String>> {
    let rules = tables.commented(Family::Ip, TABLE, CHAIN)?;
    let ours = rules.into_iter().filter(|rule| rule.comment.starts_with(COMMENT));
    Ok(ours.map(|rule| format!("{CHAIN} {}", rule.comment)).collect())
}

fn firewalld(what: &str, net: &Network) -> Result<(), HelperError> {
    if crate::run::find(FIREWALL_CMD).is_none() {
        return Ok(());
    }
    let interface = format!("{what}={}", net.bridge());
    crate::run::run(FIREWALL_CMD, &["--zone=trusted", &interface], b"", LIMIT)
}

/// Text that has Docker's chain hold banger's rules for a network and its uplinks once each, or none. Empty when that is so.
fn docker(ways: Option<(&Network, &BTreeSet<String>)>, marked: &[Commented]) -> String {
    let mut wanted: Vec<(String, String)> = Vec::new();
    if let Some((net, uplinks)) = ways {
        let bridge = net.bridge();
        let out = uplinks.iter().map(|uplink| (bridge, uplink.as_str()));
        let back = uplinks.iter().map(|uplink| (uplink.as_str(), bridge));
        // Machines of one group, where the kernel has Docker's rules judge what a bridge passes on.
        for (from, to) in out.chain(back).chain([(bridge, bridge)]) {
            let comment = format!("{COMMENT}{from} to {to}");
            // As `iptables -i … -o … -j ACCEPT` would make it, so that `iptables` can still show its table.
            let rule = format!("iifname \"{from}\" oifname \"{to}\" counter accept comment \"{comment}\"");
            wanted.push((comment, rule));
        }
    }
    let mut text = String::new();
    let mut kept: Vec<&str> = Vec::new();
    for rule in marked.iter().filter(|rule| rule.comment.starts_with(COMMENT)) {
        if wanted.iter().any(|(comment, _)| *comment == rule.comment) && !kept.contains(&rule.comment.as_str()) {
            kept.push(&rule.comment);
        } else {
            let _ = writeln!(text, "delete rule ip {TABLE} {CHAIN} handle {}", rule.handle);
        }
    }
    for (comment, rule) in &wanted {
        if !kept.contains(&comment.as_str()) {
            let _ = writeln!(text, "insert rule ip {TABLE} {CHAIN} {rule}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(rules: &[(u64, &str)]) -> Vec<Commented> {
        let one = |(handle, comment): &(u64, &str)| Commented {
            handle: *handle,
            comment: (*comment).to_owned(),
        };
        rules.iter().map(one).collect()
    }

    #[test]
    fn docker_gets_rules_between_bridge_and_uplinks_once() {
        let net = Network::default();
        let uplinks = |names: &[&str]| {
            names
                .iter()
                .map(|name| (*name).to_owned())
                .collect::<BTreeSet<String>>()
        };
        let (one, both) = (uplinks(&["eth0"]), uplinks(&["eth0", "wg0"]));
        let insert = |from: &str, to: &str| {
            format!(
                "insert rule ip filter DOCKER-USER iifname \"{from}\" oifname \"{to}\" counter accept comment \"banger {from} to {to}\"\n"
            )
        };
        let text = docker(Some((&net, &one)), &marked(&[(3, "somebody's"), (4, "bangers")]));
        let all = [
            insert("br-fc", "eth0"),
            insert("eth0", "br-fc"),
            insert("br-fc", "br-fc"),
        ];
        assert_eq!(text, all.concat());
        let mut there = vec![
            (3, "somebody's"),
            (7, "banger br-fc to eth0"),
            (8, "banger eth0 to br-fc"),
            (9, "banger br-fc to br-fc"),
        ];
        assert_eq!(docker(Some((&net, &one)), &marked(&there)), "");
        let more = docker(Some((&net, &both)), &marked(&there));
        assert_eq!(more, [insert("br-fc", "wg0"), insert("wg0", "br-fc")].concat());
        // Twice, of an uplink that is none any more, and what an older release let through whatever its target.
        there.extend([
            (10, "banger eth0 to br-fc"),
            (11, "banger br-fc to ppp0"),
            (12, "banger from br-fc"),
        ]);
        let less = docker(Some((&net, &one)), &marked(&there));
        let handles = [10, 11, 12].map(|handle| format!("delete rule ip filter DOCKER-USER handle {handle}\n"));
        assert_eq!(less, handles.concat());
    }

    #[test]
    fn only_bangers_are_taken_back() {
        let there = marked(&[
            (3, "somebody's"),
            (7, "banger br-fc to eth0"),
            (8, "banger to br-fc-old"),
        ]);
        assert_eq!(
            docker(None, &there),
            "delete rule ip filter DOCKER-USER handle 7\ndelete rule ip filter DOCKER-USER handle 8\n"
        );
    }
}
