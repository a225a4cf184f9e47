//! Packets as `dig` and `systemd-resolved` send them, and garbage.

use proptest::prelude::*;

use super::*;

const AAAA: u16 = 28;
const WEB: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 7);

fn web(name: &str) -> Option<Ipv4Addr> {
    (name == "web").then_some(WEB)
}

fn wire_name(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for label in text.split('.').filter(|l| !l.is_empty()) {
        out.push(label.len() as u8);
        out.extend_from_slice(label.as_bytes());
    }
    out.push(0);
    out
}

fn query(name: &str, kind: u16, additional: &[u8]) -> Vec<u8> {
    let mut out = vec![
        0xab,
        0xcd,
        0x01,
        0x20,
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        u8::from(!additional.is_empty()),
    ];
    out.extend(wire_name(name));
    out.extend(kind.to_be_bytes());
    out.extend(IN.to_be_bytes());
    out.extend_from_slice(additional);
    out
}

/// An OPT record with a cookie, as `dig` sends it.
fn opt(version: u8, flags: u8) -> Vec<u8> {
    let mut out = vec![0, 0, 41, 0x04, 0xd0, 0, version, flags, 0, 0, 12];
    out.extend([0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]);
    out
}

/// Code, addresses, and whether the zone's record is there; checks the form of everything else.
fn read(answer: &[u8], asked: &[u8]) -> (u8, Vec<Ipv4Addr>, bool) {
    assert!(answer.len() <= 512);
    assert_eq!(answer[..2], asked[..2], "its id");
    assert_eq!(answer[2] & 0x80, 0x80);
    assert_eq!(answer[2] & 0x79, asked[2] & 0x79, "opcode and recursion as asked");
    let count = |at: usize| usize::from(u16::from_be_bytes([answer[at], answer[at + 1]]));
    let mut at = HEADER;
    if count(4) == 1 {
        let (_, length) = name(&answer[at..]).unwrap();
        assert_eq!(
            answer[at..at + length + 4],
            asked[at..at + length + 4],
            "the question as it came"
        );
        at += length + 4;
    }
    let (mut addresses, mut zone) = (Vec::new(), false);
    for _ in 0..count(6) + count(8) + count(10) {
        at += if answer[at] == 0xc0 {
            assert_eq!(answer[at + 1], 12);
            2
        } else {
            name(&answer[at..]).unwrap().1
        };
        let kind = u16::from_be_bytes([answer[at], answer[at + 1]]);
        let ttl = u32::from_be_bytes(answer[at + 4..at + 8].try_into().unwrap());
        let length = usize::from(u16::from_be_bytes([answer[at + 8], answer[at + 9]]));
        let data = &answer[at + 10..at + 10 + length];
        match kind {
            A => addresses.push(Ipv4Addr::from(<[u8; 4]>::try_from(data).unwrap())),
            SOA => zone = true,
            other => assert_eq!(other, OPT),
        }
        assert!(kind == OPT || ttl <= 5);
        at += 10 + length;
    }
    assert_eq!(at, answer.len(), "nothing behind it");
    (answer[3] & 0x0f, addresses, zone)
}

fn ask(query: &[u8]) -> (u8, Vec<Ipv4Addr>, bool) {
    read(&answer(query, web).unwrap(), query)
}

#[test]
fn what_is_asked_is_answered() {
    let none = Vec::new;
    for (name, kind, wanted) in [
        ("web.vm", A, (0, vec![WEB], false)),
        ("web.vm", ANY, (0, vec![WEB], false)),
        ("web.vm", AAAA, (0, none(), true)),
        ("web.vm", 16, (0, none(), true)),
        ("other.vm", A, (3, none(), true)),
        ("other.vm", AAAA, (3, none(), true)),
        ("a.web.vm", A, (3, none(), true)),
        ("vm", A, (0, none(), true)),
        ("vm", SOA, (0, none(), true)),
        ("web", A, (5, none(), false)),
        ("example.com", A, (5, none(), false)),
        ("web.vm.example.com", A, (5, none(), false)),
        ("", A, (5, none(), false)),
    ] {
        assert_eq!(ask(&query(name, kind, &[])), wanted, "{name} {kind}");
        assert_eq!(ask(&query(name, kind, &opt(0, 0))), wanted, "{name} {kind} with EDNS");
    }
}

#[test]
fn case_makes_no_difference_and_comes_back() {
    // `read` compares the question.
    assert_eq!(ask(&query("wEb.Vm", A, &[])), (0, vec![WEB], false));
}

#[test]
fn edns_is_answered_with_edns() {
    let asked = query("web.vm", A, &opt(0, 0x80));
    let answered = answer(&asked, web).unwrap();
    assert_eq!(
        answered[answered.len() - 11..],
        [0, 0, 41, 0x04, 0xd0, 0, 0, 0x80, 0, 0, 0]
    );
    let later = query("web.vm", A, &opt(1, 0));
    let answered = answer(&later, web).unwrap();
    assert_eq!(answered[answered.len() - 6], 1, "BADVERS is code 16");
    assert_eq!(read(&answered, &later), (0, vec![], false));
}

#[test]
fn what_is_not_of_the_form_is_told() {
    let good = query("web.vm", A, &[]);
    let with = |at: usize, byte: u8| {
        let mut query = good.clone();
        query[at] = byte;
        query
    };
    assert_eq!(answer(&with(2, 0x81), web), None, "an answer is not answered");
    assert_eq!(answer(&good[..11], web), None);
    assert_eq!(ask(&with(2, 0x29)).0, 4, "an update");
    assert_eq!(ask(&with(5, 2)).0, 1, "two questions");
    assert_eq!(ask(&with(5, 0)).0, 1, "no question");
    assert_eq!(ask(&with(7, 1)).0, 1, "an answer in the question");
    assert_eq!(ask(&with(11, 1)).0, 1, "a record that is not there");
    assert_eq!(ask(&with(12, 0xc0)).0, 1, "a pointer");
    assert_eq!(ask(&with(12, 64)).0, 1, "a label too long");
    assert_eq!(ask(&good[..good.len() - 1]).0, 1, "cut off");
    let mut class = good.clone();
    *class.last_mut().unwrap() = 3;
    assert_eq!(ask(&class).0, 5, "another class");
    let twice = [opt(0, 0), opt(0, 0)].concat();
    let mut twice = query("web.vm", A, &twice);
    twice[11] = 2;
    assert_eq!(ask(&twice).0, 1);
}

#[test]
fn names_are_as_long_as_they_may_be() {
    let label = "a".repeat(63);
    let long = format!("{label}.{label}.{label}.{}.vm", "a".repeat(58));
    let asked = query(&long, A, &opt(0, 0));
    assert_eq!(wire_name(&long).len(), 255);
    assert_eq!(ask(&asked), (3, vec![], true));
    let longer = format!("{label}.{label}.{label}.{}.vm", "a".repeat(59));
    assert_eq!(ask(&query(&longer, A, &[])).0, 1);
}

proptest! {
    #[test]
    fn garbage_is_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        if let Some(answered) = answer(&bytes, web) {
            read(&answered, &bytes);
        }
    }

    #[test]
    fn a_damaged_query_is_answered_in_form(at in 0usize..60, byte: u8, cut in 0usize..60) {
        let mut query = query("web.vm", A, &opt(0, 0));
        let at = at % query.len();
        query[at] = byte;
        query.truncate(query.len() - cut % query.len());
        if let Some(answered) = answer(&query, web) {
            read(&answered, &query);
        }
    }

    #[test]
    fn only_names_below_vm_are_looked_up(name in "[a-zA-Z0-9.-]{0,60}", kind: u16) {
        let asked = query(&name.replace("..", "."), kind, &[]);
        let mut looked = false;
        let answered = answer(&asked, |_| { looked = true; None });
        let code = read(&answered.unwrap(), &asked).0;
        prop_assert!(!looked || code == 3);
    }
}
