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
    /// How many times as much.
    Times,
    /// A number of things.
    Count,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Ms => "ms",
            Self::Seconds => "s",
            Self::MiB => "MiB",
            Self::MegabytesPerSecond => "MB/s",
            Self::Times => "×",
            Self::Count => "",
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
    baselines: Vec<(String, f64)>,
    /// The figure that this is a part of.
    part_of: Option<String>,
}

impl Figure {
    /// A figure.
    pub(crate) fn new(name: impl Into<String>, unit: Unit, samples: Vec<f64>) -> Self {
        Self {
            name: name.into(),
            unit,
            samples,
            target: None,
            baselines: Vec::new(),
            part_of: None,
        }
    }

    /// What is aimed at, for the median.
    pub(crate) fn target(mut self, target: f64) -> Self {
        self.target = Some(target);
        self
    }

    /// What it is compared with.
    pub(crate) fn against(self, other: &Figure) -> Self {
        let name = other.name.clone();
        self.against_as(&name, other)
    }

    /// What it is compared with, under a shorter name.
    pub(crate) fn against_as(mut self, name: &str, other: &Figure) -> Self {
        self.baselines.push((name.to_owned(), other.median()));
        self
    }

    /// What it is of.
    pub(crate) fn name(&self) -> &str {
        &self.name
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

/// Something that is aimed at, and what was measured. It is judged, and nothing hangs on the judgement.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    what: String,
    unit: Unit,
    at_most: bool,
    bound: f64,
    /// Or why it was not.
    measured: Result<f64, String>,
}

impl Target {
    /// This and no more.
    pub(crate) fn at_most(what: impl Into<String>, unit: Unit, bound: f64, measured: Result<f64, String>) -> Self {
        Self {
            what: what.into(),
            unit,
            at_most: true,
            bound,
            measured,
        }
    }

    /// This or more.
    pub(crate) fn at_least(what: impl Into<String>, unit: Unit, bound: f64, measured: Result<f64, String>) -> Self {
        Self {
            at_most: false,
            ..Self::at_most(what, unit, bound, measured)
        }
    }

    fn met(&self) -> Option<bool> {
        let measured = *self.measured.as_ref().ok()?;
        Some(if self.at_most {
            measured <= self.bound
        } else {
            measured >= self.bound
        })
    }

    fn verdict(&self) -> &'static str {
        match self.met() {
            Some(true) => "met",
            Some(false) => "not met",
            None => "not measured",
        }
    }

    fn row(&self) -> Vec<String> {
        let sign = if self.at_most { "≤" } else { "≥" };
        let measured = match &self.measured {
            Ok(value) => with_unit(*value, self.unit),
            Err(why) => why.clone(),
        };
        vec![
            self.what.clone(),
            format!("{sign} {}", with_unit(self.bound, self.unit)),
            measured,
            self.verdict().to_owned(),
        ]
    }
}

fn with_unit(value: f64, unit: Unit) -> String {
    format!("{} {}", number(value), unit.name()).trim_end().to_owned()
}

/// All figures of a run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    figures: Vec<Figure>,
    targets: Vec<Target>,
}

impl Report {
    /// No figures yet.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a figure and says so at once, since a whole run takes long.
    pub(crate) fn add(&mut self, figure: Figure) {
        eprintln!("  {}: {}", figure.name, with_unit(figure.median(), figure.unit));
        if let Some(bound) = figure.target {
            let measured = Ok(figure.median());
            let target = if figure.unit.less_is_better() {
                Target::at_most(&figure.name, figure.unit, bound, measured)
            } else {
                Target::at_least(&figure.name, figure.unit, bound, measured)
            };
            self.targets.push(target);
        }
        self.figures.push(figure);
    }

    /// Adds a target that is not just the median of one figure.
    pub(crate) fn judge(&mut self, target: Target) {
        eprintln!("  {}", target.row().join("  "));
        self.targets.push(target);
    }

    /// Adds the parts of a figure, which say what it is made of.
    pub(crate) fn parts(&mut self, of: &str, parts: Parts) {
        let parts = parts.0.into_iter().map(|(name, samples)| Figure {
            part_of: Some(of.to_owned()),
            ..Figure::new(name, Unit::Ms, samples)
        });
        let parts: Vec<_> = parts.collect();
        let line: Vec<_> = parts
            .iter()
            .map(|p| format!("{} {}", p.name, number(p.median())))
            .collect();
        if !line.is_empty() {
            eprintln!("    {}", line.join(", "));
        }
        self.figures.extend(parts);
    }

    /// A figure of an earlier benchmark of this run.
    pub(crate) fn find(&self, name: &str) -> Option<&Figure> {
        self.figures.iter().find(|f| f.name == name)
    }

    /// For people, and for docs/performance.md.
    pub(crate) fn table(&self) -> String {
        let head = ["figure", "unit", "median", "p95", "min", "max", "n", "target", "ratio"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for f in &self.figures {
            let bound = if f.unit.less_is_better() { "≤" } else { "≥" };
            let target = f.target.map_or_else(String::new, |t| format!("{bound} {}", number(t)));
            let of_target = f.target.map(|t| format!("{:.2} of target", f.median() / t));
            let times = |(name, median): &(String, f64)| format!("{:.2} × {name}", f.median() / median);
            let ratios = of_target.into_iter().chain(f.baselines.iter().map(times));
            let ratio = ratios.collect::<Vec<_>>().join(", ");
            let p95 = if f.samples.len() >= 20 {
                number(f.percentile(95))
            } else {
                String::new()
            };
            let indent = if f.part_of.is_some() { "… " } else { "" };
            rows.push(vec![
                format!("{indent}{}", f.name),
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
        let mut text = format!("{}\n\n{}", host(), aligned(&rows));
        if !self.targets.is_empty() {
            let head = ["target", "bound", "measured", "verdict"].map(str::to_owned).to_vec();
            let rows: Vec<_> = std::iter::once(head)
                .chain(self.targets.iter().map(Target::row))
                .collect();
            text.push_str(&format!("\n{}", aligned(&rows)));
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
                    "part_of": f.part_of,
                    "unit": f.unit.name(),
                    "median": f.median(),
                    "min": f.percentile(0),
                    "max": f.percentile(100),
                    "p95": f.percentile(95),
                    "samples": f.samples,
                    "target": f.target,
                    "baselines": f.baselines.iter().map(|(name, median)| json!({"name": name, "median": median})).collect::<Vec<_>>(),
                })
            })
            .collect();
        let targets: Vec<_> = self
            .targets
            .iter()
            .map(|t| {
                json!({
                    "what": t.what,
                    "unit": t.unit.name(),
                    "bound": if t.at_most { "at most" } else { "at least" },
                    "target": t.bound,
                    "measured": t.measured.as_ref().ok(),
                    "why_not": t.measured.as_ref().err(),
                    "met": t.met(),
                })
            })
            .collect();
        let report = json!({"schema": 2, "host": host(), "figures": figures, "targets": targets});
        format!("{report:#}\n")
    }
}

/// Stages by name, in the order in which they were first seen, with all their samples.
#[derive(Debug, Default)]
pub(crate) struct Parts(Vec<(String, Vec<f64>)>);

impl Parts {
    /// Adds a sample in milliseconds.
    pub(crate) fn add(&mut self, name: &str, ms: f64) {
        match self.0.iter_mut().find(|(n, _)| n == name) {
            Some((_, samples)) => samples.push(ms),
            None => self.0.push((name.to_owned(), vec![ms])),
        }
    }

    /// Adds the stages as the API and `--timings` have them: `[{stage, ms, parts}]`.
    pub(crate) fn add_json(&mut self, stages: &serde_json::Value) {
        for stage in stages.as_array().into_iter().flatten() {
            let name = stage["stage"].as_str().unwrap_or("?");
            self.add(name, stage["ms"].as_f64().unwrap_or(0.0));
            for part in stage["parts"].as_array().into_iter().flatten() {
                let part_name = format!("{name}/{}", part["stage"].as_str().unwrap_or("?"));
                self.add(&part_name, part["ms"].as_f64().unwrap_or(0.0));
            }
        }
    }
}

/// A table whose first row is its head.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
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

fn number(value: f64) -> String {
    match value.abs() {
        v if v == v.trunc() && v < 1e6 => format!("{value:.0}"),
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
        assert_eq!(json["figures"][1]["baselines"][0]["name"], "a");
    }

    #[test]
    fn targets_are_judged_and_never_asserted() {
        let mut report = Report::new();
        report.add(Figure::new("quick", Unit::Ms, vec![5.0]).target(10.0));
        report.add(Figure::new("slow", Unit::MegabytesPerSecond, vec![5.0]).target(10.0));
        report.judge(Target::at_most("ratio", Unit::Times, 0.7, Err("no podman".to_owned())));
        let table = report.table();
        for row in [
            "| quick  | ≤ 10 ms   | 5 ms      | met          |",
            "| slow   | ≥ 10 MB/s | 5 MB/s    | not met      |",
            "| ratio  | ≤ 0.70 ×  | no podman | not measured |",
        ] {
            assert!(table.contains(row), "{table}");
        }
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["targets"][1]["met"], false);
        assert_eq!(json["targets"][2]["why_not"], "no podman");
    }

    #[test]
    fn stages_keep_their_order() {
        let mut parts = Parts::default();
        let stages = serde_json::json!([{"stage": "start", "ms": 2, "parts": [{"stage": "agent", "ms": 1}]}, {"stage": "end", "ms": 3}]);
        parts.add_json(&stages);
        parts.add_json(&stages);
        let names: Vec<_> = parts.0.iter().map(|(n, s)| (n.as_str(), s.len())).collect();
        assert_eq!(names, [("start", 2), ("start/agent", 2), ("end", 2)]);
    }
}
