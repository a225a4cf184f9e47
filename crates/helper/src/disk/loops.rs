//! Loop devices: files as block devices. One read-only loop for each base, shared by all disks over it; one for each file of changes.
//!
//! Every loop clears itself when nobody has it open any more, so the kernel does the count of references: the last device-mapper
//! device over a base takes the loop with it. Until that device is there, the loop is held open here.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use banger_system::helper::{HelperCode, HelperError};
use rustix::fs::{Mode, OFlags, Stat};
use rustix::io::Errno;

use super::gate::{Access, Checked, Storage};
use super::sys::{self, LoopInfo};
use crate::ctx::{Ctx, error, failed};

const CONTROL: &str = "/dev/loop-control";
/// What the name of a loop begins with that is banger's.
pub(super) const MARK: &str = "banger:";
/// Others take free loops too; so often another one is tried.
const TRIES: usize = 32;
/// Loops have sectors of this size, whatever the file system below.
const BLOCK: u32 = 512;
/// Between the search for a base's loop and its making nobody else makes one.
static SEARCH: Mutex<()> = Mutex::new(());

/// A loop, held.
#[derive(Debug)]
pub(super) struct Loop {
    /// Its number.
    pub(super) number: u32,
    _fd: OwnedFd,
}

impl Loop {
    /// `7:N`
    pub(super) fn device(&self) -> String {
        format!("7:{}", self.number)
    }
}

/// What `/sys` says of a loop that is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Listed {
    number: u32,
    read_only: bool,
    autoclear: bool,
}

/// The loops that are in use.
fn listed(sys: &Path) -> Vec<Listed> {
    let Ok(entries) = std::fs::read_dir(sys.join("block")) else {
        return Vec::new();
    };
    let flag = |path: std::path::PathBuf| std::fs::read_to_string(path).is_ok_and(|text| text.trim() == "1");
    let mut found: Vec<Listed> = entries
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix("loop")?.parse().ok()?;
            // Only a loop that is bound has this directory.
            let bound = entry.path().join("loop");
            bound.is_dir().then(|| Listed {
                number,
                read_only: flag(entry.path().join("ro")),
                autoclear: flag(bound.join("autoclear")),
            })
        })
        .collect();
    found.sort_by_key(|listed| listed.number);
    found
}

fn open(number: u32, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(format!("/dev/loop{number}"), flags | OFlags::CLOEXEC, Mode::empty())
}

/// The text of a loop's name.
fn name(info: &LoopInfo) -> String {
    let end = info.name.iter().position(|b| *b == 0).unwrap_or(info.name.len());
    String::from_utf8_lossy(&info.name[..end]).into_owned()
}

fn is_of(info: &LoopInfo, stat: &Stat) -> bool {
    (info.device, info.inode) == (stat.st_dev, stat.st_ino)
}

/// The shared loop of a base: the one that there is, or a new one.
pub(super) fn base(ctx: &Ctx, file: &Checked) -> Result<Loop, HelperError> {
    let _searching = SEARCH.lock().unwrap_or_else(PoisonError::into_inner);
    for candidate in listed(&ctx.sys).iter().filter(|l| l.read_only && l.autoclear) {
        let Ok(fd) = open(candidate.number, OFlags::RDONLY) else {
            continue;
        };
        // Asked after it was opened: what it is bound to now, it stays bound to.
        let Ok(info) = sys::loop_status(&fd) else { continue };
        let whole = info.offset == 0 && info.size_limit == 0;
        let ours = info.flags & (sys::LO_READ_ONLY | sys::LO_AUTOCLEAR) == sys::LO_READ_ONLY | sys::LO_AUTOCLEAR;
        if is_of(&info, &file.stat) && whole && ours && name(&info).starts_with(MARK) {
            return Ok(Loop {
                number: candidate.number,
                _fd: fd,
            });
        }
    }
    bind(file, Access::Read, &format!("{MARK}base"))
}

/// A loop over a machine's changes. `mark` says whose they are. A file that a loop has already is refused: two disks that write to
/// one file destroy both.
pub(super) fn changes(ctx: &Ctx, file: &Checked, mark: &str) -> Result<Loop, HelperError> {
    let _searching = SEARCH.lock().unwrap_or_else(PoisonError::into_inner);
    for other in listed(&ctx.sys).iter().filter(|l| !l.read_only && l.autoclear) {
        let info = open(other.number, OFlags::RDONLY)
            .map_err(io::Error::from)
            .and_then(sys::loop_status);
        if info.is_ok_and(|info| is_of(&info, &file.stat)) {
            let text = format!("the changes are in use already, by /dev/loop{}", other.number);
            return Err(error(HelperCode::Conflict, text));
        }
    }
    bind(file, Access::ReadWrite, &format!("{MARK}{mark}"))
}

fn bind(file: &Checked, access: Access, mark: &str) -> Result<Loop, HelperError> {
    let control = rustix::fs::open(CONTROL, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| match e {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => error(
            HelperCode::Unsupported,
            "this host has no loop devices (the kernel module `loop`)",
        ),
        e => failed(format!("open {CONTROL}"), e),
    })?;
    let mut info = LoopInfo::zero();
    info.flags = sys::LO_AUTOCLEAR;
    match access {
        Access::Read => info.flags |= sys::LO_READ_ONLY,
        // What is written is in the guest's cache and in that of the device above already. Bases are shared: they are worth keeping.
        Access::ReadWrite if file.storage == Storage::Direct => info.flags |= sys::LO_DIRECT_IO,
        Access::ReadWrite => {}
    }
    let mark = &mark.as_bytes()[..mark.len().min(sys::LOOP_NAME - 1)];
    info.name[..mark.len()].copy_from_slice(mark);
    let flags = match access {
        Access::Read => OFlags::RDONLY,
        Access::ReadWrite => OFlags::RDWR,
    };
    for _ in 0..TRIES {
        let number = sys::loop_free(&control).map_err(|e| failed("find a free loop device", e))?;
        let fd = open(number, flags).map_err(|e| failed(format!("open /dev/loop{number}"), e))?;
        match sys::loop_configure(&fd, &file.fd, BLOCK, info) {
            Ok(()) => return Ok(Loop { number, _fd: fd }),
            // Somebody else took it in between.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            Err(e) => return Err(failed(format!("bind /dev/loop{number}"), e)),
        }
    }
    Err(error(
        HelperCode::Failed,
        format!("cannot bind a loop device: others took {TRIES} free ones first"),
    ))
}

/// How long somebody who looked at a loop (udev) may keep it from going.
const LETTING_GO: Duration = Duration::from_secs(5);

/// The loops right below a block device.
pub(super) fn below(ctx: &Ctx, dev: u64) -> Vec<u32> {
    let device = format!("dev/block/{}:{}/slaves", rustix::fs::major(dev), rustix::fs::minor(dev));
    let entries = std::fs::read_dir(ctx.sys.join(device)).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("loop")?.parse().ok())
        .collect()
}

/// Waits until loops that have lost a user are gone, unless they have another.
pub(super) fn wait(ctx: &Ctx, numbers: &[u32]) -> Result<(), HelperError> {
    let deadline = Instant::now() + LETTING_GO;
    for number in numbers {
        let dir = ctx.sys.join(format!("block/loop{number}"));
        let idle = || std::fs::read_dir(dir.join("holders")).is_ok_and(|mut holders| holders.next().is_none());
        while dir.join("loop").is_dir() && idle() {
            if Instant::now() >= deadline {
                let text = format!(
                    "/dev/loop{number} is still open {} s after its last disk went",
                    LETTING_GO.as_secs()
                );
                return Err(error(HelperCode::Conflict, text));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

/// Number and mark of the loops that are banger's.
pub(super) fn marked(ctx: &Ctx) -> Vec<(u32, String)> {
    listed(&ctx.sys)
        .into_iter()
        .filter(|listed| listed.autoclear)
        .filter_map(|listed| {
            let fd = open(listed.number, OFlags::RDONLY).ok()?;
            let name = name(&sys::loop_status(fd).ok()?);
            name.starts_with(MARK).then_some((listed.number, name))
        })
        .collect()
}
