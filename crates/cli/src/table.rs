//! Tables and how single values are written in them.

use comfy_table::{ContentArrangement, Table, presets};
use jiff::Timestamp;

use crate::printer::clean;

/// A table with these headings; cells are cleaned of control characters.
pub(crate) fn render(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(headings.iter().copied());
    for row in rows {
        table.add_row(row.iter().map(|cell| clean(cell)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    lines.join("\n") + "\n"
}

/// Pairs of key and value, one a line.
pub(crate) fn pairs<'a>(rows: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let rows: Vec<_> = rows.into_iter().collect();
    let width = rows.iter().map(|r| r.0.len()).max().unwrap_or(0) + 2;
    rows.iter()
        .map(|(key, value)| format!("{key:width$}{}\n", clean(value)))
        .collect()
}

/// How long ago a point in time is, for people: `3 minutes ago`.
pub(crate) fn ago(timestamp: &str, now: Timestamp) -> String {
    let Ok(then) = timestamp.parse::<Timestamp>() else {
        return timestamp.to_owned();
    };
    let seconds = now.duration_since(then).as_secs();
    match seconds {
        ..0 => "just now".to_owned(),
        0..2 => "a second ago".to_owned(),
        2..120 => format!("{seconds} seconds ago"),
        120..7200 => format!("{} minutes ago", seconds / 60),
        7200..172_800 => format!("{} hours ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// The first twelve characters of an id or digest.
pub(crate) fn short(id: &str) -> String {
    id.strip_prefix("sha256:").unwrap_or(id).chars().take(12).collect()
}

/// Milliseconds for people: `420 ms`, `3.1 s`, `2 min 5 s`, `3 h 2 min`.
pub(crate) fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{}.{} s", seconds, ms % 1000 / 100),
        60_000..3_600_000 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_without_trailing_blanks() {
        let rows = [
            vec!["a".to_owned(), "long name".to_owned()],
            vec!["bbbb".to_owned(), "\x1b[31mx".to_owned()],
        ];
        assert_eq!(
            render(&["ID", "NAME"], rows),
            "ID    NAME\na     long name\nbbbb  \u{fffd}[31mx\n"
        );
        assert_eq!(render(&["ID", "NAME"], []), "ID  NAME\n");
    }

    #[test]
    fn pairs_line_up() {
        assert_eq!(
            pairs([("name", "a".to_owned()), ("x", "b".to_owned())]),
            "name  a\nx     b\n"
        );
    }

    #[test]
    fn times_are_for_people() {
        let now: Timestamp = "2026-11-22T12:00:00Z".parse().unwrap();
        for (then, text) in [
            ("2026-11-22T12:00:05Z", "just now"),
            ("2026-11-22T11:59:59Z", "a second ago"),
            ("2026-11-22T11:58:01Z", "119 seconds ago"),
            ("2026-11-22T11:00:00Z", "60 minutes ago"),
            ("2026-11-21T12:00:00Z", "24 hours ago"),
            ("2026-11-01T12:00:00Z", "21 days ago"),
            ("nonsense", "nonsense"),
        ] {
            assert_eq!(ago(then, now), text);
        }
        for (ms, text) in [
            (7, "7 ms"),
            (3140, "3.1 s"),
            (125_000, "2 min 5 s"),
            (10_920_000, "3 h 2 min"),
        ] {
            assert_eq!(span(ms), text);
        }
    }
}
