//! A git directory of ours that stands for that of a repository.
//!
//! ```text
//!   .git/config           ours, line by line          .git/objects/info/alternates ─▶ objects of the repository
//!   .git/HEAD             a copy                      .git/refs, packed-refs, logs ─▶ those of the repository
//! ```
//!
//! The repository's configuration is read as a file, and never in force. Of it come along what names a format, and what a branch
//! follows.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::workspace::git::{Git, User, finish};
use crate::workspace::place::{Place, small};
use crate::workspace::settings::{Settings, is_safe, key};

/// Largest configuration of a repository that is read, in bytes.
const MAX_CONFIG: u64 = 4 * 1024 * 1024;

/// What every git directory of ours says.
const CONFIG: &str = "[core]\n\trepositoryformatversion = 1\n\tbare = false\n\thooksPath = /dev/null\n\tfsmonitor = false\n\
                      \tuntrackedCache = false\n\tcommitGraph = false\n\tmultiPackIndex = false\n\tquotePath = false\n\
                      [protocol]\n\tallow = never\n[gc]\n\tauto = 0\n[maintenance]\n\tauto = false\n\
                      [pack]\n\tcompression = 1\n\tthreads = 2\n";

/// A repository as it is read.
#[derive(Debug, Clone)]
pub(crate) struct Mirror {
    /// Git, to be called on it.
    pub(crate) git: Git,
    /// Where it is.
    pub(crate) place: Place,
    /// Its own settings.
    pub(crate) settings: Settings,
    /// The user's settings, and the system's.
    pub(crate) user: Settings,
    /// Files with rules for what is ignored, besides git's own.
    pub(crate) excludes: Vec<PathBuf>,
    /// How objects are named: `sha1` or `sha256`.
    pub(crate) object_format: String,
}

/// Makes an empty git directory of ours, to be filled with a repository or with what stands for one.
pub(crate) fn empty(user: &User, object_format: &str) -> Result<Git> {
    let git = Git::new(user)?;
    let top = git.top();
    for dir in ["objects/info", "objects/pack", "info", "logs"] {
        make(&top.join(dir))?;
    }
    let extensions = format!("[extensions]\n\tobjectFormat = {object_format}\n");
    write(&top.join("config"), [CONFIG, &extensions].concat())?;
    write(&top.join("HEAD"), "ref: refs/heads/none\n")?;
    Ok(git)
}

impl Mirror {
    /// Of the repository whose work tree `here` (a canonical path) is in.
    pub(crate) fn of(here: &Path, user: &User) -> Result<Self> {
        let place = Place::find(here, &ceilings(user))?;
        // A first one reads the settings, from which follows what the second one is like.
        let reader = empty(user, "sha1")?;
        make(&reader.top().join("refs"))?;
        check_owner(&reader, &place, user)?;
        let settings = own_settings(&reader, &place)?;
        check_work_tree(&place, &settings)?;
        let object_format = format(&settings, b"extensions.objectformat", &["sha1", "sha256"])?;
        let references = format(&settings, b"extensions.refstorage", &["files", "reftable"])?;
        let user_settings = Settings::parse(&user_list(&reader, &place, &settings)?);
        let excludes = excludes(&reader, &place, &settings, user)?;

        let git = empty(user, &object_format)?;
        let top = git.top();
        let git_dir = if place.is_linked() {
            let dir = top.join("worktrees/tree");
            make(&dir.join("logs"))?;
            write(&dir.join("commondir"), "../..\n")?;
            dir
        } else {
            top.clone()
        };
        let git = git
            .linked(git_dir.clone())
            .with_work_tree(&place.root, &place.git_dir.join("index"));
        write(
            &top.join("objects/info/alternates"),
            alternate(&place.common.join("objects")),
        )?;
        for name in [
            "refs",
            "packed-refs",
            "shallow",
            "info/exclude",
            "info/attributes",
            "logs/refs",
        ] {
            link(&place.common.join(name), &top.join(name))?;
        }
        link(&place.git_dir.join("logs/HEAD"), &git_dir.join("logs/HEAD"))?;
        write(&git_dir.join("HEAD"), head(&place)?)?;
        if references == "reftable" {
            configure(&git, b"extensions.refStorage", references.as_bytes())?;
            link(&place.common.join("reftable"), &top.join("reftable"))?;
            if place.is_linked() {
                link(&place.git_dir.join("reftable"), &git_dir.join("reftable"))?;
            }
        }
        shared_indexes(&place, &git_dir)?;
        Ok(Self {
            git,
            place,
            settings,
            user: user_settings,
            excludes,
            object_format,
        })
    }

    /// The value that counts of a key that the repository or the user may set.
    pub(crate) fn setting(&self, key: &[u8]) -> Option<&[u8]> {
        self.settings.last(key).or_else(|| self.user.last(key))
    }

    /// Lets git know what a branch follows, so that `@{upstream}` means something.
    pub(crate) fn follow(&self, branch: &str) -> Result<()> {
        let remote_key = key("branch", branch.as_bytes(), "remote");
        let Some(remote) = self.settings.last(&remote_key) else {
            return Ok(());
        };
        configure(&self.git, &remote_key, remote)?;
        for key in [
            key("branch", branch.as_bytes(), "merge"),
            key("remote", remote, "fetch"),
        ] {
            if let Some(value) = self.settings.last(&key) {
                configure(&self.git, &key, value)?;
            }
        }
        Ok(())
    }
}

/// Sets a value in our own configuration.
pub(crate) fn configure(git: &Git, key: &[u8], value: &[u8]) -> Result<()> {
    let file = git.top().join("config");
    let bytes = |bytes: &[u8]| std::ffi::OsStr::from_bytes(bytes).to_owned();
    let arguments = [
        "config".into(),
        "--file".into(),
        file.into_os_string(),
        "--".into(),
        bytes(key),
        bytes(value),
    ];
    git.output(&arguments, b"").map(drop)
}

fn ceilings(user: &User) -> Vec<PathBuf> {
    let listed = user.get("GIT_CEILING_DIRECTORIES").unwrap_or_default();
    std::env::split_paths(listed)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.canonicalize().unwrap_or(dir))
        .collect()
}

/// A repository that belongs to another user could be changed while it is read. As git does, it is refused unless
/// `safe.directory` of the user names it.
fn check_owner(reader: &Git, place: &Place, user: &User) -> Result<()> {
    let own = rustix::process::geteuid().as_raw();
    let mut users = vec![own];
    if own == 0 {
        let sudo = user.get("SUDO_UID").and_then(|uid| uid.to_str()?.parse::<u32>().ok());
        users.extend(sudo);
    }
    if place.is_owned_by(&users)? {
        return Ok(());
    }
    let mut command = reader.user_command(None);
    command.args([
        "config",
        "--includes",
        "--type=path",
        "-z",
        "--get-all",
        "safe.directory",
    ]);
    let values: Vec<Vec<u8>> = finish(command, b"")?
        .stdout
        .split(|&b| b == 0)
        .map(<[u8]>::to_vec)
        .collect();
    // The last one is what follows the last zero.
    let values = values.split_last().map_or(&[][..], |(_, values)| values);
    if is_safe(values, place.root.as_os_str().as_bytes()) {
        return Ok(());
    }
    Err(
        Error::failed(format!("repository {} belongs to another user", place.root.display())).hint(format!(
            "if you trust that user: git config --global --add safe.directory {}",
            place.root.display()
        )),
    )
}

/// The repository's settings, from its files alone: nothing is included.
fn own_settings(reader: &Git, place: &Place) -> Result<Settings> {
    let mut settings = Settings::parse(&file_list(reader, &place.common.join("config"))?);
    if settings.flag(b"extensions.worktreeconfig") == Some(true) {
        settings.add(&file_list(reader, &place.git_dir.join("config.worktree"))?);
    }
    Ok(settings)
}

/// What a file of settings says, nothing where there is none.
fn file_list(reader: &Git, file: &Path) -> Result<Vec<u8>> {
    match std::fs::symlink_metadata(file) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("look at", file, e)),
        Ok(found) if found.len() > MAX_CONFIG => {
            return Err(Error::failed(format!("{} is too long for what it is", file.display())));
        }
        Ok(_) => {}
    }
    let file = file.as_os_str();
    let [config, name, plain, list, zeros] =
        ["config", "--file", "--no-includes", "--list", "-z"].map(std::ffi::OsStr::new);
    reader.output(&[config, name, file, plain, list, zeros], b"")
}

/// The work tree is where `.git` is. Where the repository says that it is elsewhere, the index does not fit what is here.
fn check_work_tree(place: &Place, settings: &Settings) -> Result<()> {
    if !place.is_linked() && settings.flag(b"core.bare") == Some(true) {
        return Err(Error::failed(format!(
            "{} is a bare repository, it has no files to work on",
            place.root.display()
        ))
        .hint("clone it and name the clone"));
    }
    let Some(claimed) = settings.last(b"core.worktree").filter(|_| !place.is_linked()) else {
        return Ok(());
    };
    let claimed = place.git_dir.join(std::ffi::OsStr::from_bytes(claimed));
    if claimed.canonicalize().is_ok_and(|path| path == place.root) {
        return Ok(());
    }
    Err(Error::failed(format!(
        "the repository at {} claims {} as its work tree",
        place.root.display(),
        claimed.display()
    ))
    .hint("only a work tree with its own .git is copied; unset core.worktree"))
}

/// A format of the repository, out of those that are known. The first one counts where none is named.
fn format(settings: &Settings, key: &[u8], known: &[&str]) -> Result<String> {
    let Some(named) = settings.last(key) else {
        return Ok(known[0].to_owned());
    };
    let found = known.iter().find(|k| named.eq_ignore_ascii_case(k.as_bytes()));
    found.map(|k| (*k).to_owned()).ok_or_else(|| {
        let (key, named) = (String::from_utf8_lossy(key), String::from_utf8_lossy(named));
        Error::new(
            Kind::Unsupported,
            format!(
                "the repository is of the unknown format {key} = {}",
                named.escape_debug()
            ),
        )
    })
}

/// The user's settings. Conditions of theirs may ask for the directory and for the URL of a remote.
fn user_list(reader: &Git, place: &Place, settings: &Settings) -> Result<Vec<u8>> {
    let mut command = reader.user_command(Some(&place.git_dir));
    command.args(["config", "--includes", "--list", "-z"]);
    if let Some(url) = settings.last(b"remote.origin.url") {
        command
            .env("GIT_CONFIG_COUNT", "1")
            .env("GIT_CONFIG_KEY_0", "remote.origin.url")
            .env("GIT_CONFIG_VALUE_0", std::ffi::OsStr::from_bytes(url));
    }
    let output = finish(command, b"")?;
    if output.success {
        return Ok(output.stdout);
    }
    let lines = output.stderr.lines().take(10).map(str::to_owned).collect();
    Err(Error::failed("git cannot read your own configuration")
        .details(lines)
        .hint("see `git config --global --list`"))
}

/// Files with patterns of what is ignored: the user's, and the one that the repository names. Both count, so that a repository
/// can't undo what the user ignores everywhere.
fn excludes(reader: &Git, place: &Place, settings: &Settings, user: &User) -> Result<Vec<PathBuf>> {
    let mut command = reader.user_command(Some(&place.git_dir));
    command.args([
        "config",
        "--includes",
        "--type=path",
        "-z",
        "--get",
        "core.excludesFile",
    ]);
    let said = finish(command, b"")?.stdout;
    let home = user.get("HOME").map(PathBuf::from);
    let own = match said.strip_suffix(b"\0") {
        Some(path) => Some(PathBuf::from(std::ffi::OsString::from_vec(path.to_vec()))),
        None => user
            .get("XDG_CONFIG_HOME")
            .filter(|dir| !dir.is_empty())
            .map(PathBuf::from)
            .or_else(|| home.as_ref().map(|home| home.join(".config")))
            .map(|dir| dir.join("git/ignore")),
    };
    let theirs = settings.last(b"core.excludesfile").map(|path| {
        let below_home = path.strip_prefix(b"~/").zip(home.as_ref());
        match below_home {
            Some((rest, home)) => home.join(std::ffi::OsStr::from_bytes(rest)),
            None => PathBuf::from(std::ffi::OsStr::from_bytes(path)),
        }
    });
    let named = own.into_iter().chain(theirs).map(|path| place.root.join(path));
    // A pipe would be waited for.
    Ok(named.filter(|path| path.is_file()).collect())
}

/// The line of a file of alternates.
fn alternate(objects: &Path) -> Vec<u8> {
    let mut line = vec![b'"'];
    for &byte in objects.as_os_str().as_bytes() {
        match byte {
            b'"' | b'\\' => line.extend([b'\\', byte]),
            b'\n' => line.extend(b"\\n"),
            byte => line.push(byte),
        }
    }
    line.extend(b"\"\n");
    line
}

/// What `HEAD` says: a reference or a commit.
fn head(place: &Place) -> Result<Vec<u8>> {
    let text = small(&place.git_dir.join("HEAD"))?;
    let line = text.trim_ascii_end();
    let sound = match line.strip_prefix(b"ref:") {
        Some(name) => name.trim_ascii_start().starts_with(b"refs/") && !line.contains(&b'\n'),
        None => !line.is_empty() && line.iter().all(u8::is_ascii_hexdigit),
    };
    if sound {
        return Ok(text);
    }
    Err(Error::failed(format!(
        "HEAD of the repository {} says nothing that is understood",
        place.root.display()
    )))
}

/// The rest of an index that is split.
fn shared_indexes(place: &Place, git_dir: &Path) -> Result<()> {
    let entries = std::fs::read_dir(&place.git_dir).map_err(|e| Error::io("read", &place.git_dir, e))?;
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("read", &place.git_dir, e))?;
        let name = entry.file_name();
        if name.as_bytes().starts_with(b"sharedindex.") && entry.file_type().is_ok_and(|kind| kind.is_file()) {
            link(&entry.path(), &git_dir.join(&name))?;
        }
    }
    Ok(())
}

fn make(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io("make", dir, e))
}

fn write(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    std::fs::write(path, content).map_err(|e| Error::io("write", path, e))
}

/// Links to something of the repository that is there.
fn link(target: &Path, path: &Path) -> Result<()> {
    if target.symlink_metadata().is_err() {
        return Ok(());
    }
    symlink(target, path).map_err(|e| Error::io("make", path, e))
}
