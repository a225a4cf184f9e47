//! Full disks of the host: stalled machines say so and resume, machines end, failures have their kind.
//!
//! The daemon and its machines have their state on a small file system that the test mounts where nobody else sees it; images are
//! read from where they are.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use banger_testkit::{Cmd, Done, Need, Running, TestEnv, binaries, need, processes};

use crate::harness::tests;

tests! { &[Need::Base, Need::Git, Need::Root, Need::MountNamespace];
    a_guest_whose_disk_is_full_says_so_and_resumes,
    machines_end_on_a_full_disk,
    what_a_full_disk_fails_says_so,
}

/// Mounts a file system of 96 MiB as the state directory, but for the images in it.
const MOUNT: &str = r#"set -e
state=$1 work=$2
mkdir -p "$work/old" "$work/new"
mount --bind "$state" "$work/old"
truncate -s 96M "$work/image"
mkfs.ext4 -q "$work/image"
mount -o loop "$work/image" "$work/new"
rmdir "$work/new/lost+found"
chmod 700 "$work/new"
mount --bind "$work/new" "$state"
for entry in "$work"/old/*; do
    name=${entry##*/}
    case $name in
        banger.db*) cp "$entry" "$state/$name" ;;
        store) mkdir "$state/$name"; mount --bind "$entry" "$state/$name" ;;
    esac
done
echo ready
exec sleep 600"#;

/// An environment whose state is on a small disk.
struct SmallDisk {
    env: TestEnv,
    holder: Child,
}

impl SmallDisk {
    fn new(name: &str) -> Self {
        let env = TestEnv::new(name);
        let holder = Command::new("unshare")
            .args(need::namespace_flags())
            .args(["sh", "-c", MOUNT, "sh"])
            .arg(env.state())
            .arg(env.work())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut disk = Self { env, holder };
        let mut ready = [0; 6];
        let mut out = disk.holder.stdout.take().unwrap();
        out.read_exact(&mut ready).expect("the small disk is mounted");
        disk.start_daemon();
        disk
    }

    /// `banger` where the disk is: a daemon that it starts sees the disk, too.
    fn banger<A: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Cmd {
        let pid = self.holder.id().to_string();
        let enter = self.env.program("nsenter").args(["-t", &pid, "-m", "--"]);
        enter.arg(binaries::program("banger")).args(args).deadline(60)
    }

    /// Runs `banger` with the words of a line (no quoting).
    fn run(&self, line: &str) -> Done {
        self.banger(line.split_whitespace()).run()
    }

    fn start_daemon(&self) {
        self.run("daemon start").code(0);
    }

    fn state_of(&self, name: &str) -> String {
        let shown = self.run(&format!("vm show {name} --json")).code(0).json();
        shown["state"].as_str().unwrap_or_default().to_owned()
    }

    /// A file in the state directory, seen from outside.
    fn file(&self, name: &str) -> PathBuf {
        let state = self.env.state();
        PathBuf::from(format!("/proc/{}/root{}/{name}", self.holder.id(), state.display()))
    }

    /// Takes every byte that is left.
    fn fill(&self) {
        let path = self.file("filler");
        let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
        for size in [1 << 20, 4096, 1] {
            while file.write_all(&vec![7; size]).is_ok() {}
        }
        let _ = file.sync_all();
    }

    fn empty(&self) {
        std::fs::remove_file(self.file("filler")).unwrap();
    }

    fn create(&self, name: &str) {
        let create = self.banger(["vm", "create", "--cold", "--name", name]);
        create.deadline(180).ok();
    }

    /// Lets the guest of a machine write until it is stalled.
    fn stall(&self, name: &str) -> Running {
        let script = "dd if=/dev/urandom of=/root/big bs=1M count=24 conv=fsync 2>/dev/null && stat -c %s /root/big";
        let writes = self.banger(["vm", "exec", name, "--", "sh", "-c", script]);
        let running = writes.deadline(180).spawn();
        processes::until("the machine to stand still", Duration::from_secs(90), || {
            self.state_of(name) == "stalled"
        });
        running
    }

    fn close(mut self) {
        let list = self.run("vm list --quiet").code(0).out();
        if !list.is_empty() {
            self.banger(["vm", "delete", "--force"])
                .args(list.split_whitespace())
                .ok();
        }
        self.run("daemon stop").code(0);
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        self.env.close();
    }
}

fn quick(limit: u64, what: &str, work: impl FnOnce()) {
    let begun = Instant::now();
    work();
    assert!(
        begun.elapsed() < Duration::from_secs(limit),
        "{what} took {:?}",
        begun.elapsed()
    );
}

fn a_guest_whose_disk_is_full_says_so_and_resumes() {
    let disk = SmallDisk::new("stalled");
    disk.create("m");
    disk.fill();
    let writes = disk.stall("m");
    let shown = disk.run("vm show m --json").code(0).json();
    assert_eq!(shown["stalled"]["kind"], "no_space", "{shown}");
    assert!(shown["cause"].as_str().is_some_and(|c| c.contains("full")), "{shown}");
    assert!(disk.run("vm list").code(0).out().contains("stalled"));
    // Whatever needs the guest fails at once and says why.
    quick(10, "exec", || {
        disk.run("vm exec m -- true").code(125).says(&["full", "hint:"]);
    });
    for refused in [
        "vm suspend m",
        "vm pause m",
        "vm snapshot create m s",
        "vm resume m",
        "vm ssh m",
        "vm cp /etc/hostname m:/root/x",
    ] {
        quick(10, refused, || drop(disk.run(refused).code(8).says(&["full", "hint:"])));
    }
    // The next daemon finds the same.
    disk.env.kill_daemon();
    disk.start_daemon();
    processes::until("the next daemon to know", Duration::from_secs(20), || {
        disk.state_of("m") == "stalled"
    });
    disk.empty();
    processes::until("the machine to run", Duration::from_secs(30), || {
        disk.state_of("m") == "running"
    });
    // Nothing was lost, and the guest has not noticed.
    writes.wait();
    let script =
        "until [ $(stat -c %s /root/big) = 25165824 ]; do sleep 0.2; done; sync; dmesg | grep -ci 'i/o error'; true";
    let done = disk.banger(["vm", "exec", "m", "--", "sh", "-c", script]).run();
    done.code(0).prints("0\n");
    let shown = disk.run("vm show m --json").code(0).json();
    assert!(
        shown.get("stalled").is_none() && shown.get("cause").is_none(),
        "{shown}"
    );
    disk.close();
}

fn machines_end_on_a_full_disk() {
    let disk = SmallDisk::new("ends");
    for name in ["a", "b", "c"] {
        disk.create(name);
    }
    // As in a copy that leaves zeros out.
    let reserve = disk.file("banger.reserve");
    std::fs::remove_file(&reserve).unwrap();
    std::fs::File::create(&reserve).unwrap().set_len(1 << 20).unwrap();
    disk.fill();
    let writes = disk.stall("a");
    quick(30, "stopping a stalled machine", || drop(disk.run("vm stop a").code(0)));
    writes.wait();
    let stopped = disk.run("vm show a --json").code(0).json();
    assert_eq!(stopped["state"], "stopped");
    assert!(
        stopped["cause"].as_str().is_some_and(|c| c.contains("full")),
        "{stopped}"
    );
    disk.fill();
    quick(50, "stopping an idle machine", || drop(disk.run("vm stop b").code(0)));
    assert_eq!(disk.state_of("b"), "stopped");
    disk.fill();
    disk.env.kill_daemon();
    disk.fill();
    disk.start_daemon();
    disk.fill();
    disk.run("vm kill c").code(0);
    let killed = disk.run("vm show c --json").code(0).json();
    assert_eq!(killed["state"], "stopped");
    // How its engine ended is written down by the shim, which took the space before.
    let record = format!("machines/{}/exit.json", killed["id"].as_str().unwrap());
    processes::until("the record of the end", Duration::from_secs(5), || {
        disk.file(&record).exists()
    });
    disk.fill();
    disk.run("vm create --name d").code(8).says(&["space", "hint:"]);
    disk.fill();
    disk.run("vm delete -f a").code(0);
    disk.fill();
    disk.run("vm delete -f b c").code(0);
    assert_eq!(disk.run("vm list --quiet").code(0).out(), "");
    disk.empty();
    processes::until("space to be held again", Duration::from_secs(20), || {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(&reserve).is_ok_and(|m| m.blocks() * 512 >= 1 << 20)
    });
    disk.create("d");
    disk.close();
}

fn what_a_full_disk_fails_says_so() {
    let disk = SmallDisk::new("kinds");
    disk.create("m");
    for fails in ["vm snapshot create m s", "vm suspend m", "vm fork m --name n"] {
        disk.fill();
        let done = disk.banger(fails.split_whitespace()).deadline(120).run();
        done.code(8).says(&["hint:"]);
        // What the guest wrote meanwhile may have stalled it.
        disk.empty();
        processes::until("the machine to run", Duration::from_secs(30), || {
            disk.state_of("m") == "running"
        });
        disk.run("vm exec m -- true").code(0);
    }
    disk.close();
}
