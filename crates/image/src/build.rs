//! The bootstrap tool that writes the tar streams of the recipes.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::cancel::Cancel;
use crate::error::{Error, IoContext, Result};
use crate::ingest::{Ingested, ingest};
use crate::process::{Program, Run, find_program};
use crate::progress::{Progress, Step};
use crate::recipe::Recipe;
use crate::store::Staging;
use crate::tar::Scrub;

pub(crate) const MMDEBSTRAP: Program = Program {
    name: "mmdebstrap",
    package: "mmdebstrap",
    purpose: "build an image",
};
pub(crate) const UNSHARE: Program = Program {
    name: "unshare",
    package: "util-linux",
    purpose: "build an image",
};
pub(crate) const NEWUIDMAP: Program = Program {
    name: "newuidmap",
    package: "uidmap",
    purpose: "build an image without root",
};
pub(crate) const NEWGIDMAP: Program = Program {
    name: "newgidmap",
    package: "uidmap",
    purpose: "build an image without root",
};
pub(crate) const APT_GET: Program = Program {
    name: "apt-get",
    package: "apt",
    purpose: "build an image",
};
const APT_CONFIG: Program = Program {
    name: "apt-config",
    package: "apt",
    purpose: "build an image",
};
/// Variable that tells the tool's hooks where the scratch directory is.
const SCRATCH: &str = "BANGER_SCRATCH";
const BUILD_DEADLINE: Duration = Duration::from_secs(1800);
const LOOKUP: Duration = Duration::from_secs(30);

/// Builds a recipe's image at `target`. `scratch` is removed whatever happens, and `staging`, in which the target is, is held
/// until the tool has ended: it cleans up there when it is cancelled.
pub(crate) async fn bootstrap(
    recipe: &'static Recipe,
    scratch: Scratch,
    staging: Arc<Staging>,
    target: PathBuf,
    progress: &Progress,
) -> Result<Ingested> {
    let run = match crate::builder::socket() {
        Some(socket) => crate::builder::asking(recipe, &socket, BUILD_DEADLINE),
        None => prepare(recipe, &scratch).await?,
    };
    let run = run
        .shown(format!("mmdebstrap {}", recipe.suite))
        .hold(scratch)
        .hold(staging);
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

/// The run of the bootstrap tool that writes a recipe's tar stream.
pub(crate) async fn prepare(recipe: &'static Recipe, scratch: &Scratch) -> Result<Run> {
    let root = rustix::process::geteuid().is_root();
    // Looked for first: the missing tool is what the user must hear about.
    let tool = MMDEBSTRAP.find()?;
    let run = if root {
        // For root the tool mounts what packages need while they are configured. In a mount namespace of its own that goes with it, also
        // when it is killed.
        Run::new(UNSHARE, BUILD_DEADLINE)?.args(["--mount", "--"]).arg(tool)
    } else {
        NEWUIDMAP.find()?;
        NEWGIDMAP.find()?;
        check_subordinate_ids()?;
        crate::needs::user_namespaces(crate::needs::setting)?;
        Run::of(&tool, BUILD_DEADLINE)
    };
    let mut run = run
        .shown(MMDEBSTRAP.name)
        .args([
            "--verbose",
            "--format=tar",
            if root { "--mode=root" } else { "--mode=unshare" },
        ])
        .arg(format!("--variant={}", recipe.variant))
        .arg(format!("--include={}", recipe.packages.join(",")))
        .args(recipe.dpkg_options.iter().map(|filter| format!("--dpkgopt={filter}")))
        .env("TMPDIR", &scratch.path)
        .env(SCRATCH, &scratch.path);
    for hook in hooks(recipe, scratch.path())? {
        run = run.arg(hook);
    }
    for (kind, proxy) in proxies().await {
        run = run.arg(format!("--aptopt=Acquire::{kind}::Proxy \"{proxy}\""));
    }
    Ok(run.arg(recipe.suite).arg("-").args(mirrors(recipe.suite).await))
}

/// The bootstrap tool's options for what a recipe has besides packages. Scripts are written to `scratch`, from where the tool takes them.
fn hooks(recipe: &Recipe, scratch: &Path) -> Result<Vec<String>> {
    let mut hooks = Vec::new();
    if !recipe.locales.is_empty() {
        let generated = recipe.locales.join(", ");
        // Before `locales` is configured, which generates what it is told here. None of them is the system's default: that one would win
        // over the locale that somebody brings along by SSH.
        hooks.push(format!(
            "--essential-hook=printf '%s\\n' 'locales locales/locales_to_be_generated multiselect {generated}' \
             'locales locales/default_environment_locale select None' | chroot \"$1\" debconf-set-selections"
        ));
    }
    for (at, script) in recipe.scripts.iter().enumerate() {
        let file = scratch.join(format!("script-{at}"));
        std::fs::write(&file, script.text).on("write", &file)?;
        // The tool may read it as another user.
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).on("open up", &file)?;
        hooks.push(format!(
            "--customize-hook=install -m 0755 \"${SCRATCH}/script-{at}\" \"$1{}\"",
            script.path
        ));
    }
    Ok(hooks)
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

pub(crate) fn check_subordinate_ids() -> Result<()> {
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
