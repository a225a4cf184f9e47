//! A root helper by itself, below a root directory of its own, and calls to it: what the daemon would ask, and what it never would.

use std::fs::{File, OpenOptions};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use banger_testkit::processes;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::lab::{self, PAYLOAD};

/// The owner's user and group id in the lab.
const OWNER: u32 = 1000;
/// Short, for the sockets below it.
const ROOT: &str = "/b";

/// A helper that serves [`ROOT`]. Ended and cleared away when dropped.
pub(crate) struct Helper {
    child: Child,
}

/// What a call brought, or its error: code, message, details in one text.
pub(crate) type Outcome = Result<Value, String>;

impl Helper {
    /// Writes a record, makes the directories, starts the helper. Engines are those of the payload, where it has any.
    pub(crate) fn start() -> Self {
        for (dir, owner, mode) in [
            ("", 0, 0o755),
            ("etc", 0, 0o755),
            ("etc/banger", 0, 0o755),
            ("dev", 0, 0o755),
            ("run", 0, 0o755),
            ("run/banger-root", 0, 0o711),
            ("var", 0, 0o755),
            ("var/lib", 0, 0o755),
            ("var/lib/banger", 0, 0o711),
            ("var/lib/banger/state", OWNER, 0o700),
        ] {
            let path = Path::new(ROOT).join(dir);
            std::fs::create_dir_all(&path).unwrap();
            chown(&path, Some(owner), Some(owner)).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        if let Some((firecracker, jailer)) = lab::firecracker() {
            std::fs::create_dir_all(format!("{ROOT}/bin")).unwrap();
            for program in [firecracker, jailer] {
                let to = Path::new(ROOT).join("bin").join(program.file_name().unwrap());
                std::fs::copy(&program, &to).unwrap();
                std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
        let record = format!(
            "version = 1\n[owner]\nuser = \"dev\"\nuid = {OWNER}\ngid = {OWNER}\nhome = \"/home/dev\"\n\
             [installed]\nat = \"\"\nversion = \"\"\ncommit = \"\"\n\
             [firecracker]\nfirecracker = \"{ROOT}/bin/firecracker\"\njailer = \"{ROOT}/bin/jailer\"\n"
        );
        let path = format!("{ROOT}/etc/banger/install.toml");
        std::fs::write(&path, record).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let helper = Self { child: spawn() };
        helper.wait();
        helper
    }

    fn wait(&self) {
        let there = || UnixStream::connect(socket()).is_ok();
        assert!(
            processes::reached(Duration::from_secs(20), there),
            "no helper within 20 s"
        );
    }

    /// Kills it and starts another.
    pub(crate) fn replace(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn();
        self.wait();
    }

    /// A call with descriptors.
    pub(crate) fn call(&self, method: &str, params: Value, fds: &[OwnedFd]) -> Outcome {
        let mut call = json!({"version": 2, "request": {"method": method}});
        if !params.is_null() {
            call["request"]["params"] = params;
        }
        let bytes = serde_json::to_vec(&call).unwrap();
        let frame = [&(bytes.len() as u32).to_be_bytes()[..], &bytes].concat();
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::<u8>::uninit(); 256];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        }
        let mut stream = UnixStream::connect(socket()).unwrap();
        let sent = sendmsg(&stream, &[IoSlice::new(&frame)], &mut control, SendFlags::NOSIGNAL).unwrap();
        stream.write_all(&frame[sent..]).unwrap();
        let mut head = [0; 4];
        stream.read_exact(&mut head).unwrap();
        let mut reply = vec![0; u32::from_be_bytes(head) as usize];
        stream.read_exact(&mut reply).unwrap();
        let reply: Value = serde_json::from_slice(&reply).unwrap();
        if reply["ok"].is_object() {
            Ok(reply["ok"].clone())
        } else {
            Err(reply["error"].to_string())
        }
    }

    /// A call that has to work.
    #[track_caller]
    pub(crate) fn ok(&self, method: &str, params: Value, fds: &[OwnedFd]) -> Value {
        self.call(method, params, fds)
            .unwrap_or_else(|e| panic!("{method}: {e}"))
    }

    /// Makes a disk of 512 MiB for the owner; its node.
    #[track_caller]
    pub(crate) fn attach(&self, machine: &str, base: &Path, changes: &Path) -> PathBuf {
        let answer = self.ok(
            "disk_attach",
            disk(machine, json!("owner")),
            &[read(base), write(changes)],
        );
        answer["node"].as_str().unwrap().into()
    }

    #[track_caller]
    pub(crate) fn detach(&self, machine: &str) {
        self.ok("disks_detach", json!({"machine": machine}), &[]);
    }

    /// State of a machine's one disk.
    #[track_caller]
    pub(crate) fn status(&self, machine: &str) -> Value {
        self.ok("disks_status", json!({"machine": machine}), &[])["disks"][0].clone()
    }

    /// Removes everything of a machine.
    #[track_caller]
    pub(crate) fn remove(&self, machine: &str) {
        self.ok("machine_remove", json!({"machine": machine}), &[]);
    }

    /// What an audit would list: kind and name.
    #[track_caller]
    pub(crate) fn inventory(&self) -> Vec<(String, String)> {
        let answer = self.ok("inventory", json!(null), &[]);
        let text = |v: &Value| v.as_str().unwrap().to_owned();
        let objects = answer["objects"].as_array().unwrap();
        objects.iter().map(|o| (text(&o["kind"]), text(&o["name"]))).collect()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(ROOT);
    }
}

fn socket() -> String {
    format!("{ROOT}/run/banger-root/bangerd-root.sock")
}

fn spawn() -> Child {
    Command::new(format!("{PAYLOAD}/bin/banger-helper"))
        .args(["--root", ROOT])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Parameters of `disk_attach`: 512 MiB, the root disk.
pub(crate) fn disk(machine: &str, user: Value) -> Value {
    json!({"machine": machine, "role": "root", "bytes": 512u64 << 20, "user": user})
}

/// A path in the owner's state directory.
pub(crate) fn state(name: &str) -> PathBuf {
    Path::new(ROOT).join("var/lib/banger/state").join(name)
}

/// The jail of a machine.
pub(crate) fn jail(machine: &str) -> PathBuf {
    Path::new(ROOT).join("var/lib/banger/jail/firecracker").join(machine)
}

/// A sparse file of the owner's.
pub(crate) fn sparse(path: &Path, bytes: u64) {
    File::create(path).unwrap().set_len(bytes).unwrap();
    chown(path, Some(OWNER), Some(OWNER)).unwrap();
}

/// A copy of a file, the owner's and read-only for everybody.
pub(crate) fn shared(from: &Path, name: &str) -> PathBuf {
    let to = state(name);
    std::fs::copy(from, &to).unwrap();
    chown(&to, Some(OWNER), Some(OWNER)).unwrap();
    std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o444)).unwrap();
    to
}

pub(crate) fn read(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

pub(crate) fn write(path: &Path) -> OwnedFd {
    OpenOptions::new().read(true).write(true).open(path).unwrap().into()
}
