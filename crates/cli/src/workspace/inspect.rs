//! Looking at a work tree: what would be copied, decided before anything is made.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use crate::error::{Error, Kind, Result};
use crate::files::beneath::Root;
use crate::workspace::changes::changed;
use crate::workspace::git::{Git, User};
use crate::workspace::mirror::Mirror;
use crate::workspace::settings::key;
use crate::workspace::{Content, Entry, IndexEntry, Options, Snapshot, Upstream, url};

const LINK_MODE: &str = "120000";
const MODULE_MODE: &str = "160000";

/// Looks at the work tree that `path` is in. Only reads, and only on this host.
pub(crate) fn inspect(path: &Path, options: Options, user: &User) -> Result<Snapshot> {
    let mirror = Mirror::of(&directory(path)?, user)?;
    let (git, root) = (&mirror.git, &mirror.place.root);
    let Some(head) = git.line(&["rev-parse", "--verify", "--quiet", "HEAD^{commit}"])? else {
        return Err(
            Error::failed(format!("repository {} has no commit yet", root.display()))
                .hint("commit something first: `git add -A && git commit`"),
        );
    };
    let current = match &options.branch {
        // Its name may be anything; it is not needed.
        Some(_) => git.line(&["symbolic-ref", "--quiet", "--short", "HEAD"]).ok().flatten(),
        None => git.line(&["symbolic-ref", "--quiet", "--short", "HEAD"])?,
    };
    if let Some(branch) = &current {
        mirror.follow(branch)?;
    }
    let base = match &options.from {
        Some(from) => resolve(git, from)?,
        None => head.clone(),
    };
    if let Some(branch) = &options.branch {
        check_branch(git, branch)?;
    }
    let index = parse_index(&git.output(&["ls-files", "--stage", "-t", "-z"], b"")?)?;
    refuse_submodules(root, &index)?;
    let untracked = untracked(&mirror)?;
    let mut open = Root::open(root).map_err(|e| Error::io("open", root, e))?;
    let (index, mut entries) = if base == head {
        let entries = on_disk(&mut open, index.iter().map(|e| e.path.as_path()));
        (index, entries)
    } else {
        carried_over(&mirror, &mut open, (&head, &base), &index)?
    };
    let mut skipped_untracked = untracked.len();
    if options.include_untracked {
        skipped_untracked = 0;
        entries.extend(on_disk(&mut open, untracked.iter().map(PathBuf::as_path)));
    }
    let upstream = match (&options.branch, &current) {
        (None, Some(branch)) => upstream(&mirror, branch)?,
        _ => None,
    };
    let origin = mirror.settings.first(b"remote.origin.url");
    Ok(Snapshot {
        object_format: mirror.object_format.clone(),
        origin: origin
            .and_then(|url| std::str::from_utf8(url).ok())
            .and_then(url::without_secrets),
        settings: ["user.name", "user.email", "core.autocrlf", "core.eol"]
            .into_iter()
            .filter_map(|key| Some((key, mirror.setting(key.as_bytes())?.to_vec())))
            .collect(),
        branch: options.branch.or(current),
        upstream,
        head,
        base,
        index,
        entries: entries.into_values().collect(),
        skipped_untracked,
        includes_untracked: options.include_untracked,
        guest_path: options.guest_path,
        user: user.clone(),
        owner: (0, 0),
        root: mirror.place.root,
        git: mirror.git,
    })
}

fn directory(path: &Path) -> Result<PathBuf> {
    let found = path.canonicalize().map_err(|e| Error::io("find workspace", path, e))?;
    if found.is_dir() {
        return Ok(found);
    }
    Err(
        Error::failed(format!("workspace {} is not a directory", path.display()))
            .hint("name the directory of a git work tree"),
    )
}

fn resolve(git: &Git, from: &str) -> Result<String> {
    let parse = |name: &str| git.line(&["rev-parse", "--verify", "--quiet", "--end-of-options", name]);
    // In two steps: what is behind `:/` is a text to look for, to its end.
    let commit = match parse(from)? {
        Some(object) => parse(&format!("{object}^{{commit}}"))?,
        None => None,
    };
    commit.ok_or_else(|| {
        Error::new(Kind::NotFound, format!("--from: there is no commit `{from}`"))
            .hint("`git log --all --oneline` shows them")
    })
}

fn check_branch(git: &Git, branch: &str) -> Result<()> {
    // `--branch` also expands `@{-1}` and the like; a name that is something else is no name.
    if git.line(&["check-ref-format", "--branch", branch])?.as_deref() != Some(branch) {
        return Err(Error::usage(format!("--branch: `{branch}` is not a name for a branch"))
            .hint("see git-check-ref-format(1)"));
    }
    let full = format!("refs/heads/{branch}");
    if git
        .line(&["rev-parse", "--verify", "--quiet", "--end-of-options", &full])?
        .is_some()
    {
        return Err(Error::new(
            Kind::Conflict,
            format!("--branch: there is a branch `{branch}` already"),
        )
        .hint("choose another name, or check it out here and leave --branch away"));
    }
    Ok(())
}

/// `H 100644 <hash> 0\t<path>`, ended by zeros.
fn parse_index(bytes: &[u8]) -> Result<Vec<IndexEntry>> {
    let broken = || Error::failed("git ls-files said something that was not understood");
    bytes
        .split(|&b| b == 0)
        .filter(|line| !line.is_empty())
        .map(|line| {
            let tab = line.iter().position(|&b| b == b'\t').ok_or_else(broken)?;
            let words: Vec<&str> = std::str::from_utf8(&line[..tab])
                .map_err(|_| broken())?
                .split(' ')
                .collect();
            let [tag, mode, hash, stage] = words.as_slice() else {
                return Err(broken());
            };
            Ok(IndexEntry {
                mode: (*mode).to_owned(),
                hash: (*hash).to_owned(),
                stage: (*stage).to_owned(),
                // Upper or lower case: the latter when it is also assumed to be unchanged.
                skip_worktree: tag.eq_ignore_ascii_case("s"),
                path: safe_path(&line[tab + 1..])?,
            })
        })
        .collect()
}

/// A path of git, which never leads out of the tree nor into its administration; one that does is an attack.
fn safe_path(bytes: &[u8]) -> Result<PathBuf> {
    let path = PathBuf::from(OsStr::from_bytes(bytes));
    let sound = path.components().all(|c| match c {
        std::path::Component::Normal(name) => !name.eq_ignore_ascii_case(".git"),
        _ => false,
    });
    if sound && !bytes.is_empty() {
        return Ok(path);
    }
    Err(Error::failed(format!(
        "the repository holds the unacceptable path `{}`",
        path.display()
    )))
}

fn refuse_submodules(root: &Path, index: &[IndexEntry]) -> Result<()> {
    let modules: Vec<String> = index
        .iter()
        .filter(|e| e.mode == MODULE_MODE)
        .map(|e| e.path.display().to_string())
        .collect();
    if modules.is_empty() {
        return Ok(());
    }
    let more = if modules.len() > 3 {
        format!(" and {} more", modules.len() - 3)
    } else {
        String::new()
    };
    let shown = modules[..modules.len().min(3)].join(", ");
    Err(Error::failed(format!(
        "{} has submodules, which are not copied: {shown}{more}",
        root.display()
    ))
    .hint("run without a workspace and clone inside the machine, or copy the tree with `banger vm cp`"))
}

fn untracked(mirror: &Mirror) -> Result<Vec<PathBuf>> {
    let mut arguments: Vec<std::ffi::OsString> = ["ls-files", "--others", "--exclude-standard", "-z"]
        .map(Into::into)
        .into();
    for file in &mirror.excludes {
        arguments.push("--exclude-from".into());
        arguments.push(file.into());
    }
    let listed = mirror.git.output(&arguments, b"")?;
    listed
        .split(|&b| b == 0)
        // A directory here is a repository of its own.
        .filter(|line| !line.is_empty() && !line.ends_with(b"/"))
        .map(safe_path)
        .collect()
}

/// What of these paths is there, as it is now. What is gone, or stands behind a link, is left out as git would.
fn on_disk<'a>(root: &mut Root, paths: impl Iterator<Item = &'a Path>) -> BTreeMap<PathBuf, Entry> {
    let mut found = BTreeMap::new();
    for path in paths {
        let Ok(stat) = root.stat(path) else { continue };
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let kind = FileType::from_raw_mode(stat.st_mode);
        if matches!(kind, FileType::RegularFile | FileType::Symlink) {
            let size = if kind == FileType::Symlink { 0 } else { size };
            found.insert(
                path.to_owned(),
                Entry {
                    path: path.to_owned(),
                    size,
                    content: Content::Disk,
                },
            );
        }
    }
    found
}

/// The files of another commit, with the uncommitted changes of this work tree on top, as `git switch` carries them over.
fn carried_over(
    mirror: &Mirror,
    root: &mut Root,
    (head, base): (&str, &str),
    index: &[IndexEntry],
) -> Result<(Vec<IndexEntry>, BTreeMap<PathBuf, Entry>)> {
    let (mut entries, mut base_index) = (BTreeMap::new(), Vec::new());
    for (entry, size) in tree(&mirror.git, base)? {
        let link = entry.mode == LINK_MODE;
        let content = Content::Blob {
            hash: entry.hash.clone(),
            link,
            executable: entry.mode == "100755",
        };
        let (path, size) = (entry.path.clone(), if link { 0 } else { size });
        entries.insert(path.clone(), Entry { path, size, content });
        base_index.push(entry);
    }
    refuse_submodules(Path::new("the commit of --from"), &base_index)?;
    let committed: Vec<IndexEntry> = tree(&mirror.git, head)?.into_iter().map(|(entry, _)| entry).collect();
    let changed = changed(mirror, root, &committed, index)?;
    for path in &changed {
        entries.remove(path);
    }
    let tracked: std::collections::HashSet<&Path> = index.iter().map(|e| e.path.as_path()).collect();
    let on_top = changed
        .iter()
        .map(PathBuf::as_path)
        .filter(|path| tracked.contains(path));
    entries.extend(on_disk(root, on_top));
    Ok((base_index, entries))
}

/// The files of a commit, and the sizes of their contents in bytes.
fn tree(git: &Git, commit: &str) -> Result<Vec<(IndexEntry, u64)>> {
    let listed = git.output(&["ls-tree", "-r", "-l", "-z", "--full-tree", commit], b"")?;
    let broken = || Error::failed("git ls-tree said something that was not understood");
    listed
        .split(|&b| b == 0)
        .filter(|line| !line.is_empty())
        .map(|line| {
            let tab = line.iter().position(|&b| b == b'\t').ok_or_else(broken)?;
            let words = std::str::from_utf8(&line[..tab]).map_err(|_| broken())?;
            let words: Vec<&str> = words.split_whitespace().collect();
            let [mode, _, hash, size] = words.as_slice() else {
                return Err(broken());
            };
            let entry = IndexEntry {
                mode: (*mode).to_owned(),
                hash: (*hash).to_owned(),
                stage: "0".to_owned(),
                skip_worktree: false,
                path: safe_path(&line[tab + 1..])?,
            };
            Ok((entry, size.parse().unwrap_or(0)))
        })
        .collect()
}

/// What a branch follows at `origin`, and where that is as far as this host knows.
fn upstream(mirror: &Mirror, branch: &str) -> Result<Option<Upstream>> {
    if mirror.settings.last(&key("branch", branch.as_bytes(), "remote")) != Some(b"origin") {
        return Ok(None);
    }
    let merge = mirror.settings.last(&key("branch", branch.as_bytes(), "merge"));
    let Some(merge) = merge.and_then(|m| std::str::from_utf8(m).ok()) else {
        return Ok(None);
    };
    let Some(name) = merge.strip_prefix("refs/heads/") else {
        return Ok(None);
    };
    let tracking = format!("refs/remotes/origin/{name}");
    if !mirror.git.call(&["check-ref-format", &tracking], b"")?.success {
        return Ok(None);
    }
    let wanted = format!("{tracking}^{{commit}}");
    let commit = mirror
        .git
        .line(&["rev-parse", "--verify", "--quiet", "--end-of-options", &wanted])?;
    Ok(Some(Upstream {
        merge: merge.to_owned(),
        tracking,
        commit,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_lines_are_read() {
        let bytes = b"H 100644 aa 0\ta b\0s 120000 bb 0\tc/d\0M 100755 cc 2\te\n\0";
        let index = parse_index(bytes).unwrap();
        assert_eq!(index.len(), 3);
        assert_eq!(index[0].path, Path::new("a b"));
        assert!(index[1].skip_worktree && !index[0].skip_worktree);
        assert_eq!(
            (index[2].stage.as_str(), index[2].path.as_path()),
            ("2", Path::new("e\n"))
        );
        for bad in ["H 100644 aa 0", "100644 aa 0\tx"] {
            assert!(parse_index(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn paths_that_leave_the_tree_are_refused() {
        for bad in ["../x", "/etc/passwd", "a/../../x", ".git/config", "a/.GIT/hooks/x", ""] {
            assert!(safe_path(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(safe_path(b"a/.gitignore").is_ok());
        assert!(safe_path(b"\xff\xfe").is_ok());
    }
}
