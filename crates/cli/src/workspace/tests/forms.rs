//! Forms that repositories, indexes and settings come in.

use super::*;

/// Packs one work tree and unpacks it as another.
fn copied(place: &Place, below: &str, options: Options) -> PathBuf {
    let snapshot = place.look_at(below, options).unwrap();
    let target = place.path(&format!("copy-of-{}", below.replace('/', "-")));
    let _ = std::fs::remove_dir_all(&target);
    tar::Archive::new(packed(&snapshot).as_slice()).unpack(&target).unwrap();
    target
}

#[test]
fn formats_of_repositories_are_understood() {
    let place = Place::new();
    let formats: &[(&str, &[&str])] = &[
        ("sha256", &["--object-format=sha256"]),
        ("reftable", &["--ref-format=reftable"]),
        ("odd: \"name\\", &[]),
    ];
    for (name, options) in formats {
        let mut init = vec!["init", "-q", "-b", "main"];
        init.extend(*options);
        init.push(name);
        place.git(&init);
        place.write(&format!("{name}/a.txt"), "one\n");
        let git = |arguments: &[&str]| git_in(&place.path(name), arguments);
        git(&["add", "-A"]);
        git(&["commit", "-q", "-m", "first"]);
        place.write(&format!("{name}/a.txt"), "two\n");
        git(&["commit", "-q", "-a", "-m", "second"]);
        git(&["worktree", "add", "-q", "-b", "side", "../side", "HEAD~1"]);
        place.write(&format!("{name}/b.txt"), "staged\n");
        git(&["add", "-A"]);
        let copy = copied(&place, name, Options::default());
        assert_eq!(
            git_in(&copy, &["rev-parse", "HEAD"]),
            git(&["rev-parse", "HEAD"]),
            "{name}"
        );
        assert_eq!(status(&copy), "A  b.txt", "{name}");
        git_in(&copy, &["fsck", "--strict"]);
        let linked = copied(&place, "side", Options::default());
        assert_eq!(git_in(&linked, &["symbolic-ref", "HEAD"]), "refs/heads/side", "{name}");
        assert_eq!(
            std::fs::read_to_string(linked.join("a.txt")).unwrap(),
            "one\n",
            "{name}"
        );
        git(&["worktree", "remove", "--force", "../side"]);
    }
}

#[test]
fn forms_of_the_index_are_understood() {
    let forms: &[&[&str]] = &[
        &["update-index", "--split-index"],
        &["update-index", "--index-version", "4"],
        &["update-index", "--untracked-cache"],
        &["sparse-checkout", "set", "--cone", "--sparse-index", "dir"],
    ];
    for form in forms {
        let place = Place::new();
        place.write("r/dir/in.txt", "in\n");
        place.write("r/other/out.txt", "out\n");
        place.commit("second");
        place.in_repo(form);
        place.write("r/dir/in.txt", "changed\n");
        let copy = place.copy(Options::default());
        assert_eq!(status(&copy), " M dir/in.txt", "{form:?}");
    }
}

#[test]
fn the_user_is_known_in_the_machine() {
    let place = Place::new();
    place.write("home/.gitconfig", &format!(
        "[user]\n\tname = Some One\n\temail = private@example.org\n[core]\n\tautocrlf = input\n\
         [includeIf \"gitdir:{}/\"]\n\tpath = work\n[includeIf \"hasconfig:remote.*.url:https://work.example.org/**\"]\n\tpath = far\n",
        place.path("r").canonicalize().unwrap().display()
    ));
    place.write("home/work", "[user]\n\temail = work@example.org\n");
    place.write("home/far", "[user]\n\temail = far@example.org\n");
    let said = |place: &Place, key: &str| {
        let copy = place.copy(Options::default());
        git_in(&copy, &["config", "--local", key])
    };
    assert_eq!(said(&place, "user.name"), "Some One");
    assert_eq!(said(&place, "user.email"), "work@example.org");
    assert_eq!(said(&place, "core.autocrlf"), "input");
    place.in_repo(&["remote", "add", "origin", "https://work.example.org/x"]);
    assert_eq!(said(&place, "user.email"), "far@example.org");
    // The repository's own win, but for what it includes.
    place.write("r/.git/more", "[user]\n\temail = included@example.org\n");
    place.in_repo(&["config", "user.name", "Örk \"quoted\" # x"]);
    place.in_repo(&["config", "include.path", "more"]);
    assert_eq!(said(&place, "user.name"), "Örk \"quoted\" # x");
    assert_eq!(said(&place, "user.email"), "far@example.org");
}

#[test]
fn what_the_user_ignores_stays_here() {
    let place = Place::new();
    for name in ["mine.secret", "theirs.tmp", "aside.x", "plain.txt"] {
        place.write(&format!("r/{name}"), "x");
    }
    place.write("home/.config/git/ignore", "*.secret\n");
    place.write("home/rules", "*.tmp\n");
    place.write("r/.git/info/exclude", "*.x\n");
    place.in_repo(&["config", "core.excludesFile", "~/rules"]);
    let options = Options {
        include_untracked: true,
        ..Options::default()
    };
    let listed = files(&place.look(options.clone()).unwrap());
    assert!(listed.contains(&"plain.txt".to_owned()), "{listed:?}");
    for name in ["mine.secret", "theirs.tmp", "aside.x"] {
        assert!(!listed.contains(&name.to_owned()), "{name}: {listed:?}");
    }
    place.write("home/.gitconfig", "[core]\n\texcludesFile = ~/rules\n");
    let listed = files(&place.look(options).unwrap());
    assert!(listed.contains(&"mine.secret".to_owned()), "{listed:?}");
}

fn from(commit: &str) -> Options {
    Options {
        branch: Some("new".into()),
        from: Some(commit.into()),
        ..Options::default()
    }
}

#[test]
fn commits_are_named_as_git_names_them() {
    let place = Place::new();
    let first = place.in_repo(&["rev-parse", "HEAD"]);
    place.in_repo(&["tag", "-a", "-m", "x", "v1"]);
    place.in_repo(&["switch", "-q", "-c", "other"]);
    place.in_repo(&["switch", "-q", "main"]);
    place.write("r/b.txt", "b");
    place.commit("second");
    place.in_repo(&["remote", "add", "up", "https://example.org/x"]);
    place.in_repo(&["update-ref", "refs/remotes/up/main", &first]);
    place.in_repo(&["config", "branch.main.remote", "up"]);
    place.in_repo(&["config", "branch.main.merge", "refs/heads/main"]);
    for name in [
        "v1",
        "other",
        "@{upstream}",
        "@{-1}",
        "main@{1}",
        "HEAD~1",
        "up/main",
        &first[..8],
        ":/first",
    ] {
        let snapshot = place.look(from(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(snapshot.base, first, "{name}");
    }
}

#[test]
fn conversions_are_no_change() {
    let place = Place::new();
    place.write(
        "r/.gitattributes",
        "*.bat text eol=crlf\n*.raw -text\n*.big filter=big\n",
    );
    place.write("r/one.bat", "one\r\ntwo\r\n");
    place.write("r/two.bat", "one\r\n");
    place.write("r/x.raw", "a\n");
    place.write("r/touched.big", "pointer\n");
    place.write("r/known.big", "pointer\n");
    place.commit("second");
    place.write("r/two.bat", "changed\r\n");
    place.write("r/x.raw", "a\r\n");
    place.write("r/touched.big", "content\n");
    let changed = |place: &Place| {
        let snapshot = place.look(from("HEAD~1")).unwrap();
        files(&snapshot)
    };
    let listed = changed(&place);
    for (name, there) in [
        ("one.bat", false),
        ("two.bat", true),
        ("x.raw", true),
        ("touched.big", true),
        ("known.big", false),
    ] {
        assert_eq!(listed.contains(&name.to_owned()), there, "{name}: {listed:?}");
    }
}

#[test]
fn what_the_index_left_is_not_carried_over() {
    let place = Place::new();
    place.write("r/gone.txt", "x");
    place.commit("second");
    place.in_repo(&["rm", "-q", "--cached", "a.txt"]);
    place.in_repo(&["rm", "-q", "gone.txt"]);
    std::fs::set_permissions(place.path("r/run.sh"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let snapshot = place.look(from("HEAD~1")).unwrap();
    let listed = files(&snapshot);
    assert!(
        !listed.contains(&"a.txt".to_owned()) && !listed.contains(&"gone.txt".to_owned()),
        "{listed:?}"
    );
    let run = snapshot.entries.iter().find(|e| e.path == Path::new("run.sh")).unwrap();
    assert_eq!(run.content, Content::Disk, "another mode is a change");
}
