//! What others' firewalls are told, in the places that they have for it, and nothing else of theirs is touched:
//!
//! * Docker drops what is forwarded and not its own. Its chain `DOCKER-USER` is where others' rules go: two that carry banger's comment
//!   let through what comes from the bridge and what goes to it. Banger's own tables decide about both.
//! * firewalld gets the bridge into its zone `trusted`, until it is restarted.

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
pub(crate) fn let_through(tables: &mut Tables, net: &Network) -> Result<(), HelperError> {
    let unread = |e: io::Error| failed("read the rules of other firewalls", e);
    if tables.has_chain(Family::Ip, TABLE, CHAIN).map_err(unread)? {
        let marked = tables.commented(Family::Ip, TABLE, CHAIN).map_err(unread)?;
        nft::apply(&docker(Some(net), &marked))?;
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

/// Text that has Docker's chain hold banger's rules for a network once each, or none. Empty when that is so.
fn docker(net: Option<&Network>, marked: &[Commented]) -> String {
    let mut wanted: Vec<(String, String)> = Vec::new();
    if let Some(net) = net {
        for (way, side) in [("from", "iifname"), ("to", "oifname")] {
            let comment = format!("{COMMENT}{way} {}", net.bridge());
            // As `iptables -i … -j ACCEPT` would make it, so that `iptables` can still show its table.
            let rule = format!("{side} \"{}\" counter accept comment \"{comment}\"", net.bridge());
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
    fn docker_gets_two_rules_once() {
        let net = Network::default();
        let text = docker(Some(&net), &marked(&[(3, "somebody's"), (4, "bangers")]));
        assert_eq!(
            text,
            "insert rule ip filter DOCKER-USER iifname \"br-fc\" counter accept comment \"banger from br-fc\"\n\
             insert rule ip filter DOCKER-USER oifname \"br-fc\" counter accept comment \"banger to br-fc\"\n"
        );
        let there = marked(&[(3, "somebody's"), (7, "banger from br-fc"), (8, "banger to br-fc")]);
        assert_eq!(docker(Some(&net), &there), "");
        let twice = marked(&[(7, "banger from br-fc"), (8, "banger to br-fc"), (9, "banger to br-fc")]);
        assert_eq!(
            docker(Some(&net), &twice),
            "delete rule ip filter DOCKER-USER handle 9\n"
        );
    }

    #[test]
    fn only_bangers_are_taken_back() {
        let there = marked(&[(3, "somebody's"), (7, "banger from br-fc"), (8, "banger to br-fc-old")]);
        assert_eq!(
            docker(None, &there),
            "delete rule ip filter DOCKER-USER handle 7\ndelete rule ip filter DOCKER-USER handle 8\n"
        );
    }
}
