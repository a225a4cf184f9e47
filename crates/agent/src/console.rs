//! Last words: lines on the guest's console, which the host keeps and shows when a start fails.

use std::fs::OpenOptions;
use std::io::Write;

/// Writes one line to the kernel's log with the priority of an error, so that it comes out on the console and in `dmesg`;
/// where there is no kernel log, to standard error.
pub(crate) fn say(text: &str) {
    write(3, text);
}

/// The same for what the host has to know, whatever of the kernel's log the guest shows on its console.
pub(crate) fn announce(text: &str) {
    write(0, text);
}

fn write(priority: u8, text: &str) {
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(800)
        .collect();
    let line = format!("<{priority}>banger-agent: {text}\n");
    let written = OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| log.write_all(line.as_bytes()));
    if written.is_err() {
        let _ = writeln!(std::io::stderr(), "banger-agent: {text}");
    }
}

/// An error with all its sources, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}
