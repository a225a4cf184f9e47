//! Sizes as users write them: a whole number with a unit, in powers of 1024.

/// Bytes of a KiB.
pub const KIB: u64 = 1 << 10;
/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;
/// Bytes of a GiB.
pub const GIB: u64 = 1 << 30;
/// Bytes of a TiB.
pub const TIB: u64 = 1 << 40;

/// Why a size is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// No number in front.
    #[error("size `{0}` is not a number with a unit")]
    NotANumber(String),
    /// A number alone.
    #[error("size `{0}` has no unit")]
    NoUnit(String),
    /// An unknown unit.
    #[error("size `{size}` has the unknown unit `{unit}`")]
    Unit {
        /// The size as given.
        size: String,
        /// The part that is not a unit.
        unit: String,
    },
    /// More than 2^64 bytes.
    #[error("size `{0}` is too large")]
    TooLarge(String),
}

impl SizeError {
    /// What to write instead.
    pub fn hint(&self) -> &'static str {
        "write a whole number and a unit: 512M, 2G, 4GiB (powers of 1024)"
    }
}

/// Reads `512M`, `2g`, `4GiB`, `10GB`. All units are powers of 1024.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let shown = || text.escape_default().to_string();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(SizeError::NotANumber(shown()));
    }
    let number: u64 = number.parse().map_err(|_| SizeError::TooLarge(shown()))?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" => return Err(SizeError::NoUnit(shown())),
        "k" | "kb" | "kib" => KIB,
        "m" | "mb" | "mib" => MIB,
        "g" | "gb" | "gib" => GIB,
        "t" | "tb" | "tib" => TIB,
        _ => {
            return Err(SizeError::Unit {
                size: shown(),
                unit: unit.escape_default().to_string(),
            });
        }
    };
    number.checked_mul(factor).ok_or_else(|| SizeError::TooLarge(shown()))
}

/// Writes a size for people: the largest unit that leaves at most one decimal, `8G`, `1.5G`, `312M`.
pub fn format(bytes: u64) -> String {
    for (unit, name) in [(TIB, "T"), (GIB, "G"), (MIB, "M"), (KIB, "K")] {
        if bytes >= unit {
            let tenths = (u128::from(bytes) * 10 + u128::from(unit) / 2) / u128::from(unit);
            return if tenths.is_multiple_of(10) {
                format!("{}{name}", tenths / 10)
            } else {
                format!("{}.{}{name}", tenths / 10, tenths % 10)
            };
        }
    }
    format!("{bytes}B")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_users_write() {
        for (text, bytes) in [
            ("512M", 512 * MIB),
            ("2g", 2 * GIB),
            ("4GiB", 4 * GIB),
            ("10GB", 10 * GIB),
            ("1t", TIB),
            ("0K", 0),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn refuses_the_rest_by_name() {
        assert_eq!(parse("512"), Err(SizeError::NoUnit("512".into())));
        assert_eq!(parse("G"), Err(SizeError::NotANumber("G".into())));
        assert_eq!(parse("-1G"), Err(SizeError::NotANumber("-1G".into())));
        assert!(matches!(parse("1.5G"), Err(SizeError::Unit { .. })));
        assert!(matches!(parse("1X"), Err(SizeError::Unit { .. })));
        assert!(matches!(parse("99999999999999999999G"), Err(SizeError::TooLarge(_))));
        assert!(matches!(parse("18446744073709551615T"), Err(SizeError::TooLarge(_))));
    }

    #[test]
    fn writes_for_people() {
        for (bytes, text) in [
            (0, "0B"),
            (8 * GIB, "8G"),
            (3 * GIB / 2, "1.5G"),
            (312 * MIB, "312M"),
            (u64::MAX, "16777216T"),
        ] {
            assert_eq!(format(bytes), text);
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,40}") {
            let _ = parse(&text);
        }

        #[test]
        fn whole_units_read_back(number in 1u64..1024, unit in prop::sample::select(vec![KIB, MIB, GIB, TIB])) {
            prop_assert_eq!(parse(&format(number * unit)), Ok(number * unit));
        }
    }
}
