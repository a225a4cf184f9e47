//! What the tests of this crate share.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Finds a program, or says why the test is skipped. Under `CI=true` nothing is skipped.
pub(crate) fn need(program: &str) -> Option<PathBuf> {
    let found = banger_image::process::find_program(program);
    if found.is_none() {
        let reason = format!("`{program}` is not installed");
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "skipping is a failure here: {reason}"
        );
        eprintln!("skipped: {reason}");
    }
    found
}

/// Finds a program that even a complete machine may lack; its absence skips everywhere.
pub(crate) fn maybe(program: &str) -> Option<PathBuf> {
    let found = banger_image::process::find_program(program);
    if found.is_none() {
        eprintln!("skipped: `{program}` is not installed");
    }
    found
}

/// Checks a file system in depth; it must be clean.
pub(crate) fn fsck(e2fsck: &Path, image: &Path) {
    let out = Command::new(e2fsck).args(["-f", "-n"]).arg(image).output().unwrap();
    assert!(
        out.status.success(),
        "{} is not clean:\n{}{}",
        image.display(),
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(!text.contains("IGNORED") && !text.contains("? no"), "{text}");
}

/// What `debugfs` answers to a request.
pub(crate) fn debugfs(image: &Path, request: &str) -> String {
    let out = Command::new(banger_image::process::find_program("debugfs").unwrap())
        .args(["-R", request])
        .arg(image)
        .output()
        .unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// A path as its names.
pub(crate) fn path(text: &str) -> Vec<Vec<u8>> {
    text.split('/')
        .filter(|n| !n.is_empty())
        .map(|n| n.as_bytes().to_vec())
        .collect()
}

/// This many cases; what failed is printed, and kept nowhere.
pub(crate) fn config(cases: u32) -> proptest::test_runner::Config {
    proptest::test_runner::Config {
        cases,
        failure_persistence: None,
        ..proptest::test_runner::Config::default()
    }
}
