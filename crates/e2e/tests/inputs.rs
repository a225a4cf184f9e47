//! Bad input gets a precise error with a hint, and nothing is created.

use std::os::unix::fs::{PermissionsExt, symlink};

use banger_testkit::{TestEnv, need};

use crate::harness::{MACHINES, shared, tests};

tests! { MACHINES;
    wrong_names,
    sizes_out_of_range_or_without_unit,
    an_unknown_image_with_a_directory_of_that_name,
    unknown_machines,
    a_missing_engine,
    two_creates_of_one_name,
    a_name_that_is_taken,
    kernels_and_images_that_are_not_there,
}

// B23: the name was not validated.
fn wrong_names() {
    let env = shared();
    let before = env.ok("vm list").out();
    let long = "x".repeat(64);
    for name in [
        "A",
        "a.b",
        "a_b",
        "-a",
        "a-",
        "a b",
        "../x",
        "ä",
        "",
        "a\u{1b}[31m",
        &long,
    ] {
        let flag = format!("--name={name}");
        let done = env
            .banger(["vm", "create", "--no-start", &flag])
            .run()
            .fails()
            .says(&["name"]);
        assert!(
            !done.err().contains('\u{1b}'),
            "the name's escape sequence is printed: {:?}",
            done.err()
        );
    }
    // The daemon checks for itself: others than this command line talk to it.
    let body = serde_json::json!({"name": "Not_A_Name", "start": false});
    let answer = banger_testkit::http::request(&env.socket(), "POST", "/v1/machines", Some(&body)).unwrap();
    assert_eq!(answer.status, 422, "{}", String::from_utf8_lossy(&answer.body));
    assert_eq!(env.ok("vm list").out(), before);
}

fn sizes_out_of_range_or_without_unit() {
    let env = shared();
    for (flags, parts) in [
        ("--vcpu 0", &["virtual cpu"] as &[&str]),
        ("--vcpu 100000", &["virtual cpu"]),
        ("--vcpu two", &["two"]),
        ("--memory 1M", &["memory"]),
        ("--memory 512", &["unit", "write a whole number"]),
        ("--memory 900T", &["memory"]),
        ("--memory 1X", &["unit"]),
        ("--disk-size 8", &["unit", "write a whole number"]),
        ("--disk-size 1K", &["disk"]),
        ("--disk-size 99999999999999999999G", &["too large"]),
        ("--engine xen", &["xen"]),
    ] {
        env.run(&format!("vm create --name sized --no-start {flags}"))
            .fails()
            .says(parts);
    }
    env.run("vm show sized").fails();
}

fn an_unknown_image_with_a_directory_of_that_name() {
    let env = shared();
    env.run("vm run --rm nosuchimage -- true")
        .fails()
        .says(&["nosuchimage"]);
    std::fs::create_dir_all(env.work().join("myproject")).unwrap();
    env.run("vm run --rm myproject -- true")
        .fails()
        .says(&["myproject", "hint:", "./myproject"]);
}

fn unknown_machines() {
    let env = shared();
    for line in [
        "vm show nosuch",
        "vm start nosuch",
        "vm stop nosuch",
        "vm delete nosuch",
        "vm exec nosuch -- true",
        "vm logs nosuch",
    ] {
        env.run(line).fails().says(&["nosuch"]);
    }
    env.run("vm exec ../../images -- true").fails();
}

fn a_missing_engine() {
    let env = TestEnv::new("no-engine");
    // Everything of PATH but the engine.
    let bin = env.work().join("bin");
    std::fs::create_dir(&bin).unwrap();
    for program in ["git", "sh", "env"] {
        symlink(need::which(program).unwrap(), bin.join(program)).unwrap();
    }
    let done = env
        .banger(["vm", "create", "--name", "m"])
        .env("PATH", &bin)
        .run()
        .fails()
        .says(&["qemu", "hint:"]);
    assert!(done.err().lines().count() < 12, "{}", done.err());
    assert!(env.machine_names().is_empty());
    let doctor = env.banger(["doctor"]).env("PATH", &bin).run();
    assert!(doctor.out().to_lowercase().contains("qemu"), "{}", doctor.out());
    // A file of that name that is no engine says so, in the engine's own words.
    env.ok("daemon stop");
    let fake = bin.join("qemu-system-x86_64");
    std::fs::write(&fake, "#!/bin/sh\necho out of order >&2\nexit 3\n").unwrap();
    std::fs::set_permissions(&fake, std::fs::Permissions::from_mode(0o755)).unwrap();
    env.banger(["vm", "create", "--name", "m"])
        .env("PATH", &bin)
        .run()
        .fails()
        .says(&["out of order"]);
    assert!(
        env.machine_names().is_empty(),
        "a machine that could not start for the first time stays: {:?}",
        env.machine_names()
    );
    env.close();
}

fn two_creates_of_one_name() {
    let env = TestEnv::new("one-name");
    let creates: Vec<_> = (0..6)
        .map(|_| env.banger(["vm", "create", "--no-start", "--name", "twin"]).spawn())
        .collect();
    let done: Vec<_> = creates.into_iter().map(banger_testkit::Running::wait).collect();
    let won = done.iter().filter(|d| d.status == 0).count();
    assert_eq!(won, 1, "{done:#?}");
    for lost in done.iter().filter(|d| d.status != 0) {
        assert!(lost.err().contains("twin"), "{}", lost.err());
    }
    assert_eq!(env.machine_names(), ["twin"]);
    env.close();
}

fn a_name_that_is_taken() {
    let env = TestEnv::new("taken");
    env.ok("vm create --no-start --name one");
    env.ok("vm create --no-start --name two");
    env.run("vm create --no-start --name one")
        .fails()
        .says(&["one", "hint:"]);
    env.run("vm run --rm --name one -- true").fails().says(&["one"]);
    env.run("vm rename two one").fails().says(&["one"]);
    env.run("vm rename two Two").fails();
    assert_eq!(env.machine_names().len(), 2);
    env.close();
}

fn kernels_and_images_that_are_not_there() {
    let env = shared();
    env.run("vm create --no-start --kernel nosuch")
        .fails()
        .says(&["nosuch"]);
    env.run("image show nosuch").fails().says(&["nosuch"]);
    env.run("kernel show nosuch").fails().says(&["nosuch"]);
    env.run("image build nosuch").fails().says(&["nosuch"]);
    env.run("kernel import --from /nonexistent.deb nosuch").fails();
    // In use by the machines that tests share.
    crate::harness::slim();
    env.run("image delete debian-slim")
        .fails()
        .says(&["debian-slim", "slim"]);
}
