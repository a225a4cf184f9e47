//! Kernel, default images and their templates, made once through the real commands and shared with every environment.
//!
//! They stand in `target/tests/base`, made again when what makes them has changed, when they are missing, or when
//! `BANGER_TEST_FRESH=1` asks for it. An environment gets the store as hard links, which is safe because machines open
//! images and kernels read-only, and its own copy of the database.

use std::hash::{DefaultHasher, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{FlockOperation, flock};

use crate::binaries;
use crate::env::{CONFIG, TestEnv};

/// Images that every environment has.
pub const IMAGES: [&str; 2] = ["debian-slim", "debian"];

/// The shared state.
#[derive(Debug)]
pub struct Base {
    state: PathBuf,
}

/// The base, made when it is not there. Fails when it could not be made; tests that need it are skipped then, or fail.
pub fn get() -> Result<&'static Base, String> {
    static BASE: OnceLock<Result<Base, String>> = OnceLock::new();
    BASE.get_or_init(|| std::panic::catch_unwind(make).unwrap_or_else(|p| Err(format!("no base: {}", message(&*p)))))
        .as_ref()
        .map_err(Clone::clone)
}

/// The base's state directory with kernel and images, made when they are not there; templates may be missing. Nobody writes there.
pub fn store() -> Result<PathBuf, String> {
    let make = || with_images(|_, root| Ok(root.join("state/banger")));
    std::panic::catch_unwind(make).unwrap_or_else(|p| Err(format!("no base: {}", message(&*p))))
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no reason given").to_owned()
}

fn make() -> Result<Base, String> {
    with_images(|open, root| {
        // They fit one agent, one kernel and one engine: those of now are made if they are not there.
        let env = open();
        for image in IMAGES {
            env.banger(["template", "build", image]).deadline(300).ok();
        }
        env.banger(["template", "prune"]).ok();
        env.run("daemon stop").code(0);
        Ok(Base {
            state: root.join("state/banger"),
        })
    })
}

/// Sockets of the base.
fn runtime() -> PathBuf {
    PathBuf::from(format!("/tmp/btb{}", std::process::id()))
}

/// Makes kernel and images if need be, and goes on while nobody else can; with what opens the base as an environment.
fn with_images<T>(go_on: impl FnOnce(&dyn Fn() -> TestEnv, &Path) -> Result<T, String>) -> Result<T, String> {
    let tests = binaries::target().join("tests");
    std::fs::create_dir_all(&tests).map_err(|e| format!("{}: {e}", tests.display()))?;
    let lock = std::fs::File::create(tests.join("base.lock")).map_err(|e| format!("base.lock: {e}"))?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|e| format!("base.lock: {e}"))?;

    let root = tests.join("base");
    let marker = root.join("made-of");
    let key = key();
    let fresh = std::env::var_os("BANGER_TEST_FRESH").is_some_and(|v| v == "1");
    let current = std::fs::read_to_string(&marker).is_ok_and(|k| k == key);
    let open = || {
        let env = TestEnv::at(root.clone(), runtime()).keep();
        env.config(CONFIG);
        env
    };
    if fresh || !current {
        let _ = std::fs::remove_dir_all(&root);
        let env = open();
        eprintln!(
            "preparing kernel and default images for the tests in {}",
            root.display()
        );
        env.banger(["kernel", "import"]).deadline(600).ok();
        for image in IMAGES {
            env.banger(["image", "build", image]).deadline(1200).ok();
        }
        env.run("daemon stop").code(0);
        std::fs::write(&marker, &key).map_err(|e| format!("{}: {e}", marker.display()))?;
    }
    let outcome = go_on(&open, &root);
    let _ = std::fs::remove_dir_all(runtime());
    outcome
}

/// Changes whenever what makes kernel and images does.
fn key() -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../image/src");
    let mut files = Vec::new();
    for part in [
        "recipe.rs",
        "recipe",
        "build.rs",
        "build",
        "ext4.rs",
        "ext4",
        "kernel.rs",
        "kernel",
    ] {
        collect(&source.join(part), &mut files);
    }
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        // Neither comments nor the way it is broken into lines change what it makes; what is for tests does not either.
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for line in code.lines().map(str::trim).filter(|l| !l.starts_with("//")) {
            hasher.write(line.split_whitespace().collect::<String>().as_bytes());
        }
    }
    format!("{:016x}\n", hasher.finish())
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) {
    if path.is_file() {
        files.push(path.to_owned());
    }
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        collect(&entry.path(), files);
    }
}

impl Base {
    /// What it was made of, in a word.
    pub(crate) fn made_of(&self) -> String {
        key()
    }

    /// Copies what it has, but templates, to a directory as a user's own.
    pub(crate) fn copy_to(&self, to: &Path, owner: u32) {
        copy_tree(&self.state, to, owner);
    }

    /// Gives an environment, in which no daemon has run yet, kernel and images.
    pub fn share_with(&self, env: &TestEnv) {
        let state = env.state();
        std::fs::create_dir_all(&state).expect("the state directory");
        std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o700)).expect("the state directory's mode");
        for entry in std::fs::read_dir(&self.state).expect("the base").flatten() {
            let name = entry.file_name();
            let target = state.join(&name);
            match name.to_str().unwrap_or_default() {
                // Of each daemon's own.
                "machines" | "ssh" => {}
                name if name.ends_with(".log") || name.ends_with(".lock") => {}
                // Written in place: a copy of its own.
                name if name.contains(".db") => {
                    std::fs::copy(entry.path(), &target).expect("a copy of the database");
                }
                _ => link_tree(&entry.path(), &target),
            }
        }
    }
}

/// A copy of the tree as another user's, without what is of each daemon's own.
fn copy_tree(from: &Path, to: &Path, owner: u32) {
    let own = || std::os::unix::fs::chown(to, Some(owner), Some(owner)).expect("an owner");
    let meta = std::fs::symlink_metadata(from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
    let name = from.file_name().unwrap_or_default().to_string_lossy();
    if ["machines", "ssh", "templates"].contains(&&*name) || name.ends_with(".log") || name.ends_with(".lock") {
        return;
    }
    if meta.is_dir() {
        std::fs::create_dir_all(to).unwrap_or_else(|e| panic!("{}: {e}", to.display()));
        std::fs::set_permissions(to, meta.permissions()).expect("a directory's mode");
        own();
        for entry in std::fs::read_dir(from).expect("a directory of the base").flatten() {
            copy_tree(&entry.path(), &to.join(entry.file_name()), owner);
        }
        return;
    }
    // Sparse files stay sparse.
    let done = std::process::Command::new("cp")
        .arg("--sparse=always")
        .arg(from)
        .arg(to)
        .status();
    assert!(done.is_ok_and(|s| s.success()), "cannot copy {}", from.display());
    std::fs::set_permissions(to, meta.permissions()).expect("a file's mode");
    own();
}

/// The same tree, its files being hard links.
fn link_tree(from: &Path, to: &Path) {
    let meta = std::fs::symlink_metadata(from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
    if meta.is_dir() {
        std::fs::create_dir_all(to).unwrap_or_else(|e| panic!("{}: {e}", to.display()));
        std::fs::set_permissions(to, meta.permissions()).expect("a directory's mode");
        for entry in std::fs::read_dir(from).expect("a directory of the base").flatten() {
            link_tree(&entry.path(), &to.join(entry.file_name()));
        }
    } else {
        std::fs::hard_link(from, to).unwrap_or_else(|e| panic!("{} to {}: {e}", from.display(), to.display()));
    }
}
