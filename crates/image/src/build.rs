//! A tar stream into an image; and the bootstrap tool that writes such streams for the recipes.
//!
//! Nothing is unpacked onto the host by us: every entry goes through the policy of [`crate::tar`] into the writer of
//! [`crate::ext4`]. The digest of an image is taken over what went in, so the same content has the same name.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::cancel::Cancel;
use crate::digest::{Digest, Hasher};
use crate::disk::as_uuid;
use crate::error::{Error, IoContext, Result};
use crate::ext4::Ext4Error;
use crate::ext4::tree::{Meta, Special};
use crate::ext4::writer::{Finish, Limits, Size, Summary, Writer};
use crate::process::{Program, Run, find_program};
use crate::progress::{Progress, Step};
use crate::recipe::Recipe;
use crate::store::Staging;
use crate::tar::{self, Entry, Kind, Reader, Scrub, TarError, Verdict, policy};

/// Free bytes in a stored image: little, as disks of machines are made larger when they are made.
const SLACK: u64 = 32 << 20;
/// Journal of an image, for the machines that grow out of it: 64 MiB.
const JOURNAL_BLOCKS: u64 = 16_384;
/// Bytes between two reports.
const REPORT_EVERY: u64 = 4 << 20;

const MMDEBSTRAP: Program = Program {
    name: "mmdebstrap",
    package: "mmdebstrap",
    purpose: "build an image",
};
const NEWUIDMAP: Program = Program {
    name: "newuidmap",
    package: "uidmap",
    purpose: "build an image without root",
};
const APT_GET: Program = Program {
    name: "apt-get",
    package: "apt",
    purpose: "build an image",
};
const APT_CONFIG: Program = Program {
    name: "apt-config",
    package: "apt",
    purpose: "build an image",
};
const BUILD_DEADLINE: Duration = Duration::from_secs(1800);
const LOOKUP: Duration = Duration::from_secs(30);

/// What became of a tar stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ingested {
    /// Digest of the content.
    pub digest: Digest,
    /// Init system of the image.
    pub init: Option<String>,
    /// The file system.
    pub summary: Summary,
}

/// Writes the file system `target` from a tar stream. `what` names it in errors.
pub fn ingest(stream: impl Read, what: &str, scrub: Scrub, target: &Path, progress: &Progress) -> Result<Ingested> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(target)
        .on("make the image", target)?;
    let sync = file.try_clone().on("open", target)?;
    let tar_error = |source| Error::Tar {
        what: what.to_owned(),
        source,
    };
    let fs_error = |error: Ext4Error| ext4_error(error, what, target);

    let mut writer = Writer::new(file, Limits::default()).map_err(fs_error)?;
    let mut reader = Reader::new(stream, tar::Limits::default());
    let mut hasher = Hasher::new();
    let mut init = InitSearch::default();
    let mut reported = 0;
    hasher.update(b"banger image 1\n");
    while let Some(entry) = reader.next_entry().map_err(tar_error)? {
        if reader.offset() >= reported + REPORT_EVERY {
            reported = reader.offset();
            progress.bytes(Step::WriteImage, reported, 0);
        }
        let path = policy::components(&entry.path).map_err(tar_error)?;
        let verdict = scrub.verdict(&path, entry.kind == Kind::Directory);
        if verdict == Verdict::Drop {
            continue;
        }
        init.see(&path, &entry.kind);
        enter(&mut writer, &mut reader, &mut hasher, &path, entry, verdict).map_err(|e| match e {
            EnterError::Tar(source) => tar_error(source),
            EnterError::Ext4(source) => fs_error(source),
        })?;
    }
    let digest = hasher.finish();
    let seed = |from: usize| {
        let mut out = [0; 16];
        out.iter_mut()
            .zip(digest.as_bytes().iter().skip(from))
            .for_each(|(o, b)| *o = *b);
        out
    };
    let finish = Finish {
        size: Size::Fit { slack: SLACK },
        journal_blocks: JOURNAL_BLOCKS,
        uuid: as_uuid(seed(0)),
        hash_seed: as_uuid(seed(16)),
        label: "root",
        time: 0,
    };
    let summary = writer.finish(&finish).map_err(fs_error)?;
    sync.sync_data().on("write", target)?;
    progress.bytes(Step::WriteImage, reader.offset(), reader.offset());
    Ok(Ingested {
        digest,
        init: init.found(),
        summary,
    })
}

enum EnterError {
    Tar(TarError),
    Ext4(Ext4Error),
}

impl From<TarError> for EnterError {
    fn from(error: TarError) -> Self {
        Self::Tar(error)
    }
}

impl From<Ext4Error> for EnterError {
    fn from(error: Ext4Error) -> Self {
        Self::Ext4(error)
    }
}

/// Enters one entry, and hashes it with its content.
fn enter(
    writer: &mut Writer,
    content: &mut impl Read,
    hasher: &mut Hasher,
    path: &[Vec<u8>],
    mut entry: Entry,
    verdict: Verdict,
) -> Result<(), EnterError> {
    entry.xattrs.sort();
    hash_entry(hasher, path, &entry, verdict);
    let meta = Meta {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        mtime_nsec: entry.mtime_nsec,
        xattrs: entry.xattrs,
    };
    match entry.kind {
        Kind::Directory => writer.directory(path, meta)?,
        Kind::File if verdict == Verdict::Empty => writer.file(path, meta, 0, &mut io::empty())?,
        Kind::File => writer.file(path, meta, entry.size, &mut Hashing { inner: content, hasher })?,
        Kind::Symlink(target) => writer.symlink(path, meta, &target)?,
        Kind::HardLink(target) => writer.hard_link(path, &policy::components(&target)?)?,
        Kind::Char(major, minor) => writer.special(path, meta, Special::Char(major, minor))?,
        Kind::Block(major, minor) => writer.special(path, meta, Special::Block(major, minor))?,
        Kind::Fifo => writer.special(path, meta, Special::Fifo)?,
    }
    Ok(())
}

/// Adds everything that makes an entry what it is to the digest of the image.
fn hash_entry(hasher: &mut Hasher, path: &[Vec<u8>], entry: &Entry, verdict: Verdict) {
    hasher.field(&path.join(&b'/'));
    let (kind, text, numbers) = match &entry.kind {
        Kind::File => (b'f', [].as_slice(), (0, 0)),
        Kind::Directory => (b'd', [].as_slice(), (0, 0)),
        Kind::Symlink(target) => (b'l', target.as_slice(), (0, 0)),
        Kind::HardLink(target) => (b'h', target.as_slice(), (0, 0)),
        Kind::Char(major, minor) => (b'c', [].as_slice(), (*major, *minor)),
        Kind::Block(major, minor) => (b'b', [].as_slice(), (*major, *minor)),
        Kind::Fifo => (b'p', [].as_slice(), (0, 0)),
    };
    hasher.update(&[kind]);
    hasher.field(text);
    let size = if verdict == Verdict::Empty { 0 } else { entry.size };
    for number in [
        u64::from(numbers.0),
        numbers.1.into(),
        entry.mode.into(),
        entry.uid.into(),
        entry.gid.into(),
        entry.mtime_nsec.into(),
        size,
    ] {
        hasher.update(&number.to_le_bytes());
    }
    hasher.update(&entry.mtime.to_le_bytes());
    hasher.update(&(entry.xattrs.len() as u64).to_le_bytes());
    for (name, value) in &entry.xattrs {
        hasher.field(name);
        hasher.field(value);
    }
}

struct Hashing<'a, R> {
    inner: &'a mut R,
    hasher: &'a mut Hasher,
}

impl<R: Read> Read for Hashing<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.hasher.update(buf.get(..n).unwrap_or_default());
        Ok(n)
    }
}

/// Content that ends too early is the archive's fault, a full disk is the host's, the rest is the file system's.
fn ext4_error(error: Ext4Error, what: &str, target: &Path) -> Error {
    match error {
        Ext4Error::Content { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof => Error::Tar {
            what: what.to_owned(),
            source: TarError::Truncated,
        },
        Ext4Error::Write(source) => Error::io(format!("write {}", target.display()), source),
        source => Error::FileSystem {
            path: target.to_owned(),
            source,
        },
    }
}

/// Looks for an init system while entries pass by.
#[derive(Debug, Default)]
struct InitSearch {
    init: bool,
    systemd: bool,
}

impl InitSearch {
    fn see(&mut self, path: &[Vec<u8>], kind: &Kind) {
        if *kind == Kind::Directory {
            return;
        }
        let names: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
        match names.strip_prefix(&[b"usr".as_slice()]).unwrap_or(&names) {
            [b"sbin", b"init"] => self.init = true,
            [b"lib", b"systemd", b"systemd"] => self.systemd = true,
            _ => {}
        }
    }

    fn found(&self) -> Option<String> {
        let path = if self.systemd {
            "/lib/systemd/systemd"
        } else if self.init {
            "/sbin/init"
        } else {
            return None;
        };
        Some(path.to_owned())
    }
}

/// Builds a recipe's image at `target`. `scratch` is removed whatever happens, and `staging`, in which the target is, is held
/// until the tool has ended: it cleans up there when it is cancelled.
pub(crate) async fn bootstrap(
    recipe: &'static Recipe,
    scratch: Scratch,
    staging: Arc<Staging>,
    target: PathBuf,
    progress: &Progress,
) -> Result<Ingested> {
    let root = rustix::process::geteuid().is_root();
    // Looked for first: the missing tool is what the user must hear about.
    MMDEBSTRAP.find()?;
    if !root {
        NEWUIDMAP.find()?;
        check_subordinate_ids()?;
    }
    let mut run = Run::new(MMDEBSTRAP, BUILD_DEADLINE)?
        .args([
            "--verbose",
            "--format=tar",
            if root { "--mode=root" } else { "--mode=unshare" },
        ])
        .arg(format!("--variant={}", recipe.variant))
        .arg(format!("--include={}", recipe.packages.join(",")))
        .args(recipe.dpkg_options.iter().map(|filter| format!("--dpkgopt={filter}")))
        .env("TMPDIR", &scratch.path)
        .shown(format!("mmdebstrap {}", recipe.suite))
        .hold(scratch)
        .hold(staging);
    for (kind, proxy) in proxies().await {
        run = run.arg(format!("--aptopt=Acquire::{kind}::Proxy \"{proxy}\""));
    }
    run = run.arg(recipe.suite).arg("-").args(mirrors(recipe.suite).await);

    let (cancel, _guard) = Cancel::new();
    let mut lines = BootstrapProgress::default();
    let told = progress.clone();
    let listener = progress.clone();
    let name = recipe.name;
    progress.begin(Step::DownloadPackages);
    run.stream(
        move |line| {
            if let Some((step, done, total)) = lines.line(line) {
                told.items(step, done, total);
            }
        },
        move |stdout| ingest(cancel.reader(stdout), name, Scrub::FreshInstall, &target, &listener),
    )
    .await
}

/// Where the bootstrap tool works: inside the store for root; for others in the system's place for temporary files, as the tool's other
/// user ids may not enter the store.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    /// Outside of the store, to be removed here; otherwise it goes with the staging directory it is in.
    outside: bool,
}

/// Begins the name of a scratch directory outside of the store.
pub(crate) const SCRATCH_PREFIX: &str = "banger-build-";

impl Scratch {
    /// A directory below `staging`.
    pub(crate) fn inside(staging: &Path) -> Result<Self> {
        let path = staging.join("scratch");
        crate::files::make_dir(&path)?;
        Ok(Self { path, outside: false })
    }

    /// A directory outside of the store.
    pub(crate) fn outside() -> Result<Self> {
        let base = std::env::temp_dir();
        let dir = tempfile::Builder::new()
            .prefix(SCRATCH_PREFIX)
            .tempdir_in(&base)
            .on("make a directory in", &base)?;
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))
            .on("open up", dir.path())?;
        Ok(Self {
            path: dir.keep(),
            outside: true,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.outside {
            // What the tool's other users own can't be removed by us; it removes that itself, and the sweep looks again.
            let _ = crate::files::remove_tree(&self.path);
        }
    }
}

fn check_subordinate_ids() -> Result<()> {
    let uid = rustix::process::getuid().as_raw().to_string();
    let user = std::env::var("USER")
        .or_else(|_| std::env::var("LOGNAME"))
        .unwrap_or_else(|_| uid.clone());
    for file in ["/etc/subuid", "/etc/subgid"] {
        let mut text = String::new();
        // Not there or not readable is the same as empty.
        let _ = File::open(file).and_then(|f| f.take(1 << 20).read_to_string(&mut text));
        if !has_range(&text, &user, &uid) {
            return Err(Error::NoSubordinateIds { user });
        }
    }
    Ok(())
}

/// Whether a user has at least 65536 ids in `/etc/subuid` or `/etc/subgid`.
fn has_range(text: &str, user: &str, uid: &str) -> bool {
    text.lines().any(|line| {
        let mut fields = line.split(':');
        let owner = fields.next();
        let count = fields.nth(1).and_then(|n| n.trim().parse::<u64>().ok());
        (owner == Some(user) || owner == Some(uid)) && count.is_some_and(|n| n >= 65_536)
    })
}

/// The host's own sources of the release, where the host has all of them; none leaves the choice to the bootstrap tool.
async fn mirrors(suite: &str) -> Vec<String> {
    if find_program("apt-get").is_none() {
        return Vec::new();
    }
    let run = Run::new(APT_GET, LOOKUP).map(|r| {
        r.args([
            "indextargets",
            "--format",
            "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)",
            "Created-By: Packages",
        ])
    });
    match run {
        Ok(run) => run
            .output(1 << 20)
            .await
            .map(|out| sources(&String::from_utf8_lossy(&out), suite))
            .unwrap_or_default(),
        Err(_) => Vec::new(),
    }
}

/// Lines for sources.list out of what `apt-get indextargets` says. Addresses with a user name or password in them are not taken
/// over: the image is no place for them.
fn sources(targets: &str, suite: &str) -> Vec<String> {
    let wanted = [
        suite.to_owned(),
        format!("{suite}-updates"),
        format!("{suite}-security"),
    ];
    let mut found: Vec<(usize, String)> = Vec::new();
    for line in targets.lines() {
        let mut fields = line.split('|');
        let (Some(uri), Some(release), Some("main"), Some("Debian")) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let Some(rank) = wanted.iter().position(|w| w == release) else {
            continue;
        };
        let clean = (uri.starts_with("http://") || uri.starts_with("https://"))
            && uri.bytes().all(|b| b.is_ascii_graphic() && !b"@[]\"'|".contains(&b));
        if clean {
            let entry = (rank, format!("deb {uri} {release} main"));
            if !found.contains(&entry) {
                found.push(entry);
            }
        }
    }
    found.sort();
    // Without the security updates it is better to let the tool choose.
    let complete = [0, 2].iter().all(|rank| found.iter().any(|(r, _)| r == rank));
    if complete {
        found.into_iter().map(|(_, line)| line).collect()
    } else {
        Vec::new()
    }
}

/// The proxies that the host's apt uses. They serve the build; the option's file is kept out of the image.
async fn proxies() -> Vec<(&'static str, String)> {
    let mut out = Vec::new();
    if find_program("apt-config").is_none() {
        return out;
    }
    for kind in ["http", "https"] {
        let Ok(run) = Run::new(APT_CONFIG, LOOKUP) else {
            continue;
        };
        let run = run
            .args(["--format", "%v%n", "dump", "--no-empty"])
            .arg(format!("Acquire::{kind}::Proxy"));
        if let Ok(text) = run.output(4096).await
            && let Some(proxy) = String::from_utf8_lossy(&text).lines().next().map(str::trim)
            && !proxy.is_empty()
            && proxy.bytes().all(|b| b.is_ascii_graphic() && b != b'"')
        {
            out.push((kind, proxy.to_owned()));
        }
    }
    out
}

/// Where the bootstrap tool is, from what it and its tools say.
#[derive(Debug, Default)]
struct BootstrapProgress {
    packages: u64,
    downloading: bool,
    downloaded: u64,
    set_up: u64,
}

impl BootstrapProgress {
    /// Looks at a line; returns step, done and total if it tells something.
    fn line(&mut self, line: &str) -> Option<(Step, u64, u64)> {
        if line.starts_with("I: ") {
            // Package lists are downloaded before; they are no packages.
            self.downloading =
                line.contains("downloading packages") || (self.downloading && !line.contains("running apt-get update"));
            return match line {
                "I: creating tarball..." => Some((Step::WriteImage, 0, 0)),
                _ => None,
            };
        }
        if let Some((_, rest)) = line.split_once(" upgraded, ")
            && let Some(n) = rest.split(' ').next().and_then(|n| n.parse::<u64>().ok())
        {
            self.packages = self.packages.saturating_add(n);
            return None;
        }
        if line.starts_with("Get:") && self.downloading {
            self.downloaded += 1;
            return Some((
                Step::DownloadPackages,
                self.downloaded,
                self.packages.max(self.downloaded),
            ));
        }
        if line.starts_with("Setting up ") {
            self.set_up += 1;
            return Some((Step::InstallPackages, self.set_up, self.packages.max(self.set_up)));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_sources_are_taken_over_when_complete() {
        let all = "http://a.example/debian/|bookworm|main|Debian\nhttp://a.example/debian/|bookworm-updates|main|Debian\n\
                   http://s.example/debian-security/|bookworm-security|main|Debian\nhttp://x.example/|bookworm|contrib|Debian\n\
                   http://o.example/|bookworm|main|Other\n";
        assert_eq!(
            sources(all, "bookworm"),
            [
                "deb http://a.example/debian/ bookworm main",
                "deb http://a.example/debian/ bookworm-updates main",
                "deb http://s.example/debian-security/ bookworm-security main",
            ]
        );
        assert!(sources(all, "trixie").is_empty());
        assert!(sources("http://a.example/debian/|bookworm|main|Debian\n", "bookworm").is_empty());
        assert!(sources(&all.replace("http://s.", "http://user:secret@s."), "bookworm").is_empty());
        assert!(sources(&all.replace("http://s.", "file:/srv/"), "bookworm").is_empty());
    }

    #[test]
    fn progress_of_the_tool() {
        let mut p = BootstrapProgress::default();
        for quiet in [
            "I: running apt-get update...",
            "Get:1 http://x bookworm InRelease [151 kB]",
            "I: downloading packages with apt...",
            "0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.",
        ] {
            assert_eq!(p.line(quiet), None, "{quiet}");
        }
        assert_eq!(
            p.line("Get:1 http://x bookworm/main amd64 libc6 [1 kB]"),
            Some((Step::DownloadPackages, 1, 2))
        );
        assert_eq!(
            p.line("Setting up libc6:amd64 (2.36) ..."),
            Some((Step::InstallPackages, 1, 2))
        );
        assert_eq!(p.line("I: creating tarball..."), Some((Step::WriteImage, 0, 0)));
    }

    #[test]
    fn ranges_of_subordinate_ids() {
        assert!(has_range("root:1:2\nann:100000:65536\n", "ann", "1000"));
        assert!(has_range("1000:100000:65536\n", "ann", "1000"));
        assert!(!has_range("ann:100000:1000\n", "ann", "1000"));
        assert!(!has_range("", "ann", "1000"));
    }
}
