//! What a launched engine leaves behind: its console log and the record of its end. Both are written by `banger-shim`.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use banger_core::plan::MachinePaths;
pub use banger_proto::shim::ExitRecord;
use banger_proto::shim::STARTED;

use crate::engine::EngineExit;

/// Size at which the console log is full and becomes the old one.
pub const CONSOLE_LIMIT: u64 = 1 << 20;

/// The most that is read for a tail.
const TAIL_LIMIT: u64 = 256 << 10;
/// The longest line that is shown.
const LINE_LIMIT: usize = 500;

impl From<&ExitRecord> for EngineExit {
    fn from(record: &ExitRecord) -> Self {
        Self {
            code: record.code,
            signal: record.signal,
        }
    }
}

impl std::fmt::Display for EngineExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.code, self.signal) {
            (_, Some(signal)) => write!(f, "signal {signal}"),
            (Some(code), None) => write!(f, "exit status {code}"),
            (None, None) => write!(f, "nobody saw how"),
        }
    }
}

/// Reads the record of the last end. `None` while the engine runs, and where `banger-shim` could not write it.
pub fn exit_record(paths: &MachinePaths) -> Option<ExitRecord> {
    let mut text = Vec::new();
    File::open(paths.exit_record())
        .and_then(|f| f.take(64 << 10).read_to_end(&mut text))
        .ok()?;
    serde_json::from_slice(&text).ok()
}

/// Where the older part of the console log is.
pub fn old_console_log(paths: &MachinePaths) -> PathBuf {
    let mut name = paths.console_log().into_os_string();
    name.push(".1");
    name.into()
}

/// The last lines of the console, made harmless for terminals: no control characters, no byte that is not UTF-8, no line
/// without end, and nothing from before the engine's last start. Where the log is full and was just begun anew, the older part
/// fills up.
pub fn console_tail(paths: &MachinePaths, lines: usize) -> Vec<String> {
    let new = tail_bytes(&paths.console_log()).unwrap_or_default();
    let (new, begins) = since_start(&new);
    let mut tail = clean_tail(new, lines);
    let full = File::open(old_console_log(paths)).and_then(|f| f.metadata());
    // One that is not full was written by an older banger, which began a log at every start.
    if !begins && tail.len() < lines && full.is_ok_and(|m| m.len() > CONSOLE_LIMIT - 8192) {
        let old = tail_bytes(&old_console_log(paths)).unwrap_or_default();
        let mut both = clean_tail(since_start(&old).0, lines - tail.len());
        both.append(&mut tail);
        return both;
    }
    tail
}

/// What was written since the engine's last start, and whether that is in there.
fn since_start(log: &[u8]) -> (&[u8], bool) {
    let mark = STARTED.as_bytes();
    let line = |at: &usize| log[*at..].starts_with(mark) && (*at == 0 || log[at - 1] == b'\n');
    match (0..log.len()).rev().find(line) {
        Some(at) => (&log[at + mark.len()..], true),
        None => (log, false),
    }
}

fn tail_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(TAIL_LIMIT)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_LIMIT).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The last lines of what a guest printed, made harmless.
pub fn clean_tail(bytes: &[u8], lines: usize) -> Vec<String> {
    let mut tail: Vec<String> = bytes
        .rsplit(|b| *b == b'\n')
        .map(clean_line)
        .filter(|line| !line.is_empty())
        .take(lines)
        .collect();
    tail.reverse();
    tail
}

/// One line without anything that a terminal would obey.
fn clean_line(line: &[u8]) -> String {
    // What a carriage return would have overwritten is not what a reader saw.
    let line = line.trim_ascii_end();
    let line = line.rsplit(|b| *b == b'\r').next().unwrap_or(line);
    let mut out = String::new();
    let text = String::from_utf8_lossy(line);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' if chars.peek() == Some(&'[') => {
                // A colour or cursor sequence: to its final letter.
                chars.next();
                while chars.next_if(|c| matches!(c, '\x20'..='\x3f')).is_some() {}
                chars.next_if(|c| matches!(c, '\x40'..='\x7e'));
            }
            '\t' => out.push_str("    "),
            c if c.is_control() || is_bidi(c) => {}
            c => out.push(c),
        }
        if out.len() >= LINE_LIMIT {
            out.push('…');
            break;
        }
    }
    out.truncate(out.trim_end().len());
    out
}

/// Characters that change the order in which others are shown.
fn is_bidi(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn paths(dir: &Path) -> MachinePaths {
        MachinePaths {
            state: dir.to_owned(),
            run: dir.to_owned(),
        }
    }

    #[test]
    fn control_sequences_are_gone() {
        let bytes =
            b"\x1b[0;1;31mred\x1b[0m text\x07\r\nprogress 1\rprogress 2\r\n\x1b]0;title\x07x\n\xff\xfe\n\n\t a\n";
        assert_eq!(
            clean_tail(bytes, 10),
            ["red text", "progress 2", "]0;titlex", "\u{fffd}\u{fffd}", "     a"]
        );
        assert_eq!(clean_tail(bytes, 1), ["     a"]);
        assert_eq!(clean_tail("a\u{202e}b\n".as_bytes(), 1), ["ab"]);
        assert!(clean_tail(b"", 5).is_empty());
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let lines = clean_tail(&[b'x'; 100_000], 5);
        assert_eq!(lines.len(), 1);
        assert!(lines[0].len() < LINE_LIMIT + 8);
    }

    proptest::proptest! {
        #[test]
        fn whatever_a_guest_prints_is_harmless(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..2000)) {
            for line in clean_tail(&bytes, 50) {
                proptest::prop_assert!(!line.chars().any(char::is_control));
            }
        }
    }

    #[test]
    fn the_tail_reaches_into_the_old_log_of_the_same_boot_only() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        assert!(console_tail(&paths, 5).is_empty());
        fs::write(old_console_log(&paths), "boot before\n").unwrap();
        fs::write(paths.console_log(), "one\ntwo\n").unwrap();
        assert_eq!(console_tail(&paths, 3), ["one", "two"]);
        let mut full = vec![b'.'; usize::try_from(CONSOLE_LIMIT).unwrap() - 100];
        full.extend_from_slice(b"\nearlier\n");
        fs::write(old_console_log(&paths), full).unwrap();
        assert_eq!(console_tail(&paths, 3), ["earlier", "one", "two"]);
        assert_eq!(console_tail(&paths, 1), ["two"]);
    }

    #[test]
    fn the_tail_is_of_the_last_start() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        let log = format!("before\n{STARTED}\nkernel\nnot at a line's begin: {STARTED}\n");
        fs::write(paths.console_log(), &log).unwrap();
        assert_eq!(
            console_tail(&paths, 5),
            ["kernel", &format!("not at a line's begin: {STARTED}")]
        );
        fs::write(paths.console_log(), format!("{log}{STARTED}\n")).unwrap();
        assert!(console_tail(&paths, 5).is_empty());
    }

    #[test]
    fn a_broken_record_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        assert_eq!(exit_record(&paths), None);
        fs::write(paths.exit_record(), "{").unwrap();
        assert_eq!(exit_record(&paths), None);
        fs::write(
            paths.exit_record(),
            r#"{"code":null,"signal":9,"last_words":["x"],"at_ms":1}"#,
        )
        .unwrap();
        let record = exit_record(&paths).unwrap();
        assert_eq!(EngineExit::from(&record).to_string(), "signal 9");
        assert_eq!(record.last_words, ["x"]);
    }
}
