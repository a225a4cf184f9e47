//! Machine names: DNS labels, as they appear in `NAME.vm`.

use std::fmt;

/// Longest name in bytes (a DNS label, RFC 1035).
pub const MAX_NAME: usize = 63;

/// A valid machine name: 1 to 63 of `a-z 0-9 -`, no hyphen at either end. Never normalised: what is not a name is refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MachineName(String);

/// Why a name is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing there.
    #[error("name is empty")]
    Empty,
    /// Longer than [`MAX_NAME`].
    #[error("name `{start}…` has {length} characters, at most {MAX_NAME} are allowed")]
    TooLong {
        /// Its beginning.
        start: String,
        /// Its length.
        length: usize,
    },
    /// A character that is not allowed.
    #[error("name `{name}` contains `{character}`; allowed are a-z, 0-9 and `-`")]
    Character {
        /// The name.
        name: String,
        /// The first offending character, escaped.
        character: String,
    },
    /// A hyphen at an end.
    #[error("name `{0}` begins or ends with `-`")]
    EdgeHyphen(String),
}

impl MachineName {
    /// Checks a name.
    pub fn parse(name: &str) -> Result<Self, NameError> {
        if name.is_empty() {
            return Err(NameError::Empty);
        }
        if name.len() > MAX_NAME {
            let start = name.chars().take(16).flat_map(char::escape_default).collect();
            return Err(NameError::TooLong {
                start,
                length: name.chars().count(),
            });
        }
        if let Some(bad) = name.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-')) {
            let name = name.escape_default().to_string();
            return Err(NameError::Character {
                name,
                character: bad.escape_default().to_string(),
            });
        }
        if name.starts_with('-') || name.ends_with('-') {
            return Err(NameError::EdgeHyphen(name.to_owned()));
        }
        Ok(Self(name.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MachineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

const FIRST: &[&str] = &[
    "amber", "bold", "brisk", "calm", "clear", "crisp", "eager", "early", "fair", "fast", "fine", "fresh", "gentle",
    "glad", "grand", "keen", "kind", "light", "lively", "lucky", "merry", "mild", "neat", "noble", "plain", "proud",
    "quick", "quiet", "rapid", "ready", "royal", "sharp", "silent", "smart", "solid", "steady", "sunny", "swift",
    "tidy", "warm", "wise", "young",
];
const SECOND: &[&str] = &[
    "badger", "beaver", "bison", "crane", "dove", "eagle", "falcon", "finch", "fox", "gecko", "hare", "hawk", "heron",
    "ibex", "jay", "koala", "lark", "lemur", "lion", "lynx", "marten", "mole", "moose", "newt", "otter", "owl",
    "panda", "puma", "quail", "raven", "robin", "seal", "shrew", "stork", "swan", "tapir", "tern", "tiger", "toad",
    "viper", "wolf", "wren",
];

/// Makes a name up from random numbers: `swift-otter`, and with a number behind it once the plain ones are taken.
pub fn invent(mut random: impl FnMut() -> u32, taken: impl Fn(&str) -> bool) -> MachineName {
    let mut pick = |list: &[&'static str]| list[random() as usize % list.len()];
    for _ in 0..8 {
        let name = format!("{}-{}", pick(FIRST), pick(SECOND));
        if !taken(&name) {
            return MachineName(name);
        }
    }
    let base = format!("{}-{}", pick(FIRST), pick(SECOND));
    let mut number = 2u32;
    while taken(&format!("{base}-{number}")) {
        number += 1;
    }
    MachineName(format!("{base}-{number}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn accepts_labels_and_nothing_else() {
        for good in ["a", "0", "web-1", "a--b", &"x".repeat(63)] {
            assert_eq!(MachineName::parse(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "-a",
            "a-",
            "A",
            "a.b",
            "a_b",
            "ä",
            "a b",
            "../x",
            "a\n",
            &"x".repeat(64),
        ] {
            assert!(MachineName::parse(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn messages_stay_on_one_line() {
        let message = MachineName::parse("a\u{1b}[31m\nb").unwrap_err().to_string();
        assert!(!message.contains('\n') && !message.contains('\u{1b}'), "{message:?}");
    }

    proptest! {
        #[test]
        fn invented_names_are_valid_and_free(numbers in prop::collection::vec(any::<u32>(), 1..40)) {
            let mut taken: Vec<String> = Vec::new();
            let mut source = numbers.iter().cycle();
            for _ in 0..20 {
                let name = invent(|| *source.next().unwrap(), |n| taken.iter().any(|t| t == n));
                prop_assert!(MachineName::parse(name.as_str()).is_ok());
                prop_assert!(!taken.contains(&name.to_string()));
                taken.push(name.to_string());
            }
        }
    }
}
