//! Files in and out of a machine.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use crate::harness::{MACHINES, noise, shared, slim, tests};

tests! { MACHINES;
    files_and_directories_both_ways,
    names_and_places,
    what_the_guest_sends_stays_in_its_place,
    errors_name_their_object,
    large_files_arrive_whole,
}

fn files_and_directories_both_ways() {
    let (env, m) = slim();
    let tree = env.work().join("cp-tree");
    std::fs::create_dir_all(tree.join("sub/empty")).unwrap();
    std::fs::write(tree.join("file"), "content\n").unwrap();
    std::fs::write(tree.join("sub/tool"), "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(tree.join("sub/tool"), std::fs::Permissions::from_mode(0o751)).unwrap();
    symlink("../file", tree.join("sub/link")).unwrap();
    symlink("/nowhere", tree.join("dangling")).unwrap();
    env.ok(&format!("vm cp cp-tree {m}:/tmp/cp-in"));
    let listing = env
        .sh(
            m,
            "cd /tmp/cp-in && cat file && stat -c %a sub/tool && readlink sub/link dangling && ls -d sub/empty",
        )
        .code(0);
    assert_eq!(listing.out(), "content\n751\n../file\n/nowhere\nsub/empty\n");
    env.ok(&format!("vm cp {m}:/tmp/cp-in cp-out"));
    let out = env.work().join("cp-out");
    assert_eq!(std::fs::read_to_string(out.join("file")).unwrap(), "content\n");
    assert_eq!(std::fs::metadata(out.join("sub/tool")).unwrap().mode() & 0o777, 0o751);
    assert_eq!(
        std::fs::read_link(out.join("sub/link")).unwrap().to_str(),
        Some("../file")
    );
    assert!(out.join("sub/empty").is_dir());
}

fn names_and_places() {
    let (env, m) = slim();
    std::fs::write(env.work().join("cp-one"), "one\n").unwrap();
    // Into a directory that is there, under its own name; to a name that is not there, as that.
    env.ok(&format!("vm cp cp-one {m}:/tmp/"));
    env.ok(&format!("vm cp cp-one {m}:/tmp/cp-renamed"));
    assert_eq!(env.sh(m, "cat /tmp/cp-one /tmp/cp-renamed").code(0).out(), "one\none\n");
    env.ok(&format!("vm cp {m}:/tmp/cp-renamed cp-back"));
    assert_eq!(std::fs::read_to_string(env.work().join("cp-back")).unwrap(), "one\n");
    std::fs::create_dir_all(env.work().join("cp-dir")).unwrap();
    env.ok(&format!("vm cp {m}:/tmp/cp-renamed cp-dir"));
    assert_eq!(
        std::fs::read_to_string(env.work().join("cp-dir/cp-renamed")).unwrap(),
        "one\n"
    );
    // A path that is not absolute begins in the user's home.
    env.ok(&format!("vm cp cp-one {m}:cp-in-home"));
    assert_eq!(env.sh(m, "cat /root/cp-in-home").code(0).out(), "one\n");
    env.sh(m, "printf x >'/tmp/cp ä b'").code(0);
    env.banger(["vm", "cp", &format!("{m}:/tmp/cp ä b"), "cp-odd"]).ok();
    assert_eq!(std::fs::read_to_string(env.work().join("cp-odd")).unwrap(), "x");
}

// B20: a path check by prefix was passed with a symbolic link.
fn what_the_guest_sends_stays_in_its_place() {
    let (env, m) = slim();
    let work = env.work();
    let outside = work.join("cp-outside");
    std::fs::create_dir_all(&outside).unwrap();
    let target = work.join("cp-target/tree");
    std::fs::create_dir_all(&target).unwrap();
    // On the host a link already stands where the guest sends a directory.
    symlink(&outside, target.join("sub")).unwrap();
    env.sh(
        m,
        "mkdir -p /tmp/tree/sub && echo evil >/tmp/tree/sub/file && ln -s /etc/passwd /tmp/tree/passwd",
    )
    .code(0);
    let _ = env.run(&format!("vm cp {m}:/tmp/tree cp-target"));
    assert!(
        !outside.join("file").exists(),
        "the guest wrote through a link on the host"
    );
    // A link to elsewhere stays behind.
    env.ok(&format!("vm cp {m}:/tmp/tree cp-fresh"));
    let fresh = work.join("cp-fresh");
    assert!(std::fs::symlink_metadata(fresh.join("passwd")).is_err());
    assert_eq!(std::fs::read_to_string(fresh.join("sub/file")).unwrap(), "evil\n");
    // Devices and set-uid bits of the guest are not made here.
    env.sh(m, "mkdir -p /tmp/odd && cp /bin/true /tmp/odd/suid && chmod 4755 /tmp/odd/suid && mkfifo /tmp/odd/fifo && mknod /tmp/odd/null c 1 3; true");
    let done = env.run(&format!("vm cp {m}:/tmp/odd cp-devices"));
    let odd = work.join("cp-devices");
    assert!(
        !odd.join("null").exists() && !odd.join("fifo").exists(),
        "{}",
        done.err()
    );
    if let Ok(meta) = std::fs::metadata(odd.join("suid")) {
        assert_eq!(meta.mode() & 0o6000, 0, "a set-uid bit came out of the guest");
    }
}

fn errors_name_their_object() {
    let (env, m) = slim();
    env.run(&format!("vm cp nowhere {m}:/tmp/")).fails().says(&["nowhere"]);
    env.run(&format!("vm cp {m}:/nowhere out")).fails().says(&["/nowhere"]);
    env.run("vm cp nosuch:/etc/hostname out").fails().says(&["nosuch"]);
    env.run("vm cp a b").fails().says(&["hint:"]);
    env.run(&format!("vm cp {m}:/a {m}:/b")).fails();
    assert!(!env.work().join("out").exists());
    // The guest's disk is what is full, not the host's.
    std::fs::write(env.work().join("cp-full"), noise(3_000_000)).unwrap();
    env.sh(m, "mkdir -p /tmp/tiny && mount -t tmpfs -o size=1m none /tmp/tiny")
        .code(0);
    env.run(&format!("vm cp cp-full {m}:/tmp/tiny/"))
        .fails()
        .says(&["no space"]);
    env.sh(m, "umount /tmp/tiny").code(0);
}

fn large_files_arrive_whole() {
    let (env, m) = slim();
    let bytes = noise(30_000_000);
    std::fs::write(env.work().join("cp-large"), &bytes).unwrap();
    env.banger(["vm", "cp", "cp-large", &format!("{m}:/tmp/cp-large")])
        .deadline(120)
        .ok();
    assert!(
        env.sh(m, "sha256sum /tmp/cp-large")
            .code(0)
            .out()
            .starts_with(&crate::harness::sha256(&bytes))
    );
    env.banger(["vm", "cp", &format!("{m}:/tmp/cp-large"), "cp-large-back"])
        .deadline(120)
        .ok();
    assert!(
        std::fs::read(env.work().join("cp-large-back")).unwrap() == bytes,
        "30 MB came back changed"
    );
    shared().sh(m, "rm /tmp/cp-large").code(0);
}
