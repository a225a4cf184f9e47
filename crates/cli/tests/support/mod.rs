//! What the tests of the program share: directories of their own, and a daemon of canned answers.

#![allow(clippy::unwrap_used, reason = "a test may end this way")]
#![allow(dead_code, reason = "no test file needs all of it")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_banger");

/// Directories of its own for each test.
pub(crate) struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("run/banger")).unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.dir.path())
            .env("XDG_RUNTIME_DIR", self.path("run"))
            // Whatever is installed on the host that the tests run on is none of theirs.
            .env("BANGER_ROOT", self.path("root"))
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        Ran::from(self.command(Path::new(PROGRAM)).args(arguments).output().unwrap())
    }

    /// Makes this host one on which banger is installed in system mode, for this user.
    pub(crate) fn installed_for(&self, uid: u32) {
        std::fs::create_dir_all(self.path("root/etc/banger")).unwrap();
        std::fs::create_dir_all(self.path("root/run/banger")).unwrap();
        let record = format!(
            "version = 1\n[owner]\nuser = 'dev'\nuid = {uid}\ngid = {uid}\nhome = '/home/dev'\n\
             [installed]\nat = '2026-11-22T10:00:00Z'\nversion = '0.1.0'\ncommit = 'c'\n"
        );
        std::fs::write(self.path("root/etc/banger/install.toml"), record).unwrap();
    }

    /// Answers requests by method and path; everything else is not found. What was asked is noted, with its body.
    pub(crate) fn serve(&self, answers: &[(&str, u16, &str)]) -> Arc<Mutex<Vec<String>>> {
        self.serve_at("run/banger/bangerd.sock", answers)
    }

    /// The same on another socket.
    pub(crate) fn serve_at(&self, socket: &str, answers: &[(&str, u16, &str)]) -> Arc<Mutex<Vec<String>>> {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&heard);
        let listener = UnixListener::bind(self.path(socket)).unwrap();
        let answers: HashMap<String, (u16, String)> = answers
            .iter()
            .map(|(request, status, body)| ((*request).to_owned(), (*status, (*body).to_owned())))
            .collect();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, answers, noted) = (stream.unwrap(), answers.clone(), Arc::clone(&noted));
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    let mut line = String::new();
                    while reader.read_line(&mut line).is_ok_and(|n| n > 0) {
                        let request = line.split(' ').take(2).collect::<Vec<_>>().join(" ");
                        let mut length = 0;
                        loop {
                            line.clear();
                            reader.read_line(&mut line).unwrap();
                            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                                length = value.trim().parse().unwrap();
                            }
                            if line.trim().is_empty() {
                                break;
                            }
                        }
                        let mut body = vec![0; length];
                        reader.read_exact(&mut body).unwrap();
                        let words = format!("{request} {}", String::from_utf8_lossy(&body));
                        noted.lock().unwrap().push(words.trim_end().to_owned());
                        let none = (
                            404,
                            r#"{"error":{"code":"not_found","message":"no such thing"}}"#.to_owned(),
                        );
                        let (status, body) = answers.get(&request).unwrap_or(&none);
                        let _ = write!(
                            stream,
                            "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}",
                            body.len()
                        );
                        line.clear();
                    }
                });
            }
        });
        heard
    }

    /// The program in a directory of its own, beside a daemon that is this script. Both are written by another process: a
    /// file that was open for writing here could still be so in a child that a test beside us is about to start, and then
    /// cannot be run.
    pub(crate) fn with_daemon(&self, script: &str) -> PathBuf {
        let bin = self.path("bin");
        let made = Command::new("sh")
            .arg("-ec")
            .arg("mkdir \"$1\"; cp \"$2\" \"$1/banger\"; printf '#!/bin/sh\n%s\n' \"$3\" > \"$1/bangerd\"; chmod +x \"$1/bangerd\"")
            .arg("sh")
            .args([bin.as_os_str(), PROGRAM.as_ref(), script.as_ref()])
            .status();
        assert!(made.unwrap().success());
        bin.join("banger")
    }
}

#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

pub(crate) const MACHINE: &str = r#"{"id":"0123456789abcdef","name":"build","state":"running","spec":{"image":"debian","image_digest":"sha256:0",
"kernel":"default","kernel_digest":"sha256:1","engine":"qemu","accel":"tcg","vcpu":2,"memory_mib":1024,"disk_bytes":8589934592,
"network":"user"},"created_at":"2026-11-22T10:00:00Z","auto_remove":false}"#;
