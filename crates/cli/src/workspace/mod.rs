//! A git work tree on its way into a machine.
//!
//! ```text
//!   inspect (local, reads only) ─▶ Snapshot ─▶ history (a fresh .git) ─┐
//!                                      └──── files as they are now ─────┴─▶ one tar stream ─▶ machine
//! ```
//!
//! A repository is hostile input: it is no other repository ([`place`]), none of its configuration is in force ([`mirror`]), no link
//! in it is followed ([`crate::files::beneath`]), and nothing but tracked files, those asked for, and a history without foreign
//! configuration leaves this host.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{SystemTime, UNIX_EPOCH};

use banger_core::size;
use banger_proto::api::Workspace;
use serde::Serialize;
use tokio::task::JoinHandle;

use crate::cli::Context;
use crate::client::Client;
use crate::error::{Error, Result, reason};
use crate::files::beneath::Root;
use crate::files::pack::{Packer, Permissions};
use crate::files::upload::put;
use crate::workspace::git::{Git, spawn, wait};
use crate::workspace::history::History;

mod changes;
mod git;
mod history;
mod inspect;
mod mirror;
mod owner;
mod place;
mod settings;
mod url;

pub(crate) use git::User;
pub(crate) use inspect::inspect;

/// Where a workspace lands when nothing else is said.
const DEFAULT_PATH: &str = "/root/repo";

/// Its last element, for other users than root.
const DEFAULT_NAME: &str = "repo";

/// What is asked of a workspace.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    /// Untracked files too.
    pub(crate) include_untracked: bool,
    /// A new branch.
    pub(crate) branch: Option<String>,
    /// Where that starts.
    pub(crate) from: Option<String>,
    /// Directory in the guest.
    pub(crate) guest_path: String,
}

/// A line of the index.
#[derive(Debug, Clone, PartialEq, Eq)]
struct IndexEntry {
    mode: String,
    hash: String,
    stage: String,
    /// Left out of the work tree on purpose (a sparse checkout).
    skip_worktree: bool,
    path: PathBuf,
}

/// A file to copy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    path: PathBuf,
    size: u64,
    content: Content,
}

/// Where a file's content is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    /// In the work tree.
    Disk,
    /// In the repository.
    Blob { hash: String, link: bool, executable: bool },
}

/// What a branch follows.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Upstream {
    merge: String,
    tracking: String,
    commit: Option<String>,
}

/// What a work tree is, at the time it was looked at.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    git: Git,
    user: User,
    root: PathBuf,
    object_format: String,
    origin: Option<String>,
    /// For the machine: who commits, and how line ends are converted.
    settings: Vec<(&'static str, Vec<u8>)>,
    /// Branch in the machine; none for a detached HEAD.
    branch: Option<String>,
    upstream: Option<Upstream>,
    /// HEAD on the host.
    head: String,
    /// HEAD in the machine.
    base: String,
    index: Vec<IndexEntry>,
    entries: Vec<Entry>,
    skipped_untracked: usize,
    includes_untracked: bool,
    guest_path: String,
    /// User and group in the machine.
    owner: (u32, u32),
}

impl Snapshot {
    /// Gives it to a user of the machine.
    pub(crate) async fn settle(&mut self, client: &Client, machine: &str, user: Option<&str>) -> Result<()> {
        let Some(user) = user.filter(|user| !owner::is_root(user)) else {
            return Ok(());
        };
        let owner = owner::find(client, machine, user).await?;
        self.owner = (owner.uid, owner.gid);
        if self.guest_path.starts_with('~') {
            self.guest_path = format!("{}/{DEFAULT_NAME}", owner.home);
        }
        Ok(())
    }

    /// What the machine's record keeps of it.
    pub(crate) fn record(&self) -> Workspace {
        Workspace {
            source: self.root.display().to_string(),
            guest_path: self.guest_path.clone(),
            head: self.base.clone(),
            branch: self.branch.clone(),
        }
    }

    /// In words what is copied.
    fn mode(&self) -> String {
        let mut mode = if self.base == self.head {
            "tracked files with their uncommitted changes".to_owned()
        } else {
            format!(
                "files of {} with the uncommitted changes of this work tree",
                &self.base[..self.base.len().min(12)]
            )
        };
        if self.includes_untracked {
            mode.push_str(", untracked files");
        }
        mode + ", history of up to 10 generations"
    }
}

/// The directory in the guest for a workspace. `~USER/repo` stands for one in a home directory, which only the machine knows.
pub(crate) fn guest_path(workdir: Option<&str>, user: Option<&str>) -> Result<String> {
    let Some(path) = workdir else {
        return Ok(match user.filter(|user| !owner::is_root(user)) {
            Some(user) => format!("~{user}/{DEFAULT_NAME}"),
            None => DEFAULT_PATH.to_owned(),
        });
    };
    let sound = path.starts_with('/')
        && Path::new(path)
            .components()
            .all(|c| !matches!(c, std::path::Component::ParentDir))
        && Path::new(path).components().count() > 1;
    if !sound {
        return Err(Error::usage(format!("--workdir: `{path}` is no place for a workspace"))
            .hint("write an absolute path below `/`, like /root/repo"));
    }
    Ok(path.trim_end_matches('/').to_owned())
}

#[derive(Serialize)]
struct Listing<'a> {
    schema_version: u32,
    source: String,
    guest_path: &'a str,
    head: &'a str,
    branch: Option<&'a str>,
    mode: String,
    files: Vec<String>,
    skipped_untracked: usize,
}

/// Lists what would be copied.
pub(crate) fn show(context: &Context, snapshot: &Snapshot, json: bool) -> Result<u8> {
    let printer = &context.printer;
    if json {
        printer.json(&Listing {
            schema_version: banger_proto::OUTPUT_SCHEMA_VERSION,
            source: snapshot.root.display().to_string(),
            guest_path: &snapshot.guest_path,
            head: &snapshot.base,
            branch: snapshot.branch.as_deref(),
            mode: snapshot.mode(),
            files: snapshot.entries.iter().map(|e| e.path.display().to_string()).collect(),
            skipped_untracked: snapshot.skipped_untracked,
        })?;
        return Ok(0);
    }
    let total: u64 = snapshot.entries.iter().map(|e| e.size).sum();
    printer.note(format!(
        "workspace: {} -> {}",
        snapshot.root.display(),
        snapshot.guest_path
    ));
    printer.note(format!("mode: {}", snapshot.mode()));
    printer.note(format!("{} files, {}", snapshot.entries.len(), size::format(total)));
    notices(context, snapshot);
    let mut lines = String::new();
    for entry in &snapshot.entries {
        let path = entry.path.to_string_lossy();
        // One line for each file, whatever is in its name.
        if path.contains(char::is_control) {
            lines.push_str(&format!("{path:?}\n"));
        } else {
            lines.push_str(&format!("{path}\n"));
        }
    }
    printer.data(lines)?;
    Ok(0)
}

/// Says what is not copied.
pub(crate) fn notices(context: &Context, snapshot: &Snapshot) {
    if snapshot.skipped_untracked > 0 {
        let files = if snapshot.skipped_untracked == 1 {
            "file is"
        } else {
            "files are"
        };
        context.printer.note(format!(
            "note: {} untracked {files} not copied; --include-untracked takes them along",
            snapshot.skipped_untracked
        ));
    }
}

/// The repository for the machine on its way: it needs no machine, so it is made while that one starts.
#[derive(Debug)]
pub(crate) struct Packing(JoinHandle<Result<History>>);

impl Packing {
    /// Begins.
    pub(crate) fn begin(snapshot: &Snapshot) -> Self {
        let snapshot = snapshot.clone();
        Self(tokio::task::spawn_blocking(move || history::build(&snapshot)))
    }

    /// Waits until nothing of it is left, when it is not wanted any more.
    pub(crate) async fn discard(self) {
        let _ = self.0.await;
    }
}

/// Copies a workspace into a machine.
pub(crate) async fn upload(
    context: &Context,
    client: &Client,
    machine: &str,
    snapshot: &Snapshot,
    packing: Packing,
) -> Result<()> {
    let mut activity = context.printer.activity("vm run");
    activity.stage("packing the workspace");
    let history = packing
        .0
        .await
        .map_err(|e| Error::failed(format!("packing the workspace broke off: {e}")))??;
    let administration = walk(&history.git_dir())?;
    let total = snapshot
        .entries
        .iter()
        .chain(&administration)
        .map(|e| stored(e.size))
        .sum();
    activity.stage("copying the workspace");
    let packed = snapshot.clone();
    // Through the directory above, so that the work tree itself belongs to its owner too.
    let (above, name) = snapshot.guest_path.rsplit_once('/').unwrap_or_default();
    let (above, name) = (if above.is_empty() { "/" } else { above }, PathBuf::from(name));
    let pack = move |sink: &mut crate::files::upload::Sink| {
        let mut packer = Packer::new(sink).within(&name, packed.owner);
        packer.directory(Path::new(""), 0o755, now())?;
        write(&mut packer, &packed, &history, &administration)?;
        packer.finish()
    };
    put(client, machine, above, total, &mut activity, pack).await?;
    Ok(())
}

/// Bytes that a file takes in a tar stream.
fn stored(size: u64) -> u64 {
    512 + size.next_multiple_of(512)
}

/// The files of our own `.git`, by their paths in the work tree.
fn walk(git_dir: &Path) -> Result<Vec<Entry>> {
    let mut files = Vec::new();
    let mut open = vec![git_dir.to_owned()];
    while let Some(directory) = open.pop() {
        let entries = std::fs::read_dir(&directory).map_err(|e| Error::io("read", &directory, e))?;
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("read", &directory, e))?;
            let path = entry.path();
            let found = entry.metadata().map_err(|e| Error::io("look at", &path, e))?;
            if found.is_dir() {
                open.push(path);
            } else if let Some(below) = git_dir.parent().and_then(|top| path.strip_prefix(top).ok()) {
                files.push(Entry {
                    path: below.to_owned(),
                    size: found.len(),
                    content: Content::Disk,
                });
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn write<W: Write>(
    packer: &mut Packer<W>,
    snapshot: &Snapshot,
    history: &history::History,
    administration: &[Entry],
) -> Result<()> {
    let now = now();
    // Git wants these even when they are empty.
    for directory in [".git", ".git/objects", ".git/refs", ".git/refs/heads"] {
        packer.directory(Path::new(directory), 0o755, now)?;
    }
    let top = history.git_dir();
    let mut root = Root::open(top.parent().unwrap_or(&top)).map_err(|e| Error::io("open", &top, e))?;
    for entry in administration {
        packer.parents(&entry.path)?;
        let file = root.read(&entry.path).map_err(|e| Error::io("open", &entry.path, e))?;
        packer.open_file(&entry.path, file, Permissions::AsGit)?;
    }
    let mut root = Root::open(&snapshot.root).map_err(|e| Error::io("open", &snapshot.root, e))?;
    let mut blobs: Option<Blobs> = None;
    for entry in &snapshot.entries {
        packer.parents(&entry.path)?;
        match &entry.content {
            Content::Disk => from_disk(packer, &mut root, &entry.path)?,
            Content::Blob { hash, link, executable } => {
                let blobs = match &mut blobs {
                    Some(blobs) => blobs,
                    None => blobs.insert(Blobs::open(&snapshot.git)?),
                };
                let mode = if *executable { 0o755 } else { 0o644 };
                blobs.read(hash, |size, content| {
                    if *link {
                        let mut target = Vec::new();
                        content
                            .take(4096)
                            .read_to_end(&mut target)
                            .map_err(|e| Error::io("read", &entry.path, e))?;
                        packer.link(&entry.path, &target, now)
                    } else {
                        packer.file(&entry.path, mode, now, size, content)
                    }
                })?;
            }
        }
    }
    if let Some(blobs) = blobs {
        blobs.close()?;
    }
    Ok(())
}

/// A file of the work tree as it is now; one that went since it was listed stays behind.
fn from_disk<W: Write>(packer: &mut Packer<W>, root: &mut Root, path: &Path) -> Result<()> {
    use rustix::fs::FileType;
    let Ok(stat) = root.stat(path) else { return Ok(()) };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Symlink => {
            let Ok(target) = root.read_link(path) else {
                return Ok(());
            };
            let mtime = u64::try_from(stat.st_mtime).unwrap_or(0);
            packer.link(path, &target, mtime)
        }
        FileType::RegularFile => {
            let file = root.read(path).map_err(|e| Error::io("read", path, e))?;
            if file.metadata().is_ok_and(|m| m.is_file()) {
                packer.open_file(path, file, Permissions::AsGit)
            } else {
                Ok(())
            }
        }
        _ => Ok(()),
    }
}

/// Contents from the repository, one after the other.
struct Blobs {
    child: std::process::Child,
    ask: std::process::ChildStdin,
    answers: BufReader<std::process::ChildStdout>,
}

impl Blobs {
    fn open(git: &Git) -> Result<Self> {
        let mut child = spawn(
            git.command()
                .args(["cat-file", "--batch"])
                .stdin(Stdio::piped())
                .stderr(Stdio::null()),
        )?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(ask), Some(answers)) => Ok(Self {
                child,
                ask,
                answers: BufReader::new(answers),
            }),
            _ => Err(Error::failed("git was started without pipes")),
        }
    }

    fn read(&mut self, hash: &str, take: impl FnOnce(u64, &mut dyn Read) -> Result<()>) -> Result<()> {
        let broken = |e: std::io::Error| Error::failed(format!("git cat-file broke off: {}", reason(&e)));
        self.ask
            .write_all(format!("{hash}\n").as_bytes())
            .and_then(|()| self.ask.flush())
            .map_err(broken)?;
        let mut head = String::new();
        self.answers.read_line(&mut head).map_err(broken)?;
        let size = head.split_whitespace().nth(2).and_then(|s| s.parse::<u64>().ok());
        let Some(size) = size else {
            return Err(Error::failed(format!("object {hash} is not in the repository")));
        };
        let mut content = (&mut self.answers).take(size);
        take(size, &mut content)?;
        std::io::copy(&mut content, &mut std::io::sink()).map_err(broken)?;
        self.answers.read_exact(&mut [0]).map_err(broken)
    }

    fn close(self) -> Result<()> {
        let Self {
            mut child,
            ask,
            answers,
        } = self;
        drop((ask, answers));
        wait(&mut child).map(|_| ())
    }
}

#[cfg(test)]
mod tests;
