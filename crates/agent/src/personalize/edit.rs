//! The texts that make a machine itself. Pure.

/// The image's `/etc/hosts` with the machine's name in it. Its other lines are kept.
pub fn hosts(old: &str, name: &str) -> String {
    let mut out = String::new();
    let mut localhost = false;
    for line in old.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        match words.next() {
            Some("127.0.1.1") => continue,
            Some("127.0.0.1") => localhost = true,
            _ => {}
        }
        out.push_str(line);
        out.push('\n');
    }
    if !localhost {
        out.insert_str(0, "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
    }
    out.push_str("127.0.1.1 ");
    out.push_str(name);
    out.push('\n');
    out
}

/// Our keys joined to the user's own, one a line, none twice.
pub fn authorized_keys(old: &str, ours: &[String]) -> String {
    let mut out: String = old.to_owned();
    if !out.is_empty() && !out.ends_with('\n') {
        out.push('\n');
    }
    for key in ours {
        let key = key.trim();
        let one_line = !key.is_empty() && !key.contains(['\n', '\r', '\0']);
        if one_line && !out.lines().any(|line| line.trim() == key) {
            out.push_str(key);
            out.push('\n');
        }
    }
    out
}

/// `/etc/resolv.conf`.
pub fn resolv_conf(servers: &[String]) -> String {
    servers
        .iter()
        .filter(|s| s.parse::<std::net::IpAddr>().is_ok())
        .map(|s| format!("nameserver {s}\n"))
        .collect()
}

/// `/etc/machine-id` of a machine: 32 digits, always the same for one id, never all zero.
pub fn machine_id(id: &str) -> Option<String> {
    let number = u64::from_str_radix(id, 16).ok().filter(|_| id.len() == 16)?;
    // The second half only has to differ in form; the id itself is what is unique. (The finalizer of splitmix64.)
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    Some(format!("{number:016x}{mixed:016x}"))
}

/// Whether `name` is the full name of a unit, and nothing else.
pub fn is_unit(name: &str) -> bool {
    let known = [
        "service",
        "socket",
        "target",
        "timer",
        "mount",
        "automount",
        "path",
        "swap",
        "device",
        "slice",
        "scope",
    ];
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'@' | b':' | b'\\');
    name.len() < 256
        && name.bytes().all(plain)
        && name
            .rsplit_once('.')
            .is_some_and(|(stem, kind)| !stem.is_empty() && known.contains(&kind))
}

/// Whether `name` is the plain name of one of systemd's generators, which are masked like units but in their own directory.
pub fn is_generator(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    name.len() < 256 && name.ends_with("-generator") && name.bytes().all(plain)
}

/// The two parts of `TARGET.wants/UNIT`: one unit's wish for another, which can be masked alone, so that the other is not
/// started at boot but can be later.
pub fn wish(name: &str) -> Option<(&str, &str)> {
    let (directory, unit) = name.split_once('/')?;
    let target = directory.strip_suffix(".wants")?;
    (is_unit(target) && is_unit(unit)).then_some((directory, unit))
}

/// Whether `name` can be the machine's host name.
pub fn is_host_name(name: &str) -> bool {
    let label =
        |l: &str| !l.is_empty() && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') && !l.starts_with('-');
    name.len() <= 64 && name.split('.').all(label)
}

/// 64 bytes from 128 hexadecimal digits.
pub fn entropy(hex: &str) -> Option<[u8; 64]> {
    let mut out = [0; 64];
    let digits = hex.as_bytes();
    if digits.len() != 128 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_keep_what_is_there() {
        let old = "127.0.0.1 localhost\n127.0.1.1 old # gone\n10.0.0.1 db\n# 127.0.1.1 comment";
        let new = "127.0.0.1 localhost\n10.0.0.1 db\n# 127.0.1.1 comment\n127.0.1.1 m1\n";
        assert_eq!(hosts(old, "m1"), new);
        assert_eq!(hosts(new, "m1"), new);
        assert_eq!(
            hosts("", "m1"),
            "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 m1\n"
        );
    }

    #[test]
    fn keys_are_merged() {
        let keys = |k: &[&str]| k.iter().map(|&k| k.to_owned()).collect::<Vec<_>>();
        let own = "# mine\nssh-ed25519 AAA me";
        let merged = authorized_keys(
            own,
            &keys(&["ssh-ed25519 BBB banger\n", "", "two\nlines", "ssh-ed25519 AAA me"]),
        );
        assert_eq!(merged, "# mine\nssh-ed25519 AAA me\nssh-ed25519 BBB banger\n");
        assert_eq!(authorized_keys(&merged, &keys(&["ssh-ed25519 BBB banger"])), merged);
    }

    #[test]
    fn machine_ids() {
        let id = machine_id("0123456789abcdef").unwrap();
        assert_eq!((id.len(), &id[..16]), (32, "0123456789abcdef"));
        assert_ne!(id[16..], machine_id("0123456789abcdee").unwrap()[16..]);
        assert_eq!(machine_id("123"), None);
        assert_eq!(machine_id("zzzzzzzzzzzzzzzz"), None);
        assert_ne!(machine_id("0000000000000000").unwrap(), "0".repeat(32));
    }

    #[test]
    fn names() {
        assert!(is_unit("getty@tty1.service") && is_unit("dev-sda\\x2d1.swap"));
        assert!(!is_unit("../x.service") && !is_unit(".service") && !is_unit("x.conf") && !is_unit("service"));
        assert!(is_generator("systemd-gpt-auto-generator"));
        assert!(!is_generator("../x-generator") && !is_generator("x.service"));
        assert_eq!(wish("a.target.wants/b.service"), Some(("a.target.wants", "b.service")));
        assert_eq!(
            wish("a.wants/b.service")
                .or(wish("a.target.wants/../b.service"))
                .or(wish("/b.service")),
            None
        );
        assert!(is_host_name("m-1") && is_host_name("a.b"));
        assert!(!is_host_name("") && !is_host_name("a..b") && !is_host_name("-a") && !is_host_name("a b"));
    }

    #[test]
    fn other_texts() {
        let servers = ["10.0.2.3".to_owned(), "x\nsearch evil".to_owned()];
        assert_eq!(resolv_conf(&servers), "nameserver 10.0.2.3\n");
        assert_eq!(entropy(&"0f".repeat(64)), Some([15; 64]));
        assert_eq!(entropy("0f"), None);
        assert_eq!(entropy(&"+1".repeat(64)), None);
    }
}
