//! Whether a process is the one that was meant.
//!
//! A pid is a number that is used again. What makes a process unmistakable is pid *and* start time within one boot of the
//! host; that it still is what it was started as, its name shows. A signal goes through a pidfd that was opened before the
//! identity was checked: from then on the descriptor cannot come to mean another process.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::sys;

/// What `/proc/PID/stat` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Process.
    pub pid: u32,
    /// Name of its main thread, at most 15 bytes.
    pub comm: String,
    /// State: `R`, `S`, `Z` …
    pub state: char,
    /// Start time in clock ticks since boot.
    pub start_time: u64,
}

impl Stat {
    /// Reads the text of `/proc/PID/stat`. The name may hold anything, so it ends at the *last* parenthesis.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let open = text.iter().position(|b| *b == b'(')?;
        let close = text.iter().rposition(|b| *b == b')')?;
        let comm = text.get(open + 1..close)?;
        let pid = std::str::from_utf8(&text[..open]).ok()?.trim().parse().ok()?;
        let rest = std::str::from_utf8(&text[close + 1..]).ok()?;
        let mut fields = rest.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        // Field 3 is the state, so field 22 is the eighteenth after it.
        let start_time = fields.nth(18)?.parse().ok()?;
        Some(Self {
            pid,
            comm: String::from_utf8_lossy(comm).into_owned(),
            state,
            start_time,
        })
    }

    /// Reads it for a process. `Ok(None)`: there is no such process.
    pub fn read(proc: &Path, pid: u32) -> io::Result<Option<Self>> {
        let path = proc.join(pid.to_string()).join("stat");
        let Some(text) = read_file(&path, 4096)? else {
            return Ok(None);
        };
        let stat = Self::parse(&text).filter(|stat| stat.pid == pid);
        stat.map(Some).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("cannot understand {}", path.display()),
            )
        })
    }

    /// Whether the process has ended and is only waited for.
    pub fn ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

/// What a process must be to be the one that was meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Process.
    pub pid: u32,
    /// Its start time.
    pub start_time: u64,
    /// What its name must begin with.
    pub comm_prefix: String,
}

/// Why a process is not the one that was meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mismatch {
    /// It has ended. Nothing can be left of it.
    Gone(String),
    /// It cannot be told.
    Unclear(String),
}

impl Mismatch {
    /// The reason.
    pub fn why(&self) -> &str {
        match self {
            Self::Gone(why) | Self::Unclear(why) => why,
        }
    }
}

/// Compares what is expected with what `/proc` says.
pub fn verify(proc: &Path, expected: &Expected) -> Result<Stat, Mismatch> {
    let pid = expected.pid;
    let stat = match Stat::read(proc, pid) {
        Ok(Some(stat)) => stat,
        // Without a /proc every process would seem to be gone.
        Ok(None) if proc.join("self").symlink_metadata().is_err() => {
            return Err(Mismatch::Unclear(format!("{} is not mounted", proc.display())));
        }
        Ok(None) => return Err(Mismatch::Gone(format!("there is no process {pid}"))),
        Err(e) => return Err(Mismatch::Unclear(format!("cannot look at process {pid}: {e}"))),
    };
    if stat.start_time != expected.start_time {
        return Err(Mismatch::Gone(format!(
            "process {pid} is another one ({}), started at another time",
            stat.comm.escape_default()
        )));
    }
    if stat.ended() {
        return Err(Mismatch::Gone(format!("process {pid} has ended")));
    }
    if !stat.comm.starts_with(&expected.comm_prefix) {
        return Err(Mismatch::Unclear(format!(
            "process {pid} calls itself {}, not {}",
            stat.comm.escape_default(),
            expected.comm_prefix
        )));
    }
    Ok(stat)
}

/// A process that was verified, held by a descriptor.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    fd: OwnedFd,
}

impl Process {
    /// Opens a process and verifies it afterwards.
    pub fn open(proc: &Path, expected: &Expected) -> Result<Self, Mismatch> {
        let pid = i32::try_from(expected.pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| Mismatch::Gone(format!("{} is no process", expected.pid)))?;
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(Errno::SRCH) => return Err(Mismatch::Gone(format!("there is no process {}", expected.pid))),
            Err(e) => return Err(Mismatch::Unclear(format!("cannot open process {}: {e}", expected.pid))),
        };
        verify(proc, expected)?;
        Ok(Self { pid: expected.pid, fd })
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a signal. That it has ended meanwhile is no error.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let signal = Signal::from_named_raw(signal).ok_or(io::ErrorKind::InvalidInput)?;
        match pidfd_send_signal(&self.fd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits until it has ended.
    pub async fn ended(self) -> io::Result<()> {
        let fd = sys::watch_readable(self.fd)?;
        fd.readable().await.map(drop)
    }
}

/// The arguments of a process, as it was started. `None`: there is no such process, or none that shows them.
pub fn arguments(proc: &Path, pid: u32) -> Option<Vec<Vec<u8>>> {
    let text = read_file(&proc.join(pid.to_string()).join("cmdline"), 256 << 10).ok()??;
    let text = text.strip_suffix(b"\0").unwrap_or(&text);
    (!text.is_empty()).then(|| text.split(|b| *b == 0).map(<[u8]>::to_vec).collect())
}

/// Processes of a user.
pub fn processes(proc: &Path, uid: u32) -> io::Result<Vec<u32>> {
    use std::os::unix::fs::MetadataExt;
    let mut found = all_processes(proc)?;
    found.retain(|pid| std::fs::metadata(proc.join(pid.to_string())).is_ok_and(|m| m.uid() == uid));
    Ok(found)
}

/// Processes of all users.
pub fn all_processes(proc: &Path) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(proc)? {
        found.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(found)
}

/// Reads a file, bounded. `None`: it is not there, or its process is gone.
pub(crate) fn read_file(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let mut text = Vec::new();
    match File::open(path).and_then(|f| f.take(limit).read_to_end(&mut text)) {
        Ok(_) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;

    fn stat_text(pid: u32, comm: &str, state: char, start: u64) -> String {
        format!(
            "{pid} ({comm}) {state} 1 2 3 0 -1 4194560 1 0 0 0 5 6 0 0 20 0 4 0 {start} 1000 200 18446744073709551615\n"
        )
    }

    /// A `/proc` with one process.
    fn tree(pid: u32, stat: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("self")).unwrap();
        fs::create_dir(dir.path().join(pid.to_string())).unwrap();
        fs::write(dir.path().join(pid.to_string()).join("stat"), stat).unwrap();
        dir
    }

    fn expected() -> Expected {
        Expected {
            pid: 42,
            start_time: 777,
            comm_prefix: "banger-".to_owned(),
        }
    }

    fn gone(stat: &str) -> bool {
        let dir = tree(42, stat);
        matches!(verify(dir.path(), &expected()), Err(Mismatch::Gone(_)))
    }

    fn unclear(stat: &str) -> bool {
        let dir = tree(42, stat);
        matches!(verify(dir.path(), &expected()), Err(Mismatch::Unclear(_)))
    }

    #[test]
    fn the_one_that_was_meant() {
        let dir = tree(42, &stat_text(42, "banger-01234567", 'S', 777));
        let stat = verify(dir.path(), &expected()).unwrap();
        assert_eq!((stat.comm.as_str(), stat.state), ("banger-01234567", 'S'));
    }

    #[test]
    fn a_stopped_one_is_alive() {
        let dir = tree(42, &stat_text(42, "banger-01234567", 'T', 777));
        assert!(verify(dir.path(), &expected()).is_ok());
    }

    #[test]
    fn a_dead_one() {
        let dir = tree(43, &stat_text(43, "banger-01234567", 'S', 777));
        assert!(matches!(verify(dir.path(), &expected()), Err(Mismatch::Gone(_))));
    }

    #[test]
    fn a_number_used_again() {
        assert!(gone(&stat_text(42, "banger-01234567", 'S', 778)));
        assert!(gone(&stat_text(42, "bash", 'S', 778)));
    }

    #[test]
    fn another_name_is_not_touched() {
        assert!(unclear(&stat_text(42, "bash", 'S', 777)));
    }

    #[test]
    fn a_zombie_is_gone() {
        assert!(gone(&stat_text(42, "banger-01234567", 'Z', 777)));
    }

    #[test]
    fn garbage_proves_nothing() {
        for text in [
            "",
            "42",
            "42 (",
            "42 )(",
            "x (y) S",
            "42 (banger-) S 1 2",
            "\0\0",
            "43 (banger-0) S 1 2 3 0 -1 4194560 1 0 0 0 5 6 0 0 20 0 4 0 777 1",
            "42 (banger-0) S 1 2 3 0 -1 4194560 1 0 0 0 5 6 0 0 20 0 4 0 seven 1",
        ] {
            assert!(unclear(text), "{text:?}");
        }
    }

    #[test]
    fn without_proc_nothing_is_known() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(verify(dir.path(), &expected()), Err(Mismatch::Unclear(_))));
        assert!(matches!(
            verify(Path::new("/nonexistent"), &expected()),
            Err(Mismatch::Unclear(_))
        ));
    }

    #[test]
    fn names_may_hold_spaces_and_parentheses() {
        for comm in ["a b", "a) S 1 2 3", "((", "))", ") Z 1 1", "", "a\nb"] {
            let stat = Stat::parse(stat_text(42, comm, 'S', 777).as_bytes()).unwrap();
            assert_eq!((stat.comm.as_str(), stat.start_time, stat.state), (comm, 777, 'S'));
        }
    }

    proptest::proptest! {
        #[test]
        fn no_stat_text_panics(text in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = Stat::parse(&text);
        }

        #[test]
        fn any_name_is_read_back(comm in "\\PC{0,15}", pid in 1u32..4_194_304, start: u64) {
            let stat = Stat::parse(stat_text(pid, &comm, 'R', start).as_bytes()).unwrap();
            proptest::prop_assert_eq!((stat.pid, stat.comm, stat.start_time), (pid, comm, start));
        }
    }

    #[test]
    fn arguments_are_split_at_nul() {
        let dir = tree(42, "");
        fs::write(dir.path().join("42/cmdline"), b"qemu\0-name\0\0x y\0").unwrap();
        let words = arguments(dir.path(), 42).unwrap();
        assert_eq!(words, [b"qemu".as_slice(), b"-name", b"", b"x y"]);
        fs::write(dir.path().join("42/cmdline"), b"").unwrap();
        assert_eq!(arguments(dir.path(), 42), None);
        assert_eq!(arguments(dir.path(), 43), None);
    }

    #[tokio::test]
    async fn a_real_process_is_signalled_and_waited_for() {
        let proc = Path::new("/proc");
        let mut child = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        // Between fork and exec it still has the name of the test.
        let stat = loop {
            let stat = Stat::read(proc, child.id()).unwrap().unwrap();
            if stat.comm == "sleep" {
                break stat;
            }
            std::thread::yield_now();
        };
        let mut expected = Expected {
            pid: child.id(),
            start_time: stat.start_time,
            comm_prefix: "sleep".to_owned(),
        };
        expected.start_time += 1;
        assert!(matches!(Process::open(proc, &expected), Err(Mismatch::Gone(_))));
        expected.start_time -= 1;
        let process = Process::open(proc, &expected).unwrap();
        let watcher = Process::open(proc, &expected).unwrap();
        process.signal(15).unwrap();
        tokio::time::timeout(Duration::from_secs(10), watcher.ended())
            .await
            .unwrap()
            .unwrap();
        // Not waited for yet: a zombie.
        assert!(matches!(Process::open(proc, &expected), Err(Mismatch::Gone(_))));
        child.wait().unwrap();
        assert!(matches!(Process::open(proc, &expected), Err(Mismatch::Gone(_))));
        process.signal(15).unwrap();
    }
}
