//! `banger doctor`.

use banger_proto::api::{Check, CheckLevel};
use clap::Args;
use serde::Deserialize;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::Client;
use crate::error::Result;
use crate::printer::{Style, clean};

/// Check what this host can do, and say what to do about the rest
///
/// Changes nothing. The exit status is 6 when a check fails.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  banger doctor")]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Deserialize)]
struct Checks {
    checks: Vec<Check>,
}

impl DoctorArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let checks = context.block_on(async {
            let client = Client::new(&context.places)?;
            Ok(client.get::<Checks>("doctor").await?.checks)
        })?;
        show(context, self.output, checks)
    }
}

/// Shows checks; the answer is the exit status.
pub(crate) fn show(context: &Context, output: OutputArgs, checks: Vec<Check>) -> Result<u8> {
    let failed = checks.iter().any(|c| c.level == CheckLevel::Fail);
    if output.json() {
        context
            .printer
            .json(&checks.into_iter().map(versioned).collect::<Vec<_>>())?;
    } else {
        context.printer.data(render(context, &checks))?;
    }
    Ok(if failed { 6 } else { 0 })
}

fn render(context: &Context, checks: &[Check]) -> String {
    let width = checks.iter().map(|c| c.name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let (word, style) = match check.level {
            CheckLevel::Pass => ("PASS", Style::Green),
            CheckLevel::Warn => ("WARN", Style::Yellow),
            CheckLevel::Fail => ("FAIL", Style::Red),
        };
        let word = context.printer.out_style(word, style);
        text.push_str(&format!(
            "{word}  {:width$}  {}\n",
            clean(&check.name),
            clean(&check.message)
        ));
        if let Some(hint) = &check.hint {
            let hint_word = context.printer.out_style("hint:", Style::Cyan);
            text.push_str(&format!("      {:width$}  {hint_word} {}\n", "", clean(hint)));
        }
    }
    text
}
