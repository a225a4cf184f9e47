//! What scenarios do in the lab: run things as this or that user, wait for units, look at what is left.
//!
//! Everything here fails with a message: its callers are scenarios.
#![allow(dead_code, reason = "fixtures that more scenarios use than there are at any time")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use banger_testkit::{Cmd, Done, processes};
use serde_json::Value;

/// Where the payload is mounted: `bin/`, `store/`, `engines/`.
pub(crate) const PAYLOAD: &str = "/payload";
/// The registered owner.
pub(crate) const OWNER: &str = "dev";
/// Somebody who has no business with banger.
pub(crate) const STRANGER: &str = "stranger";
/// Where programs are found: installed ones first.
const PATH: &str = "/usr/local/bin:/usr/local/sbin:/payload/bin:/usr/bin:/usr/sbin:/bin:/sbin";
/// The owner's state directory in system mode.
pub(crate) const STATE: &str = "/var/lib/banger/state";
/// A copy of the payload's store that directories on the same file system share by hard links.
const STORE: &str = "/var/cache/banger-lab/store";

/// A program as root, in a clean environment.
pub(crate) fn root<A: AsRef<std::ffi::OsStr>>(words: impl IntoIterator<Item = A>) -> Cmd {
    Cmd::new("env")
        .args(["-i", &format!("PATH={PATH}"), "HOME=/root", "LANG=C.UTF-8", "TERM=dumb"])
        .args(words)
        .cwd("/root")
}

/// A program as a user, in a clean environment: no `XDG_RUNTIME_DIR`, nothing of whoever started this.
pub(crate) fn user<A: AsRef<std::ffi::OsStr>>(name: &str, words: impl IntoIterator<Item = A>) -> Cmd {
    Cmd::new("runuser")
        .args(["-u", name, "--", "env", "-i"])
        .args([
            format!("PATH={PATH}"),
            format!("HOME=/home/{name}"),
            format!("USER={name}"),
        ])
        .args(["LANG=C.UTF-8", "TERM=dumb"])
        .args(words)
        .cwd(format!("/home/{name}"))
}

/// A program as the owner.
pub(crate) fn dev<A: AsRef<std::ffi::OsStr>>(words: impl IntoIterator<Item = A>) -> Cmd {
    user(OWNER, words)
}

/// `banger` as the owner, with the words of a line (no quoting). A machine in here takes ten seconds to boot.
pub(crate) fn banger(line: &str) -> Cmd {
    dev(std::iter::once("banger").chain(line.split_whitespace())).deadline(120)
}

/// `sudo banger`, typed by the owner.
pub(crate) fn sudo_banger(line: &str) -> Cmd {
    let words = ["sudo", "/payload/bin/banger"];
    dev(words.into_iter().chain(line.split_whitespace())).deadline(120)
}

/// A shell script as root.
#[track_caller]
pub(crate) fn sh(script: &str) -> Done {
    root(["sh", "-euc", script]).run()
}

/// What `banger` prints as JSON.
#[track_caller]
pub(crate) fn json(line: &str) -> Value {
    banger(&format!("{line} --format json")).ok().json()
}

/// A property of a unit, as `systemctl show` has it.
#[track_caller]
pub(crate) fn unit(unit: &str, property: &str) -> String {
    let done = root(["systemctl", "show", "--value", "--property", property, unit]).ok();
    done.out().trim().to_owned()
}

/// Waits until a unit is `active`, `inactive`, `failed`; fails with the end of its journal.
#[track_caller]
pub(crate) fn wait_unit(name: &str, state: &str) {
    if processes::reached(Duration::from_secs(60), || unit(name, "ActiveState") == state) {
        return;
    }
    let journal = root(["journalctl", "--no-pager", "--lines=40", "--unit", name]).run();
    panic!(
        "waited 60 s in vain for {name} to be {state}; it is {}\n{}",
        unit(name, "ActiveState"),
        journal.out()
    );
}

/// The main process of a unit.
#[track_caller]
pub(crate) fn main_pid(name: &str) -> i32 {
    unit(name, "MainPID").parse().expect("a process id")
}

/// The engine process of a running machine.
#[track_caller]
pub(crate) fn engine_pid(machine: &str) -> i32 {
    let shown = json(&format!("vm show {machine}"));
    let pid = shown["pid"].as_i64().unwrap_or_else(|| panic!("no engine: {shown}"));
    i32::try_from(pid).expect("a process id")
}

/// The boot id of a guest, read inside it.
#[track_caller]
pub(crate) fn boot_id(machine: &str) -> String {
    let done = banger(&format!("vm exec {machine} -- cat /proc/sys/kernel/random/boot_id")).ok();
    done.out().trim().to_owned()
}

/// What `banger audit` says, as JSON; its exit status tells whether there are orphans.
#[track_caller]
pub(crate) fn audit() -> (i32, Value) {
    let done = banger("audit --format json").run();
    (done.status, done.json())
}

/// Gives a state directory kernel and image `debian-slim`, belonging to the owner. No daemon may have run in it.
#[track_caller]
pub(crate) fn seed_store(state: &Path) {
    let script = format!(
        "
        if [ ! -e {STORE} ]; then
            mkdir -p {STORE}.new
            cp -r --sparse=auto {PAYLOAD}/store/. {STORE}.new/
            chown -R {OWNER}: {STORE}.new
            chmod -R u=rwX,go= {STORE}.new
            mv {STORE}.new {STORE}
        fi
        if [ ! -d \"$1\" ]; then
            install -d -m 700 -o {OWNER} -g {OWNER} \"$1\"
        fi
        cp -a --link {STORE}/store \"$1/\" || cp -a {STORE}/store \"$1/\"
        # Written in place: a copy of its own.
        cp -a {STORE}/banger.db \"$1/\"
        "
    );
    root(["sh", "-euc", &script, "sh"]).arg(state).deadline(120).ok();
}

/// Real Firecracker and jailer, where they were given to the run. A scenario copies them to where the owner cannot write.
pub(crate) fn firecracker() -> Option<(PathBuf, PathBuf)> {
    let engines = Path::new(PAYLOAD).join("engines");
    let (firecracker, jailer) = (engines.join("firecracker"), engines.join("jailer"));
    (firecracker.is_file() && jailer.is_file()).then_some((firecracker, jailer))
}

/// The same, without which the scenario is skipped.
pub(crate) fn need_firecracker() -> (PathBuf, PathBuf) {
    firecracker()
        .unwrap_or_else(|| banger_testkit::need::skip("no Firecracker was given: --firecracker FILE --jailer FILE"))
}

/// All processes, for whoever has to find out what hangs.
pub(crate) fn processes() -> String {
    let done = root(["ps", "axfww", "-o", "pid,user,stat,wchan:20,etimes,args"])
        .deadline(20)
        .run();
    String::from_utf8_lossy(&done.stdout)
        .lines()
        .filter(|l| !l.trim_end().ends_with(']'))
        .collect::<Vec<_>>()
        .join("\n")
}
