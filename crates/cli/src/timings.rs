//! How long a run took, stage by stage, as this side saw it: `vm run --timings`.

use std::cell::Cell;
use std::time::{Duration, Instant};

use banger_proto::api::{BootReport, StageTime};
use serde::Serialize;

/// A stage, and what it was made of where that is known.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Stage {
    stage: String,
    ms: f64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    parts: Vec<Stage>,
}

/// All stages of a run, for JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Report<'a> {
    stages: &'a [Stage],
    total_ms: f64,
}

/// Takes the time.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    stages: Vec<Stage>,
    last: Instant,
}

/// What a session notes of itself.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    /// The guest has taken the request.
    pub(crate) opened: Cell<Option<Instant>>,
    /// The first output came.
    pub(crate) output: Cell<Option<Instant>>,
}

impl Marks {
    /// Notes the time, the first time.
    pub(crate) fn note(mark: &Cell<Option<Instant>>) {
        if mark.get().is_none() {
            mark.set(Some(Instant::now()));
        }
    }
}

impl Stopwatch {
    /// A stopwatch that runs since `began`.
    pub(crate) fn since(began: Instant) -> Self {
        Self {
            stages: Vec::new(),
            last: began,
        }
    }

    /// A stage ended just now.
    pub(crate) fn lap(&mut self, stage: &str) {
        self.lap_at(stage, Instant::now());
    }

    fn lap_at(&mut self, name: &str, end: Instant) {
        self.stages
            .push(stage(name, milliseconds(end.saturating_duration_since(self.last))));
        self.last = end.max(self.last);
    }

    /// A session ended just now.
    pub(crate) fn session(&mut self, marks: &Marks) {
        let Some(opened) = marks.opened.get() else {
            return self.lap("session");
        };
        self.lap_at("session", opened);
        self.lap("command");
        if let (Some(output), Some(command)) = (marks.output.get(), self.stages.last_mut()) {
            let ms = milliseconds(output.saturating_duration_since(opened));
            command.parts.push(stage("first output", ms));
        }
    }

    /// Time that passed for the sake of the report is not counted.
    pub(crate) fn skip(&mut self) {
        self.last = Instant::now();
    }

    /// What the daemon knows of the start.
    pub(crate) fn start(&mut self, boot: &BootReport) {
        if let Some(start) = self.stages.iter_mut().find(|s| s.stage == "start") {
            start.parts = boot.stages.iter().map(of_daemon).collect();
        }
    }

    /// For programs.
    pub(crate) fn report(&self) -> Report<'_> {
        Report {
            stages: &self.stages,
            total_ms: self.total(),
        }
    }

    fn total(&self) -> f64 {
        // What is shown adds up.
        round(self.stages.iter().map(|s| s.ms).sum())
    }

    /// For people: a stage a line, parts indented, the sum last.
    pub(crate) fn render(&self) -> String {
        let mut rows = Vec::new();
        for stage in &self.stages {
            rows.push((stage.stage.clone(), stage.ms));
            rows.extend(stage.parts.iter().map(|p| (format!("  {}", p.stage), p.ms)));
        }
        rows.push(("sum".to_owned(), self.total()));
        let width = rows.iter().map(|r| r.0.chars().count()).max().unwrap_or(0);
        rows.iter()
            .map(|(name, ms)| format!("{name:width$} {ms:>9.1} ms\n"))
            .collect()
    }
}

fn stage(name: &str, ms: f64) -> Stage {
    Stage {
        stage: name.to_owned(),
        ms,
        parts: Vec::new(),
    }
}

fn of_daemon(time: &StageTime) -> Stage {
    let ms = u32::try_from(time.ms).unwrap_or(u32::MAX);
    stage(&time.stage, f64::from(ms))
}

fn milliseconds(duration: Duration) -> f64 {
    round(duration.as_secs_f64() * 1000.0)
}

fn round(ms: f64) -> f64 {
    (ms * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_line_up_and_add_up() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let mut watch = Stopwatch::since(began);
        watch.lap_at("connect", at(2));
        watch.lap_at("start", at(152));
        watch.start(&BootReport {
            how: "template".into(),
            from: None,
            source_paused_ms: None,
            stages: vec![StageTime {
                stage: "restore".into(),
                ms: 90,
            }],
        });
        watch.lap_at("removal", at(1152));
        assert_eq!(
            watch.render(),
            "connect         2.0 ms\n\
             start         150.0 ms\n  restore      90.0 ms\n\
             removal      1000.0 ms\n\
             sum          1152.0 ms\n"
        );
        let json = serde_json::to_value(watch.report()).unwrap();
        assert_eq!(
            (&json["total_ms"], &json["stages"][1]["parts"][0]["ms"]),
            (&1152.0.into(), &90.0.into())
        );
        assert!(json["stages"][0].get("parts").is_none());
    }

    #[test]
    fn a_session_that_was_never_open_is_one_stage() {
        let mut watch = Stopwatch::since(Instant::now());
        watch.session(&Marks::default());
        let marks = Marks::default();
        Marks::note(&marks.opened);
        Marks::note(&marks.output);
        watch.session(&marks);
        let names: Vec<_> = watch.stages.iter().map(|s| s.stage.as_str()).collect();
        assert_eq!(names, ["session", "session", "command"]);
        assert_eq!(watch.stages[2].parts[0].stage, "first output");
    }
}
