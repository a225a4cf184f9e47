//! Repositories that want something else than to be worked on.

use super::*;

#[test]
fn links_in_the_way_of_tracked_files_are_not_followed() {
    let place = Place::new();
    place.write("outside/b c.txt", "secret of the host");
    std::fs::remove_dir_all(place.path("r/sub")).unwrap();
    symlink(place.path("outside"), place.path("r/sub")).unwrap();
    std::fs::remove_file(place.path("r/a.txt")).unwrap();
    symlink("/etc/passwd", place.path("r/a.txt")).unwrap();
    let snapshot = place.look(Options::default()).unwrap();
    assert!(
        !files(&snapshot).contains(&"sub/b c.txt".to_owned()),
        "as git has it: deleted"
    );
    let bytes = packed(&snapshot);
    let mut archive = tar::Archive::new(bytes.as_slice());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap() == Path::new("a.txt") {
            assert_eq!(
                entry.link_name().unwrap().unwrap(),
                Path::new("/etc/passwd"),
                "a link stays a link"
            );
        }
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        assert!(!content.windows(6).any(|w| w == b"secret"));
    }
}

#[test]
fn a_work_tree_elsewhere_is_refused() {
    let place = Place::new();
    place.write(".ssh/id_rsa", "secret of the host");
    for elsewhere in ["..", "../.."] {
        // Seen from .git: the directory of the repository, or one above it.
        place.in_repo(&["config", "core.worktree", elsewhere]);
        let result = place.look(Options::default());
        if elsewhere == ".." {
            assert!(result.is_ok(), "its own work tree may be named");
        } else {
            assert!(result.unwrap_err().message.contains("claims"));
        }
    }
}

/// A repository and a program that leaves a mark when it is run.
struct Trap {
    place: Place,
    evil: String,
    mark: PathBuf,
}

impl Trap {
    /// Two commits, and attributes that name drivers. The files have changed since the index was written, to others of the
    /// same length.
    fn new() -> Self {
        let place = Place::new();
        place.write("r/more.txt", "more\n");
        place.write_bytes(
            "r/.gitattributes",
            b"* filter=evil diff=evil merge=evil\n*.txt filter=\xff\n",
        );
        place.commit("second");
        let (mark, evil) = (place.path("mark"), place.path("evil.sh"));
        let script = format!("#!/bin/sh\necho \"$0 $*\" >> '{}'\nexit 1\n", mark.display());
        place.write("evil.sh", &script);
        executable(&evil);
        let trap = Self {
            evil: evil.display().to_string(),
            place,
            mark,
        };
        trap.place.write("r/untracked.txt", "x");
        trap.place.write("r/a.txt", "onE\n");
        trap.place.write("r/more.txt", "morE\n");
        trap
    }

    /// Adds to a file of the repository's administration. `EVIL` is the program.
    fn add(&self, below: &str, text: &[u8]) {
        let path = self.place.path("r/.git").join(below);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut all = std::fs::read(&path).unwrap_or_default();
        for (at, piece) in text.split(|&b| b == b'%').enumerate() {
            if at > 0 {
                all.extend_from_slice(self.evil.as_bytes());
            }
            all.extend_from_slice(piece);
        }
        std::fs::write(path, all).unwrap();
    }

    /// Looks and packs in each way there is, and finds no mark.
    #[track_caller]
    fn holds(&self, what: &str, user: &User) {
        let from = Options {
            branch: Some("b".into()),
            from: Some("HEAD~1".into()),
            ..Options::default()
        };
        let untracked = Options {
            include_untracked: true,
            ..Options::default()
        };
        for options in [Options::default(), untracked, from] {
            let snapshot = inspect(&self.place.path("r"), options, user).unwrap_or_else(|e| panic!("{what}: {e:?}"));
            let history = history::build(&snapshot).unwrap();
            // A lacking object is an error; that no program was run to get it is what counts.
            let _ = write(&mut Packer::new(Vec::new()), &snapshot, &history, &[]);
            let ran = std::fs::read_to_string(&self.mark).unwrap_or_default();
            assert!(ran.is_empty(), "{what} ran: {ran}");
        }
    }

    /// Plain git, left to the repository, runs the program: the trap is one.
    #[track_caller]
    fn bites(&self, what: &str, arguments: &[&str], home: &str) {
        let _ = Command::new("git")
            .arg("-C")
            .arg(self.place.path("r"))
            .args(arguments)
            .env("HOME", self.place.path(home))
            .env("XDG_CONFIG_HOME", "/nonexistent")
            .output();
        assert!(self.mark.exists(), "{what}: the test can tell");
        std::fs::remove_file(&self.mark).unwrap();
    }
}

fn executable(path: &Path) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// The index knows the files by a time and a size that fit, so that git looks closer, and takes the time of change for nothing.
const LAX: &[u8] = b"[core]\n\ttrustctime = false\n\tcheckStat = minimal\n";

#[test]
fn no_setting_of_a_repository_runs_anything() {
    let status: &[&str] = &["status"];
    let show: &[&str] = &["diff", "HEAD"];
    let fetch: &[&str] = &["cat-file", "-p", "HEAD:sub/b c.txt"];
    type Files<'a> = &'a [(&'a str, &'a [u8])];
    let traps: &[(&str, Files<'_>, &[&str])] = &[
        (
            "a filter whose name is no text",
            &[("config", LAX), ("config", b"[filter \"\xff\"]\n\tclean = %\n\trequired = true\n")],
            show,
        ),
        ("a clean filter", &[("config", b"[filter \"evil\"]\n\tclean = %\n")], show),
        (
            "a filter that is a process",
            &[("config", b"[filter \"evil\"]\n\tprocess = %\n\trequired = true\n")],
            show,
        ),
        (
            "a filter through its attributes beside the work tree",
            &[
                ("info/attributes", b"a.txt filter=aside\n"),
                ("config", b"[filter \"aside\"]\n\tclean = %\n"),
            ],
            show,
        ),
        (
            "a filter through an included file",
            &[
                ("config", b"[include]\n\tpath = more\n"),
                ("more", b"[filter \"evil\"]\n\tclean = %\n[core]\n\tfsmonitor = %\n"),
            ],
            show,
        ),
        (
            "a filter through a condition",
            &[
                ("config", b"[includeIf \"gitdir:/\"]\n\tpath = more\n"),
                ("more", b"[filter \"evil\"]\n\tclean = %\n[core]\n\tfsmonitor = %\n"),
            ],
            show,
        ),
        (
            "a filter through the settings of one work tree",
            &[
                ("config", b"[core]\n\trepositoryformatversion = 1\n[extensions]\n\tworktreeConfig = true\n"),
                ("config.worktree", b"[filter \"evil\"]\n\tclean = %\n[core]\n\tfsmonitor = %\n"),
            ],
            show,
        ),
        ("a monitor", &[("config", b"[core]\n\tfsmonitor = %\n")], status),
        (
            "a monitor with its hook",
            &[("config", b"[core]\n\tfsmonitor = .git/hooks/fsmonitor-watchman\n\tfsmonitorHookVersion = 1\n")],
            status,
        ),
        ("hooks", &[("config", b"[core]\n\tuntrackedCache = true\n")], &["update-index", "--refresh", "--force-write-index"]),
        ("a program for differences", &[("config", b"[diff]\n\texternal = %\n")], show),
        (
            "a driver for differences",
            &[("config", b"[diff \"evil\"]\n\ttextconv = %\n\tcommand = %\n")],
            show,
        ),
        ("a pager and aliases", &[("config", b"[alias]\n\tx = !%\n[pager]\n\tls-files = %\n[core]\n\tpager = %\n")], &["x"]),
        (
            "a partial clone over ext",
            &[(
                "config",
                b"[core]\n\trepositoryformatversion = 1\n[extensions]\n\tpartialClone = evil\n\
                  [remote \"evil\"]\n\turl = ext::%\n\tpromisor = true\n[protocol]\n\tallow = always\n[protocol \"ext\"]\n\tallow = always\n",
            )],
            fetch,
        ),
        (
            "a partial clone with an upload program",
            &[(
                "config",
                b"[core]\n\trepositoryformatversion = 1\n[extensions]\n\tpartialClone = evil\n\
                  [remote \"evil\"]\n\turl = file:///\n\tuploadpack = %\n\tpromisor = true\n[protocol]\n\tallow = always\n",
            )],
            fetch,
        ),
        (
            "a partial clone over ssh",
            &[(
                "config",
                b"[core]\n\trepositoryformatversion = 1\n\tsshCommand = %\n\tgitProxy = %\n\taskPass = %\n[extensions]\n\tpartialClone = evil\n\
                  [remote \"evil\"]\n\turl = ssh://127.0.0.1:1/x\n\tpromisor = true\n[credential]\n\thelper = !%\n",
            )],
            fetch,
        ),
        (
            "what runs later elsewhere",
            &[(
                "config",
                b"[uploadpack]\n\tpackObjectsHook = %\n[gpg]\n\tprogram = %\n[core]\n\teditor = %\n\talternateRefsCommand = %\n\tfsmonitor = %\n\
                  [sequence]\n\teditor = %\n[log]\n\tshowSignature = true\n[submodule]\n\trecurse = true\n[trailer \"x\"]\n\tcommand = %\n",
            )],
            status,
        ),
    ];
    for (what, files, bite) in traps {
        let trap = Trap::new();
        for (file, text) in *files {
            trap.add(file, text);
        }
        for hook in [
            "post-index-change",
            "pre-auto-gc",
            "reference-transaction",
            "fsmonitor-watchman",
        ] {
            trap.add(&format!("hooks/{hook}"), b"#!/bin/sh\nexec %\n");
            executable(&trap.place.path("r/.git/hooks").join(hook));
        }
        if *bite == fetch {
            std::fs::remove_file(lacking_object(&trap.place, "HEAD:sub/b c.txt")).unwrap();
        }
        trap.holds(what, &trap.place.user());
        trap.bites(what, bite, "none");
    }
}

/// The user's own settings are of use to the user's repositories. A hostile one could lead their programs to something else.
#[test]
fn no_setting_of_the_user_is_in_force() {
    let trap = Trap::new();
    let text = format!(
        "[filter \"evil\"]\n\tclean = {evil}\n[core]\n\tfsmonitor = {evil}\n\thooksPath = {hooks}\n",
        evil = trap.evil,
        hooks = trap.place.path("hooks").display()
    );
    trap.place.write("home/.gitconfig", &text);
    trap.place.write(
        "hooks/reference-transaction",
        &format!("#!/bin/sh\nexec {}\n", trap.evil),
    );
    executable(&trap.place.path("hooks/reference-transaction"));
    trap.holds("the user's settings", &trap.place.user());
    trap.bites("the user's settings", &["status"], "home");
}

#[test]
fn no_variable_of_git_is_in_force() {
    let trap = Trap::new();
    let bin = trap.place.path("r/bin");
    for program in ["git", "ssh", "sh", "git-ls-files", "git-remote-ext"] {
        trap.place
            .write(&format!("r/bin/{program}"), &format!("#!/bin/sh\nexec {}\n", trap.evil));
        executable(&bin.join(program));
        std::fs::copy(bin.join(program), trap.place.path("r").join(program)).unwrap();
    }
    trap.place.write(
        "template/hooks/reference-transaction",
        &format!("#!/bin/sh\nexec {}\n", trap.evil),
    );
    executable(&trap.place.path("template/hooks/reference-transaction"));
    let mut path: std::ffi::OsString = ".::bin:r/bin:".into();
    path.push(std::env::var_os("PATH").unwrap());
    let evil = || trap.evil.clone().into();
    let elsewhere = || trap.place.path("elsewhere").into();
    let user = User::with([
        ("HOME", trap.place.path("home").into()),
        ("PATH", path),
        ("GIT_EXEC_PATH", bin.into()),
        ("GIT_EXTERNAL_DIFF", evil()),
        ("GIT_SSH", evil()),
        ("GIT_SSH_COMMAND", evil()),
        ("GIT_PROXY_COMMAND", evil()),
        ("GIT_ASKPASS", evil()),
        ("GIT_EDITOR", evil()),
        ("GIT_PAGER", evil()),
        ("GIT_TRACE", trap.mark.clone().into()),
        ("GIT_TRACE2", trap.mark.clone().into()),
        ("GIT_TEMPLATE_DIR", trap.place.path("template").into()),
        ("GIT_CONFIG_COUNT", "1".into()),
        ("GIT_CONFIG_KEY_0", "core.fsmonitor".into()),
        ("GIT_CONFIG_VALUE_0", evil()),
        (
            "GIT_CONFIG_PARAMETERS",
            format!("'core.fsmonitor'='{}'", trap.evil).into(),
        ),
        ("GIT_DIR", elsewhere()),
        ("GIT_COMMON_DIR", elsewhere()),
        ("GIT_WORK_TREE", elsewhere()),
        ("GIT_INDEX_FILE", elsewhere()),
        ("GIT_OBJECT_DIRECTORY", elsewhere()),
        ("GIT_ALTERNATE_OBJECT_DIRECTORIES", elsewhere()),
        ("GIT_NAMESPACE", "x".into()),
        ("GIT_LITERAL_PATHSPECS", "1".into()),
    ]);
    trap.holds("variables", &user);
}

/// The file of an object that is not packed.
fn lacking_object(place: &Place, name: &str) -> PathBuf {
    // The repository may be hostile by now; this git has no configuration of it.
    let snapshot = place.look(Options::default()).unwrap();
    let hash = snapshot.git.line(&["rev-parse", name]).unwrap().unwrap();
    place.path("r/.git/objects").join(&hash[..2]).join(&hash[2..])
}

/// A repository next to the hostile one, and a way to get at it.
fn foreign() -> Place {
    let place = Place::new();
    place.git(&["init", "-q", "-b", "main", "private"]);
    place.write("private/secret.txt", "secret of the host\n");
    git_in(&place.path("private"), &["add", "-A"]);
    git_in(&place.path("private"), &["commit", "-q", "-m", "secret"]);
    git_in(
        &place.path("private"),
        &["worktree", "add", "-q", "-b", "side", "../private-tree"],
    );
    git_in(&place.path("private"), &["pack-refs", "--all"]);
    git_in(&place.path("private"), &["repack", "-q", "-a", "-d"]);
    place
}

/// Puts a link in place of something of the repository.
fn relink(place: &Place, name: &str) {
    let path = place.path("r/.git").join(name);
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_dir_all(&path);
    symlink(place.path("private/.git").join(name), path).unwrap();
}

#[test]
fn a_repository_is_no_other_one() {
    type Lead = fn(&Place);
    fn marker(place: &Place, text: &str) {
        std::fs::remove_dir_all(place.path("r/.git")).unwrap();
        place.write("r/.git", text);
    }
    let leads: &[(&str, Lead)] = &[
        ("a file", |p| {
            marker(p, &format!("gitdir: {}\n", p.path("private/.git").display()))
        }),
        ("a relative file", |p| marker(p, "gitdir: ../private/.git\n")),
        ("another's work tree", |p| {
            marker(p, "gitdir: ../private/.git/worktrees/private-tree\n")
        }),
        ("a work tree of its own making", |p| {
            marker(p, "gitdir: ../made/worktrees/r\n");
            p.write("made/worktrees/r/HEAD", "ref: refs/heads/main\n");
            p.write("made/worktrees/r/gitdir", &format!("{}\n", p.path("r/.git").display()));
            p.write(
                "made/worktrees/r/commondir",
                &format!("{}\n", p.path("private/.git").display()),
            );
        }),
        ("a linked work tree through links", |p| {
            marker(p, "gitdir: ../made/worktrees/r\n");
            p.write("made/worktrees/r/HEAD", "ref: refs/heads/main\n");
            p.write("made/worktrees/r/gitdir", &format!("{}\n", p.path("r/.git").display()));
            p.write("made/worktrees/r/commondir", "../..\n");
            for name in ["objects", "refs", "packed-refs", "config"] {
                symlink(p.path("private/.git").join(name), p.path("made").join(name)).unwrap();
            }
        }),
        ("nonsense", |p| marker(p, "nonsense")),
        ("a file that is too long", |p| {
            marker(p, &format!("gitdir: {}", "x/".repeat(8000)))
        }),
        ("a link", |p| {
            std::fs::remove_dir_all(p.path("r/.git")).unwrap();
            symlink(p.path("private/.git"), p.path("r/.git")).unwrap();
        }),
        ("commondir", |p| {
            p.write("r/.git/commondir", &p.path("private/.git").display().to_string())
        }),
        ("objects", |p| relink(p, "objects")),
        ("packs", |p| relink(p, "objects/pack")),
        ("references", |p| relink(p, "refs")),
        ("packed references", |p| relink(p, "packed-refs")),
        ("HEAD", |p| relink(p, "HEAD")),
        ("the index", |p| relink(p, "index")),
        ("settings", |p| relink(p, "config")),
        ("the log", |p| relink(p, "logs")),
        ("the log of HEAD", |p| relink(p, "logs/HEAD")),
        ("rules", |p| relink(p, "info")),
        ("a reference", |p| {
            let main = p.path("r/.git/refs/heads/main");
            std::fs::remove_file(&main).unwrap();
            symlink(p.path("private/.git/refs/heads/main"), main).unwrap();
        }),
        ("a pack", |p| {
            for entry in std::fs::read_dir(p.path("private/.git/objects/pack")).unwrap() {
                let entry = entry.unwrap();
                symlink(entry.path(), p.path("r/.git/objects/pack").join(entry.file_name())).unwrap();
            }
        }),
        ("alternates", |p| {
            p.write(
                "r/.git/objects/info/alternates",
                &p.path("private/.git/objects").display().to_string(),
            );
        }),
        ("a pipe", |p| {
            let _ = std::fs::remove_file(p.path("r/.git/HEAD"));
            let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
            rustix::fs::mknodat(rustix::fs::CWD, p.path("r/.git/HEAD"), kind, mode, 0).unwrap();
        }),
    ];
    for (what, lead) in leads {
        let place = foreign();
        lead(&place);
        let error = place.look(Options::default()).expect_err(what);
        assert_eq!(error.kind, Kind::Failed, "{what}: {error}");
        assert!(
            ["another repository", "other repositories", "too long"]
                .iter()
                .any(|part| error.message.contains(part)),
            "{what}: {error}"
        );
        assert!(
            error.hint.is_some() || error.message.contains("too long"),
            "{what}: {error}"
        );
    }
}

/// A repository can name what another one holds, if it is there. Only its own objects are.
#[test]
fn a_commit_of_another_repository_is_not_there() {
    let place = foreign();
    let secret = git_in(&place.path("private"), &["rev-parse", "HEAD"]);
    place.write("r/.git/refs/heads/main", &format!("{secret}\n"));
    let error = place.look(Options::default()).unwrap_err();
    assert!(error.message.contains("no commit"), "{error}");
}

#[test]
fn a_submodule_and_a_separate_git_directory_are_refused_with_a_hint() {
    let place = Place::new();
    place.git(&["clone", "-q", "r", "outer"]);
    git_in(
        &place.path("outer"),
        &[
            "submodule",
            "--quiet",
            "add",
            &place.path("r").display().to_string(),
            "lib/m",
        ],
    );
    place.git(&["clone", "-q", "--separate-git-dir", "aside", "r", "tree"]);
    place.git(&["clone", "-q", "--shared", "r", "shared"]);
    for below in ["outer/lib/m", "tree", "shared"] {
        let error = place.look_at(below, Options::default()).unwrap_err();
        assert!(error.message.contains("other"), "{below}: {error}");
        assert!(error.hint.is_some(), "{below}");
    }
}

#[test]
fn a_linked_work_tree_that_was_moved_is_told_how_to_be_mended() {
    let place = Place::new();
    place.in_repo(&["worktree", "add", "-q", "-b", "linked", "../w"]);
    std::fs::rename(place.path("w"), place.path("moved")).unwrap();
    let error = place.look_at("moved", Options::default()).unwrap_err();
    assert!(
        error.hint.as_deref().unwrap().contains("git worktree repair"),
        "{error:?}"
    );
    git_in(&place.path("moved"), &["worktree", "repair"]);
    place.look_at("moved", Options::default()).unwrap();
}

#[test]
fn looking_changes_nothing_and_leaves_nothing() {
    let place = Place::new();
    let before = place.all("r");
    place.write("tmp/keep", "");
    let user = place.user();
    let snapshot = inspect(&place.path("r"), Options::default(), &user).unwrap();
    let temporary = snapshot.git.top();
    packed(&snapshot);
    assert!(temporary.exists());
    drop(snapshot);
    assert!(!temporary.exists());
    assert_eq!(place.all("r"), before);
}

/// Files of another user may change while they are read.
#[test]
fn a_repository_of_another_user_is_refused_unless_it_is_safe() {
    if !rustix::process::geteuid().is_root() {
        // Only root can give files away.
        return;
    }
    let place = Place::new();
    std::os::unix::fs::chown(place.path("r/.git"), Some(12345), None).unwrap();
    let error = place.look(Options::default()).unwrap_err();
    assert!(error.message.contains("another user"), "{error}");
    assert!(error.hint.unwrap().contains("safe.directory"));
    let root = place.path("r").canonicalize().unwrap();
    place.write(
        "home/.gitconfig",
        &format!("[safe]\n\tdirectory = {}\n", root.display()),
    );
    place.look(Options::default()).unwrap();
    // The repository can't say so itself.
    std::fs::remove_file(place.path("home/.gitconfig")).unwrap();
    place.write("r/.git/config", "[safe]\n\tdirectory = *\n");
    place.look(Options::default()).unwrap_err();
}
