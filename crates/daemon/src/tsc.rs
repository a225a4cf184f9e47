//! The frequency of the host's time stamp counter, the same from one daemon to the next.
//!
//! It is measured, and two measurements differ by a kHz or two. It stands in the kernel line, and the kernel line decides which template
//! fits: without a kept figure a restart of the daemon would make every template anew.

use std::path::Path;

use banger_vmm::host::{Tsc, TscSource};

use crate::machine::handles::write_whole;

/// Measurements that differ by less than one part in this many are of the same counter. The difference costs a guest's clock at most
/// two seconds a day, which the daemon corrects.
const PARTS: u64 = 50_000;

/// The figure of the file, if this one is a measurement of the same counter; otherwise this one, which is then kept.
pub fn steadied(file: &Path, found: Tsc) -> Tsc {
    let kept = std::fs::read_to_string(file)
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let chosen = choose(kept, found);
    if kept != Some(chosen.khz)
        && chosen.source == TscSource::Measured
        && let Err(e) = write_whole(file, format!("{}\n", chosen.khz).as_bytes())
    {
        tracing::warn!(file = %file.display(), error = %e, "the frequency of the time stamp counter is not kept");
    }
    chosen
}

fn choose(kept: Option<u64>, found: Tsc) -> Tsc {
    match kept {
        Some(khz)
            if found.source == TscSource::Measured
                && khz.abs_diff(found.khz).saturating_mul(PARTS) < khz.max(found.khz) =>
        {
            Tsc { khz, ..found }
        }
        _ => found,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(khz: u64) -> Tsc {
        Tsc {
            khz,
            source: TscSource::Measured,
        }
    }

    #[test]
    fn measurements_of_one_counter_are_one_figure() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tsc-khz");
        for khz in [2_596_122, 2_596_121, 2_596_123, 2_596_150] {
            assert_eq!(steadied(&file, measured(khz)).khz, 2_596_122, "{khz}");
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "2596122\n");
        // Another host: the next ones go by its figure.
        assert_eq!(steadied(&file, measured(2_600_000)).khz, 2_600_000);
        assert_eq!(steadied(&file, measured(2_600_001)).khz, 2_600_000);
    }

    #[test]
    fn a_file_of_no_use_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tsc-khz");
        for text in ["", "fast", "18446744073709551615", "-1", "0"] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(steadied(&file, measured(2_596_122)).khz, 2_596_122, "{text}");
            assert_eq!(std::fs::read_to_string(&file).unwrap(), "2596122\n", "{text}");
        }
    }

    #[test]
    fn what_the_processor_states_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tsc-khz");
        let stated = Tsc {
            khz: 2_596_000,
            source: TscSource::Stated,
        };
        assert_eq!(steadied(&file, stated), stated);
        assert!(!file.exists());
    }

    #[test]
    fn a_figure_that_cannot_be_kept_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("none/tsc-khz");
        assert_eq!(steadied(&file, measured(2_596_122)).khz, 2_596_122);
    }
}
