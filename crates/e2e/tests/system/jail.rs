//! Real Firecracker in a jail, by the root helper alone: started, spoken to by its owner, saved, lost and found again, removed.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use banger_testkit::processes;
use serde_json::{Value, json};

use crate::harness::scenarios;
use crate::lab::{self, PAYLOAD, dev, sh};
use crate::root_helper::{Helper, disk, jail, read, shared, sparse, state, write};

scenarios! {
    a_jailed_engine_from_start_to_end: 180,
    an_engine_that_cannot_start_leaves_nothing: 60,
    an_engine_of_the_owners_keeps_its_scope: 60,
}

const ID: &str = "00112233aabbccdd";
const UID: u32 = 1_879_048_192 + 5;

fn launch(helper: &Helper, files: &[(&str, &Path)], disks: Value) -> Result<Value, String> {
    let (output, input) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    std::thread::spawn(move || std::io::copy(&mut std::fs::File::from(output), &mut std::io::sink()));
    let mut fds: Vec<OwnedFd> = vec![input];
    fds.extend(files.iter().map(|(_, path)| read(path)));
    let names: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
    let params = json!({"machine": ID, "slot": 5, "vcpu": 1, "memory_mib": 128, "files": names, "disks": disks});
    helper.call("engine_launch", params, &fds)
}

/// A request to the engine's API, by the owner; the answer.
#[track_caller]
fn api(method: &str, path: &str, body: &Value) -> String {
    let socket = jail(ID).join("root/firecracker.socket");
    let done = dev(["curl", "--silent", "--fail-with-body", "--unix-socket"])
        .arg(&socket)
        .args(["-X", method, &format!("http://localhost/{path}")]);
    let done = if body.is_null() {
        done
    } else {
        done.args(["-d", &body.to_string()])
    };
    done.ok().out()
}

fn vmlinux() -> std::path::PathBuf {
    let found = sh(&format!("ls {PAYLOAD}/store/store/kernels/*/vmlinux"));
    found.out().lines().next().unwrap().into()
}

fn a_jailed_engine_from_start_to_end() {
    lab::need_firecracker();
    let mut helper = Helper::start();
    let (base, cow) = (state("base"), state("cow"));
    sparse(&base, 64 << 20);
    sparse(&cow, 80 << 20);
    helper.ok("disk_attach", disk(ID, json!({"jail": 5})), &[read(&base), write(&cow)]);
    let kernel = shared(&vmlinux(), "vmlinux");
    let answer = launch(&helper, &[("kernel", &kernel)], json!(["root"])).unwrap();
    let pid = i32::try_from(answer["pid"].as_i64().unwrap()).unwrap();

    // Whose it is, and where.
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(
        status.contains(&format!("Uid:\t{UID}\t{UID}\t{UID}\t{UID}")),
        "{status}"
    );
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert_eq!(cgroup.trim(), format!("0::/banger.slice/banger-machine-{ID}.scope"));
    let root = jail(ID).join("root");
    let mode = |path: &Path| {
        let meta = std::fs::symlink_metadata(path).unwrap();
        (meta.uid(), meta.gid(), meta.mode() & 0o7777)
    };
    assert_eq!(mode(&jail(ID)), (0, 0, 0o710));
    assert_eq!(mode(&root), (UID, UID, 0o755));
    assert_eq!(mode(&root.join("firecracker.socket")), (1000, UID, 0o600));
    assert_eq!(mode(&root.join("root")), (UID, UID, 0o600));
    assert_eq!(std::fs::metadata(&kernel).unwrap().nlink(), 2);

    // The owner speaks to it, a stranger does not.
    assert!(api("GET", "", &Value::Null).contains(ID));
    let stranger = lab::user(lab::STRANGER, ["curl", "--silent", "--unix-socket"]);
    assert_ne!(
        stranger
            .arg(root.join("firecracker.socket"))
            .arg("http://x/")
            .run()
            .status,
        0
    );
    api("PUT", "machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 128}));
    api(
        "PUT",
        "boot-source",
        &json!({"kernel_image_path": "kernel", "boot_args": "console=ttyS0 reboot=k"}),
    );
    let drive = json!({"drive_id": "root", "path_on_host": "root", "is_root_device": false, "is_read_only": false});
    api("PUT", "drives/root", &drive);
    api("PUT", "vsock", &json!({"guest_cid": 3, "uds_path": "agent.sock"}));
    api("PUT", "actions", &json!({"action_type": "InstanceStart"}));
    helper.ok("engine_open", json!({"machine": ID}), &[]);
    assert_eq!(mode(&root.join("agent.sock")), (1000, UID, 0o600));

    // The disk is the engine's as long as there is a jail.
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let file_size = limits.lines().find(|l| l.starts_with("Max file size")).unwrap();
    assert!(file_size.contains(&(192u64 << 20).to_string()), "{file_size}");
    let refused = helper.call("disks_detach", json!({"machine": ID}), &[]).unwrap_err();
    assert!(
        refused.contains("conflict") && refused.contains("is still there"),
        "{refused}"
    );
    // Somebody whose primary group is the owner's does not reach it.
    let shared = sh(&format!(
        "setpriv --reuid=1001 --regid=1000 --clear-groups ls {0} {0}/firecracker.socket",
        root.display()
    ));
    assert_ne!(shared.status, 0);

    // Another helper finds it, though the pidfile says something else.
    helper.replace();
    std::fs::write(root.join("pid"), "1").unwrap();
    std::fs::rename(root.join("pid"), root.join("firecracker.pid")).unwrap();
    assert!(
        launch(&helper, &[], json!([]))
            .unwrap_err()
            .contains("has an engine already")
    );

    // What it saves becomes the owner's, and nothing else does.
    let saved = state("saved");
    std::fs::create_dir(&saved).unwrap();
    chown(&saved, Some(1000), Some(1000)).unwrap();
    symlink("/etc/shadow", root.join("memory.new")).unwrap();
    let refused = helper
        .call("engine_collect", json!({"machine": ID}), &[read(&saved)])
        .unwrap_err();
    assert!(refused.contains("denied"), "{refused}");
    api("PATCH", "vm", &json!({"state": "Paused"}));
    let paths = json!({"snapshot_type": "Full", "snapshot_path": "state.new", "mem_file_path": "memory.new"});
    api("PUT", "snapshot/create", &paths);
    helper.ok("engine_collect", json!({"machine": ID}), &[read(&saved)]);
    for name in ["memory", "state"] {
        assert_eq!(mode(&saved.join(name)), (1000, 1000, 0o444), "{name}");
    }

    // It is ended, and goes on in another jail.
    helper.ok("engine_signal", json!({"machine": ID, "signal": "KILL"}), &[]);
    let gone = || !Path::new(&format!("/proc/{pid}")).exists();
    assert!(
        processes::reached(Duration::from_secs(10), gone),
        "it is not gone 10 s after SIGKILL"
    );
    helper.ok("engine_signal", json!({"machine": ID, "signal": "KILL"}), &[]);
    let (memory, devices) = (saved.join("memory"), saved.join("state"));
    launch(&helper, &[("memory", &memory), ("state", &devices)], json!(["root"])).unwrap();
    let load = json!({"snapshot_path": "state", "resume_vm": true,
        "mem_backend": {"backend_type": "File", "backend_path": "memory"}});
    api("PUT", "snapshot/load", &load);
    assert!(api("GET", "", &Value::Null).contains("Running"));

    helper.remove(ID);
    helper.remove(ID);
    assert_eq!(helper.inventory(), []);
    assert!(!jail(ID).exists() && memory.exists());
    assert_eq!(
        sh("systemctl list-units --all --plain --no-legend 'banger-machine-*'").out(),
        ""
    );
}

fn an_engine_that_cannot_start_leaves_nothing() {
    lab::need_firecracker();
    let helper = Helper::start();
    // A program that is no engine: the jailer starts it, and it ends.
    let engine = Path::new("/b/bin/firecracker");
    std::fs::copy("/bin/busybox", engine).unwrap();
    let e = launch(&helper, &[], json!([])).unwrap_err();
    assert!(e.contains("ended before its API socket was there"), "{e}");
    assert_eq!(helper.inventory(), []);
    // One that others could have changed is not started at all.
    sh("chmod g+w /b/bin/firecracker").code(0);
    let e = launch(&helper, &[], json!([])).unwrap_err();
    assert!(e.contains("can be written to by others"), "{e}");
    sh("rm /b/bin/firecracker; ln -s /bin/busybox /b/bin/firecracker").code(0);
    let e = launch(&helper, &[], json!([])).unwrap_err();
    assert!(e.contains("symbolic link"), "{e}");
    let e = launch(&helper, &[], json!(["work"])).unwrap_err();
    assert!(e.contains("symbolic link") || e.contains("not_found"), "{e}");
    assert_eq!(helper.inventory(), []);
}

fn an_engine_of_the_owners_keeps_its_scope() {
    let helper = Helper::start();
    // What counts is what the kernel calls it.
    let program = format!("/tmp/banger-{}", &ID[..8]);
    std::fs::copy("/bin/sleep", &program).unwrap();
    let mut engine = Command::new(&program).arg("1000").uid(1000).gid(1000).spawn().unwrap();
    let pid = engine.id();
    let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let named = || stat().contains("(banger-");
    assert!(processes::reached(Duration::from_secs(10), named), "{}", stat());
    let start_time: u64 = stat().split_whitespace().nth(21).unwrap().parse().unwrap();
    let ask = |machine: &str, start_time: u64| {
        let params = json!({"machine": machine, "pid": pid, "start_time": start_time, "memory_mib": 256});
        helper.call("engine_scope", params, &[])
    };
    for refused in [ask(ID, start_time + 1), ask("ffeeddccbbaa9988", start_time)] {
        assert!(refused.unwrap_err().contains("denied"));
    }
    let unit = format!("banger-machine-{ID}.scope");
    for _ in 0..2 {
        // A daemon that has just started asks again: nothing happens to what runs there.
        assert_eq!(ask(ID, start_time).unwrap()["unit"], unit);
        let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert_eq!(cgroup.trim(), format!("0::/banger.slice/{unit}"));
        assert!(matches!(engine.try_wait(), Ok(None)));
    }
    helper.remove(ID);
    engine.wait().unwrap();
    assert_eq!(helper.inventory(), []);
    std::fs::remove_file(program).unwrap();
}
