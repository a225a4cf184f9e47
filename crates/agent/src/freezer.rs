//! The guest's control groups: everything in them but the agent is frozen and thawed.
//!
//! ```text
//!  /sys/fs/cgroup            kernel threads, the agent as process 1
//!    init.scope, *.slice     systemd's            ── frozen
//!    banger.system           programs that were in the root, where nothing can be frozen ── frozen
//!    banger.3                what the agent started after its last freeze ── frozen
//!    banger.4                the agent alone
//! ```
//!
//! With each freeze the agent moves into a new group and leaves those behind that it has started. So what it starts need not be
//! moved anywhere: a move makes the kernel wait for all its processors, which costs a freeze little and the start of a session
//! much.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

/// How long everything may take to stand still.
const LIMIT: Duration = Duration::from_secs(2);

/// The agent's groups are called this and a number.
const OWN: &str = "banger.";

/// Where programs go that were in the root.
const SYSTEM: &str = "banger.system";

/// Most that is read of a control file.
const MAX: u64 = 1024 * 1024;

/// Why nothing was frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// A control file did not do.
    #[error("can't {what}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Programs that don't stop, for example because their disk does not answer.
    #[error("control group `{group}` does not freeze within {seconds} s")]
    Stuck {
        /// The group.
        group: String,
        /// How long it was given.
        seconds: f32,
    },
    /// Programs appear in the root faster than they can be moved.
    #[error("the root control group does not become empty within {seconds} s")]
    Crowded {
        /// How long it was given.
        seconds: f32,
    },
}

fn doing<T>(what: impl FnOnce() -> String, result: io::Result<T>) -> Result<T, FreezeError> {
    result.map_err(|source| FreezeError::Io { what: what(), source })
}

/// The control groups below one root.
pub struct Freezer {
    root: PathBuf,
    proc: PathBuf,
    limit: Duration,
    /// What this agent has frozen. What the guest itself froze before stays so.
    held: Mutex<Option<BTreeSet<String>>>,
}

impl Freezer {
    /// Those of the guest.
    pub fn new() -> Self {
        Self::at(Path::new("/sys/fs/cgroup"), Path::new("/proc"), LIMIT)
    }

    /// Those at `root`, of the processes at `proc`, with so much time to stand still.
    pub fn at(root: &Path, proc: &Path, limit: Duration) -> Self {
        Self {
            root: root.to_path_buf(),
            proc: proc.to_path_buf(),
            limit,
            held: Mutex::default(),
        }
    }

    /// Freezes everything but the calling process, kernel threads, and `spare` where it is in the root group. If that can't
    /// be done, nothing is frozen.
    pub fn freeze(&self, spare: Option<i32>) -> Result<(), FreezeError> {
        let result = self.try_freeze(spare);
        if result.is_err() {
            // What is told is why it did not freeze; what can't be thawed now is frozen, and that shows.
            let _ = self.thaw();
        }
        result
    }

    fn try_freeze(&self, spare: Option<i32>) -> Result<(), FreezeError> {
        let until = Instant::now() + self.limit;
        let own = self.step_aside()?;
        *self.held() = Some(BTreeSet::new());
        self.empty_root(spare, until)?;
        let mut done = BTreeSet::from([own]);
        loop {
            // A group that was made meanwhile by somebody who was not frozen yet.
            let new: Vec<String> = self.groups()?.into_iter().filter(|g| !done.contains(g)).collect();
            if new.is_empty() {
                return Ok(());
            }
            for group in &new {
                if self.is_set(group) {
                    continue;
                }
                self.set(group, true)?;
                self.held().get_or_insert_default().insert(group.clone());
            }
            for group in &new {
                self.wait(group, until)?;
            }
            done.extend(new);
        }
    }

    /// Lets go on what was frozen.
    pub fn thaw(&self) -> Result<(), FreezeError> {
        let groups = match std::mem::take(&mut *self.held()) {
            Some(groups) => groups,
            // Frozen by an earlier agent, or not at all.
            None => self.groups()?.into_iter().filter(|g| self.is_set(g)).collect(),
        };
        let mut result = Ok(());
        for group in groups {
            match self.set(&group, false) {
                Err(FreezeError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(e) => {
                    self.held().get_or_insert_default().insert(group);
                    result = result.and(Err(e));
                }
                Ok(()) => {}
            }
        }
        result
    }

    /// Whether something is frozen, as the kernel says.
    pub fn looks_frozen(&self) -> bool {
        self.groups()
            .is_ok_and(|groups| groups.iter().any(|group| self.is_set(group)))
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Option<BTreeSet<String>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn groups(&self) -> Result<Vec<String>, FreezeError> {
        let list = || -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in std::fs::read_dir(&self.root)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    names.extend(entry.file_name().into_string().ok());
                }
            }
            Ok(names)
        };
        doing(|| format!("list the control groups in {}", self.root.display()), list())
    }

    fn file(&self, group: &str, name: &str) -> PathBuf {
        self.root.join(group).join(name)
    }

    fn is_set(&self, group: &str) -> bool {
        std::fs::read(self.file(group, "cgroup.freeze")).is_ok_and(|text| text.starts_with(b"1"))
    }

    fn set(&self, group: &str, frozen: bool) -> Result<(), FreezeError> {
        let written = std::fs::write(self.file(group, "cgroup.freeze"), if frozen { "1" } else { "0" });
        doing(
            || format!("{} control group `{group}`", if frozen { "freeze" } else { "thaw" }),
            written,
        )
    }

    /// Gives the agent a group of its own, and tells its name.
    fn step_aside(&self) -> Result<String, FreezeError> {
        for group in self.groups()? {
            if group.starts_with(OWN) {
                // Only one that is empty goes.
                let _ = std::fs::remove_dir(self.root.join(group));
            }
        }
        let mut name = SYSTEM.to_owned();
        for number in 0..u32::MAX {
            name = format!("{OWN}{number}");
            match std::fs::create_dir(self.root.join(&name)) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                other => {
                    doing(|| format!("make control group `{name}`"), other)?;
                    break;
                }
            }
        }
        let moved = std::fs::write(self.file(&name, "cgroup.procs"), std::process::id().to_string());
        doing(|| format!("move the agent into control group `{name}`"), moved)?;
        Ok(name)
    }

    /// Moves the programs of the root group where they can be frozen.
    fn empty_root(&self, spare: Option<i32>, until: Instant) -> Result<(), FreezeError> {
        loop {
            let text = doing(
                || "read the processes of the root control group".to_owned(),
                std::fs::read_to_string(self.root.join("cgroup.procs")),
            )?;
            let programs: Vec<i32> = pids(&text)
                .filter(|pid| Some(*pid) != spare && self.is_program(*pid))
                .collect();
            if programs.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(FreezeError::Crowded {
                    seconds: self.limit.as_secs_f32(),
                });
            }
            let directory = self.root.join(SYSTEM);
            if !directory.is_dir() {
                doing(
                    || format!("make control group `{SYSTEM}`"),
                    std::fs::create_dir(&directory),
                )?;
            }
            for pid in programs {
                match std::fs::write(directory.join("cgroup.procs"), pid.to_string()) {
                    // It has ended.
                    Err(e) if e.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {}
                    other => doing(|| format!("move process {pid} into control group `{SYSTEM}`"), other)?,
                }
            }
        }
    }

    /// Kernel threads have no program; what has ended has none any more.
    fn is_program(&self, pid: i32) -> bool {
        std::fs::read_link(self.proc.join(pid.to_string()).join("exe")).is_ok()
    }

    fn wait(&self, group: &str, until: Instant) -> Result<(), FreezeError> {
        let what = || format!("read whether control group `{group}` is frozen");
        let mut file = match File::open(self.file(group, "cgroup.events")) {
            // It was removed.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => doing(what, other)?,
        };
        loop {
            let mut text = String::new();
            let read = file
                .rewind()
                .and_then(|()| (&mut file).take(MAX).read_to_string(&mut text));
            match read {
                Err(e) if e.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => return Ok(()),
                other => doing(what, other)?,
            };
            if says_frozen(&text) {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(FreezeError::Stuck {
                    group: group.to_owned(),
                    seconds: self.limit.as_secs_f32(),
                });
            }
            let left = rustix::time::Timespec::try_from(left).ok();
            let mut fds = [PollFd::new(&file, PollFlags::PRI)];
            match rustix::event::poll(&mut fds, left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => doing(what, Err(e.into()))?,
            }
        }
    }
}

impl Default for Freezer {
    fn default() -> Self {
        Self::new()
    }
}

/// The process numbers of a `cgroup.procs`.
pub(crate) fn pids(text: &str) -> impl Iterator<Item = i32> {
    // 0 stands for a process that can't be named here.
    text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0)
}

/// Whether a `cgroup.events` says so.
fn says_frozen(text: &str) -> bool {
    text.lines().any(|line| line == "frozen 1")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree {
        dir: tempfile::TempDir,
    }

    impl Tree {
        fn new(groups: &[(&str, &str)], root_procs: &str, programs: &[i32]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir_all(dir.path().join("cg")).unwrap();
            std::fs::write(dir.path().join("cg/cgroup.procs"), root_procs).unwrap();
            let tree = Self { dir };
            for (name, events) in groups {
                tree.group(name, events);
            }
            for pid in programs {
                let at = tree.dir.path().join(format!("proc/{pid}"));
                std::fs::create_dir_all(&at).unwrap();
                std::os::unix::fs::symlink("/bin/x", at.join("exe")).unwrap();
            }
            tree
        }

        fn group(&self, name: &str, events: &str) {
            let at = self.dir.path().join("cg").join(name);
            std::fs::create_dir_all(&at).unwrap();
            std::fs::write(at.join("cgroup.freeze"), "0\n").unwrap();
            std::fs::write(at.join("cgroup.events"), events).unwrap();
        }

        fn freezer(&self) -> Freezer {
            let at = self.dir.path();
            Freezer::at(&at.join("cg"), &at.join("proc"), Duration::from_millis(50))
        }

        fn read(&self, path: &str) -> String {
            std::fs::read_to_string(self.dir.path().join("cg").join(path)).unwrap()
        }
    }

    const YES: &str = "populated 1\nfrozen 1\n";
    const NO: &str = "populated 1\nfrozen 0\n";

    #[test]
    fn all_but_the_agent() {
        let tree = Tree::new(&[("init.scope", YES), ("system.slice", YES)], "2\n3\n", &[]);
        let freezer = tree.freezer();
        assert!(!freezer.looks_frozen());
        freezer.freeze(None).unwrap();
        assert_eq!(tree.read("init.scope/cgroup.freeze"), "1");
        assert_eq!(tree.read("system.slice/cgroup.freeze"), "1");
        assert_eq!(tree.read("banger.0/cgroup.procs"), std::process::id().to_string());
        assert!(!tree.dir.path().join("cg/banger.0/cgroup.freeze").exists());
        assert!(!tree.dir.path().join("cg/banger.system").exists());
        assert!(freezer.looks_frozen());
        freezer.thaw().unwrap();
        assert!(!freezer.looks_frozen());
    }

    #[test]
    fn the_next_freeze_leaves_behind_what_the_agent_started() {
        let tree = Tree::new(&[("banger.0", YES)], "", &[]);
        tree.freezer().freeze(None).unwrap();
        assert_eq!(tree.read("banger.0/cgroup.freeze"), "1");
        assert_eq!(tree.read("banger.1/cgroup.procs"), std::process::id().to_string());
    }

    #[test]
    fn what_does_not_freeze_is_named_and_all_is_thawed() {
        let tree = Tree::new(&[("good.slice", YES), ("bad.slice", NO)], "", &[]);
        let freezer = tree.freezer();
        let error = freezer.freeze(None).unwrap_err();
        assert!(
            matches!(&error, FreezeError::Stuck { group, .. } if group == "bad.slice"),
            "{error}"
        );
        assert!(!freezer.looks_frozen());
    }

    #[test]
    fn what_the_guest_froze_itself_stays_frozen() {
        let tree = Tree::new(&[("user.slice", YES), ("system.slice", YES)], "", &[]);
        std::fs::write(tree.dir.path().join("cg/user.slice/cgroup.freeze"), "1\n").unwrap();
        let freezer = tree.freezer();
        freezer.freeze(None).unwrap();
        freezer.thaw().unwrap();
        assert_eq!(tree.read("user.slice/cgroup.freeze"), "1\n");
        assert_eq!(tree.read("system.slice/cgroup.freeze"), "0");
    }

    #[test]
    fn another_agent_thaws_too() {
        let tree = Tree::new(&[("system.slice", YES)], "", &[]);
        tree.freezer().freeze(None).unwrap();
        let next = tree.freezer();
        assert!(next.looks_frozen());
        next.thaw().unwrap();
        assert!(!next.looks_frozen());
    }

    #[test]
    fn programs_in_the_root_are_moved_and_kernel_threads_are_not() {
        // The fake root never loses them, so this ends as crowded; what was moved is what counts.
        let tree = Tree::new(&[], "1\n2\n40\n41\n0\n", &[1, 41]);
        let error = tree.freezer().freeze(Some(1)).unwrap_err();
        assert!(matches!(error, FreezeError::Crowded { .. }), "{error}");
        assert_eq!(tree.read("banger.system/cgroup.procs"), "41");
    }

    #[test]
    fn a_guest_without_groups_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = Freezer::at(&dir.path().join("none"), dir.path(), LIMIT)
            .freeze(None)
            .unwrap_err();
        assert!(error.to_string().contains("list the control groups"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read(text in "\\PC*", numbers in proptest::collection::vec(1..i32::MAX, 0..20)) {
            let _ = (pids(&text).count(), says_frozen(&text));
            let lines: String = numbers.iter().map(|n| format!("{n}\n")).collect();
            proptest::prop_assert_eq!(pids(&lines).collect::<Vec<_>>(), numbers);
        }
    }
}
