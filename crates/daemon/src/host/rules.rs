//! Which machine may reach what, and which slots come next: pure functions.

use std::collections::{BTreeMap, BTreeSet};

use banger_core::id::MachineId;
use banger_system::helper::TapRules;

/// A machine that has a tap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its slot.
    pub slot: u32,
    /// It reaches what is outside.
    pub nat: bool,
    /// Its group.
    pub group: Option<String>,
}

/// The machines that have taps.
pub type Members = BTreeMap<MachineId, Member>;

/// The rules of one of them.
pub fn of(members: &Members, id: &MachineId) -> Option<TapRules> {
    let member = members.get(id)?;
    let peers = match &member.group {
        None => Vec::new(),
        group => {
            let others = members.iter().filter(|(other, m)| *other != id && m.group == *group);
            others.map(|(_, m)| m.slot).collect()
        }
    };
    Some(TapRules {
        slot: member.slot,
        nat: member.nat,
        peers,
    })
}

/// The rules of all of them.
pub fn all(members: &Members) -> Vec<TapRules> {
    members.keys().filter_map(|id| of(members, id)).collect()
}

/// The smallest slots that nobody has, up to `last`.
pub fn free(used: &BTreeSet<u32>, last: u32, count: usize) -> Vec<u32> {
    (0..=last).filter(|slot| !used.contains(slot)).take(count).collect()
}

/// The highest slot that nobody has: for machines that are gone soon, out of the way of those that stay.
pub fn highest(used: &BTreeSet<u32>, last: u32) -> Option<u32> {
    (0..=last).rev().find(|slot| !used.contains(slot))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> MachineId {
        MachineId::from_random([n; 8])
    }

    fn members(list: &[(u8, Option<&str>)]) -> Members {
        let member = |(n, group): &(u8, Option<&str>)| {
            let member = Member {
                slot: u32::from(*n),
                nat: *n != 9,
                group: group.map(str::to_owned),
            };
            (id(*n), member)
        };
        list.iter().map(member).collect()
    }

    #[test]
    fn machines_reach_their_group_and_nobody_else() {
        let all_of = members(&[
            (1, None),
            (2, Some("a")),
            (3, Some("a")),
            (4, Some("b")),
            (9, None),
            (5, Some("a")),
        ]);
        let peers_of = |n| of(&all_of, &id(n)).unwrap().peers;
        assert_eq!((peers_of(1), peers_of(9), peers_of(4)), (vec![], vec![], vec![]));
        assert_eq!((peers_of(2), peers_of(3)), (vec![3, 5], vec![2, 5]));
        assert!(of(&all_of, &id(1)).unwrap().nat && !of(&all_of, &id(9)).unwrap().nat);
        assert_eq!(of(&all_of, &id(77)), None);
        // Whoever is a peer has the other as a peer.
        for rules in all(&all_of) {
            for peer in &rules.peers {
                let back = all(&all_of).into_iter().find(|r| r.slot == *peer).unwrap();
                assert!(back.peers.contains(&rules.slot));
            }
        }
    }

    #[test]
    fn slots_are_given_from_below_and_lent_from_above() {
        let used: BTreeSet<u32> = [0, 1, 3, 9].into();
        assert_eq!(free(&used, 9, 3), [2, 4, 5]);
        assert_eq!(free(&used, 3, 3), [2]);
        assert_eq!((highest(&used, 9), highest(&used, 3)), (Some(8), Some(2)));
        assert_eq!(highest(&[0].into(), 0), None);
    }
}
