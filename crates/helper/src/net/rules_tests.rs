use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use super::*;

fn rules(slot: u32, nat: bool, peers: &[u32]) -> TapRules {
    TapRules {
        slot,
        nat,
        peers: peers.to_vec(),
    }
}

#[test]
fn the_elements_of_a_machine() {
    let net = Network::default();
    let mut elements = Elements::default();
    elements.set(&rules(0, true, &[7]));
    assert_eq!(
        changes(&net, &Elements::default(), &elements),
        "add element bridge banger guests { \"tap-fc-0\" . 02:fc:ac:10:00:02 . 172.16.0.2 }\n\
         add element ip banger nat { 172.16.0.2 }\n\
         add element bridge banger pairs { \"tap-fc-0\" . \"tap-fc-7\", \"tap-fc-7\" . \"tap-fc-0\" }\n"
    );
    let mut less = elements.clone();
    less.set(&rules(0, false, &[]));
    assert_eq!(
        changes(&net, &elements, &less),
        "delete element ip banger nat { 172.16.0.2 }\n\
         delete element bridge banger pairs { \"tap-fc-0\" . \"tap-fc-7\", \"tap-fc-7\" . \"tap-fc-0\" }\n"
    );
    assert_eq!(changes(&net, &less, &less), "");
}

#[test]
fn tables_name_only_what_is_bangers() {
    let net = Network::parse("br-fc-x", "10.9.0.1/24").unwrap();
    let text = tables(&net, 1024, &Elements::default());
    for line in text.lines().filter(|line| line.contains("table ")) {
        assert!(line.ends_with(" banger") || line.ends_with(" banger {"), "{line}");
    }
    assert!(text.contains("\"br-fc-x\"") && !text.contains("\"br-fc\""));
    assert!(text.contains("ip daddr 10.9.0.1 accept"));
}

#[test]
fn a_setup_keeps_what_it_was_not_told_about() {
    let mut had = Elements::default();
    had.set(&rules(1, true, &[2]));
    had.set(&rules(3, false, &[]));
    let there = BTreeSet::from([1, 2, 3, 4, 5]);
    let all = wanted(&[rules(5, true, &[4, 9])], &there, &BTreeSet::from([4]), &had);
    assert_eq!(all.guests, there);
    assert_eq!(all.nat, BTreeSet::from([1, 4, 5]), "2 and 3 had none, 4 is idle");
    assert_eq!(
        all.pairs,
        BTreeSet::from([(1, 2), (2, 1)]),
        "an idle tap is nobody's peer, nor is one that is not there"
    );
}

#[test]
fn one_side_alone_makes_no_pair() {
    let there = BTreeSet::from([1, 2]);
    let told = [rules(1, true, &[2]), rules(2, true, &[])];
    assert!(
        wanted(&told, &there, &BTreeSet::new(), &Elements::default())
            .pairs
            .is_empty()
    );
    let told = [rules(1, true, &[2]), rules(2, true, &[1])];
    assert_eq!(
        wanted(&told, &there, &BTreeSet::new(), &Elements::default())
            .pairs
            .len(),
        2
    );
}

#[test]
fn one_machine_has_a_small_part_of_the_hosts_connections() {
    assert_eq!(
        [None, Some(262_144), Some(65_536), Some(1000), Some(u32::MAX)].map(bound),
        [1024, 4096, 1024, 512, 4096]
    );
}

#[test]
fn rules_are_known_by_their_mark() {
    let net = Network::default();
    assert_eq!(mark(&net, 1024), mark(&net, 1024));
    let others = [
        mark(&net, 1025),
        mark(&Network::parse("br-fc", "172.16.0.1/25").unwrap(), 1024),
        mark(&Network::parse("br-fc-x", "172.16.0.1/24").unwrap(), 1024),
    ];
    assert!(others.iter().all(|other| *other != mark(&net, 1024)));
    assert!(tables(&net, 1024, &Elements::default()).contains(&mark(&net, 1024)));
}

#[test]
fn interfaces_are_elements_and_only_names_that_can_be_written() {
    let net = Network::default();
    let mut elements = Elements::default();
    elements.uplinks.insert("eth0.5".to_owned());
    elements.forwarding.insert("eth0.5".to_owned());
    assert_eq!(
        changes(&net, &Elements::default(), &elements),
        "add element ip banger uplinks { \"eth0.5\" }\nadd element ip banger forwarding { \"eth0.5\" }\n"
    );
    for bad in ["", "a\"b", "eth*", "a b", "a{b", "a;b", "abcdefghijklmnop"] {
        assert!(!writable(bad), "{bad}");
    }
    assert_eq!(interface(b"wlp3s0\0\0\0\0\0\0\0\0\0\0").as_deref(), Some("wlp3s0"));
}

fn any_rules() -> impl Strategy<Value = TapRules> {
    (0u32..40, any::<bool>(), btree_set(0u32..40, 0..5)).prop_map(|(slot, nat, peers)| TapRules {
        slot,
        nat,
        peers: peers.into_iter().filter(|peer| *peer != slot).collect(),
    })
}

proptest! {
    #[test]
    fn keys_lead_back_to_their_slots(host in 1u32..=253, slot in 0u32..252) {
        let net = Network::new("br-fc", Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 3, 4, 0)) + host), 24).unwrap();
        let key = guest_key(&net, slot).unwrap();
        prop_assert_eq!(guest_slot(&net, &key), Some(slot));
        let address = net.address(slot).unwrap();
        prop_assert_eq!(nat_slot(&net, &address.octets()), Some(slot));
        prop_assert_eq!(slot_of(&net, net.gateway()), None);
    }

    #[test]
    fn any_key_is_read(key in vec(any::<u8>(), 0..64)) {
        let net = Network::default();
        let _ = (guest_slot(&net, &key), nat_slot(&net, &key), pair_slots(&key));
    }

    #[test]
    fn what_was_set_holds_and_is_gone_when_cleared(all in vec(any_rules(), 1..12)) {
        let mut elements = Elements::default();
        for one in &all {
            elements.set(one);
            prop_assert!(elements.has(one));
            prop_assert!(elements.pairs.iter().all(|(a, b)| elements.pairs.contains(&(*b, *a)) && a != b));
        }
        for one in &all {
            elements.clear(one.slot);
            prop_assert!(elements.pairs.iter().all(|(a, b)| *a != one.slot && *b != one.slot));
        }
        prop_assert_eq!(elements.guests.len() + elements.nat.len() + elements.pairs.len(), 0);
    }

    #[test]
    fn text_is_made_of_slots_alone(all in vec(any_rules(), 0..12), others in vec(any_rules(), 0..12)) {
        let net = Network::default();
        let (mut a, mut b) = (Elements::default(), Elements::default());
        all.iter().for_each(|one| a.set(one));
        others.iter().for_each(|one| b.set(one));
        let text = changes(&net, &a, &b);
        let allowed = |c: char| c.is_ascii_alphanumeric() || " \n{},.\"-:".contains(c);
        prop_assert!(text.chars().all(allowed), "{}", text);
        prop_assert_eq!(changes(&net, &a, &b).is_empty(), a == b);
        for line in text.lines() {
            let starts = ["add element bridge banger ", "add element ip banger ", "delete element bridge banger ", "delete element ip banger "];
            prop_assert!(starts.iter().any(|s| line.starts_with(s)), "{}", line);
        }
    }

    #[test]
    fn a_setup_gives_nobody_more_than_told(told in vec(any_rules(), 0..12), there in btree_set(0u32..40, 0..20), free in btree_set(0u32..40, 0..5)) {
        let idle_taps: BTreeSet<u32> = free.intersection(&there).copied().filter(|s| told.iter().all(|t| t.slot != *s)).collect();
        let all = wanted(&told, &there, &idle_taps, &Elements::default());
        prop_assert_eq!(&all.guests, &there);
        for (a, b) in &all.pairs {
            prop_assert!(all.pairs.contains(&(*b, *a)) && there.contains(a) && there.contains(b));
            prop_assert!(!idle_taps.contains(a));
        }
        for slot in &all.nat {
            let rules = told.iter().find(|t| t.slot == *slot);
            prop_assert!(rules.map_or(idle_taps.contains(slot), |t| t.nat));
        }
    }
}
