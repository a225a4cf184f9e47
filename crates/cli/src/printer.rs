//! The only place that writes to standard output and standard error (but for the raw bytes of a session).
//!
//! Data goes to standard output, everything else to standard error. What comes from a guest, an image or a repository is
//! shown without its control characters.

use std::cell::OnceCell;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::error::{Error, Kind, Result, reason};

/// When to use colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal, unless NO_COLOR is set or TERM is dumb
    #[default]
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// Colours and weights that are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// Errors.
    Red,
    /// Warnings.
    Yellow,
    /// What is well.
    Green,
    /// Hints.
    Cyan,
}

impl Style {
    fn code(self) -> &'static str {
        match self {
            Self::Red => "1;31",
            Self::Yellow => "1;33",
            Self::Green => "32",
            Self::Cyan => "1;36",
        }
    }
}

/// Writes for the user.
#[derive(Debug)]
pub(crate) struct Printer {
    /// Only data and errors.
    pub(crate) quiet: bool,
    stdout_color: bool,
    stderr_color: bool,
    stdout_terminal: bool,
    stderr_terminal: bool,
    /// The bars that are drawn now; everything else has to go around them.
    bars: OnceCell<MultiProgress>,
}

impl Printer {
    /// A printer for this process.
    pub(crate) fn new(quiet: bool, color: Color) -> Self {
        let stdout_terminal = std::io::stdout().is_terminal();
        let stderr_terminal = std::io::stderr().is_terminal();
        let wanted = |terminal: bool| match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                terminal
                    && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
                    && std::env::var_os("TERM").is_none_or(|v| v != "dumb")
            }
        };
        Self {
            quiet,
            stdout_color: wanted(stdout_terminal),
            stderr_color: wanted(stderr_terminal),
            stdout_terminal,
            stderr_terminal,
            bars: OnceCell::new(),
        }
    }

    /// Standard output is a terminal.
    pub(crate) fn stdout_is_terminal(&self) -> bool {
        self.stdout_terminal
    }

    /// Standard error is a terminal, so bars can be drawn.
    pub(crate) fn stderr_is_terminal(&self) -> bool {
        self.stderr_terminal
    }

    /// Writes data as it is.
    pub(crate) fn data(&self, text: impl AsRef<[u8]>) -> Result<()> {
        self.around_bars(|| {
            let mut out = std::io::stdout().lock();
            out.write_all(text.as_ref()).and_then(|()| out.flush())
        })
        .map_err(|e| output_error(&e))
    }

    /// Writes a line of data.
    pub(crate) fn line(&self, text: impl AsRef<str>) -> Result<()> {
        self.data(format!("{}\n", text.as_ref()))
    }

    /// Writes a value as indented JSON.
    pub(crate) fn json<T: Serialize>(&self, value: &T) -> Result<()> {
        let text = serde_json::to_string_pretty(value).map_err(|e| Error::failed(format!("cannot write JSON: {e}")))?;
        self.line(text)
    }

    /// Says something that is not data; silent with `--quiet`.
    pub(crate) fn note(&self, text: impl AsRef<str>) {
        if !self.quiet {
            self.err_line(text.as_ref());
        }
    }

    /// Says on standard error what was asked for: not even `--quiet` silences it.
    pub(crate) fn report(&self, text: impl AsRef<str>) -> Result<()> {
        self.err_raw(&format!("{}\n", text.as_ref()))
    }

    /// Warns. Silent with `--quiet`.
    pub(crate) fn warn(&self, text: impl AsRef<str>) {
        if !self.quiet {
            self.err_line(&format!(
                "{} {}",
                self.err_style("warning:", Style::Yellow),
                text.as_ref()
            ));
        }
    }

    /// Shows a failure. A closed pipe is no news to anybody.
    pub(crate) fn error(&self, error: &Error) {
        if error.kind == Kind::BrokenPipe {
            return;
        }
        let mut text = format!("{} {}", self.err_style("error:", Style::Red), clean(&error.message));
        if let Some(operation) = &error.operation {
            text.push_str(&format!(" ({})", clean(operation)));
        }
        for line in &error.details {
            text.push_str(&format!("\n  {}", clean(line)));
        }
        if let Some(hint) = &error.hint {
            text.push_str(&format!("\n\n{} {}", self.err_style("hint:", Style::Cyan), clean(hint)));
        }
        self.err_line(&text);
    }

    /// Writes text that clap rendered.
    pub(crate) fn rendered(&self, text: &clap::builder::StyledStr, to_stdout: bool) -> Result<()> {
        let color = if to_stdout {
            self.stdout_color
        } else {
            self.stderr_color
        };
        let text = if color {
            text.ansi().to_string()
        } else {
            text.to_string()
        };
        if to_stdout {
            self.data(text)
        } else {
            self.err_raw(&text)
        }
    }

    /// Text for standard output in a style.
    pub(crate) fn out_style(&self, text: &str, style: Style) -> String {
        paint(text, style, self.stdout_color)
    }

    /// Text for standard error in a style.
    pub(crate) fn err_style(&self, text: &str, style: Style) -> String {
        paint(text, style, self.stderr_color)
    }

    /// Begins something that takes a while. On a terminal a bar follows it, elsewhere each stage is a line.
    pub(crate) fn activity<'p>(&'p self, label: &str) -> Activity<'p> {
        Activity {
            printer: self,
            label: clean(label),
            stage: String::new(),
            bar: None,
            shape: Shape::None,
            lines: true,
        }
    }

    /// The same for what is mostly short: nothing off a terminal.
    pub(crate) fn short_activity<'p>(&'p self, label: &str) -> Activity<'p> {
        let mut activity = self.activity(label);
        activity.lines = false;
        activity
    }

    fn err_line(&self, text: &str) {
        // Nobody is left to tell when standard error is gone.
        let _ = self.err_raw(&format!("{text}\n"));
    }

    fn err_raw(&self, text: &str) -> Result<()> {
        self.around_bars(|| std::io::stderr().lock().write_all(text.as_bytes()))
            .map_err(|e| output_error(&e))
    }

    fn around_bars<T>(&self, write: impl FnOnce() -> T) -> T {
        match self.bars.get() {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }
}

/// The failure of our own output.
pub(crate) fn output_error(error: &std::io::Error) -> Error {
    let kind = match error.kind() {
        std::io::ErrorKind::BrokenPipe => Kind::BrokenPipe,
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Kind::NoSpace,
        _ => Kind::Failed,
    };
    Error::new(kind, format!("cannot write output: {}", reason(error)))
}

fn paint(text: &str, style: Style, color: bool) -> String {
    if color {
        format!("\x1b[{}m{text}\x1b[0m", style.code())
    } else {
        text.to_owned()
    }
}

/// Text without control characters, so that nothing foreign can drive the terminal. Tabs become spaces.
pub(crate) fn clean(text: &str) -> String {
    if !text.contains(char::is_control) && !text.contains(is_bidi) {
        return text.to_owned();
    }
    text.chars()
        .map(|c| match c {
            '\t' => ' ',
            c if c.is_control() || is_bidi(c) => '\u{fffd}',
            c => c,
        })
        .collect()
}

/// Characters that reorder what stands around them.
fn is_bidi(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// What an activity draws at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    None,
    Spinner,
    Bytes,
    Items,
}

/// Something that takes a while, shown on standard error until it is dropped.
#[derive(Debug)]
pub(crate) struct Activity<'p> {
    printer: &'p Printer,
    label: String,
    stage: String,
    bar: Option<ProgressBar>,
    shape: Shape,
    /// Stages are lines where there is no terminal.
    lines: bool,
}

impl Activity<'_> {
    /// A new stage. The same stage again is no news.
    pub(crate) fn stage(&mut self, stage: &str) {
        let stage = clean(stage);
        if stage == self.stage || stage.is_empty() {
            return;
        }
        self.stage = stage;
        if self.printer.quiet {
            return;
        }
        if self.printer.stderr_terminal {
            self.draw(Shape::Spinner, 0, 0);
        } else if self.lines {
            self.printer.note(format!("[{}] {}", self.label, self.stage));
        }
    }

    /// How far the stage is, in bytes. Nothing off a terminal.
    pub(crate) fn bytes(&mut self, done: u64, total: u64) {
        self.draw(if total == 0 { Shape::Spinner } else { Shape::Bytes }, done, total);
    }

    /// How far the stage is, in things. Nothing off a terminal.
    pub(crate) fn items(&mut self, done: u64, total: u64) {
        self.draw(if total == 0 { Shape::Spinner } else { Shape::Items }, done, total);
    }

    fn draw(&mut self, shape: Shape, done: u64, total: u64) {
        if self.printer.quiet || !self.printer.stderr_terminal {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let bars = self
                .printer
                .bars
                .get_or_init(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
            let bar = bars.add(ProgressBar::no_length());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if shape != self.shape {
            let template = match shape {
                Shape::None | Shape::Spinner => "{spinner} {prefix} {msg} {elapsed}",
                Shape::Bytes => "{spinner} {prefix} {msg} {bar:24} {bytes}/{total_bytes} {bytes_per_sec}",
                Shape::Items => "{spinner} {prefix} {msg} {bar:24} {pos}/{len}",
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            self.shape = shape;
        }
        bar.set_prefix(format!("[{}]", self.label));
        bar.set_message(self.stage.clone());
        if total > 0 {
            bar.set_length(total);
        }
        bar.set_position(done);
    }
}

impl Drop for Activity<'_> {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
            if let Some(bars) = self.printer.bars.get() {
                bars.remove(&bar);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_cannot_drive_the_terminal() {
        assert_eq!(clean("plain · ü"), "plain · ü");
        assert_eq!(clean("a\x1b[2Jb\tc\r"), "a\u{fffd}[2Jb c\u{fffd}");
        assert_eq!(clean("a\u{202e}b"), "a\u{fffd}b");
    }

    #[test]
    fn styles_only_with_colour() {
        assert_eq!(paint("x", Style::Red, false), "x");
        assert_eq!(paint("x", Style::Red, true), "\x1b[1;31mx\x1b[0m");
    }
}
