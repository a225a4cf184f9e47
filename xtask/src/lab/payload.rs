//! What a run brings along, as a read-only disk: `system` (the test program), `bin/` (banger's programs), `store/` (a state directory
//! with kernel and image), `engines/` (a real Firecracker and its jailer, when they were named).
//!
//! The disk is made anew when one of its files has changed.

use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use banger_testkit::{Cmd, base, binaries};
use serde_json::Value;

use super::Options;
use super::machine::PAYLOAD_SIZE;

/// The image that scenarios start.
const IMAGE: &str = "recipe debian-slim";

/// The payload's disk, for these options.
pub(super) fn get(repository: &Path, directory: &Path, options: &Options) -> Result<PathBuf, String> {
    let program = if options.no_build {
        built_last()?
    } else {
        build(repository)?
    };
    let mut files = vec![("system".to_owned(), program)];
    let programs = binaries::directory()?;
    for entry in ["banger", "bangerd", "banger-agent", "banger-shim", "banger-helper"] {
        let path = programs.join(entry);
        if path.is_file() {
            files.push((format!("bin/{entry}"), path));
        }
    }
    for (name, path) in [("firecracker", &options.firecracker), ("jailer", &options.jailer)] {
        if let Some(path) = path {
            files.push((format!("engines/{name}"), path.clone()));
        }
    }
    store(&mut files)?;
    files.sort();
    disk(directory, &files)
}

/// Builds banger and the test program; returns the latter's path.
fn build(repository: &Path) -> Result<PathBuf, String> {
    let cargo = || {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(repository);
        // As the Makefile does: it is compiled in, and another value compiles it anew.
        if std::env::var_os("BANGER_COMMIT").is_none() {
            let head = Command::new("git")
                .current_dir(repository)
                .args(["rev-parse", "HEAD"])
                .output();
            let head = head.ok().filter(|o| o.status.success()).map(|o| o.stdout);
            let head = head.and_then(|h| String::from_utf8(h).ok());
            cargo.env("BANGER_COMMIT", head.as_deref().map_or("unknown", str::trim));
        }
        cargo
    };
    let built = cargo().args(["build", "--release", "--quiet"]).status();
    if !built.is_ok_and(|s| s.success()) {
        return Err("banger could not be built".into());
    }
    let output = cargo()
        .args([
            "test",
            "--release",
            "--quiet",
            "--package",
            "banger-e2e",
            "--test",
            "system",
        ])
        .args(["--no-run", "--message-format=json"])
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("cargo: {e}"))?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|l| serde_json::from_str::<Value>(l).ok())
        .filter(|m| m["target"]["name"] == "system")
        .find_map(|m| m["executable"].as_str().map(PathBuf::from))
        .ok_or_else(|| "the test program `system` could not be built".to_owned())
}

/// The test program that was built last. Nothing waits for cargo.
fn built_last() -> Result<PathBuf, String> {
    // This program is <target>/<triple>/<profile>/xtask.
    let me = std::env::current_exe().map_err(|e| format!("cannot tell where this program is: {e}"))?;
    let platform = me.ancestors().nth(2).unwrap_or(Path::new("/"));
    let deps = platform.join("release/deps");
    std::fs::read_dir(&deps)
        .map_err(|e| format!("{}: {e}", deps.display()))?
        .flatten()
        .map(|e| e.path())
        .filter(|p| {
            p.extension().is_none()
                && p.file_name()
                    .is_some_and(|n| n.to_string_lossy().starts_with("system-"))
        })
        .max_by_key(|p| std::fs::metadata(p).and_then(|m| m.modified()).ok())
        .ok_or_else(|| {
            format!(
                "{} has no test program `system`: cargo test --release -p banger-e2e --test system --no-run",
                deps.display()
            )
        })
}

/// Kernel, image and database of the tests' own store.
fn store(files: &mut Vec<(String, PathBuf)>) -> Result<(), String> {
    let state = &base::store()?;
    files.push(("store/banger.db".into(), state.join("banger.db")));
    let images = state.join("store/images");
    let list = |dir: &Path| {
        let entries = std::fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        Ok::<Vec<PathBuf>, String>(entries.flatten().map(|e| e.path()).collect())
    };
    let mut found = false;
    for image in list(&images)? {
        let text = std::fs::read_to_string(image.join("image.json")).unwrap_or_default();
        let said: Value = serde_json::from_str(&text).unwrap_or_default();
        if said["source"].as_str().is_some_and(|s| s.starts_with(IMAGE)) {
            tree(state, &image, files);
            found = true;
        }
    }
    if !found {
        return Err(format!("{} has no image of {IMAGE}", images.display()));
    }
    for kernel in list(&state.join("store/kernels"))? {
        tree(state, &kernel, files);
    }
    files.retain(|(name, _)| !name.ends_with("/package.deb"));
    Ok(())
}

/// All files below a directory, by their names below the state directory.
fn tree(state: &Path, path: &Path, files: &mut Vec<(String, PathBuf)>) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            tree(state, &entry.path(), files);
        }
    } else if let Ok(name) = path.strip_prefix(state) {
        files.push((format!("store/{}", name.display()), path.to_owned()));
    }
}

/// A file system of these files.
fn disk(directory: &Path, files: &[(String, PathBuf)]) -> Result<PathBuf, String> {
    let mut key = String::new();
    for (name, path) in files {
        let meta = std::fs::metadata(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let _ = writeln!(
            key,
            "{name} {} {}.{} {:o}",
            meta.len(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.mode()
        );
    }
    let (image, marker) = (directory.join("payload.img"), directory.join("payload.of"));
    if image.is_file() && std::fs::read_to_string(&marker).is_ok_and(|k| k == key) {
        return Ok(image);
    }
    // The image may be in use: it gives its name to a new one, and stays what it is.
    let me = std::process::id();
    let (work, fresh) = (
        directory.join(format!("payload.{me}")),
        directory.join(format!("payload.{me}.img")),
    );
    let made = assemble(&work, &fresh, files);
    let _ = std::fs::remove_dir_all(&work);
    let _ = std::fs::remove_file(&marker);
    let put = made.and_then(|()| std::fs::rename(&fresh, &image).map_err(|e| format!("{}: {e}", image.display())));
    if put.is_err() {
        let _ = std::fs::remove_file(&fresh);
    }
    put?;
    std::fs::write(&marker, key).map_err(|e| format!("{}: {e}", marker.display()))?;
    Ok(image)
}

fn assemble(work: &Path, image: &Path, files: &[(String, PathBuf)]) -> Result<(), String> {
    for (name, path) in files {
        let to = work.join(name);
        let failed = |e: std::io::Error| format!("{} to {}: {e}", path.display(), to.display());
        std::fs::create_dir_all(to.parent().unwrap_or(work)).map_err(failed)?;
        // Another file system has no links of this one's files.
        std::fs::hard_link(path, &to)
            .or_else(|_| std::fs::copy(path, &to).map(drop))
            .map_err(failed)?;
    }
    std::fs::File::create(image)
        .and_then(|f| f.set_len(PAYLOAD_SIZE))
        .map_err(|e| format!("{}: {e}", image.display()))?;
    let made = Cmd::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode"])
        .args(["-E", "root_owner=0:0,lazy_itable_init=1,nodiscard", "-d"])
        .arg(work)
        .arg(image)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .deadline(120)
        .run();
    if made.status == 0 {
        return Ok(());
    }
    Err(format!("mkfs.ext4 for the payload: {}", made.err()))
}
