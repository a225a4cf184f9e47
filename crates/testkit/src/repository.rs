//! Git repositories to work on.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A git work tree of a test's own.
#[derive(Debug)]
pub struct Repository {
    path: PathBuf,
}

impl Repository {
    /// An empty repository with branch `main`.
    pub fn empty(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        std::fs::create_dir_all(&path).expect("a directory for the repository");
        let repository = Self { path };
        repository.git(&["init", "--quiet", "--initial-branch=main"]);
        repository
    }

    /// A repository with two commits, an executable, a symbolic link, a name that is no plain ASCII, and an ignored file.
    pub fn typical(path: impl Into<PathBuf>) -> Self {
        let repository = Self::empty(path);
        repository.write("README", "hello\n");
        repository.write(".gitignore", "ignored.log\nbuild/\n");
        repository.commit("first");
        repository.write("src/deep/main.c", "int main(void) { return 0; }\n");
        repository.write("name with space äö.txt", "unusual\n");
        repository.write("run.sh", "#!/bin/sh\necho ran in $(pwd)\n");
        repository.make_executable("run.sh");
        std::os::unix::fs::symlink("README", repository.path.join("link")).expect("a symbolic link");
        repository.commit("second");
        repository.write("ignored.log", "never shipped\n");
        repository.write("build/out.o", "never shipped\n");
        repository
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file, directories above it included.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path.join(name);
        std::fs::create_dir_all(path.parent().expect("a file is in a directory")).expect("the file's directory");
        std::fs::write(&path, content).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }

    /// Makes a file executable.
    pub fn make_executable(&self, name: &str) {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(self.path.join(name), std::fs::Permissions::from_mode(0o755))
            .expect("the file's mode");
    }

    /// Commits everything there is.
    pub fn commit(&self, message: &str) -> String {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--message", message]);
        self.head()
    }

    /// The commit at hand.
    pub fn head(&self) -> String {
        self.git(&["rev-parse", "HEAD"]).trim().to_owned()
    }

    /// `git status` for programs.
    pub fn status(&self) -> String {
        self.git(&["status", "--porcelain"])
    }

    /// Runs git in it, untouched by the user's configuration, and returns what it prints.
    #[track_caller]
    pub fn git(&self, args: &[&str]) -> String {
        let output = git(&self.path).args(args).output().expect("git runs");
        assert!(
            output.status.success(),
            "git {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("git prints UTF-8")
    }
}

/// git in a directory, untouched by the user's configuration.
pub fn git(dir: &Path) -> Command {
    let mut command = Command::new("git");
    command
        .current_dir(dir)
        .env_clear()
        .envs(std::env::var_os("PATH").map(|p| ("PATH", p)))
        .env("HOME", "/nonexistent")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .args(["-c", "user.name=Test", "-c", "user.email=test@example.invalid"])
        .args(["-c", "commit.gpgsign=false", "-c", "protocol.file.allow=always"]);
    command
}
