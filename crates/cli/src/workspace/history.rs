//! The repository that goes into the machine: a fresh one, made of a short history and the state of the index, with a
//! configuration of which every line is ours.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::error::{Error, Result, reason};
use crate::workspace::git::{Git, spawn, wait, words};
use crate::workspace::{IndexEntry, Snapshot};

/// Commits from the newest one down that go along.
const DEPTH: usize = 10;

/// Most commits that go along; merges can make ten generations many.
const MAX_COMMITS: usize = 2000;

/// A repository in a temporary directory, removed when it is dropped.
#[derive(Debug)]
pub(crate) struct History {
    git: Git,
}

impl History {
    /// Its `.git`.
    pub(crate) fn git_dir(&self) -> PathBuf {
        self.git.top()
    }
}

/// Commits of a short history.
#[derive(Debug, Default, PartialEq, Eq)]
struct Commits {
    all: Vec<String>,
    /// Those whose parents stay behind.
    boundary: Vec<String>,
}

/// Makes the repository for a snapshot.
pub(crate) fn build(snapshot: &Snapshot) -> Result<History> {
    let git = Git::new(&snapshot.user)?;
    let format = format!("--object-format={}", snapshot.object_format);
    git.output(&["init", "--quiet", "--template=", &format], b"")?;
    let history = History { git };
    let commits = commits(&snapshot.git, &snapshot.base)?;
    pack(snapshot, &commits, &history.git_dir())?;
    references(snapshot, &commits, &history.git_dir())?;
    configure(snapshot, &history.git)?;
    index(&history.git, &snapshot.index)?;
    Ok(history)
}

/// The commits down to [`DEPTH`] generations. Reads commits as they are stored: a shallow source just ends earlier.
fn commits(git: &Git, base: &str) -> Result<Commits> {
    let mut child = spawn(
        git.command()
            .args(["cat-file", "--batch"])
            .stdin(Stdio::piped())
            .stderr(Stdio::null()),
    )?;
    let (Some(mut ask), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(Error::failed("git was started without pipes"));
    };
    let mut answers = BufReader::new(answers);
    let result = generations(base, DEPTH, |hash| parents(&mut ask, &mut answers, hash));
    drop(ask);
    drop(answers);
    wait(&mut child)?;
    let commits = result?;
    if commits.all.is_empty() {
        return Err(Error::failed(format!("commit {base} cannot be read")));
    }
    Ok(commits)
}

/// Walks a history generation by generation. `parents` says nothing for a commit that is not there.
fn generations(
    base: &str,
    depth: usize,
    mut parents: impl FnMut(&str) -> Result<Option<Vec<String>>>,
) -> Result<Commits> {
    let mut known: HashMap<String, Vec<String>> = HashMap::new();
    let mut order = Vec::new();
    let mut generation = vec![base.to_owned()];
    for _ in 0..depth {
        let mut next = Vec::new();
        for hash in generation {
            if known.contains_key(&hash) || known.len() >= MAX_COMMITS {
                continue;
            }
            if let Some(parents) = parents(&hash)? {
                next.extend(parents.iter().cloned());
                order.push(hash.clone());
                known.insert(hash, parents);
            }
        }
        generation = next;
    }
    let is_open = |hash: &&String| known[*hash].iter().any(|p| !known.contains_key(p));
    let boundary = order.iter().filter(is_open).cloned().collect();
    Ok(Commits { all: order, boundary })
}

fn parents(ask: &mut impl Write, answers: &mut impl BufRead, hash: &str) -> Result<Option<Vec<String>>> {
    let broken = |e: std::io::Error| Error::failed(format!("git cat-file broke off: {}", reason(&e)));
    ask.write_all(format!("{hash}\n").as_bytes())
        .and_then(|()| ask.flush())
        .map_err(broken)?;
    let mut head = String::new();
    answers.read_line(&mut head).map_err(broken)?;
    let fields: Vec<&str> = head.split_whitespace().collect();
    let [_, kind, size] = fields.as_slice() else {
        return Ok(None);
    };
    let size: usize = size
        .parse()
        .map_err(|_| Error::failed("git cat-file said something that was not understood"))?;
    let mut body = vec![0; size + 1];
    answers.read_exact(&mut body).map_err(broken)?;
    if *kind != "commit" {
        return Ok(None);
    }
    let lines = body.split(|&b| b == b'\n').take_while(|l| !l.is_empty());
    Ok(Some(
        lines
            .filter_map(|l| l.strip_prefix(b"parent "))
            .filter(|hash| hash.iter().all(u8::is_ascii_hexdigit))
            .map(|hash| String::from_utf8_lossy(hash).into_owned())
            .collect(),
    ))
}

/// Writes one pack with everything that the commits and the index need.
fn pack(snapshot: &Snapshot, commits: &Commits, target: &Path) -> Result<()> {
    let directory = target.join("objects/pack");
    std::fs::create_dir_all(&directory).map_err(|e| Error::io("make", &directory, e))?;
    let list = snapshot.git.output(
        &["rev-list", "--objects", "--no-walk", "--missing=allow-any", "--stdin"],
        (commits.all.join("\n") + "\n").as_bytes(),
    )?;
    // What was staged and not committed is in no commit.
    let mut listed: HashSet<&[u8]> = list
        .split(|&b| b == b'\n')
        .map(|l| l.split(|&b| b == b' ').next().unwrap_or_default())
        .collect();
    let mut staged = String::new();
    for entry in &snapshot.index {
        if listed.insert(entry.hash.as_bytes()) {
            staged.push_str(&entry.hash);
            staged.push('\n');
        }
    }
    let mut input = list.clone();
    input.extend_from_slice(present(&snapshot.git, &staged)?.as_bytes());
    let mut command = snapshot.git.command();
    // Deltas are taken over where they are, but not looked for: the time that takes is longer than the copy.
    command
        .args(["pack-objects", "-q", "--delta-base-offset", "--window=0"])
        .arg(directory.join("pack"));
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = spawn(&mut command)?;
    let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
    let complaint = std::thread::scope(|scope| {
        if let Some(mut stdin) = stdin {
            scope.spawn(move || drop(stdin.write_all(&input)));
        }
        words(stderr)
    });
    if wait(&mut child)? {
        Ok(())
    } else {
        Err(snapshot.git.failed(&["pack-objects"], &complaint))
    }
}

/// Those of the objects that are there: a partial clone may lack some, and an index may name what never was.
fn present(git: &Git, hashes: &str) -> Result<String> {
    if hashes.is_empty() {
        return Ok(String::new());
    }
    let found = git.call(&["cat-file", "--batch-check=%(objectname)"], hashes.as_bytes())?;
    let found = String::from_utf8_lossy(&found.stdout).into_owned();
    Ok(found
        .lines()
        .filter(|l| !l.contains(' '))
        .map(|l| format!("{l}\n"))
        .collect())
}

fn references(snapshot: &Snapshot, commits: &Commits, git_dir: &Path) -> Result<()> {
    let write = |name: &str, text: String| {
        let path = git_dir.join(name);
        std::fs::write(&path, text).map_err(|e| Error::io("write", &path, e))
    };
    let mut references = Vec::new();
    match &snapshot.branch {
        Some(branch) => {
            references.push((format!("refs/heads/{branch}"), snapshot.base.clone()));
            write("HEAD", format!("ref: refs/heads/{branch}\n"))?;
        }
        None => write("HEAD", format!("{}\n", snapshot.base))?,
    }
    if let Some(upstream) = &snapshot.upstream
        && let Some(commit) = upstream.commit.as_ref().filter(|c| commits.all.contains(c))
    {
        references.push((upstream.tracking.clone(), commit.clone()));
    }
    references.sort();
    let lines: String = references
        .iter()
        .map(|(name, hash)| format!("{hash} {name}\n"))
        .collect();
    write("packed-refs", format!("# pack-refs with: sorted\n{lines}"))?;
    if !commits.boundary.is_empty() {
        write("shallow", commits.boundary.join("\n") + "\n")?;
    }
    Ok(())
}

fn configure(snapshot: &Snapshot, git: &Git) -> Result<()> {
    let mut settings: Vec<(String, OsString)> = snapshot
        .settings
        .iter()
        .map(|(key, value)| ((*key).to_owned(), OsStr::from_bytes(value).to_owned()))
        .collect();
    if let Some(origin) = &snapshot.origin {
        settings.push(("remote.origin.url".to_owned(), origin.into()));
        settings.push((
            "remote.origin.fetch".to_owned(),
            "+refs/heads/*:refs/remotes/origin/*".into(),
        ));
        if let (Some(branch), Some(upstream)) = (&snapshot.branch, &snapshot.upstream) {
            settings.push((format!("branch.{branch}.remote"), "origin".into()));
            settings.push((format!("branch.{branch}.merge"), (&upstream.merge).into()));
        }
    }
    for (key, value) in settings {
        let [config, local, end] = ["config", "--local", "--"].map(OsStr::new);
        git.output(&[config, local, end, key.as_ref(), &value], b"")?;
    }
    Ok(())
}

/// The index as it is here, so that `git status` in the machine says what it says here.
fn index(git: &Git, entries: &[IndexEntry]) -> Result<()> {
    let mut lines = Vec::new();
    let mut skipped = Vec::new();
    for entry in entries {
        let path = entry.path.as_os_str().as_encoded_bytes();
        lines.extend_from_slice(format!("{} {} {}\t", entry.mode, entry.hash, entry.stage).as_bytes());
        lines.extend_from_slice(path);
        lines.push(0);
        if entry.skip_worktree {
            skipped.extend_from_slice(path);
            skipped.push(0);
        }
    }
    if !lines.is_empty() {
        git.output(&["update-index", "-z", "--index-info"], &lines)?;
    }
    if !skipped.is_empty() {
        git.output(&["update-index", "-z", "--skip-worktree", "--stdin"], &skipped)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_is_cut_by_generations() {
        // m has the parents a and b, each the end of a line.
        let graph = |hash: &str| {
            Ok(match hash {
                "m" => Some(vec!["a".to_owned(), "b".to_owned()]),
                "a" => Some(vec!["c".to_owned()]),
                "b" => Some(vec!["missing".to_owned()]),
                "c" => Some(vec![]),
                _ => None,
            })
        };
        let cut = generations("m", 2, graph).unwrap();
        assert_eq!(cut.all, ["m", "a", "b"]);
        assert_eq!(cut.boundary, ["a", "b"]);
        let whole = generations("m", 10, graph).unwrap();
        assert_eq!(whole.all, ["m", "a", "b", "c"]);
        assert_eq!(whole.boundary, ["b"], "what the source does not have is a boundary too");
    }
}
