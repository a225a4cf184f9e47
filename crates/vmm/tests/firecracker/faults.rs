//! What can go wrong with a Firecracker, one row each.

use std::fs;
use std::time::Duration;

use banger_vmm::firecracker::Firecracker;
use banger_vmm::{Engine, EngineError, Liveness, Steps, VcpuState};

use crate::bed::{Bed, KILL, driver, saved, tests};
use crate::fake::{self, Fault, Script};
use crate::life::{ask, plan};

tests!(
    a_start_that_fails_leaves_nothing,
    a_load_that_fails_leaves_nothing,
    a_save_that_fails_leaves_nothing_and_the_machine_runs,
    a_running_engine_that_misbehaves,
    a_guest_that_takes_no_call,
    a_slow_start_is_waited_for,
);

fn quick(dir: &std::path::Path) -> Firecracker {
    driver(&fake::install(dir), |options| {
        options.launch_timeout = Duration::from_millis(700);
        options.answer_timeout = Duration::from_millis(400);
    })
}

fn refuse(words: &str) -> Fault {
    Fault::Refuse(400, words.to_owned())
}

type Fits = fn(&EngineError) -> bool;

/// What every call of a start may meet, and what is then said of it.
fn faults() -> Vec<(Fault, Fits)> {
    vec![
        (
            refuse("not today"),
            |e| matches!(e, EngineError::Refused { message, .. } if message == "not today"),
        ),
        (Fault::Refuse(500, String::new()), |e| {
            matches!(e, EngineError::Refused { .. })
        }),
        (
            Fault::Crash,
            |e| matches!(e, EngineError::Died { how, .. } if how == "signal 6"),
        ),
        (Fault::CrashAfter, |e| matches!(e, EngineError::Died { .. })),
        (Fault::HangUp, |e| matches!(e, EngineError::Io { .. })),
        (Fault::Garbage, |e| matches!(e, EngineError::Io { .. })),
        (Fault::Hang, |e| matches!(e, EngineError::Timeout { .. })),
    ]
}

async fn fails(driver: &Firecracker, bed: &Bed) -> EngineError {
    let error = driver.launch(&bed.plan).await.map(|h| panic!("{h:?}")).unwrap_err();
    bed.assert_nothing_left().await;
    let found = driver.find(&bed.plan.id, &bed.plan.paths, None).await;
    assert!(matches!(found, Liveness::Gone(_)), "{found:?}");
    error
}

async fn a_start_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let driver = quick(dir.path());
    for call in [
        "GET /",
        "PUT /machine-config",
        "PUT /drives/root",
        "PUT /vsock",
        "PUT /actions",
    ] {
        let mut tests = Vec::new();
        for (fault, fits) in faults() {
            let driver = driver.clone();
            tests.push(tokio::spawn(async move {
                let bed = Bed::new();
                bed.script(Script::with(call, fault.clone()));
                let error = fails(&driver, &bed).await;
                assert!(fits(&error), "{call} met {fault:?}: {error:?}");
            }));
        }
        for test in tests {
            test.await.unwrap();
        }
    }
    // What is not there is told in Firecracker's words.
    let bed = Bed::new();
    fs::remove_file(&bed.plan.kernel).unwrap();
    let error = fails(&driver, &bed).await;
    assert!(
        matches!(&error, EngineError::Refused { command, message, .. }
            if command == "PUT /boot-source" && message.contains("No such file")),
        "{error:?}"
    );
    let bed = Bed::new();
    bed.script(Script {
        stillborn: Some("no KVM for you".to_owned()),
        ..Default::default()
    });
    match fails(&driver, &bed).await {
        EngineError::Died { how, last_words, .. } => {
            assert_eq!(
                (how.as_str(), last_words),
                ("exit status 1", vec!["no KVM for you".to_owned()])
            );
        }
        other => panic!("{other:?}"),
    }
    let bed = Bed::new();
    bed.script(Script {
        id: Some("ffffffffffffffff".to_owned()),
        ..Default::default()
    });
    let error = fails(&driver, &bed).await;
    assert!(
        matches!(&error, EngineError::NotOurs { why, .. } if why.contains("ffffffffffffffff")),
        "{error:?}"
    );
    let bed = Bed::new();
    bed.script(Script {
        listens_after: 60_000,
        ..Default::default()
    });
    let error = fails(&driver, &bed).await;
    assert!(
        matches!(
            error,
            EngineError::Timeout {
                what: "answer on its API socket",
                ..
            }
        ),
        "{error:?}"
    );
}

async fn a_load_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let driver = quick(dir.path());
    let bed = Bed::new();
    let handles = bed.launch(&driver).await;
    let good = saved(dir.path(), "good");
    driver.save(&handles, &plan(&good, None), Steps::none()).await.unwrap();
    for (fault, fits) in faults() {
        let bed = Bed::of(&good);
        bed.script(Script::with("PUT /snapshot/load", fault.clone()));
        let error = fails(&driver, &bed).await;
        assert!(fits(&error), "{fault:?}: {error:?}");
    }
    let bed = Bed::of(&good);
    let damaged = saved(dir.path(), "damaged");
    fs::copy(&good.memory, &damaged.memory).unwrap();
    fs::write(&damaged.state, b"no state").unwrap();
    let mut other = Bed::of(&damaged);
    let error = fails(&driver, &other).await;
    assert!(
        matches!(&error, EngineError::Refused { message, .. } if message.contains("damaged")),
        "{error:?}"
    );
    other.plan.memory_mib += 1;
    assert!(matches!(fails(&driver, &other).await, EngineError::Io { .. }));
    fs::write(&damaged.state, b"").unwrap();
    other.plan.memory_mib -= 1;
    assert!(matches!(fails(&driver, &other).await, EngineError::Io { .. }));
    // A machine of another shape.
    let mut other = bed;
    other.plan.disks.pop();
    assert!(matches!(fails(&driver, &other).await, EngineError::Refused { .. }));
}

async fn a_save_that_fails_leaves_nothing_and_the_machine_runs() {
    let dir = tempfile::tempdir().unwrap();
    let driver = quick(dir.path());
    for (number, call) in ["PATCH /vm", "PUT /snapshot/create"].into_iter().enumerate() {
        let faults = [refuse("disk full"), Fault::HangUp, Fault::Garbage];
        for (fault, row) in faults.into_iter().zip('a'..) {
            let bed = Bed::new();
            bed.script(Script::with(call, fault.clone()));
            let handles = bed.launch(&driver).await;
            let to = saved(dir.path(), &format!("{number}{row}"));
            let error = driver
                .save(&handles, &plan(&to, None), Steps::none())
                .await
                .unwrap_err();
            assert!(
                matches!(error, EngineError::Refused { .. } | EngineError::Io { .. }),
                "{call} met {fault:?}: {error:?}"
            );
            assert!(!to.memory.exists() && !to.state.exists());
            assert_eq!(driver.vcpu_state(&handles).await.unwrap(), VcpuState::Running);
            assert_eq!(ask(&driver, &handles, b"x").await, b'x');
        }
    }
    // An engine that dies of it is the reason.
    let bed = Bed::new();
    bed.script(Script::with("PUT /snapshot/create", Fault::Crash));
    let handles = bed.launch(&driver).await;
    let to = saved(dir.path(), "crash");
    let error = driver
        .save(&handles, &plan(&to, None), Steps::none())
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::NotOurs { .. }), "{error:?}");
    assert!(!to.memory.exists() && !to.state.exists());
    driver.wait_exit(&handles).await;
}

async fn a_running_engine_that_misbehaves() {
    let dir = tempfile::tempdir().unwrap();
    let driver = quick(dir.path());
    for (fault, fits) in faults() {
        let bed = Bed::new();
        bed.script(Script::with("PATCH /vm", fault.clone()));
        let handles = bed.launch(&driver).await;
        let error = driver.pause(&handles).await.unwrap_err();
        let dead = matches!(fault, Fault::Crash | Fault::CrashAfter);
        assert!(
            fits(&error) || (dead && matches!(error, EngineError::Io { .. })),
            "{fault:?}: {error:?}"
        );
        if dead {
            driver.wait_exit(&handles).await;
            assert!(matches!(driver.pause(&handles).await, Err(EngineError::NotOurs { .. })));
        }
    }
    // One that is stopped is there, and cannot be told.
    let bed = Bed::new();
    let handles = bed.launch(&driver).await;
    driver
        .signal(&handles, rustix::process::Signal::STOP.as_raw())
        .await
        .unwrap();
    let found = driver.find(&bed.plan.id, &bed.plan.paths, Some(&handles)).await;
    assert!(
        matches!(&found, Liveness::Silent { handles: found, .. } if *found == handles),
        "{found:?}"
    );
    driver.signal(&handles, KILL).await.unwrap();
    driver.wait_exit(&handles).await;
}

async fn a_guest_that_takes_no_call() {
    let dir = tempfile::tempdir().unwrap();
    let driver = quick(dir.path());
    let bed = Bed::new();
    bed.script(Script {
        held_calls: 1,
        silent_calls: 2,
        ..Default::default()
    });
    let handles = bed.launch(&driver).await;
    for _ in 0..3 {
        let error = driver.connect_agent(&handles).await.unwrap_err();
        assert!(matches!(error, EngineError::Silent { .. }), "{error:?}");
    }
    assert_eq!(ask(&driver, &handles, b"x").await, b'x');
}

async fn a_slow_start_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let driver = quick(dir.path());
    let bed = Bed::new();
    bed.script(Script {
        listens_after: 200,
        ..Script::with("PUT /actions", Fault::Delay(200))
    });
    let handles = bed.launch(&driver).await;
    assert_eq!(driver.vcpu_state(&handles).await.unwrap(), VcpuState::Running);
}
