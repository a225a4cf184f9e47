//! The packer on real repositories, well-meaning and hostile.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use super::*;
use crate::error::Kind;

/// A directory with a repository `r` in it, and room beside it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// A repository with one commit.
    fn new() -> Self {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        place.git(&["init", "-q", "-b", "main", "r"]);
        place.write("r/a.txt", "one\n");
        place.write("r/sub/b c.txt", "two\n");
        place.write("r/run.sh", "#!/bin/sh\n");
        std::fs::set_permissions(place.path("r/run.sh"), std::fs::Permissions::from_mode(0o755)).unwrap();
        symlink("a.txt", place.path("r/link")).unwrap();
        place.write("r/.gitignore", "*.log\n");
        place.commit("first");
        place
    }

    fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    fn write(&self, below: &str, text: &str) {
        let path = self.path(below);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn write_bytes(&self, below: &str, bytes: &[u8]) {
        std::fs::write(self.path(below), bytes).unwrap();
    }

    /// All that is below a directory, with its content.
    fn all(&self, below: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let (mut found, mut open) = (Vec::new(), vec![self.path(below)]);
        while let Some(dir) = open.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    open.push(path);
                } else {
                    found.push((path.clone(), std::fs::read(path).unwrap()));
                }
            }
        }
        found.sort();
        found
    }

    /// Runs git beside the repository; in it with `-C r`.
    fn git(&self, arguments: &[&str]) -> String {
        git_in(self.dir.path(), arguments)
    }

    fn in_repo(&self, arguments: &[&str]) -> String {
        git_in(&self.path("r"), arguments)
    }

    fn commit(&self, message: &str) -> String {
        self.in_repo(&["add", "-A"]);
        self.in_repo(&["commit", "-q", "--allow-empty", "-m", message]);
        self.in_repo(&["rev-parse", "HEAD"])
    }

    fn look(&self, options: Options) -> Result<Snapshot> {
        self.look_at("r", options)
    }

    fn look_at(&self, below: &str, options: Options) -> Result<Snapshot> {
        inspect(&self.path(below), options, &self.user())
    }

    /// A user whose home directory is `home`.
    fn user(&self) -> User {
        User::with([
            ("HOME", self.path("home").into()),
            ("PATH", std::env::var_os("PATH").unwrap()),
            ("GIT_CONFIG_NOSYSTEM", "1".into()),
        ])
    }

    /// Packs the repository and unpacks it beside.
    fn copy(&self, options: Options) -> PathBuf {
        let snapshot = self.look(options).unwrap();
        let target = self.path("copy");
        let _ = std::fs::remove_dir_all(&target);
        std::fs::create_dir(&target).unwrap();
        tar::Archive::new(packed(&snapshot).as_slice()).unpack(&target).unwrap();
        target
    }
}

fn git_in(dir: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new("git");
    for (name, _) in std::env::vars().filter(|v| v.0.starts_with("GIT_")) {
        command.env_remove(name);
    }
    let output = command
        .arg("-C")
        .arg(dir)
        .args([
            "-c",
            "user.name=T",
            "-c",
            "user.email=t@example.org",
            "-c",
            "protocol.file.allow=always",
        ])
        .args(arguments)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "git {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

fn packed(snapshot: &Snapshot) -> Vec<u8> {
    let history = history::build(snapshot).unwrap();
    let administration = walk(&history.git_dir()).unwrap();
    let mut bytes = Vec::new();
    let mut packer = Packer::new(&mut bytes);
    write(&mut packer, snapshot, &history, &administration).unwrap();
    packer.finish().unwrap();
    bytes
}

fn files(snapshot: &Snapshot) -> Vec<String> {
    snapshot.entries.iter().map(|e| e.path.display().to_string()).collect()
}

/// `git status` without untracked files, which stay behind.
fn status(dir: &Path) -> String {
    git_in(dir, &["status", "--porcelain", "--untracked-files=no"])
}

mod forms;
mod hostile;

#[test]
fn everything_belongs_to_the_owner() {
    let place = Place::new();
    let snapshot = place.look(Options::default()).unwrap();
    let history = history::build(&snapshot).unwrap();
    let administration = walk(&history.git_dir()).unwrap();
    let mut bytes = Vec::new();
    let mut packer = Packer::new(&mut bytes).within(Path::new("repo"), (1000, 1001));
    packer.directory(Path::new(""), 0o755, 0).unwrap();
    write(&mut packer, &snapshot, &history, &administration).unwrap();
    packer.finish().unwrap();
    let mut archive = tar::Archive::new(bytes.as_slice());
    let mut names = Vec::new();
    for entry in archive.entries().unwrap() {
        let entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        assert_eq!(
            (entry.header().uid().unwrap(), entry.header().gid().unwrap()),
            (1000, 1001),
            "{name}"
        );
        assert!(name.starts_with("repo"), "{name}");
        names.push(name.trim_end_matches('/').to_owned());
    }
    assert_eq!(names[0], "repo");
    for name in ["repo/.git/config", "repo/a.txt", "repo/link", "repo/sub/b c.txt"] {
        assert!(names.contains(&name.to_owned()), "{name}: {names:?}");
    }
}

#[test]
fn the_copy_has_the_same_uncommitted_changes() {
    let place = Place::new();
    place.write("r/staged.txt", "to be\n");
    place.write("r/sub/d.txt", "x\n");
    place.commit("second");
    place.write("r/a.txt", "changed\n");
    place.write("r/staged.txt", "staged\n");
    place.in_repo(&["add", "staged.txt"]);
    place.write("r/staged.txt", "and changed again\n");
    place.write("r/new.txt", "new and staged\n");
    place.in_repo(&["add", "new.txt"]);
    std::fs::remove_file(place.path("r/sub/d.txt")).unwrap();
    place.write("r/untracked.txt", "mine");
    place.write("r/debug.log", "ignored");
    let copy = place.copy(Options::default());
    assert_eq!(status(&copy), status(&place.path("r")));
    assert!(status(&copy).lines().count() == 4, "{}", status(&copy));
    for gone in ["untracked.txt", "debug.log", "sub/d.txt"] {
        assert!(!copy.join(gone).exists(), "{gone}");
    }
    assert_eq!(
        git_in(&copy, &["diff", "--cached"]),
        place.in_repo(&["diff", "--cached"])
    );
    assert_eq!(git_in(&copy, &["diff"]), place.in_repo(&["diff"]));
    assert_eq!(
        git_in(&copy, &["rev-parse", "HEAD"]),
        place.in_repo(&["rev-parse", "HEAD"])
    );
    assert_eq!(git_in(&copy, &["symbolic-ref", "--short", "HEAD"]), "main");
    assert_eq!(std::fs::read_link(copy.join("link")).unwrap(), Path::new("a.txt"));
    let mode = |name: &str| std::fs::metadata(copy.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("run.sh"), mode("a.txt")), (0o755, 0o644));
    git_in(&copy, &["fsck", "--strict"]);
}

#[test]
fn the_history_is_short_and_whole() {
    let place = Place::new();
    for i in 0..15 {
        place.write("r/n.txt", &i.to_string());
        place.commit(&format!("n {i}"));
    }
    place.in_repo(&["switch", "-q", "-c", "side", "HEAD~3"]);
    place.write("r/side.txt", "s");
    place.commit("side");
    place.in_repo(&["switch", "-q", "main"]);
    place.in_repo(&["merge", "-q", "--no-edit", "side"]);
    let copy = place.copy(Options::default());
    assert_eq!(git_in(&copy, &["rev-parse", "--is-shallow-repository"]), "true");
    let ours = git_in(&copy, &["log", "--format=%H"]);
    let theirs = place.in_repo(&["log", "--format=%H"]);
    assert!(ours.lines().count() < theirs.lines().count() && ours.lines().count() >= 10);
    assert!(ours.lines().all(|h| theirs.contains(h)));
    assert_eq!(status(&copy), "");
    git_in(&copy, &["fsck", "--strict"]);
    // The machine can go on from there.
    std::fs::write(copy.join("n.txt"), "more").unwrap();
    git_in(&copy, &["commit", "-qam", "in the machine"]);
    // A source that is shallow itself works as well.
    place.git(&[
        "clone",
        "-q",
        "--depth",
        "3",
        &format!("file://{}", place.path("r").display()),
        "s",
    ]);
    let snapshot = place.look_at("s", Options::default()).unwrap();
    let target = place.path("from-shallow");
    tar::Archive::new(packed(&snapshot).as_slice()).unpack(&target).unwrap();
    assert!(git_in(&target, &["log", "--format=%H"]).lines().count() >= 3);
}

#[test]
fn configuration_is_ours_and_holds_no_secret() {
    let place = Place::new();
    place.in_repo(&["remote", "add", "origin", "https://user:hunter2@example.org/a.git"]);
    place.in_repo(&["config", "user.name", "Some One"]);
    place.in_repo(&["config", "user.email", "one@example.org"]);
    place.in_repo(&["config", "http.extraHeader", "Authorization: hunter2"]);
    place.in_repo(&["config", "branch.main.remote", "origin"]);
    place.in_repo(&["config", "branch.main.merge", "refs/heads/main"]);
    place.in_repo(&["update-ref", "refs/remotes/origin/main", "HEAD"]);
    place.commit("ahead");
    let copy = place.copy(Options::default());
    let config = std::fs::read_to_string(copy.join(".git/config")).unwrap();
    assert!(!config.contains("hunter2"), "{config}");
    assert_eq!(
        git_in(&copy, &["remote", "get-url", "origin"]),
        "https://example.org/a.git"
    );
    assert_eq!(git_in(&copy, &["config", "--local", "user.name"]), "Some One");
    assert!(git_in(&copy, &["status", "-sb"]).contains("[ahead 1]"));
    assert!(!copy.join(".git/hooks").exists());
}

#[test]
fn untracked_files_come_when_asked_and_ignored_ones_never() {
    let place = Place::new();
    place.write("r/u/one.txt", "1");
    place.write("r/two words.txt", "2");
    place.write("r/x.log", "ignored");
    place.git(&["init", "-q", "r/nested"]);
    place.write("r/nested/secret", "s");
    let without = place.look(Options::default()).unwrap();
    assert_eq!(without.skipped_untracked, 2);
    assert!(!files(&without).iter().any(|f| f.starts_with("u/")));
    let with = place
        .look(Options {
            include_untracked: true,
            ..Options::default()
        })
        .unwrap();
    let listed = files(&with);
    assert!(listed.contains(&"u/one.txt".to_owned()) && listed.contains(&"two words.txt".to_owned()));
    assert!(
        !listed.iter().any(|f| f.contains("x.log") || f.contains("nested")),
        "{listed:?}"
    );
    assert_eq!(with.skipped_untracked, 0);
}

#[test]
fn a_new_branch_starts_where_it_is_told() {
    let place = Place::new();
    let first = place.in_repo(&["rev-parse", "HEAD"]);
    place.write("r/a.txt", "committed later\n");
    place.write("r/later.txt", "later\n");
    place.commit("second");
    let branch = Some("fix/it".to_owned());
    // From HEAD: as ever, on another branch.
    let copy = place.copy(Options {
        branch: branch.clone(),
        ..Options::default()
    });
    assert_eq!(git_in(&copy, &["symbolic-ref", "--short", "HEAD"]), "fix/it");
    assert_eq!(status(&copy), "");
    // From elsewhere: those files, with what is not committed here on top.
    place.write("r/sub/b c.txt", "uncommitted\n");
    // A new time stamp alone is no change.
    place.write("r/later.txt", "later\n");
    let options = Options {
        branch: branch.clone(),
        from: Some("HEAD~1".into()),
        ..Options::default()
    };
    let copy = place.copy(options.clone());
    assert_eq!(git_in(&copy, &["rev-parse", "HEAD"]), first);
    assert_eq!(std::fs::read_to_string(copy.join("a.txt")).unwrap(), "one\n");
    assert!(!copy.join("later.txt").exists());
    assert_eq!(
        std::fs::read_to_string(copy.join("sub/b c.txt")).unwrap(),
        "uncommitted\n"
    );
    assert_eq!(status(&copy), " M \"sub/b c.txt\"");
    assert_eq!(std::fs::read_link(copy.join("link")).unwrap(), Path::new("a.txt"));
    assert!(std::fs::metadata(copy.join("run.sh")).unwrap().permissions().mode() & 0o100 != 0);
    for (options, part) in [
        (
            Options {
                branch: Some("main".into()),
                ..Options::default()
            },
            "there is a branch",
        ),
        (
            Options {
                branch: Some("bad..name".into()),
                ..Options::default()
            },
            "not a name",
        ),
        (
            Options {
                branch: Some("@{-1}".into()),
                ..Options::default()
            },
            "not a name",
        ),
        (
            Options {
                from: Some("nowhere".into()),
                ..options.clone()
            },
            "no commit",
        ),
        (
            Options {
                from: Some("--all".into()),
                ..options
            },
            "no commit",
        ),
    ] {
        let error = place.look(options).unwrap_err();
        assert!(error.message.contains(part), "{error}");
    }
}

#[test]
fn detached_heads_and_linked_work_trees_work() {
    let place = Place::new();
    place.commit("second");
    place.in_repo(&["switch", "-q", "--detach", "HEAD~1"]);
    let copy = place.copy(Options::default());
    assert_eq!(
        git_in(&copy, &["rev-parse", "HEAD"]),
        place.in_repo(&["rev-parse", "HEAD"])
    );
    assert_eq!(git_in(&copy, &["rev-parse", "--abbrev-ref", "HEAD"]), "HEAD");
    place.in_repo(&["worktree", "add", "-q", "-b", "linked", "../w", "main"]);
    place.write("w/a.txt", "in the linked one\n");
    let snapshot = place.look_at("w/sub", Options::default()).unwrap();
    assert_eq!(snapshot.root, place.path("w").canonicalize().unwrap());
    assert_eq!(snapshot.branch.as_deref(), Some("linked"));
    let target = place.path("from-linked");
    tar::Archive::new(packed(&snapshot).as_slice()).unpack(&target).unwrap();
    assert_eq!(status(&target), " M a.txt");
}

#[test]
fn what_a_sparse_checkout_leaves_out_is_not_deleted() {
    let place = Place::new();
    place.in_repo(&["sparse-checkout", "set", "--no-cone", "/a.txt"]);
    assert!(!place.path("r/sub").exists());
    let copy = place.copy(Options::default());
    assert_eq!(status(&copy), "");
}

#[test]
fn what_is_no_work_tree_is_refused_with_a_hint() {
    let place = Place::new();
    place.git(&["init", "-q", "--bare", "bare.git"]);
    place.git(&["init", "-q", "empty"]);
    place.write("plain/file", "x");
    place.git(&["clone", "-q", "r", "module"]);
    place.git(&["clone", "-q", "r", "outer"]);
    git_in(
        &place.path("outer"),
        &[
            "submodule",
            "--quiet",
            "add",
            &place.path("module").display().to_string(),
            "lib/m",
        ],
    );
    for (path, part) in [
        ("bare.git", "bare repository"),
        ("empty", "no commit yet"),
        ("plain", "not in a git work tree"),
        ("r/.git", "inside a repository's .git"),
        ("r/a.txt", "not a directory"),
        ("outer", "submodules, which are not copied: lib/m"),
    ] {
        let error = place.look_at(path, Options::default()).unwrap_err();
        assert!(error.message.contains(part), "{path}: {error}");
        assert!(error.hint.is_some(), "{path}");
    }
    assert!(
        place
            .look_at("absent", Options::default())
            .unwrap_err()
            .message
            .contains("no such file")
    );
}

#[test]
fn a_workspace_has_a_place_below_the_root() {
    assert_eq!(guest_path(None, None).unwrap(), "/root/repo");
    assert_eq!(guest_path(None, Some("root")).unwrap(), "/root/repo");
    assert_eq!(guest_path(None, Some("dev")).unwrap(), "~dev/repo");
    assert_eq!(guest_path(Some("/srv/x/"), Some("dev")).unwrap(), "/srv/x");
    for bad in ["/", "relative", "/a/../..", "", "//"] {
        assert_eq!(guest_path(Some(bad), None).unwrap_err().kind, Kind::Usage, "{bad}");
    }
}
