//! Figures and how they are shown.

use serde_json::json;

/// A unit, and whether less of it is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Milliseconds.
    Ms,
    /// Seconds.
    Seconds,
    /// MiB of memory.
    MiB,
    /// 10^6 bytes a second.
    MegabytesPerSecond,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Ms => "ms",
            Self::Seconds => "s",
            Self::MiB => "MiB",
            Self::MegabytesPerSecond => "MB/s",
        }
    }

    fn less_is_better(self) -> bool {
        self != Self::MegabytesPerSecond
    }
}

/// One figure with all its samples.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    name: String,
    unit: Unit,
    samples: Vec<f64>,
    target: Option<f64>,
    baseline: Option<(String, f64)>,
}

impl Figure {
    /// A figure.
    pub(crate) fn new(name: impl Into<String>, unit: Unit, samples: Vec<f64>) -> Self {
        Self {
            name: name.into(),
            unit,
            samples,
            target: None,
            baseline: None,
        }
    }

    /// What is aimed at.
    pub(crate) fn target(mut self, target: f64) -> Self {
        self.target = Some(target);
        self
    }

    /// What it is compared with.
    pub(crate) fn against(mut self, other: &Figure) -> Self {
        self.baseline = Some((other.name.clone(), other.median()));
        self
    }

    /// The middle sample.
    pub(crate) fn median(&self) -> f64 {
        self.percentile(50)
    }

    /// The sample below which this share lies (nearest rank).
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
    }
}

/// All figures of a run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    figures: Vec<Figure>,
}

impl Report {
    /// No figures yet.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a figure and says so at once, since a whole run takes long.
    pub(crate) fn add(&mut self, figure: Figure) {
        eprintln!("  {}: {} {}", figure.name, number(figure.median()), figure.unit.name());
        self.figures.push(figure);
    }

    /// A figure of an earlier benchmark of this run.
    pub(crate) fn find(&self, name: &str) -> Option<&Figure> {
        self.figures.iter().find(|f| f.name == name)
    }

    /// For people, and for docs/performance.md.
    pub(crate) fn table(&self) -> String {
        let mut rows =
            vec![["figure", "unit", "median", "p95", "min", "max", "n", "target", "ratio"].map(str::to_owned)];
        for f in &self.figures {
            let bound = if f.unit.less_is_better() { "≤" } else { "≥" };
            let target = f.target.map_or_else(String::new, |t| format!("{bound} {}", number(t)));
            let ratios = [
                f.target.map(|t| format!("{:.2} of target", f.median() / t)),
                f.baseline
                    .as_ref()
                    .map(|(name, median)| format!("{:.2} × {name}", f.median() / median)),
            ];
            let ratio = ratios.into_iter().flatten().collect::<Vec<_>>().join(", ");
            let p95 = if f.samples.len() >= 20 {
                number(f.percentile(95))
            } else {
                String::new()
            };
            rows.push([
                f.name.clone(),
                f.unit.name().to_owned(),
                number(f.median()),
                p95,
                number(f.percentile(0)),
                number(f.percentile(100)),
                f.samples.len().to_string(),
                target,
                ratio,
            ]);
        }
        let mut text = format!("{}\n\n", host());
        let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..9).map(width).collect();
        for (i, row) in rows.iter().enumerate() {
            let cells: Vec<String> = row
                .iter()
                .zip(&widths)
                .map(|(cell, &w)| format!("{cell:<w$}"))
                .collect();
            text.push_str(&format!("| {} |\n", cells.join(" | ")));
            if i == 0 {
                let line: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
                text.push_str(&format!("|-{}-|\n", line.join("-|-")));
            }
        }
        text
    }

    /// For programs.
    pub(crate) fn json(&self) -> String {
        let figures: Vec<_> = self
            .figures
            .iter()
            .map(|f| {
                json!({
                    "name": f.name,
                    "unit": f.unit.name(),
                    "median": f.median(),
                    "min": f.percentile(0),
                    "max": f.percentile(100),
                    "p95": f.percentile(95),
                    "samples": f.samples,
                    "target": f.target,
                    "baseline": f.baseline.as_ref().map(|(name, median)| json!({"name": name, "median": median})),
                })
            })
            .collect();
        let report = json!({"schema": 1, "host": host(), "figures": figures});
        format!("{report:#}\n")
    }
}

fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// What was measured on.
fn host() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |key: &str| {
        cpuinfo
            .lines()
            .find(|l| l.starts_with(key))
            .and_then(|l| l.split_once(": "))
            .map(|(_, v)| v)
    };
    let model = field("model name").unwrap_or("unknown processor");
    let flags = field("flags").unwrap_or_default();
    let virtualised = flags.split(' ').any(|f| f == "vmx" || f == "svm");
    let cpus = cpuinfo.lines().filter(|l| l.starts_with("processor")).count();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib: u64 = memory
        .lines()
        .next()
        .and_then(|l| l.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or(0);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!(
        "{cpus} × {model}, {} GiB, Linux {}, {}, load {} at the end",
        kib.div_ceil(1 << 20),
        kernel.trim(),
        if virtualised {
            "hardware virtualisation"
        } else {
            "no hardware virtualisation (emulated machines)"
        },
        load.split(' ').next().unwrap_or("?"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let figure = Figure::new("x", Unit::Ms, (1..=100).rev().map(f64::from).collect());
        assert_eq!([0, 50, 95, 100].map(|p| figure.percentile(p)), [1.0, 50.0, 95.0, 100.0]);
        assert!(Figure::new("none", Unit::Ms, Vec::new()).median().is_nan());
    }

    #[test]
    fn the_report_is_a_table_and_json() {
        let mut report = Report::new();
        report.add(Figure::new("a", Unit::Ms, vec![5.0]).target(10.0));
        let baseline = report.figures.iter().find(|f| f.name == "a").unwrap().clone();
        report.add(Figure::new("b", Unit::Ms, vec![10.0]).against(&baseline));
        let table = report.table();
        assert!(
            table.contains("0.50 of target") && table.contains("2.00 × a"),
            "{table}"
        );
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["figures"][1]["baseline"]["name"], "a");
    }
}
