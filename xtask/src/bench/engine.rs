//! Engines that a benchmark starts itself, after the example of banger's.

use std::process::Child;

use banger_testkit::TestEnv;

/// An engine that is ended with the measurement.
pub(super) struct Engine(pub(super) Child);

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Program and arguments of a running machine's engine.
pub(super) fn words(env: &TestEnv, machine: &str) -> Vec<String> {
    let line = std::fs::read(format!("/proc/{}/cmdline", env.engine(machine).pid))
        .expect("the engine's arguments can be read");
    line.split(|&b| b == 0)
        .filter(|w| !w.is_empty())
        .map(|w| String::from_utf8_lossy(w).into_owned())
        .collect()
}
