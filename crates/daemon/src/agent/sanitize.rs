//! Guest text, made fit to be stored and shown: bounded, one line, no control characters that a terminal would obey.

use banger_proto::agent::{Health, Port};
use banger_proto::api::{GuestInfo, Session};
use banger_proto::error::ApiError;

/// Longest word that is taken from a guest.
const WORD: usize = 64;
/// Longest sentence.
const SENTENCE: usize = 400;
/// Most lines of an error's details.
const LINES: usize = 40;
/// Most arguments of a session's command that are shown.
const ARGUMENTS: usize = 64;

/// Cuts to `max` characters and replaces what is not printable.
pub fn text(text: &str, max: usize) -> String {
    let mut out: String = text
        .chars()
        .take(max)
        .map(|c| if printable(c) { c } else { '\u{fffd}' })
        .collect();
    if text.chars().nth(max).is_some() {
        out.push('…');
    }
    out
}

/// Control characters and those that turn the direction of text around are not.
fn printable(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
}

/// What a guest says of itself.
pub fn guest_info(health: &Health) -> GuestInfo {
    GuestInfo {
        boot_id: text(&health.boot_id, WORD),
        kernel: text(&health.kernel, WORD),
        agent_version: text(&health.agent_version, WORD),
        system: text(&health.system, WORD),
    }
}

/// A session as the agent lists it.
pub fn session(mut session: Session) -> Session {
    session.id = text(&session.id, WORD);
    session.command.truncate(ARGUMENTS);
    session.command = session.command.iter().map(|a| text(a, SENTENCE)).collect();
    session
}

/// A port that something listens on.
pub fn port(mut port: Port) -> Port {
    port.process = port
        .process
        .map(|name| text(&name, WORD))
        .filter(|name| !name.is_empty());
    port
}

/// An error of the agent.
pub fn error(error: &ApiError) -> ApiError {
    ApiError {
        code: error.code,
        message: text(&error.message, SENTENCE),
        hint: error.hint.as_deref().map(|h| text(h, SENTENCE)),
        details: error.details.iter().take(LINES).map(|l| text(l, SENTENCE)).collect(),
        operation: None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn escapes_do_not_reach_a_terminal() {
        assert_eq!(text("a\x1b[31mb\nc\u{202e}d", 100), "a\u{fffd}[31mb\u{fffd}c\u{fffd}d");
        assert_eq!(text("abcdef", 3), "abc…");
    }

    proptest! {
        #[test]
        fn text_is_bounded_and_printable(input in any::<String>(), max in 0usize..50) {
            let out = text(&input, max);
            prop_assert!(out.chars().count() <= max + 1);
            prop_assert!(out.chars().all(printable));
        }
    }
}
