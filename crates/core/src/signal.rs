//! Signals that an engine may be sent.

/// Names and numbers on Linux.
pub const SIGNALS: &[(&str, i32)] = &[
    ("KILL", 9),
    ("TERM", 15),
    ("INT", 2),
    ("HUP", 1),
    ("QUIT", 3),
    ("USR1", 10),
    ("USR2", 12),
    ("ABRT", 6),
];

/// The number of a signal by its name, in any case, with or without `SIG`.
pub fn number(name: &str) -> Option<i32> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    SIGNALS.iter().find(|s| s.0 == bare).map(|s| s.1)
}

/// The names in a row, for messages.
pub fn names() -> String {
    let names: Vec<&str> = SIGNALS.iter().map(|s| s.0).collect();
    names.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names() {
        assert_eq!(number("kill"), Some(9));
        assert_eq!(number("SIGTERM"), Some(15));
        for bad in ["STOP", "CONT", "9", "", "SIG", "FOO"] {
            assert_eq!(number(bad), None, "{bad}");
        }
    }
}
