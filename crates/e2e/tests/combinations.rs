//! Combinations that make no sense are refused before anything exists.

use banger_testkit::{Repository, TestEnv};

use crate::harness::{PROGRAMS, tests};

tests! { PROGRAMS; impossible_combinations_are_refused, what_is_refused_starts_nothing }

fn impossible_combinations_are_refused() {
    let env = TestEnv::bare("combinations");
    Repository::typical(env.work().join("repo"));
    // In commands whose status is the guest's, banger's own failures have one of their own.
    for (line, status, parts) in [
        ("vm run -d --rm", 125, &["-d", "--rm", "hint:"] as &[&str]),
        ("vm run -d -- true", 125, &["-d", "hint:"]),
        ("vm run -d -t", 125, &["-t"]),
        ("vm run ./repo --from main", 125, &["--branch", "hint:"]),
        ("vm run --branch x", 125, &["--branch"]),
        ("vm run --include-untracked", 125, &["--include-untracked"]),
        ("vm run --dry-run", 125, &["--dry-run"]),
        ("vm run --rm", 125, &["--rm"]),
        ("vm run ./repo ./repo -- true", 125, &["two workspaces"]),
        ("vm run debian make", 125, &["--"]),
        ("vm run debian --image debian-slim -- true", 125, &["two images"]),
        ("vm run --rm --name a --name b", 125, &["--name"]),
        ("run --no-such-flag", 125, &["--no-such-flag"]),
        ("vm exec", 125, &[]),
        ("vm create ./repo", 2, &["./repo", "hint:"]),
        ("vm frobnicate", 2, &["frobnicate"]),
        ("vm delete", 2, &[]),
        ("vm rename one", 2, &[]),
        ("frobnicate", 2, &["frobnicate"]),
    ] {
        env.run(line).code(status).says(parts);
    }
    assert!(
        env.processes().is_empty(),
        "a refused combination started {:?}",
        env.processes()
    );
    env.close();
}

fn what_is_refused_starts_nothing() {
    let env = TestEnv::bare("refused");
    env.run("vm run --vcpu 0").fails();
    env.run("vm run ./nowhere").fails().says(&["nowhere"]);
    assert!(
        !env.state()
            .join("machines")
            .read_dir()
            .is_ok_and(|mut d| d.next().is_some())
    );
    env.close();
}
