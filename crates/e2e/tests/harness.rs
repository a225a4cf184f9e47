//! Running tests, and the machines that many of them share.

use std::process::ExitCode;
use std::sync::OnceLock;

use banger_testkit::{Need, TestEnv, need};
use libtest_mimic::{Arguments, Completion, Trial};

/// What every test with a machine needs.
pub(crate) const MACHINES: &[Need] = &[Need::Base, Need::Git];
/// What a test without machines needs.
pub(crate) const PROGRAMS: &[Need] = &[Need::Programs, Need::Git];

/// Names the tests of a module: `tests! { NEEDS; one, another }`.
macro_rules! tests {
    ($needs:expr; $($name:ident),* $(,)?) => {
        pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$(crate::harness::trial(concat!(module_path!(), "::", stringify!($name)), $needs, $name)),*]
        }
    };
}
pub(crate) use tests;

/// One test.
pub(crate) fn trial(name: &str, needs: &'static [Need], test: fn()) -> Trial {
    let name = name.split_once("::").map_or(name, |(_, rest)| rest);
    let own_name = name.to_owned();
    Trial::ignorable_test(name, move || {
        if let Some(reason) = need::missing(needs) {
            return Ok(Completion::ignored_with(reason));
        }
        let begun = std::time::Instant::now();
        if let Err(panic) = std::panic::catch_unwind(test) {
            match panic.downcast::<need::Skip>() {
                Ok(skip) => return Ok(Completion::ignored_with(skip.0)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        if std::env::var_os("BANGER_TEST_TIMES").is_some() {
            eprintln!("{:6.1} s {own_name}", begun.elapsed().as_secs_f32());
        }
        Ok(Completion::Completed)
    })
}

/// Runs what the command line selects, then ends what was shared.
pub(crate) fn run(trials: Vec<Trial>) -> ExitCode {
    let mut args = Arguments::from_args();
    // A machine under emulation keeps a processor busy while it starts.
    args.test_threads
        .get_or_insert_with(|| std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8));
    let conclusion = libtest_mimic::run(&args, trials);
    let left = SHARED.get().map(TestEnv::finish).unwrap_or_default();
    if !left.is_empty() {
        eprintln!("left behind by the machines that tests share:\n{}", left.join("\n"));
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

static SHARED: OnceLock<TestEnv> = OnceLock::new();

/// The environment of tests that only look. Whoever adds a machine to it gives it a name that no other test uses.
pub(crate) fn shared() -> &'static TestEnv {
    SHARED.get_or_init(|| TestEnv::new("shared"))
}

/// A running machine without an init system. Tests may write below `/tmp` in it, under names of their own.
pub(crate) fn slim() -> (&'static TestEnv, &'static str) {
    static READY: OnceLock<Result<(), String>> = OnceLock::new();
    (shared_machine(&READY, "slim", "debian-slim"), "slim")
}

/// A running machine with systemd and sshd, under the same rules.
pub(crate) fn debian() -> (&'static TestEnv, &'static str) {
    static READY: OnceLock<Result<(), String>> = OnceLock::new();
    (shared_machine(&READY, "deb", "debian"), "deb")
}

/// Makes a shared machine once; that it could not be made is as lasting.
fn shared_machine(ready: &OnceLock<Result<(), String>>, name: &str, image: &str) -> &'static TestEnv {
    let env = shared();
    let make = || {
        let done = env
            .banger(["vm", "create", "--name", name, "--image", image])
            .deadline(180)
            .run();
        if done.status == 0 { Ok(()) } else { Err(done.err()) }
    };
    if let Err(e) = ready.get_or_init(make) {
        panic!("the shared machine {name} could not be made: {e}");
    }
    env
}

/// Makes and starts a machine.
#[track_caller]
pub(crate) fn create(env: &TestEnv, name: &str, image: &str) {
    env.banger(["vm", "create", "--name", name, "--image", image])
        .deadline(180)
        .ok();
}

/// An environment of one's own with one running machine `m`.
#[track_caller]
pub(crate) fn machine(test: &str) -> TestEnv {
    let env = TestEnv::new(test);
    create(&env, "m", "debian-slim");
    env
}

/// SHA-256 by the system's own tool.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let done = banger_testkit::Cmd::new("sha256sum").stdin(bytes).ok();
    done.out().split_whitespace().next().unwrap_or_default().to_owned()
}

/// Bytes without a pattern, the same every time.
pub(crate) fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}
