//! By which ways machines get out, which networks of the host's are not outside, and what the host forwards because of them.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use banger_system::helper::Request;

use crate::frames::*;
use crate::support::*;

crate::tests! {
    containers_are_not_outside,
    uplinks_are_where_routes_to_everywhere_lead,
    the_host_becomes_no_router_between_its_other_networks,
    who_has_the_whole_host_forward_is_not_hindered,
    one_machine_does_not_fill_the_table_of_connections,
}

/// What Docker has by `iptables-nft`, in short: what is forwarded and not its own is dropped, and so are ports that are not published.
const DOCKER: &str = r#"
table ip filter {
    chain FORWARD {
        type filter hook forward priority filter; policy drop;
        counter jump DOCKER-USER
        oifname "docker0" ct state related,established counter accept
        oifname "docker0" counter jump DOCKER
        iifname "docker0" counter accept
    }
    chain DOCKER-USER {
        counter return
    }
    chain DOCKER {
        iifname != "docker0" oifname "docker0" counter drop
    }
}
"#;

/// A setting below `/proc/sys/net/ipv4`, of this thread's namespace.
fn setting(name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap();
    text.trim().to_owned()
}

fn set(name: &str, value: &str) {
    tool(
        "sysctl",
        &format!("-q -w net.ipv4.{}={value}", name.replace('/', ".")),
        "",
    );
}

fn machines(helper: &Helper, count: u32) -> Vec<Guest> {
    helper.ok(setup(Vec::new()));
    (0..count)
        .map(|slot| {
            helper.ok(take(rules(slot, true, &[])));
            Guest::on(slot)
        })
        .collect()
}

fn containers_are_not_outside() {
    in_namespace(|| {
        let (outside, container) = (Outside::new(), Outside::container());
        // Docker may forward whatever it likes.
        set("ip_forward", "1");
        for docker in [true, false] {
            if docker {
                nft(DOCKER);
            } else {
                tool("nft", "delete table ip filter", "");
            }
            let helper = Helper::start();
            let guests = machines(&helper, 1);
            guests[0].say(CONTAINER, 7, "not published");
            guests[0].say(OUTSIDE, 7, "out");
            let (text, from) = outside.heard();
            assert_eq!((text.as_str(), from.ip()), ("out", HOST.into()));
            outside.socket.send_to(b"back", from).unwrap();
            assert_eq!(guests[0].until("back").len(), 1);
            container.nothing_but(CONTAINER, "marker");
            // Nor do containers reach machines.
            container
                .socket
                .send_to(b"from a container", (guests[0].address, 9))
                .unwrap();
            guests[0].say(OUTSIDE, 7, "more");
            let (_, from) = outside.heard();
            outside.socket.send_to(b"last", from).unwrap();
            assert_eq!(guests[0].until("last").len(), 1);
            helper.ok(release(0));
            helper.ok(Request::NetworkRemove);
        }
    });
}

fn uplinks_are_where_routes_to_everywhere_lead() {
    in_namespace(|| {
        let outside = Outside::new();
        let there = Ipv4Addr::new(198, 51, 100, 2);
        let other = Outside::beside("out9", Ipv4Addr::new(198, 51, 100, 1), there);
        nft(DOCKER);
        let helper = Helper::start();
        let guests = machines(&helper, 1);
        let reaches_other = |what: &str| {
            guests[0].say(there, 7, what);
            guests[0].say(OUTSIDE, 7, "marker");
            assert_eq!(outside.heard().0, "marker");
            let host = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            host.send_to(b"host", (there, 7)).unwrap();
            match other.heard().0.as_str() {
                "host" => false,
                text => {
                    assert_eq!(text, what);
                    assert_eq!(other.heard().0, "host");
                    true
                }
            }
        };
        assert!(!reaches_other("no route to everywhere"));
        // A second one, by which the host goes only if the first does not work.
        ip(&format!("route add default via {there} metric 4000"));
        helper.ok(setup(Vec::new()));
        assert!(reaches_other("another way"));
        ip(&format!("route del default via {there} metric 4000"));
        helper.ok(setup(Vec::new()));
        assert!(!reaches_other("not any more"));
        // As VPNs do: two halves, or a table of their own.
        ip("route add 0.0.0.0/1 dev out9");
        ip("route del 0.0.0.0/1 dev out9");
        for (add, remove) in [
            ("route add 128.0.0.0/1 dev out9", "route del 128.0.0.0/1 dev out9"),
            (
                "route add default dev out9 table 51820",
                "route del default dev out9 table 51820",
            ),
        ] {
            ip(add);
            helper.ok(setup(Vec::new()));
            assert!(reaches_other(add));
            ip(remove);
            helper.ok(setup(Vec::new()));
            assert!(!reaches_other(remove));
        }
        // The other one goes: its rules with it.
        ip("route del default");
        helper.ok(setup(Vec::new()));
        guests[0].say(OUTSIDE, 7, "no way");
        outside.nothing_but(OUTSIDE, "marker");
        let theirs = tool("nft", "list table ip filter", "");
        assert!(!theirs.contains("out0") && !theirs.contains("out9"), "{theirs}");
    });
}

fn the_host_becomes_no_router_between_its_other_networks() {
    in_namespace(|| {
        let (outside, container) = (Outside::new(), Outside::container());
        let helper = Helper::start();
        let all = || ["ip_forward", "conf/out0/forwarding", "conf/docker0/forwarding"].map(setting);
        assert_eq!(all(), ["0", "0", "0"]);
        let guests = machines(&helper, 1);
        assert_eq!(all(), ["0", "1", "0"]);
        guests[0].say(OUTSIDE, 7, "out");
        let (_, from) = outside.heard();
        outside.socket.send_to(b"back", from).unwrap();
        assert_eq!(guests[0].until("back").len(), 1);
        // Neither direction.
        outside.socket.send_to(b"in", (CONTAINER, 7)).unwrap();
        container.socket.send_to(b"out", (OUTSIDE, 7)).unwrap();
        container.nothing_but(CONTAINER, "marker");
        outside.nothing_but(OUTSIDE, "marker");
        // Not even where something else has a network of its own forward, without asking for the uplink.
        set("conf/docker0/forwarding", "1");
        helper.ok(setup(Vec::new()));
        outside.socket.send_to(b"in", (CONTAINER, 7)).unwrap();
        container.nothing_but(CONTAINER, "marker");
        container.socket.send_to(b"asked for", (OUTSIDE, 7)).unwrap();
        let (text, from) = outside.heard();
        assert_eq!(text, "asked for");
        outside.socket.send_to(b"answer", from).unwrap();
        assert_eq!(container.heard().0, "answer");
        // When machines are gone, it is as it was.
        helper.ok(release(0));
        helper.ok(Request::NetworkRemove);
        assert_eq!(all(), ["0", "0", "1"]);
        // An uplink that is none any more is switched off; one that forwarded before banger came is left alone.
        helper.ok(setup(Vec::new()));
        assert_eq!(all(), ["0", "1", "1"]);
        ip("route del default");
        helper.ok(setup(Vec::new()));
        assert_eq!(all(), ["0", "0", "1"]);
        ip(&format!("route add default via {CONTAINER}"));
        helper.ok(setup(Vec::new()));
        helper.ok(Request::NetworkRemove);
        assert_eq!(all(), ["0", "0", "1"]);
    });
}

fn who_has_the_whole_host_forward_is_not_hindered() {
    in_namespace(|| {
        let (outside, container) = (Outside::new(), Outside::container());
        let helper = Helper::start();
        helper.ok(setup(Vec::new()));
        // As Docker does, which finds it off.
        assert_eq!(setting("ip_forward"), "0");
        set("ip_forward", "1");
        helper.ok(setup(Vec::new()));
        outside.socket.send_to(b"in", (CONTAINER, 7)).unwrap();
        assert_eq!(container.heard().0, "in");
        helper.ok(Request::NetworkRemove);
        assert_eq!(["ip_forward", "conf/out0/forwarding"].map(setting), ["1", "1"]);
        outside.socket.send_to(b"in still", (CONTAINER, 7)).unwrap();
        assert_eq!(container.heard().0, "in still");
    });
}

/// How many connections the kernel tracks in this namespace.
fn tracked() -> u32 {
    tool("sysctl", "-n net.netfilter.nf_conntrack_count", "")
        .trim()
        .parse()
        .unwrap()
}

fn one_machine_does_not_fill_the_table_of_connections() {
    in_namespace(|| {
        let outside = Outside::new();
        let helper = Helper::start();
        let guests = machines(&helper, 2);
        let most: u32 = tool("sysctl", "-n net.netfilter.nf_conntrack_max", "")
            .trim()
            .parse()
            .unwrap();
        let bound = (most / 64).clamp(512, 4096);
        let flood = |from: u16| {
            for port in from..from + u16::try_from(bound).unwrap() {
                guests[0].say_from(port, Ipv4Addr::new(203, 0, 113, 9), 9, "flood");
            }
        };
        flood(10_000);
        flood(20_000);
        // Nor by asking the host itself, nor by having the rules set up again.
        for number in 0..600u16 {
            let [high, low] = number.to_be_bytes();
            let mut question = vec![8, 0, 0, 0, high, low, 0, 1];
            let sum = checksum(&question).to_be_bytes();
            question[2..4].copy_from_slice(&sum);
            let packet = ipv4(guests[0].address, net().gateway(), 1, &question);
            guests[0].send(&ethernet(mac(net().gateway()), guests[0].mac, 0x0800, &packet));
        }
        helper.ok(setup(Vec::new()));
        flood(30_000);
        let count = tracked();
        assert!(
            count >= bound / 2 && count <= bound + 64,
            "{count} of {most} are tracked"
        );
        // The others have theirs.
        guests[1].say(OUTSIDE, 7, "another");
        assert_eq!(outside.heard().0, "another");
        // Those that have ended make room.
        tool("sysctl", "-q -w net.netfilter.nf_conntrack_udp_timeout=1", "");
        flood(10_000);
        let deadline = Instant::now() + Duration::from_secs(60);
        while tracked() > bound / 2 {
            assert!(Instant::now() < deadline, "{} are still tracked", tracked());
            std::thread::sleep(Duration::from_millis(50));
        }
        guests[0].say(OUTSIDE, 7, "again");
        assert_eq!(outside.heard().0, "again");
    });
}
