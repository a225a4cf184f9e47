//! Tables of rules in the kernel: read by netlink, changed by `nft -f -`.

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use banger_system::helper::HelperError;
use banger_system::names::NFT_TABLE;
use banger_system::net::Network;

use super::netlink::{Message, Socket, absent, each, find, text};
use super::rules::{self, Elements};

/// Where `nft` is.
pub(crate) const NFT: &[&str] = &["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft", "/usr/local/sbin/nft"];
/// How long it may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A family of tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    Inet = 1,
    Ip = 2,
    Bridge = 7,
}

const SUBSYSTEM: u16 = 10 << 8;
const GET_TABLE: u16 = SUBSYSTEM | 1;
const GET_CHAIN: u16 = SUBSYSTEM | 4;
const GET_RULE: u16 = SUBSYSTEM | 7;
const GET_ELEMENT: u16 = SUBSYSTEM | 13;
/// Of table, chain, rule and element: the table's name.
const TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_USERDATA: u16 = 7;
const SET_NAME: u16 = 2;
const SET_ELEMENTS: u16 = 3;
const LIST_ELEMENT: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const DATA_VALUE: u16 = 1;

/// A rule of somebody's chain that carries a comment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Commented {
    /// Its number in the table.
    pub(crate) handle: u64,
    /// Its comment.
    pub(crate) comment: String,
}

/// Tables of this network namespace.
#[derive(Debug)]
pub(crate) struct Tables(Socket);

impl Tables {
    pub(crate) fn open() -> io::Result<Self> {
        Socket::netfilter().map(Self)
    }

    /// Whether there is a table.
    pub(crate) fn has_table(&mut self, family: Family, table: &str) -> io::Result<bool> {
        let message = Message::new(GET_TABLE, 0, &fixed(family)).text(TABLE, table);
        Ok(self.0.get(&message)?.is_some())
    }

    /// Whether there is a chain.
    pub(crate) fn has_chain(&mut self, family: Family, table: &str, chain: &str) -> io::Result<bool> {
        let message = Message::new(GET_CHAIN, 0, &fixed(family))
            .text(TABLE, table)
            .text(CHAIN_NAME, chain);
        Ok(self.0.get(&message)?.is_some())
    }

    /// Rules of a chain that carry a comment.
    pub(crate) fn commented(&mut self, family: Family, table: &str, chain: &str) -> io::Result<Vec<Commented>> {
        let message = Message::new(GET_RULE, 0, &fixed(family))
            .text(TABLE, table)
            .text(RULE_CHAIN, chain);
        let found = match self.0.dump(&message) {
            Err(e) if absent(&e) => Vec::new(),
            other => other?,
        };
        Ok(found.iter().filter_map(|body| commented(body)).collect())
    }

    /// How many rules banger's own chains have; none where a table is missing.
    pub(crate) fn own_rules(&mut self) -> io::Result<usize> {
        let mut count = 0;
        for family in [Family::Bridge, Family::Ip] {
            let message = Message::new(GET_RULE, 0, &fixed(family)).text(TABLE, NFT_TABLE);
            count += match self.0.dump(&message) {
                Err(e) if absent(&e) => 0,
                other => other?.len(),
            };
        }
        Ok(count)
    }

    /// Whether banger's rules are these: as many, and with the mark of this release and network.
    pub(crate) fn own_are(&mut self, net: &Network, bound: u32) -> io::Result<bool> {
        let mark = rules::mark(net, bound);
        let marked = self.commented(Family::Ip, NFT_TABLE, "forward")?;
        Ok(marked.iter().any(|rule| rule.comment == mark) && self.own_rules()? == rules::count(net))
    }

    /// What is in banger's sets; none where a table or set is missing. What no slot of the network stands for is left out.
    pub(crate) fn elements(&mut self, net: &Network) -> io::Result<Option<Elements>> {
        let (Some(guests), Some(pairs), Some(nat)) = (
            self.keys(Family::Bridge, "guests")?,
            self.keys(Family::Bridge, "pairs")?,
            self.keys(Family::Ip, "nat")?,
        ) else {
            return Ok(None);
        };
        // Those that an older release did not have yet are empty.
        let mut names = |set: &str| -> io::Result<BTreeSet<String>> {
            let keys = self.keys(Family::Ip, set)?.unwrap_or_default();
            Ok(keys.iter().filter_map(|key| rules::interface(key)).collect())
        };
        Ok(Some(Elements {
            uplinks: names("uplinks")?,
            forwarding: names("forwarding")?,
            guests: guests.iter().filter_map(|key| rules::guest_slot(net, key)).collect(),
            nat: nat.iter().filter_map(|key| rules::nat_slot(net, key)).collect(),
            pairs: pairs.iter().filter_map(|key| rules::pair_slots(key)).collect(),
        }))
    }

    /// The keys of one of banger's sets.
    fn keys(&mut self, family: Family, set: &str) -> io::Result<Option<Vec<Vec<u8>>>> {
        let message = Message::new(GET_ELEMENT, 0, &fixed(family))
            .text(TABLE, NFT_TABLE)
            .text(SET_NAME, set);
        match self.0.dump(&message) {
            Err(e) if absent(&e) => Ok(None),
            Err(e) => Err(e),
            Ok(bodies) => Ok(Some(bodies.iter().flat_map(|body| keys(body)).collect())),
        }
    }
}

/// Has the tables changed, all of it or nothing.
pub(crate) fn apply(batch: &str) -> Result<(), HelperError> {
    if batch.is_empty() {
        return Ok(());
    }
    crate::run::run(NFT, &["-f", "-"], batch.as_bytes(), LIMIT)
}

/// `struct nfgenmsg`
fn fixed(family: Family) -> [u8; 4] {
    [family as u8, 0, 0, 0]
}

fn commented(body: &[u8]) -> Option<Commented> {
    let attributes = body.get(4..)?;
    let handle = find(attributes, RULE_HANDLE)?.try_into().ok()?;
    Some(Commented {
        handle: u64::from_be_bytes(handle),
        comment: comment(find(attributes, RULE_USERDATA)?)?,
    })
}

/// The comment in what `nft` keeps with a rule: type, length, bytes, one after the other; type 0 is the comment.
fn comment(mut data: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == 0 {
            return Some(text(value));
        }
        data = rest.get(usize::from(*length)..)?;
    }
    None
}

fn keys(body: &[u8]) -> Vec<Vec<u8>> {
    let list = body
        .get(4..)
        .and_then(|attributes| find(attributes, SET_ELEMENTS))
        .unwrap_or(&[]);
    each(list)
        .filter(|(kind, _)| *kind == LIST_ELEMENT)
        .filter_map(|(_, element)| Some(find(find(element, ELEMENT_KEY)?, DATA_VALUE)?.to_vec()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::netlink::attributes;
    use super::*;

    const NESTED: u16 = 0x8000;

    fn element(key: &[u8]) -> Vec<u8> {
        let value = attributes(&[(DATA_VALUE, key)]);
        let key = attributes(&[(ELEMENT_KEY | NESTED, &value)]);
        attributes(&[(LIST_ELEMENT | NESTED, &key)])
    }

    #[test]
    fn keys_and_comments_are_read() {
        let list = [element(b"abcd"), element(b"efgh")].concat();
        let body = [&[7, 0, 0, 0][..], &attributes(&[(SET_ELEMENTS | NESTED, &list)])].concat();
        assert_eq!(keys(&body), [b"abcd".to_vec(), b"efgh".to_vec()]);
        assert_eq!(comment(b"\x02\x01x\x00\x07banger\0").as_deref(), Some("banger"));
        for bad in [&b""[..], b"\x00", b"\x00\x20short", b"\x01\x01x"] {
            assert_eq!(comment(bad), None);
        }
        assert!(keys(b"").is_empty() && commented(b"xx").is_none());
    }
}
