//! `vm cp` against the system's `cp`: every kind of source to every kind of destination, both ways.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;

use crate::harness::{MACHINES, slim, tests};

tests! { MACHINES;
    every_source_to_every_destination,
    what_a_file_is_stays_what_it_is,
    a_copy_that_breaks_off_leaves_the_old_file,
}

const SOURCES: [&str; 8] = ["file", "dir", "dir/", "dir/.", "to-file", "to-dir", "to-dir/", "file/"];

const DESTINATIONS: [&str; 13] = [
    "missing",
    "missing/",
    "old",
    "old/",
    "into",
    "into/",
    "to-old",
    "to-old/",
    "to-into",
    "to-into/",
    "dangling",
    "dangling/",
    "none/missing",
];

/// Makes one case's directory: sources in `s`, destinations in `d`.
const MAKE: &str = "mkdir -p s/dir/sub d/into && printf new >s/file && printf inner >s/dir/sub/f && chmod 700 s/dir/sub \
    && ln s/dir/sub/f s/dir/twin && ln -s file s/to-file && ln -s dir s/to-dir && ln -s sub/f s/dir/link \
    && printf old >d/old && ln -s old d/to-old && ln -s into d/to-into && ln -s nowhere d/dangling \
    && touch -d @1000000000 s/file s/dir/sub/f s/dir/sub s/dir";

/// Prints a tree: kind, permissions, path, target of a link, content.
const SHOW: &str = "find d | LC_ALL=C sort | while read -r p; do \
    if [ -L \"$p\" ]; then echo \"link $p $(readlink \"$p\")\"; \
    elif [ -d \"$p\" ]; then echo \"dir $p $(stat -c %a \"$p\")\"; \
    else echo \"file $p $(stat -c '%a %h' \"$p\") $(cat \"$p\")\"; fi; done";

fn sh(dir: &Path, script: &str) -> String {
    let done = Command::new("sh")
        .args(["-c", &format!("umask 022; {script}")])
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(
        done.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    String::from_utf8(done.stdout).unwrap()
}

fn every_source_to_every_destination() {
    let (env, m) = slim();
    let work = env.work().join("like-cp");
    let cases: Vec<(String, &str, &str)> = SOURCES
        .iter()
        .flat_map(|s| DESTINATIONS.iter().map(move |d| (*s, *d)))
        .enumerate()
        .map(|(n, (s, d))| (format!("c{n}"), s, d))
        .collect();
    for side in ["cp", "in", "out"] {
        std::fs::create_dir_all(work.join(side)).unwrap();
        for (case, ..) in &cases {
            let dir = work.join(side).join(case);
            std::fs::create_dir(&dir).unwrap();
            sh(&dir, MAKE);
        }
    }
    let names: Vec<&str> = cases.iter().map(|(case, ..)| case.as_str()).collect();
    // Few programs: each costs an emulated machine some hundredths of a second.
    let make = format!(
        "umask 022; mkdir -p /tmp/like-cp/one; cd /tmp/like-cp/one; {MAKE}; cd ..; for c in {}; do cp -a one $c; done; rm -r one",
        names.join(" ")
    );
    env.banger(["vm", "exec", m, "--", "sh", "-c", &make])
        .deadline(120)
        .ok();
    let mut failed = Vec::new();
    for (case, source, destination) in &cases {
        // Links that were named are followed, others are kept; modes, times and hard links too.
        let cp = Command::new("cp")
            .args(["-aH", &format!("s/{source}"), &format!("d/{destination}")])
            .current_dir(work.join("cp").join(case))
            .output()
            .unwrap();
        let into = env.banger([
            "vm",
            "cp",
            &format!("like-cp/in/{case}/s/{source}"),
            &format!("{m}:/tmp/like-cp/{case}/d/{destination}"),
        ]);
        let into = into.run();
        let out = env.banger([
            "vm",
            "cp",
            &format!("{m}:/tmp/like-cp/{case}/s/{source}"),
            &format!("like-cp/out/{case}/d/{destination}"),
        ]);
        let out = out.run();
        let wanted = cp.status.success();
        for (way, done) in [("in", &into), ("out", &out)] {
            if (done.status == 0) != wanted {
                failed.push(format!(
                    "{source} -> {destination} {way}: cp {wanted}, vm cp {} {}",
                    done.status,
                    done.err()
                ));
            }
        }
    }
    // By the guest's own tar: what is tested here is not what looks.
    let archive = work.join("guest.tar");
    env.banger(["vm", "exec", m, "--", "tar", "-C", "/tmp/like-cp", "-c", "."])
        .stdout_file(std::fs::File::create(&archive).unwrap())
        .deadline(120)
        .ok();
    std::fs::create_dir(work.join("guest")).unwrap();
    sh(&work.join("guest"), "tar -xpf ../guest.tar");
    for (case, source, destination) in &cases {
        let guest = sh(&work.join("guest").join(case), SHOW);
        let wanted = sh(&work.join("cp").join(case), SHOW);
        let out = sh(&work.join("out").join(case), SHOW);
        for (way, is) in [("in", guest.as_str()), ("out", out.as_str())] {
            // A directory that is there keeps its permissions; `cp -a` gives it those of the source.
            if *source != "dir/." && is != wanted {
                failed.push(format!("{source} -> {destination} {way}:\n{is}instead of\n{wanted}"));
            }
        }
    }
    assert!(failed.is_empty(), "{} differ\n{}", failed.len(), failed.join("\n"));
    env.sh(m, "rm -r /tmp/like-cp").code(0);
}

fn what_a_file_is_stays_what_it_is() {
    let (env, m) = slim();
    let tree = env.work().join("cp-kinds");
    std::fs::create_dir_all(tree.join("private")).unwrap();
    std::fs::set_permissions(tree.join("private"), std::fs::Permissions::from_mode(0o700)).unwrap();
    let sparse = std::fs::File::create(tree.join("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (400 << 20) - 3).unwrap();
    std::fs::write(tree.join("one"), "x").unwrap();
    std::fs::hard_link(tree.join("one"), tree.join("private/two")).unwrap();
    symlink("one", tree.join("link")).unwrap();
    let hour = std::time::UNIX_EPOCH + std::time::Duration::from_secs(3600);
    for path in ["private", ""] {
        std::fs::File::open(tree.join(path))
            .unwrap()
            .set_modified(hour)
            .unwrap();
    }
    env.ok(&format!("vm cp cp-kinds {m}:/tmp/kinds"));
    let there = env.sh(m, "cd /tmp/kinds; stat -c '%a %Y' private .; stat -c %s sparse; du -k sparse | cut -f1; tail -c 3 sparse; echo; stat -c %h one; cmp one private/two");
    let lines: Vec<String> = there.code(0).out().lines().map(str::to_owned).collect();
    assert_eq!((lines[0].as_str(), lines[1].as_str()), ("700 3600", "755 3600"));
    assert_eq!(
        (lines[2].as_str(), lines[4].as_str(), lines[5].as_str()),
        ("419430400", "end", "2")
    );
    assert!(lines[3].parse::<u64>().unwrap() < 1024, "{lines:?}");
    env.ok(&format!("vm cp {m}:/tmp/kinds cp-kinds-back"));
    let back = env.work().join("cp-kinds-back");
    let private = std::fs::metadata(back.join("private")).unwrap();
    assert_eq!((private.mode() & 0o777, private.mtime()), (0o700, 3600));
    let sparse = std::fs::metadata(back.join("sparse")).unwrap();
    assert_eq!(sparse.len(), 400 << 20);
    assert!(sparse.blocks() * 512 < 1 << 20, "{} blocks", sparse.blocks());
    let inode = |path: &str| std::fs::metadata(back.join(path)).unwrap().ino();
    assert_eq!(inode("one"), inode("private/two"));
    // Files whose size is only known once they were read.
    env.ok(&format!("vm cp {m}:/proc/version cp-version"));
    assert_eq!(
        std::fs::read_to_string(env.work().join("cp-version")).unwrap(),
        env.sh(m, "cat /proc/version").code(0).out()
    );
    env.ok(&format!("vm cp {m}:/sys/class/net/lo/mtu cp-mtu"));
    assert_eq!(std::fs::read_to_string(env.work().join("cp-mtu")).unwrap(), "65536\n");
    env.ok(&format!("vm cp /proc/version {m}:/tmp/host-version"));
    assert_eq!(
        env.sh(m, "cat /tmp/host-version").code(0).out(),
        std::fs::read_to_string("/proc/version").unwrap()
    );
    // Devices are neither replaced nor written to.
    env.run(&format!("vm cp cp-version {m}:/dev/null"))
        .fails()
        .says(&["/dev/null"]);
    env.run(&format!("vm cp {m}:/proc/version /dev/null"))
        .fails()
        .says(&["/dev/null"]);
    env.sh(m, "test -c /dev/null").code(0);
    env.sh(m, "rm -r /tmp/kinds").code(0);
}

fn a_copy_that_breaks_off_leaves_the_old_file() {
    let (env, m) = slim();
    // The guest's disk is full.
    env.sh(
        m,
        "mkdir -p /tmp/brim && mount -t tmpfs -o size=1m none /tmp/brim && printf old >/tmp/brim/cp-brim",
    )
    .code(0);
    std::fs::write(env.work().join("cp-brim"), crate::harness::noise(3_000_000)).unwrap();
    env.run(&format!("vm cp cp-brim {m}:/tmp/brim/")).code(8);
    assert_eq!(
        env.sh(m, "cat /tmp/brim/cp-brim; ls -A /tmp/brim").code(0).out(),
        "oldcp-brim\n"
    );
    env.sh(m, "umount /tmp/brim").code(0);
    // An interrupt in the middle, both ways.
    env.sh(
        m,
        "head -c 300000000 /dev/zero >/tmp/cp-long; mkdir /tmp/cp-broken; printf old >/tmp/cp-broken/f",
    )
    .code(0);
    let broken = env.work().join("cp-broken");
    std::fs::create_dir(&broken).unwrap();
    std::fs::write(broken.join("f"), "old").unwrap();
    std::fs::write(env.work().join("cp-long"), vec![0; 300_000_000]).unwrap();
    let out = env
        .banger(["vm", "cp", &format!("{m}:/tmp/cp-long"), "cp-broken/f"])
        .spawn();
    until("the copy has begun", || {
        let files = std::fs::read_dir(format!("/proc/{}/fd", out.pid())).unwrap();
        let files = files.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        files
            .into_iter()
            .any(|file| file.to_string_lossy().contains("cp-broken/"))
    });
    out.signal(Signal::INT);
    assert_eq!(out.wait().status, 130);
    assert_eq!(std::fs::read_to_string(broken.join("f")).unwrap(), "old");
    assert_eq!(std::fs::read_dir(&broken).unwrap().count(), 1);
    let into = env
        .banger(["vm", "cp", "cp-long", &format!("{m}:/tmp/cp-broken/f")])
        .spawn();
    let under_way = || env.sh(m, "ls -l /proc/[0-9]*/fd").out().contains("/tmp/cp-broken/");
    until("the copy has begun", under_way);
    into.signal(Signal::INT);
    into.wait();
    until("the guest has given the copy up", || !under_way());
    assert_eq!(
        env.sh(m, "cat /tmp/cp-broken/f; ls -A /tmp/cp-broken").code(0).out(),
        "oldf\n"
    );
    env.sh(m, "rm -r /tmp/cp-long /tmp/cp-broken").code(0);
}

/// Waits for a condition of another process.
fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !is() {
        assert!(begun.elapsed().as_secs() < 60, "waited a minute until {what}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
