//! What may enter an image. Pure: paths and patterns in, decisions out.

use super::TarError;

/// Longest path.
pub const MAX_PATH: usize = 4096;
/// Deepest path.
pub const MAX_DEPTH: usize = 256;
/// Longest name.
pub const MAX_NAME: usize = 255;

/// The names of a path from the root of the image, the root itself being the empty list. Paths are relative to the image
/// whether they begin with `/`, `./` or nothing. Those that climb (`..`) are refused, as are impossible names.
pub fn components(path: &[u8]) -> Result<Vec<Vec<u8>>, TarError> {
    let bad = |why| Err(TarError::Path { path: show(path), why });
    if path.is_empty() {
        return bad("is empty");
    }
    if path.len() > MAX_PATH {
        return bad("is too long");
    }
    let mut out = Vec::new();
    for name in path.split(|b| *b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return bad("climbs out of a directory"),
            _ if name.len() > MAX_NAME => return bad("has a name that is too long"),
            _ if name.contains(&0) => return bad("has a zero byte in it"),
            _ => out.push(name.to_vec()),
        }
    }
    if out.len() > MAX_DEPTH {
        return bad("is too deep");
    }
    Ok(out)
}

fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).escape_debug().take(200).collect()
}

/// What becomes of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It enters as it is.
    Keep,
    /// It enters without its content.
    Empty,
    /// It stays out.
    Drop,
}

/// What of a system that was just installed is left out: what belongs to the one machine or host it was made on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scrub {
    /// Nothing: the archive is an image as somebody published it.
    Nothing,
    /// Everything of the host and of the installation.
    FreshInstall,
}

/// Directories whose content is made anew by every machine.
const VOLATILE: &[&str] = &["dev", "proc", "sys", "run", "tmp", "var/tmp"];
/// Directories of which only directories are kept.
const FILES_DROPPED: &[&str] = &[
    "var/lib/apt/lists",
    "var/cache/apt",
    "var/cache/ldconfig",
    "var/cache/man",
];
/// Files of the host, of the installation, or that must be different in every machine.
const DROPPED: &[&str] = &[
    "lost+found",
    "etc/resolv.conf",
    "etc/hostname",
    "etc/apt/apt.conf.d/99mmdebstrap",
    "etc/passwd-",
    "etc/shadow-",
    "etc/group-",
    "etc/gshadow-",
    "etc/subuid-",
    "etc/subgid-",
    "etc/.pwd.lock",
    "root/.bash_history",
    "root/.wget-hsts",
    "var/lib/dbus/machine-id",
    "var/lib/systemd/random-seed",
    "var/lib/systemd/credential.secret",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/lock-frontend",
    "var/lib/dpkg/triggers/Lock",
    "var/lib/dpkg/status-old",
    "var/lib/dpkg/diversions-old",
    "var/lib/dpkg/statoverride-old",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old",
];
/// Files that are kept empty.
const EMPTIED: &[&str] = &["etc/machine-id"];

impl Scrub {
    /// What becomes of the entry at `path`.
    pub fn verdict(self, path: &[Vec<u8>], is_dir: bool) -> Verdict {
        if self == Self::Nothing {
            // The writer makes its own.
            return if path == [b"lost+found".to_vec()] {
                Verdict::Drop
            } else {
                Verdict::Keep
            };
        }
        let joined = path.join(&b'/');
        let is = |list: &[&str]| list.iter().any(|p| p.as_bytes() == joined);
        let below = |list: &[&str]| {
            list.iter().any(|p| {
                joined
                    .strip_prefix(p.as_bytes())
                    .is_some_and(|rest| rest.first() == Some(&b'/'))
            })
        };
        if is(DROPPED) || below(VOLATILE) || below(&["lost+found"]) {
            return Verdict::Drop;
        }
        if is(EMPTIED) {
            return Verdict::Empty;
        }
        if is_dir {
            return Verdict::Keep;
        }
        if below(FILES_DROPPED)
            || (below(&["etc/ssh"]) && path.last().is_some_and(|name| name.starts_with(b"ssh_host_")))
        {
            return Verdict::Drop;
        }
        if below(&["var/log"]) {
            // Accounting files must be there to be written; what the installation logged need not.
            let keeps = path.last().is_some_and(|name| {
                [b"wtmp".as_slice(), b"btmp", b"lastlog", b"faillog", b"README"].contains(&name.as_slice())
            });
            return if keeps { Verdict::Empty } else { Verdict::Drop };
        }
        Verdict::Keep
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Vec<Vec<u8>> {
        components(text.as_bytes()).unwrap()
    }

    #[test]
    fn paths() {
        assert_eq!(
            path("./usr//bin/./sh"),
            [b"usr".to_vec(), b"bin".to_vec(), b"sh".to_vec()]
        );
        assert_eq!(path("./"), Vec::<Vec<u8>>::new());
        assert_eq!(path("/"), Vec::<Vec<u8>>::new());
        assert_eq!(path("/etc/passwd"), path("etc/passwd"));
        for bad in [
            "",
            "..",
            "a/../b",
            "../a",
            "a/..",
            "a\0b",
            &"x".repeat(256),
            &"a/".repeat(300),
            &"aaa/".repeat(1025),
        ] {
            assert!(components(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn fresh_installs_are_scrubbed() {
        let verdict = |p: &str| Scrub::FreshInstall.verdict(&path(p), p.ends_with('/'));
        for dropped in [
            "etc/ssh/ssh_host_rsa_key",
            "etc/resolv.conf",
            "etc/hostname",
            "var/lib/apt/lists/mirror_dists_InRelease",
            "var/cache/apt/pkgcache.bin",
            "dev/null",
            "run/lock/",
            "tmp/x",
            "var/log/dpkg.log",
            "var/log/apt/history.log",
            "etc/apt/apt.conf.d/99mmdebstrap",
            "var/lib/dbus/machine-id",
            "lost+found/",
            "lost+found/x",
        ] {
            assert_eq!(verdict(dropped), Verdict::Drop, "{dropped}");
        }
        for kept in [
            "dev/",
            "run/",
            "tmp/",
            "etc/ssh/",
            "etc/ssh/sshd_config",
            "var/log/",
            "var/log/apt/",
            "var/lib/apt/lists/partial/",
            "etc/passwd",
            "var/cache/apt/archives/partial/",
            "etc/hostname.d/x",
            "device",
            "runner/x",
            "root/.bashrc",
            "var/lib/dpkg/status",
            "",
        ] {
            let p = if kept.is_empty() { Vec::new() } else { path(kept) };
            assert_eq!(
                Scrub::FreshInstall.verdict(&p, kept.ends_with('/')),
                Verdict::Keep,
                "{kept}"
            );
        }
        assert_eq!(verdict("etc/machine-id"), Verdict::Empty);
        assert_eq!(verdict("var/log/wtmp"), Verdict::Empty);
    }

    #[test]
    fn published_images_are_kept_as_they_are() {
        assert_eq!(Scrub::Nothing.verdict(&path("etc/machine-id"), false), Verdict::Keep);
        assert_eq!(Scrub::Nothing.verdict(&path("dev/null"), false), Verdict::Keep);
        assert_eq!(Scrub::Nothing.verdict(&path("lost+found"), true), Verdict::Drop);
    }
}
