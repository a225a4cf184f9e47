//! References to machines: a name, an id, or a prefix of one that fits only one machine; on a bridge also `NAME.vm` and an address.

/// A machine, as far as references go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// Identifier.
    pub id: &'a str,
    /// Name.
    pub name: &'a str,
    /// Its address, where it has one.
    pub address: Option<&'a str>,
}

/// Why a reference finds nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Nothing fits.
    #[error("no machine `{reference}`")]
    NotFound {
        /// What was looked for.
        reference: String,
        /// A name that is close to it.
        similar: Option<String>,
    },
    /// Several fit.
    #[error("`{reference}` fits {} machines: {}", .names.len(), .names.join(", "))]
    Ambiguous {
        /// What was looked for.
        reference: String,
        /// Names of those that fit, sorted.
        names: Vec<String>,
    },
    /// Something fits, but only by its beginning, where that is not enough.
    #[error("`{reference}` is only the beginning of {}", .names.join(", "))]
    Inexact {
        /// What was looked for.
        reference: String,
        /// Names of those that fit, sorted.
        names: Vec<String>,
    },
}

/// Least characters of an id that are enough where something is lost.
pub const EXACT_ID: usize = 4;

/// The hint for [`ReferenceError::Inexact`].
pub const EXACT_HINT: &str = "what ends or removes something takes a whole name, or four characters or more of an id";

/// The index of the machine that a reference means. An exact name wins over an exact id, and both over prefixes. What has dots is no
/// name: it is the name that the host's resolver knows, or an address.
pub fn find<'a>(reference: &str, machines: impl IntoIterator<Item = Candidate<'a>>) -> Result<usize, ReferenceError> {
    let machines: Vec<Candidate<'_>> = machines.into_iter().collect();
    if let Some(index) = exactly(reference, &machines) {
        return Ok(index);
    }
    let fitting = |m: &Candidate<'_>| m.id.starts_with(reference) || m.name.starts_with(reference);
    only(reference, &machines, fitting)
}

/// The same where something is lost, by mistake as well: beginnings of names do not count, those of ids do from [`EXACT_ID`]
/// characters on.
pub fn find_exact<'a>(
    reference: &str,
    machines: impl IntoIterator<Item = Candidate<'a>>,
) -> Result<usize, ReferenceError> {
    let machines: Vec<Candidate<'_>> = machines.into_iter().collect();
    if let Some(index) = exactly(reference, &machines) {
        return Ok(index);
    }
    let by_id = |m: &Candidate<'_>| reference.len() >= EXACT_ID && m.id.starts_with(reference);
    match only(reference, &machines, by_id) {
        Err(ReferenceError::NotFound { reference: shown, .. })
            if !reference.is_empty()
                && machines
                    .iter()
                    .any(|m| m.id.starts_with(reference) || m.name.starts_with(reference)) =>
        {
            let mut names: Vec<String> = machines
                .iter()
                .filter(|m| m.id.starts_with(reference) || m.name.starts_with(reference))
                .map(|m| m.name.to_owned())
                .collect();
            names.sort();
            Err(ReferenceError::Inexact {
                reference: shown,
                names,
            })
        }
        found => found,
    }
}

fn exactly(reference: &str, machines: &[Candidate<'_>]) -> Option<usize> {
    [
        |m: &Candidate<'_>, r: &str| m.name == r,
        |m: &Candidate<'_>, r: &str| m.id == r,
        |m: &Candidate<'_>, r: &str| r.strip_suffix(".vm") == Some(m.name),
        |m: &Candidate<'_>, r: &str| m.address == Some(r),
    ]
    .iter()
    .find_map(|exact| machines.iter().position(|m| exact(m, reference)))
}

/// The only machine that fits.
fn only(
    reference: &str,
    machines: &[Candidate<'_>],
    fits: impl Fn(&Candidate<'_>) -> bool,
) -> Result<usize, ReferenceError> {
    let shown = || reference.escape_default().to_string();
    let fitting: Vec<usize> = (0..machines.len())
        .filter(|&i| !reference.is_empty() && fits(&machines[i]))
        .collect();
    match fitting.as_slice() {
        [one] => Ok(*one),
        [] => Err(ReferenceError::NotFound {
            reference: shown(),
            similar: similar(reference, machines.iter().map(|m| m.name)),
        }),
        several => {
            let mut names: Vec<String> = several.iter().map(|&i| machines[i].name.to_owned()).collect();
            names.sort();
            Err(ReferenceError::Ambiguous {
                reference: shown(),
                names,
            })
        }
    }
}

/// The candidate that a mistyped word most likely meant: at most two edits away, and less than half its length.
pub fn similar<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    candidates
        .into_iter()
        .map(|c| (distance(word, c), c))
        .filter(|&(d, c)| d <= 2 && d * 2 < c.chars().count())
        .min()
        .map(|(_, c)| c.to_owned())
}

/// Levenshtein distance, over the first 64 characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_beginning_is_not_enough_where_something_is_lost() {
        let machines = [
            ("aa0123456789abcd", "web"),
            ("aa01ffffffffffff", "web-2"),
            ("bb03", "data.x"),
        ];
        let candidates = || {
            machines.iter().map(|&(id, name)| Candidate {
                id,
                name,
                address: Some("10.0.0.2"),
            })
        };
        for (reference, found) in [
            ("web", Some(0)),
            ("web-2", Some(1)),
            ("web.vm", Some(0)),
            ("aa0123456789abcd", Some(0)),
            ("aa012", Some(0)),
            ("bb03", Some(2)),
            ("we", None),
            ("web-", None),
            ("aa0", None),
            ("bb0", None),
            ("aa01", None),
            ("", None),
            ("nope", None),
        ] {
            assert_eq!(find_exact(reference, candidates()).ok(), found, "{reference}");
        }
        let inexact = find_exact("we", candidates()).unwrap_err();
        assert_eq!(inexact.to_string(), "`we` is only the beginning of web, web-2");
        assert!(matches!(
            find_exact("aa01", candidates()),
            Err(ReferenceError::Ambiguous { .. })
        ));
        assert!(matches!(
            find_exact("nope", candidates()),
            Err(ReferenceError::NotFound { .. })
        ));
    }

    const MACHINES: &[(&str, &str)] = &[
        ("aa01", "web"),
        ("aa02", "web-2"),
        ("bb03", "aa01"),
        ("cc04", "database"),
    ];

    fn lookup(reference: &str) -> Result<&'static str, ReferenceError> {
        let candidates = MACHINES
            .iter()
            .zip(["10.0.0.2", "10.0.0.22"].map(Some).into_iter().chain([None, None]));
        let candidates = candidates.map(|(&(id, name), address)| Candidate { id, name, address });
        find(reference, candidates).map(|i| MACHINES[i].1)
    }

    #[test]
    fn name_then_id_then_prefix() {
        assert_eq!(
            lookup("web"),
            Ok("web"),
            "an exact name wins over being a prefix of another"
        );
        assert_eq!(lookup("aa01"), Ok("aa01"), "an exact name wins over an exact id");
        assert_eq!(lookup("cc"), Ok("database"));
        assert_eq!((lookup("web.vm"), lookup("10.0.0.22")), (Ok("web"), Ok("web-2")));
        assert!(lookup("we.vm").is_err() && lookup("10.0.0.").is_err() && lookup(".vm").is_err());
        assert_eq!(lookup("data"), Ok("database"));
        assert!(matches!(lookup("we"), Err(ReferenceError::Ambiguous { names, .. }) if names == ["web", "web-2"]));
        assert!(matches!(lookup(""), Err(ReferenceError::NotFound { .. })));
        assert!(matches!(lookup("databse"), Err(ReferenceError::NotFound { similar: Some(s), .. }) if s == "database"));
        assert!(matches!(
            lookup("zzz"),
            Err(ReferenceError::NotFound { similar: None, .. })
        ));
    }

    proptest! {
        #[test]
        fn a_whole_id_or_name_always_finds_its_machine(names in prop::collection::btree_set("[a-z]{1,6}", 1..8)) {
            let machines: Vec<(String, String)> = names.iter().enumerate().map(|(i, n)| (format!("{i:016x}"), n.clone())).collect();
            let view = || machines.iter().map(|(i, n)| Candidate { id: i, name: n, address: None });
            for (index, (_, name)) in machines.iter().enumerate() {
                prop_assert_eq!(find(name, view()), Ok(index));
            }
        }

        #[test]
        fn distance_is_symmetric(a in ".{0,12}", b in ".{0,12}") {
            prop_assert_eq!(distance(&a, &b), distance(&b, &a));
        }
    }
}
