//! Looking at a work tree: what would be copied, decided before anything is made.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use crate::error::{Error, Kind, Result};
use crate::files::beneath::Root;
use crate::workspace::git::Git;
use crate::workspace::{Content, Entry, IndexEntry, Options, Snapshot, Upstream, url};

const LINK_MODE: &str = "120000";
const MODULE_MODE: &str = "160000";

/// Looks at the work tree that `path` is in. Only reads, and only on this host.
pub(crate) fn inspect(path: &Path, options: Options) -> Result<Snapshot> {
    let here = directory(path)?;
    let git = Git::at(&here);
    let root = root(&git, &here)?;
    let git = Git::at(&root);
    let Some(head) = git.line(&["rev-parse", "--verify", "--quiet", "HEAD^{commit}"])? else {
        return Err(
            Error::failed(format!("repository {} has no commit yet", root.display()))
                .hint("commit something first: `git add -A && git commit`"),
        );
    };
    let current = git.line(&["symbolic-ref", "--quiet", "--short", "HEAD"])?;
    let settings = Settings::parse(&git.output(&["config", "--list", "-z"], b"")?);
    let git = git.without_filters(settings.filters());
    let base = match &options.from {
        Some(from) => resolve(&git, from)?,
        None => head.clone(),
    };
    if let Some(branch) = &options.branch {
        check_branch(&git, branch)?;
    }
    let index = parse_index(&git.output(&["ls-files", "--stage", "-t", "-z"], b"")?)?;
    refuse_submodules(&root, &index)?;
    let untracked = untracked(&git)?;
    let mut open = Root::open(&root).map_err(|e| Error::io("open", &root, e))?;
    let (index, mut entries) = if base == head {
        let entries = on_disk(&mut open, index.iter().map(|e| e.path.as_path()));
        (index, entries)
    } else {
        carried_over(&git, &mut open, &base, &index)?
    };
    let mut skipped_untracked = untracked.len();
    if options.include_untracked {
        skipped_untracked = 0;
        entries.extend(on_disk(&mut open, untracked.iter().map(PathBuf::as_path)));
    }
    let upstream = match (&options.branch, &current) {
        (None, Some(branch)) => settings.upstream(&git, branch)?,
        _ => None,
    };
    Ok(Snapshot {
        object_format: git
            .line(&["rev-parse", "--show-object-format"])?
            .unwrap_or_else(|| "sha1".to_owned()),
        origin: settings.first("remote.origin.url").and_then(url::without_secrets),
        identity: settings.of(&["user.name", "user.email"]),
        conversions: settings.of(&["core.autocrlf", "core.eol"]),
        branch: options.branch.or(current),
        upstream,
        head,
        base,
        index,
        entries: entries.into_values().collect(),
        skipped_untracked,
        includes_untracked: options.include_untracked,
        guest_path: options.guest_path,
        root,
        git,
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

/// The top of the work tree. A repository can claim any directory as its work tree (`core.worktree`), and with that files of
/// the user that were never in it, so the claim has to agree with where `.git` is found.
fn root(git: &Git, here: &Path) -> Result<PathBuf> {
    let output = git.call(&["rev-parse", "--is-bare-repository", "--is-inside-work-tree"], b"")?;
    if !output.success {
        if output.stderr.contains("not a git repository") {
            return Err(Error::failed(format!("{} is not in a git work tree", here.display()))
                .hint("make it one with `git init` and a commit, or copy files with `banger vm cp`"));
        }
        return Err(git.failed(&["rev-parse"], &output.stderr));
    }
    let answers = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut answers = answers.lines();
    let (bare, inside) = (answers.next() == Some("true"), answers.next() == Some("true"));
    if bare {
        return Err(Error::failed(format!(
            "{} is a bare repository, it has no files to work on",
            here.display()
        ))
        .hint("clone it and name the clone"));
    }
    if !inside {
        return Err(Error::failed(format!(
            "{} is inside a repository's .git, not in its work tree",
            here.display()
        ))
        .hint("name the work tree"));
    }
    let top = git.output(&["rev-parse", "--show-toplevel"], b"")?;
    let top = PathBuf::from(std::ffi::OsString::from_vec(
        top.strip_suffix(b"\n").unwrap_or(&top).to_owned(),
    ));
    let top = top.canonicalize().map_err(|e| Error::io("find", &top, e))?;
    let marked = here.ancestors().find(|dir| dir.join(".git").symlink_metadata().is_ok());
    if marked != Some(top.as_path()) {
        return Err(Error::failed(format!(
            "the repository at {} claims {} as its work tree",
            here.display(),
            top.display()
        ))
        .hint("only a work tree with its own .git is copied; unset core.worktree"));
    }
    Ok(top)
}

fn resolve(git: &Git, from: &str) -> Result<String> {
    let wanted = format!("{from}^{{commit}}");
    git.line(&["rev-parse", "--verify", "--quiet", "--end-of-options", &wanted])?
        .ok_or_else(|| {
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

fn untracked(git: &Git) -> Result<Vec<PathBuf>> {
    let listed = git.output(&["ls-files", "--others", "--exclude-standard", "-z"], b"")?;
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
    git: &Git,
    root: &mut Root,
    base: &str,
    index: &[IndexEntry],
) -> Result<(Vec<IndexEntry>, BTreeMap<PathBuf, Entry>)> {
    let tree = git.output(&["ls-tree", "-r", "-l", "-z", "--full-tree", base], b"")?;
    let (mut entries, mut base_index) = (BTreeMap::new(), Vec::new());
    for line in tree.split(|&b| b == 0).filter(|l| !l.is_empty()) {
        let broken = || Error::failed("git ls-tree said something that was not understood");
        let tab = line.iter().position(|&b| b == b'\t').ok_or_else(broken)?;
        let words = String::from_utf8_lossy(&line[..tab]).into_owned();
        let words: Vec<&str> = words.split_whitespace().collect();
        let [mode, _, hash, size] = words.as_slice() else {
            return Err(broken());
        };
        let path = safe_path(&line[tab + 1..])?;
        let (link, executable) = (*mode == LINK_MODE, *mode == "100755");
        let content = Content::Blob {
            hash: (*hash).to_owned(),
            link,
            executable,
        };
        let size = if link { 0 } else { size.parse().unwrap_or(0) };
        entries.insert(
            path.clone(),
            Entry {
                path: path.clone(),
                size,
                content,
            },
        );
        base_index.push(IndexEntry {
            mode: (*mode).to_owned(),
            hash: (*hash).to_owned(),
            stage: "0".to_owned(),
            skip_worktree: false,
            path,
        });
    }
    refuse_submodules(Path::new("the commit of --from"), &base_index)?;
    let changed = changed(git, root, index)?;
    for path in &changed {
        entries.remove(path);
    }
    entries.extend(on_disk(root, changed.iter().map(PathBuf::as_path)));
    Ok((base_index, entries))
}

/// Tracked paths whose content differs from HEAD's.
fn changed(git: &Git, root: &mut Root, index: &[IndexEntry]) -> Result<Vec<PathBuf>> {
    let list = git.output(
        &[
            "diff-index",
            "-z",
            "--raw",
            "--no-abbrev",
            "--no-renames",
            "--no-ext-diff",
            "--ignore-submodules",
            "HEAD",
            "--",
        ],
        b"",
    )?;
    let skipped: HashMap<&Path, bool> = index.iter().map(|e| (e.path.as_path(), e.skip_worktree)).collect();
    let mut changed = Vec::new();
    let mut fields = list.split(|&b| b == 0).filter(|f| !f.is_empty());
    while let (Some(what), Some(path)) = (fields.next(), fields.next()) {
        let path = safe_path(path)?;
        if skipped.get(path.as_path()).copied().unwrap_or(false) {
            continue;
        }
        // `:<old mode> <new mode> <old hash> <new hash> M`; the new hash is zero when only the time stamp differs, too.
        let what = String::from_utf8_lossy(what).into_owned();
        let words: Vec<&str> = what.split(' ').collect();
        if let [old_mode, new_mode, old, _, "M"] = words.as_slice()
            && old_mode.trim_start_matches(':') == *new_mode
            && same_content(git, root, &path, old)?
        {
            continue;
        }
        changed.push(path);
    }
    Ok(changed)
}

/// Whether a file on disk has the content of this blob. Compared as bytes: no filter is run.
fn same_content(git: &Git, root: &mut Root, path: &Path, hash: &str) -> Result<bool> {
    let Ok(stat) = root.stat(path) else { return Ok(false) };
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(false);
    }
    let size = git.line(&["cat-file", "-s", hash])?;
    if size != Some(stat.st_size.to_string()) {
        return Ok(false);
    }
    let mut content = Vec::new();
    let read = root
        .read(path)
        .map(|mut file| std::io::Read::read_to_end(&mut file, &mut content));
    Ok(matches!(read, Ok(Ok(_))) && git.output(&["cat-file", "blob", hash], b"")? == content)
}

/// The configuration of a repository, the user's own included.
struct Settings {
    values: HashMap<String, Vec<String>>,
}

impl Settings {
    /// `key\nvalue`, ended by zeros.
    fn parse(bytes: &[u8]) -> Self {
        let mut values: HashMap<String, Vec<String>> = HashMap::new();
        for item in bytes.split(|&b| b == 0).filter(|i| !i.is_empty()) {
            let text = String::from_utf8_lossy(item);
            let (key, value) = text.split_once('\n').unwrap_or((&text, "true"));
            values.entry(key.to_owned()).or_default().push(value.to_owned());
        }
        Self { values }
    }

    fn first(&self, key: &str) -> Option<&str> {
        self.values.get(key)?.first().map(String::as_str)
    }

    fn last(&self, key: &str) -> Option<&str> {
        self.values.get(key)?.last().map(String::as_str)
    }

    fn of(&self, keys: &[&'static str]) -> Vec<(&'static str, String)> {
        keys.iter()
            .filter_map(|key| Some((*key, self.last(key)?.to_owned())))
            .collect()
    }

    /// Names of all filters that are configured.
    fn filters(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .values
            .keys()
            .filter_map(|key| Some(key.strip_prefix("filter.")?.rsplit_once('.')?.0.to_owned()))
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// What a branch follows at `origin`, and where that is as far as this host knows.
    fn upstream(&self, git: &Git, branch: &str) -> Result<Option<Upstream>> {
        if self.last(&format!("branch.{branch}.remote")) != Some("origin") {
            return Ok(None);
        }
        let Some(merge) = self.last(&format!("branch.{branch}.merge")) else {
            return Ok(None);
        };
        let Some(name) = merge.strip_prefix("refs/heads/") else {
            return Ok(None);
        };
        let tracking = format!("refs/remotes/origin/{name}");
        let commit = git.line(&[
            "rev-parse",
            "--verify",
            "--quiet",
            "--end-of-options",
            &format!("{tracking}^{{commit}}"),
        ])?;
        Ok(Some(Upstream {
            merge: merge.to_owned(),
            tracking,
            commit,
        }))
    }
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

    #[test]
    fn settings_are_read() {
        let settings =
            Settings::parse(b"user.name\nA\nB\0filter.a.b.clean\nx\0filter.a.b.smudge\ny\0core.bare\0user.name\nC\0");
        assert_eq!(settings.last("user.name"), Some("C"));
        assert_eq!(settings.first("user.name"), Some("A\nB"));
        assert_eq!(settings.filters(), ["a.b"]);
        assert_eq!(settings.last("core.bare"), Some("true"));
    }
}
