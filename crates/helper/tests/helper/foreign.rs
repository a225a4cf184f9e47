//! Beside other firewalls: theirs stay as they are.

use crate::frames::*;
use crate::support::*;
use banger_system::helper::Request;

crate::tests! {
    other_firewalls_keep_what_they_have,
}

/// What Docker (by `iptables-nft`) and firewalld have, in short.
const THEIRS: &str = r#"
table ip filter {
    chain FORWARD {
        type filter hook forward priority filter; policy drop;
        counter jump DOCKER-USER
        oifname "docker0" ct state related,established counter accept
        iifname "docker0" oifname != "docker0" counter accept
    }
    chain DOCKER-USER {
        ip saddr 198.51.100.7 counter drop comment "bangers and mash"
        counter return
    }
}
table ip nat {
    chain POSTROUTING {
        type nat hook postrouting priority srcnat; policy accept;
        oifname != "docker0" ip saddr 172.17.0.0/16 counter masquerade
    }
}
table inet firewalld {
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy accept;
        ct state { established, related } accept
    }
    chain filter_INPUT {
        type filter hook input priority filter + 10; policy accept;
        tcp dport 22 accept
    }
}
table ip6 banger {
    chain theirs {
    }
}
table inet banger {
    chain theirs {
    }
}
"#;

/// All of theirs, without what changes by itself.
fn theirs() -> String {
    let tables = ["ip filter", "ip nat", "inet firewalld", "ip6 banger", "inet banger"];
    let all: String = tables
        .iter()
        .map(|t| tool("nft", &format!("-s list table {t}"), ""))
        .collect();
    all
}

fn without_marked(text: &str) -> String {
    let foreign = |line: &&str| !line.contains("comment \"banger ");
    text.lines().filter(foreign).flat_map(|line| [line, "\n"]).collect()
}

fn other_firewalls_keep_what_they_have() {
    in_namespace(|| {
        let outside = Outside::new();
        nft(THEIRS);
        let before = theirs();
        let helper = Helper::start();
        helper.ok(setup(Vec::new()));
        helper.ok(setup(Vec::new()));
        let during = theirs();
        let marked: Vec<&str> = during
            .lines()
            .filter(|line| line.contains("comment \"banger "))
            .collect();
        assert_eq!(marked.len(), 3, "{during}");
        assert!(
            marked
                .iter()
                .all(|rule| rule.contains("\"br-fc\"") && rule.contains("accept"))
        );
        assert_eq!(without_marked(&during), before);
        // Docker's policy is to drop, and yet:
        for rules in [rules(0, true, &[1]), rules(1, false, &[0])] {
            helper.ok(take(rules));
        }
        let (a, b) = (Guest::on(0), Guest::on(1));
        a.say(OUTSIDE, 7, "through");
        let (text, from) = outside.heard();
        assert_eq!((text.as_str(), from.ip()), ("through", HOST.into()));
        outside.socket.send_to(b"back", from).unwrap();
        assert_eq!(a.until("back").len(), 1);
        b.say(OUTSIDE, 7, "not through");
        a.whisper(&b, "to a friend");
        assert_eq!(b.until("to a friend").len(), 1);
        a.say(OUTSIDE, 7, "marker");
        assert_eq!(outside.heard().0, "marker");
        // They make their chain anew: it is told again, once.
        tool("nft", "flush chain ip filter DOCKER-USER", "");
        nft(
            "add rule ip filter DOCKER-USER ip saddr 198.51.100.7 counter drop comment \"bangers and mash\"\n\
             add rule ip filter DOCKER-USER counter return",
        );
        helper.ok(setup(Vec::new()));
        assert_eq!(without_marked(&theirs()), before);
        assert_ne!(theirs(), before);
        // Nothing stays behind.
        for slot in [0, 1] {
            helper.ok(release(slot));
        }
        helper.ok(Request::NetworkRemove);
        assert_eq!(theirs(), before);
        assert_eq!(helper.inventory(), []);
    });
}
