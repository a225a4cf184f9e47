//! The lab's root file system, and the lab as it is when it has booted.
//!
//! `target/lab/<key>/` holds `root.img`, `vmlinuz` and `initrd`; the key is a digest of everything they are made by. In `warm/` there
//! is a copy of the disk with memory and devices of the booted lab; its key adds the emulator and the processor it ran on.

use std::hash::{DefaultHasher, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::machine::{self, Machine};

/// Raised when the same files make something else.
const RECIPE: u32 = 1;
const SUITE: &str = "bookworm";

/// The files that a lab is made with. Also those that go into it.
const FILES: &[(&str, &str)] = &[
    ("autologin.conf", include_str!("recipe/autologin.conf")),
    ("banger-lab.service", include_str!("recipe/banger-lab.service")),
    ("customize.sh", include_str!("recipe/customize.sh")),
    ("init", include_str!("recipe/init")),
    ("journald.conf", include_str!("recipe/journald.conf")),
    ("modprobe.conf", include_str!("recipe/modprobe.conf")),
    ("runner", include_str!("recipe/runner")),
    ("system.conf", include_str!("recipe/system.conf")),
    ("uplink.network", include_str!("recipe/uplink.network")),
];
const PACKAGES: &str = include_str!("recipe/packages");

/// Options of mmdebstrap: what is not installed, and that the initramfs is ours.
const OPTIONS: &[&str] = &[
    "--variant=minbase",
    "--format=null",
    "--aptopt=APT::Install-Recommends \"false\"",
    "--aptopt=Acquire::Languages \"none\"",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=force-confold",
    "--essential-hook=mkdir -p \"$1/etc/initramfs-tools\" && echo update_initramfs=no >\"$1/etc/initramfs-tools/update-initramfs.conf\"",
];

/// A lab on disk.
#[derive(Debug)]
pub(super) struct Root {
    directory: PathBuf,
}

/// A booted lab on disk.
#[derive(Debug)]
pub(super) struct Saved {
    directory: PathBuf,
}

impl Saved {
    pub(super) fn disk(&self) -> PathBuf {
        self.directory.join("root.img")
    }

    pub(super) fn memory(&self) -> PathBuf {
        self.directory.join("memory")
    }

    pub(super) fn state(&self) -> PathBuf {
        self.directory.join("state")
    }
}

impl Root {
    /// The lab's root, made when it is not there.
    pub(super) fn get(directory: &Path, fresh: bool) -> Result<Self, String> {
        let _lock = lock(directory)?;
        let root = Self {
            directory: directory.join(key()),
        };
        if fresh {
            remove(&root.directory)?;
        }
        if !root.directory.join("root.img").is_file() {
            build(directory, &root.directory)?;
        }
        Ok(root)
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn disk(&self) -> PathBuf {
        self.directory.join("root.img")
    }

    pub(super) fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    pub(super) fn initrd(&self) -> PathBuf {
        self.directory.join("initrd")
    }

    /// The booted lab, booted and saved when there is none that fits.
    pub(super) fn warm(&self, directory: &Path) -> Result<Saved, String> {
        let _lock = lock(directory)?;
        let saved = Saved {
            directory: self.directory.join("warm"),
        };
        let marker = saved.directory.join("made-of");
        let key = machine::fits()?;
        if std::fs::read_to_string(&marker).is_ok_and(|k| k == key) {
            return Ok(saved);
        }
        self.forget_warm();
        let begun = Instant::now();
        eprintln!("booting the lab once, to save it as it is then");
        std::fs::create_dir_all(&saved.directory).map_err(|e| format!("{}: {e}", saved.directory.display()))?;
        let copied = banger_testkit::Cmd::new("cp")
            .args(["--sparse=always", "--reflink=auto"])
            .arg(self.disk())
            .arg(saved.disk())
            .deadline(120)
            .run();
        if copied.status != 0 {
            return Err(format!("the lab's disk could not be copied: {}", copied.err()));
        }
        Machine::save(self, &saved, directory)?;
        std::fs::write(&marker, key).map_err(|e| format!("{}: {e}", marker.display()))?;
        eprintln!("saved after {:.0} s", begun.elapsed().as_secs_f32());
        Ok(saved)
    }

    /// Drops the booted lab.
    pub(super) fn forget_warm(&self) {
        let _ = std::fs::remove_dir_all(self.directory.join("warm"));
    }
}

/// Makes the root and removes those that it replaces.
fn build(directory: &Path, to: &Path) -> Result<(), String> {
    let begun = Instant::now();
    eprintln!("making the lab of packages; this takes a minute or two");
    let work = directory.join("build");
    remove(&work)?;
    let (recipe, out) = (work.join("recipe"), work.join("out"));
    for dir in [&recipe, &out] {
        std::fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    }
    for (name, text) in FILES {
        let file = recipe.join(name);
        std::fs::write(&file, text)
            .and_then(|()| std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)))
            .map_err(|e| format!("{}: {e}", file.display()))?;
    }
    // The hook runs as another user where mmdebstrap makes a namespace of its own.
    std::fs::set_permissions(&out, PermissionsExt::from_mode(0o777)).map_err(|e| format!("{}: {e}", out.display()))?;
    let log = directory.join("build.log");
    let file = std::fs::File::create(&log).map_err(|e| format!("{}: {e}", log.display()))?;
    let hook = format!("'{0}/customize.sh' \"$1\" '{0}' '{1}'", recipe.display(), out.display());
    let mut child = Command::new("mmdebstrap")
        .args(OPTIONS)
        .arg(format!("--include={}", packages().join(",")))
        .arg(format!("--customize-hook={hook}"))
        .args([SUITE, "/dev/null"])
        .stdin(Stdio::null())
        .stdout(file.try_clone().map_err(|e| format!("{}: {e}", log.display()))?)
        .stderr(file)
        .spawn()
        .map_err(|e| format!("mmdebstrap: {e}; `make setup` installs it"))?;
    let end = begun + Duration::from_secs(1200);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(200)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!(
                    "mmdebstrap was not done after 20 minutes; see {}",
                    log.display()
                ));
            }
        }
    };
    if !status.success() {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        return Err(format!("mmdebstrap ended with {status}; its last words:\n{tail}"));
    }
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().join("root.img").is_file() {
            remove(&entry.path())?;
        }
    }
    std::fs::rename(&out, to).map_err(|e| format!("{}: {e}", to.display()))?;
    remove(&work)?;
    eprintln!("made the lab in {:.0} s", begun.elapsed().as_secs_f32());
    Ok(())
}

fn remove(path: &Path) -> Result<(), String> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("{}: {e}", path.display())),
        _ => Ok(()),
    }
}

/// One at a time makes what many use.
fn lock(directory: &Path) -> Result<std::fs::File, String> {
    let path = directory.join("lock");
    let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let lock = std::fs::File::create(&path).map_err(|e| failed(&e))?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|e| failed(&e))?;
    Ok(lock)
}

fn packages() -> Vec<&'static str> {
    PACKAGES
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .collect()
}

fn key() -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write_u32(RECIPE);
    for text in packages().iter().chain(OPTIONS).chain(&[SUITE]) {
        hasher.write(text.as_bytes());
        hasher.write_u8(0);
    }
    for (name, text) in FILES {
        hasher.write(name.as_bytes());
        hasher.write(text.as_bytes());
    }
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_the_recipe_counts() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lab/recipe");
        for entry in std::fs::read_dir(here).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            assert!(name == "packages" || FILES.iter().any(|(n, _)| *n == name), "{name}");
        }
        assert!(packages().contains(&"systemd") && !packages().iter().any(|p| p.contains(' ')));
    }
}
