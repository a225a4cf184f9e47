//! What passes between guests, host and outside, with packets.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use crate::frames::*;
use crate::support::*;

crate::tests! {
    only_what_is_its_own_leaves_a_machine,
    machines_do_not_reach_each_other_unless_asked,
    the_outside_is_reached_by_translation_or_not_at_all,
    the_hosts_own_services_are_not_reached,
    machines_go_on_while_the_network_is_set_up_again,
}

/// A helper with its network and taps.
fn helper_with(taps: Vec<banger_system::helper::TapRules>) -> Helper {
    let helper = Helper::start();
    helper.ok(setup(Vec::new()));
    for rules in taps {
        helper.ok(take(rules));
    }
    helper
}

fn only_what_is_its_own_leaves_a_machine() {
    in_namespace(|| {
        let _helper = helper_with(vec![rules(0, true, &[1]), rules(1, true, &[0])]);
        let (a, b) = (Guest::on(0), Guest::on(1));
        spoof_everything(&a, &b);
        a.whisper(&b, "marker");
        let came = b.until("marker");
        assert_eq!(came.len(), 1, "{came:02x?}");
        // What is right passes: ARP, and the answer.
        a.send(&ethernet(
            EVERYBODY,
            a.mac,
            0x0806,
            &arp(1, (a.mac, a.address), ([0; 6], b.address)),
        ));
        b.send(&ethernet(
            a.mac,
            b.mac,
            0x0806,
            &arp(2, (b.mac, b.address), (a.mac, a.address)),
        ));
        b.whisper(&a, "answer");
        assert_eq!(a.until("answer").len(), 2);
        a.whisper(&b, "again");
        assert_eq!(b.until("again").len(), 2);
    });
}

/// Every frame that `a` must not be able to send to `b`.
fn spoof_everything(a: &Guest, b: &Guest) {
    let other = Ipv4Addr::new(172, 16, 0, 99);
    let packet = |from| ipv4(from, b.address, 17, &udp(1, 2, "forged"));
    a.send(&ethernet(b.mac, mac(other), 0x0800, &packet(a.address)));
    a.send(&ethernet(b.mac, a.mac, 0x0800, &packet(other)));
    a.send(&ethernet(b.mac, a.mac, 0x0800, &packet(net().gateway())));
    a.send(&ethernet(b.mac, mac(other), 0x0800, &packet(other)));
    for (frame, sender) in [(mac(other), a.mac), (a.mac, mac(other))] {
        let body = arp(2, (sender, a.address), (b.mac, b.address));
        a.send(&ethernet(b.mac, frame, 0x0806, &body));
    }
    for stolen in [net().gateway(), b.address, other, Ipv4Addr::UNSPECIFIED] {
        let body = arp(1, (a.mac, stolen), ([0; 6], b.address));
        a.send(&ethernet(EVERYBODY, a.mac, 0x0806, &body));
    }
    // A tag of a virtual network, with what would be right inside; IPv6; loops of bridges; anything else.
    let tagged = [&[0, 5, 0x08, 0x00][..], &packet(a.address)].concat();
    a.send(&ethernet(b.mac, a.mac, 0x8100, &tagged));
    a.send(&ethernet(b.mac, a.mac, 0x88a8, &tagged));
    a.send(&ethernet(b.mac, a.mac, 0x86dd, &[0x60; 60]));
    a.send(&ethernet([0x01, 0x80, 0xc2, 0, 0, 0], a.mac, 0x0026, &[0x42; 60]));
    a.send(&ethernet(EVERYBODY, a.mac, 0x88cc, &[0; 60]));
    // ARP with fields of other lengths, behind which other fields would lie.
    let mut long = arp(1, (a.mac, a.address), ([0; 6], b.address));
    long[4] = 8;
    a.send(&ethernet(EVERYBODY, a.mac, 0x0806, &long));
    a.send(&ethernet(EVERYBODY, a.mac, 0x0806, &long[..8]));
}

fn machines_do_not_reach_each_other_unless_asked() {
    in_namespace(|| {
        let helper = helper_with(vec![rules(0, true, &[]), rules(1, true, &[2]), rules(2, true, &[1])]);
        let (a, b, c) = (Guest::on(0), Guest::on(1), Guest::on(2));
        let host = UdpSocket::bind((net().gateway(), 0)).unwrap();
        let attack = || {
            a.whisper(&b, "hello");
            a.say(b.address, 4001, "by way of the host");
            a.send(&ethernet(
                EVERYBODY,
                a.mac,
                0x0806,
                &arp(1, (a.mac, a.address), ([0; 6], b.address)),
            ));
            let broadcast = ipv4(a.address, Ipv4Addr::new(172, 16, 0, 255), 17, &udp(1, 2, "all"));
            a.send(&ethernet(EVERYBODY, a.mac, 0x0800, &broadcast));
        };
        attack();
        // A group is one.
        c.whisper(&b, "from c");
        let came = b.until("from c");
        assert_eq!(came.len(), 1, "{came:02x?}");
        // It ends at once, and others begin at once.
        helper.ok(change(rules(1, true, &[])));
        helper.ok(change(rules(0, true, &[2])));
        c.whisper(&b, "late");
        attack();
        host.send_to(b"marker", (b.address, 5)).unwrap();
        let came = b.until("marker");
        assert_eq!(came.len(), 1, "{came:02x?}");
        a.whisper(&c, "new friend");
        // What was sent to all came too, and nothing by way of the host.
        let came = c.until("new friend");
        assert!(came.iter().all(|frame| frame[6..12] == a.mac), "{came:02x?}");
        // A new machine in an old one's place is in no group.
        helper.ok(release(2));
        helper.ok(take(rules(2, true, &[])));
        let d = Guest::on(2);
        a.whisper(&d, "friend?");
        host.send_to(b"marker", (d.address, 5)).unwrap();
        let came = d.until("marker");
        assert_eq!(came.len(), 1, "{came:02x?}");
    });
}

fn the_outside_is_reached_by_translation_or_not_at_all() {
    in_namespace(|| {
        let outside = Outside::new();
        let helper = helper_with(vec![rules(0, true, &[]), rules(1, false, &[])]);
        let (a, b) = (Guest::on(0), Guest::on(1));
        b.say(OUTSIDE, 7, "without");
        a.say(OUTSIDE, 7, "with");
        let (text, from) = outside.heard();
        assert_eq!((text.as_str(), from.ip()), ("with", HOST.into()));
        outside.socket.send_to(b"answer", from).unwrap();
        let answer = a.until("answer").pop().unwrap();
        assert_eq!(answer[26..30], OUTSIDE.octets());
        // Nobody outside reaches a machine that did not ask: what it routes to it is dropped.
        helper.ok(change(rules(1, true, &[])));
        b.say(OUTSIDE, 7, "now");
        let (text, to_b) = outside.heard();
        assert_eq!(text, "now");
        helper.ok(change(rules(1, false, &[])));
        outside.socket.send_to(b"too late", to_b).unwrap();
        b.say(OUTSIDE, 7, "too late too");
        a.say(OUTSIDE, 7, "marker");
        assert_eq!(outside.heard().0, "marker");
        let host = UdpSocket::bind((net().gateway(), 0)).unwrap();
        host.send_to(b"marker", (b.address, 5)).unwrap();
        assert_eq!(b.until("marker").len(), 1, "an open connection ends as well");
        // The addresses by which clouds hand out secrets; Azure's name server is one of them.
        for address in METADATA {
            a.say(address, 7, "secrets");
        }
        a.say(OUTSIDE, 7, "marker");
        assert_eq!(outside.heard().0, "marker");
        a.say(METADATA[1], 53, "question");
        let mut buffer = [0; 64];
        let (count, _) = outside.names.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"question");
    });
}

fn the_hosts_own_services_are_not_reached() {
    in_namespace(|| {
        let _outside = Outside::new();
        let _helper = helper_with(vec![rules(0, true, &[])]);
        let a = Guest::on(0);
        let service = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 5353)).unwrap();
        service.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        for address in [
            net().gateway(),
            HOST,
            Ipv4Addr::LOCALHOST,
            Ipv4Addr::new(172, 16, 0, 255),
        ] {
            a.say(address, 5353, "let me in");
        }
        UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .send_to(b"marker", "127.0.0.1:5353")
            .unwrap();
        let mut buffer = [0; 64];
        let (count, _) = service.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"marker");
        // It may see that its gateway is there, and nothing of the other addresses.
        let ping = |to, text| {
            a.send(&ethernet(
                mac(net().gateway()),
                a.mac,
                0x0800,
                &ipv4(a.address, to, 1, &echo(text)),
            ))
        };
        ping(HOST, "other");
        ping(net().gateway(), "pong");
        assert_eq!(a.until("pong").len(), 1);
        // What the host asks, it is answered.
        service.send_to(b"question", (a.address, 9)).unwrap();
        let question = a.until("question").pop().unwrap();
        let port = u16::from_be_bytes([question[34], question[35]]);
        let answer = ipv4(a.address, net().gateway(), 17, &udp(9, port, "answer"));
        a.send(&ethernet(mac(net().gateway()), a.mac, 0x0800, &answer));
        let (count, _) = service.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"answer");
        // A name that the host has for a service elsewhere is a service of the host's.
        nft("table ip x { chain pre { type nat hook prerouting priority -100; udp dport 81 dnat to 192.0.2.2:7; }; }");
        a.say(HOST, 81, "published");
        a.say(OUTSIDE, 7, "marker");
        assert_eq!(_outside.heard().0, "marker");
    });
}

fn machines_go_on_while_the_network_is_set_up_again() {
    in_namespace(|| {
        let outside = Outside::new();
        let helper = helper_with(vec![rules(0, true, &[1]), rules(1, false, &[0])]);
        helper.ok(warm([5, 6]));
        let (a, b) = (Guest::on(0), Guest::on(1));
        let works = |what: &str| {
            a.say(OUTSIDE, 7, what);
            assert_eq!(outside.heard().0, what);
            b.say(OUTSIDE, 7, "without");
            spoof_everything(&a, &b);
            a.whisper(&b, what);
            assert_eq!(b.until(what).len(), 1, "{what}");
        };
        works("first");
        let before = helper.inventory();
        helper.ok(setup(vec![rules(0, true, &[1]), rules(1, false, &[0])]));
        assert_eq!(helper.inventory(), before);
        works("told");
        // What it is not told about it keeps.
        helper.ok(setup(Vec::new()));
        assert_eq!(helper.inventory(), before);
        works("not told");
        // A foreign flush: nothing is given out on broken rules, and everything can be made again.
        tool("nft", "flush ruleset", "");
        helper.refused(take(rules(5, true, &[])), banger_system::helper::HelperCode::NotFound);
        helper.ok(setup(vec![rules(0, true, &[1]), rules(1, false, &[0])]));
        assert_eq!(helper.inventory(), before);
        works("after a flush");
        tool("nft", "flush chain bridge banger prerouting", "");
        helper.refused(take(rules(5, true, &[])), banger_system::helper::HelperCode::NotFound);
        helper.ok(setup(vec![rules(0, true, &[1]), rules(1, false, &[0])]));
        works("after a chain was emptied");
        // The bridge too.
        tool("nft", "flush ruleset", "");
        ip("link del br-fc");
        helper.refused(warm([7]), banger_system::helper::HelperCode::NotFound);
        helper.ok(setup(vec![rules(0, true, &[1]), rules(1, false, &[0])]));
        assert_eq!(helper.inventory().len(), before.len());
        for guest in [&a, &b] {
            let text: Vec<String> = guest.mac.iter().map(|b| format!("{b:02x}")).collect();
            ip(&format!(
                "neigh replace {} lladdr {} dev br-fc",
                guest.address,
                text.join(":")
            ));
        }
        [0, 1].into_iter().for_each(forwards);
        works("after the bridge was removed");
        // Rules of taps that somebody removed go.
        ip("link del tap-fc-5");
        helper.ok(setup(Vec::new()));
        assert!(!helper.inventory().iter().any(|o| o.name.ends_with("tap-fc-5")));
    });
}
