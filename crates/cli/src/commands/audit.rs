//! `banger audit`.

use banger_proto::api::{Audit, AuditObject};
use clap::Args;

use crate::cli::{Context, OutputArgs, versioned};
use crate::client::Client;
use crate::error::Result;
use crate::table;

/// Exit status when something is left that nobody owns, when something is missing, or when it cannot be told.
const FOUND: u8 = 1;

/// Look for what machines have left behind on this host
///
/// Compares every object that carries banger's mark (processes, network interfaces, rules, block devices, mounts, jails, control
/// groups, sockets, files) with what the database says, and the taps of machines that run with what is there. The exit status is 0 when
/// each has its machine, and 1 when one has none, when a tap is missing, or when something could not be looked at.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  banger audit\n  banger audit --fix")]
pub(crate) struct AuditArgs {
    /// Remove what nobody owns
    #[arg(long)]
    fix: bool,
    /// Show also what is well
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
}

impl AuditArgs {
    pub(crate) fn run(self, context: &Context) -> Result<u8> {
        let audit: Audit = context.block_on(async {
            let client = Client::new(&context.places)?;
            if self.fix {
                client.post("audit/fix", &serde_json::json!({})).await
            } else {
                client.get("audit").await
            }
        })?;
        let left = left(&audit);
        let well = left == 0 && audit.blind.is_empty() && audit.missing.is_empty();
        let status = if well { 0 } else { FOUND };
        if self.output.json() {
            context.printer.json(&versioned(audit))?;
            return Ok(status);
        }
        let shown: Vec<&AuditObject> = audit
            .objects
            .iter()
            .filter(|o| self.all || o.orphan.is_some() || o.note.is_some())
            .collect();
        if !shown.is_empty() {
            let rows = shown.into_iter().map(row);
            context
                .printer
                .data(table::render(&["KIND", "NAME", "MACHINE", "STATE"], rows))?;
        }
        for missing in &audit.missing {
            let text = format!("{} `{}` is not there: {}", missing.kind, missing.name, missing.why);
            context.printer.warn(format!("{text}; hint: {}", missing.hint));
        }
        for blind in &audit.blind {
            context.printer.warn(format!("could not look: {blind}"));
        }
        context.printer.note(summary(&audit, left));
        Ok(status)
    }
}

/// Orphans that are still there.
fn left(audit: &Audit) -> usize {
    audit
        .objects
        .iter()
        .filter(|o| o.orphan.is_some() && !o.removed)
        .count()
}

fn row(object: &AuditObject) -> Vec<String> {
    let state = match (&object.orphan, &object.failed) {
        (None, _) => object.note.clone().unwrap_or_else(|| "well".to_owned()),
        (Some(why), _) if object.removed => format!("removed: {why}"),
        (Some(why), Some(failed)) => format!("orphan: {why}; cannot be removed: {failed}"),
        (Some(why), None) => format!("orphan: {why}"),
    };
    vec![
        object.kind.clone(),
        object.name.clone(),
        object.machine.clone().unwrap_or_else(|| "-".to_owned()),
        state,
    ]
}

fn summary(audit: &Audit, left: usize) -> String {
    let removed = audit.objects.iter().filter(|o| o.removed).count();
    let well = audit.objects.iter().filter(|o| o.orphan.is_none()).count();
    let mut parts = vec![format!("{well} well")];
    if removed > 0 {
        parts.push(format!("{removed} removed"));
    }
    if !audit.missing.is_empty() {
        parts.push(format!("{} missing", audit.missing.len()));
    }
    parts.push(match left {
        0 => "no orphans".to_owned(),
        1 => "1 orphan".to_owned(),
        n => format!("{n} orphans"),
    });
    let hint = if left > 0 && removed == 0 {
        "; `banger audit --fix` removes them"
    } else {
        ""
    };
    format!("{}{hint}", parts.join(", "))
}
