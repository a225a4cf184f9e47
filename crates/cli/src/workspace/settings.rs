//! Settings of git, as data: they are read, and only those that name no program are used. Keys and values are bytes.

use std::collections::HashMap;

/// Settings by key. Section and last part of a key are in lower case; what stands between is kept as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    values: HashMap<Vec<u8>, Vec<Vec<u8>>>,
}

impl Settings {
    /// What `git config --list -z` says: `key\nvalue`, ended by zeros; a key without a value is true.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let mut settings = Self::default();
        settings.add(bytes);
        settings
    }

    /// Adds settings that win over those that are there.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        for item in bytes.split(|&b| b == 0).filter(|i| !i.is_empty()) {
            let (key, value) = match item.iter().position(|&b| b == b'\n') {
                Some(at) => (&item[..at], &item[at + 1..]),
                None => (item, &b"true"[..]),
            };
            self.values.entry(key.to_vec()).or_default().push(value.to_vec());
        }
    }

    /// All values of a key.
    pub(crate) fn all(&self, key: &[u8]) -> &[Vec<u8>] {
        self.values.get(key).map_or(&[], Vec::as_slice)
    }

    /// The first value of a key.
    pub(crate) fn first(&self, key: &[u8]) -> Option<&[u8]> {
        self.all(key).first().map(Vec::as_slice)
    }

    /// The value that counts where a key can have one only.
    pub(crate) fn last(&self, key: &[u8]) -> Option<&[u8]> {
        self.all(key).last().map(Vec::as_slice)
    }

    /// A switch. Nothing where it is not set, or is set to something else than a switch.
    pub(crate) fn flag(&self, key: &[u8]) -> Option<bool> {
        let value = self.last(key)?.to_ascii_lowercase();
        match value.as_slice() {
            b"true" | b"yes" | b"on" | b"1" => Some(true),
            b"false" | b"no" | b"off" | b"0" | b"" => Some(false),
            _ => None,
        }
    }
}

/// The key of a setting of something that has a name.
pub(crate) fn key(section: &str, name: &[u8], last: &str) -> Vec<u8> {
    [section.as_bytes(), b".", name, b".", last.as_bytes()].concat()
}

/// Whether git's `safe.directory` allows a directory that belongs to somebody else. An empty value drops those before it.
pub(crate) fn is_safe(values: &[Vec<u8>], root: &[u8]) -> bool {
    let mut safe = false;
    for value in values {
        safe = match value.as_slice() {
            b"" => false,
            b"*" => true,
            value => {
                let below = value.strip_suffix(b"/*");
                let inside = |top: &[u8]| root.strip_prefix(top).is_some_and(|rest| rest.starts_with(b"/"));
                safe || value == root || below.is_some_and(inside)
            }
        };
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_stay_bytes() {
        let settings = Settings::parse(
            b"user.name\nA\nB\0filter.\xff.clean\nx\0filter.\xfe.clean\ny\0core.bare\0user.name\nC\0core.eol\n\0",
        );
        assert_eq!(settings.last(b"user.name"), Some(&b"C"[..]));
        assert_eq!(settings.first(b"user.name"), Some(&b"A\nB"[..]));
        assert_eq!(settings.last(&key("filter", b"\xff", "clean")), Some(&b"x"[..]));
        assert_eq!(settings.last(&key("filter", b"\xfe", "clean")), Some(&b"y"[..]));
        assert_eq!(settings.flag(b"core.bare"), Some(true));
        assert_eq!(settings.flag(b"core.eol"), Some(false));
        assert_eq!(settings.flag(b"user.name"), None);
        assert!(settings.all(b"absent").is_empty());
    }

    #[test]
    fn safe_directories_are_gits() {
        let values = |all: &[&str]| all.iter().map(|v| v.as_bytes().to_vec()).collect::<Vec<_>>();
        for (all, safe) in [
            (&["/a/b"][..], true),
            (&["*"], true),
            (&["/a/*"], true),
            (&["/a"], false),
            (&["/a/b/*"], false),
            (&["/a/b", ""], false),
            (&["*", "", "/x", "/a/b"], true),
            (&[], false),
        ] {
            assert_eq!(is_safe(&values(all), b"/a/b"), safe, "{all:?}");
        }
    }
}
