//! Device-mapper, by its control device: a few calls, encoded here.
//!
//! Nothing depends on udev, and where it runs it is told to leave the devices alone: whoever opens one in the middle of its removal
//! keeps it from going.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use banger_system::helper::{HelperCode, HelperError};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::sys;
use super::table::Target;
use crate::ctx::{error, failed};

/// The control device. Its node is made by the kernel (devtmpfs), also where the module is not loaded yet.
const CONTROL: &str = "/dev/mapper/control";
/// How long a device may still be in use when it is to go: whoever looks at new block devices (udev) is done by then.
pub(super) const REMOVAL: Duration = Duration::from_secs(10);
/// How often it is tried until then.
const BETWEEN: Duration = Duration::from_millis(20);

const LIST_DEVICES: u8 = 2;
const DEV_CREATE: u8 = 3;
const DEV_REMOVE: u8 = 4;
const DEV_SUSPEND: u8 = 6;
const DEV_STATUS: u8 = 7;
const TABLE_LOAD: u8 = 9;
const TABLE_STATUS: u8 = 12;

const READONLY: u32 = 1;
/// [`TABLE_STATUS`] answers with the tables, not with their state.
const STATUS_TABLE: u32 = 1 << 4;
const BUFFER_FULL: u32 = 1 << 8;
/// Nobody waits for pages to be written when a table becomes active for the first time.
const SKIP_LOCKFS: u32 = 1 << 10;
const NOFLUSH: u32 = 1 << 11;

/// Flags for udev's rules, which travel in the upper half of an event's number: no rules for subsystems, disks, or others; low
/// priority for links; and "this is the event that counts", without which some versions of the rules guess.
const UDEV_HANDS_OFF: u32 = (0x02 | 0x04 | 0x08 | 0x10 | 0x40) << 16;

const VERSION: [u32; 3] = [4, 0, 0];
const OFF_DATA_START: usize = 16;
const OFF_TARGET_COUNT: usize = 20;
const OFF_OPEN_COUNT: usize = 24;
const OFF_FLAGS: usize = 28;
const OFF_EVENT: usize = 32;
const OFF_DEV: usize = 40;
const OFF_NAME: usize = 48;
const OFF_UUID: usize = 176;
const LEN_NAME: usize = 128;
const LEN_UUID: usize = 129;
const LEN_SPEC: usize = 40;
const LEN_KIND: usize = 16;
/// Longest answer: a list of all devices of a host.
const MOST: usize = 8 << 20;

/// A buffer for one call: its header, then data.
struct Buffer(Vec<u64>);

impl Buffer {
    fn new(name: &str, room: usize) -> Self {
        let mut buffer = Self(vec![0; (sys::DM_HEADER + room).div_ceil(8)]);
        for (n, part) in VERSION.iter().enumerate() {
            buffer.put(n * 4, &part.to_ne_bytes());
        }
        buffer.put(OFF_DATA_START, &(sys::DM_HEADER as u32).to_ne_bytes());
        // Names are banger's own and short; what is longer ends before the zero that has to follow.
        buffer.put(OFF_NAME, &name.as_bytes()[..name.len().min(LEN_NAME - 1)]);
        buffer
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (n, byte) in bytes.iter().enumerate() {
            let (word, offset) = ((at + n) / 8, (at + n) % 8);
            let mut whole = self.0[word].to_ne_bytes();
            whole[offset] = *byte;
            self.0[word] = u64::from_ne_bytes(whole);
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn u32(&self, at: usize) -> u32 {
        u32_at(&self.bytes(), at).unwrap_or_default()
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The text that begins somewhere and ends with a zero.
fn text_at(bytes: &[u8], at: usize, most: usize) -> String {
    let rest = bytes.get(at..).unwrap_or_default();
    let rest = &rest[..rest.len().min(most)];
    let end = rest.iter().position(|b| *b == 0).unwrap_or(rest.len());
    String::from_utf8_lossy(&rest[..end]).into_owned()
}

/// The targets of a table, as they follow the header.
fn encode(targets: &[Target]) -> Vec<u8> {
    let mut all = Vec::new();
    for target in targets {
        let next = (LEN_SPEC + target.params.len() + 1).next_multiple_of(8);
        let begin = all.len();
        all.extend(target.start.to_ne_bytes());
        all.extend(target.length.to_ne_bytes());
        all.extend(0i32.to_ne_bytes());
        all.extend((next as u32).to_ne_bytes());
        let mut kind = [0; LEN_KIND];
        let name = target.kind.as_bytes();
        kind[..name.len().min(LEN_KIND - 1)].copy_from_slice(&name[..name.len().min(LEN_KIND - 1)]);
        all.extend(kind);
        all.extend(target.params.as_bytes());
        all.resize(begin + next, 0);
    }
    all
}

/// Kind and status line of each target in an answer.
fn decode(bytes: &[u8]) -> Vec<(String, String)> {
    let start = u32_at(bytes, OFF_DATA_START).unwrap_or_default() as usize;
    let count = u32_at(bytes, OFF_TARGET_COUNT).unwrap_or_default();
    let mut found = Vec::new();
    let mut at = start;
    for _ in 0..count.min(1024) {
        let Some(next) = u32_at(bytes, at + 20) else { break };
        let kind = text_at(bytes, at + 24, LEN_KIND);
        found.push((kind, text_at(bytes, at + LEN_SPEC, bytes.len())));
        // Here, unlike in a table that is loaded, the next one is counted from where the data begins.
        let next = start + next as usize;
        if next <= at {
            break;
        }
        at = next;
    }
    found
}

/// Names in a list of devices.
fn names(bytes: &[u8]) -> Vec<String> {
    let mut at = u32_at(bytes, OFF_DATA_START).unwrap_or_default() as usize;
    let mut found = Vec::new();
    while let (Some(dev), Some(next)) = (u64_at(bytes, at), u32_at(bytes, at + 8)) {
        if dev != 0 {
            found.push(text_at(bytes, at + 12, LEN_NAME));
        }
        if next == 0 {
            break;
        }
        at += next as usize;
    }
    found
}

/// What there is of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Info {
    /// Its number.
    pub(super) dev: u64,
    /// Its UUID.
    pub(super) uuid: String,
    /// How often it is open.
    pub(super) open: u32,
}

/// The control device, open.
#[derive(Debug)]
pub(super) struct Control(OwnedFd);

impl Control {
    /// Opens it. None where this host has no device-mapper.
    pub(super) fn open() -> Result<Option<Self>, HelperError> {
        match rustix::fs::open(Path::new(CONTROL), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => Ok(Some(Self(fd))),
            Err(Errno::NOENT | Errno::NODEV | Errno::NXIO) => Ok(None),
            Err(e) => Err(failed(format!("open {CONTROL}"), e)),
        }
    }

    /// The same where it is needed.
    pub(super) fn needed() -> Result<Self, HelperError> {
        Self::open()?.ok_or_else(|| {
            error(
                HelperCode::Unsupported,
                "this host has no device-mapper (the kernel module `dm_mod`)",
            )
        })
    }

    fn call(&self, command: u8, buffer: &mut Buffer) -> io::Result<()> {
        sys::dm(&self.0, command, &mut buffer.0)
    }

    /// Makes a device that has no table yet.
    pub(super) fn create(&self, name: &str, uuid: &str) -> io::Result<u64> {
        let mut buffer = Buffer::new(name, 0);
        buffer.put(OFF_UUID, &uuid.as_bytes()[..uuid.len().min(LEN_UUID - 1)]);
        self.call(DEV_CREATE, &mut buffer)?;
        Ok(u64_at(&buffer.bytes(), OFF_DEV).unwrap_or_default())
    }

    /// Gives it a table, and makes that the one it works by.
    pub(super) fn activate(&self, name: &str, targets: &[Target], read_only: bool) -> io::Result<()> {
        let table = encode(targets);
        let mode = if read_only { READONLY } else { 0 };
        let mut buffer = Buffer::new(name, table.len());
        buffer.put(OFF_TARGET_COUNT, &(targets.len() as u32).to_ne_bytes());
        buffer.put(OFF_FLAGS, &mode.to_ne_bytes());
        buffer.put(sys::DM_HEADER, &table);
        self.call(TABLE_LOAD, &mut buffer)?;
        let mut buffer = Buffer::new(name, 0);
        buffer.put(OFF_FLAGS, &(mode | SKIP_LOCKFS | NOFLUSH).to_ne_bytes());
        buffer.put(OFF_EVENT, &UDEV_HANDS_OFF.to_ne_bytes());
        self.call(DEV_SUSPEND, &mut buffer)
    }

    /// What there is of a device; none if it is not there.
    pub(super) fn info(&self, name: &str) -> io::Result<Option<Info>> {
        let mut buffer = Buffer::new(name, 0);
        match self.call(DEV_STATUS, &mut buffer) {
            Ok(()) => {
                let bytes = buffer.bytes();
                Ok(Some(Info {
                    dev: u64_at(&bytes, OFF_DEV).unwrap_or_default(),
                    uuid: text_at(&bytes, OFF_UUID, LEN_UUID),
                    open: u32_at(&bytes, OFF_OPEN_COUNT).unwrap_or_default(),
                }))
            }
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Kind and status of a device's targets.
    pub(super) fn status(&self, name: &str) -> io::Result<Vec<(String, String)>> {
        self.grow(name, TABLE_STATUS, 0).map(|bytes| decode(&bytes))
    }

    /// Kind and parameters of a device's targets, as the kernel works by them.
    pub(super) fn table(&self, name: &str) -> io::Result<Vec<(String, String)>> {
        self.grow(name, TABLE_STATUS, STATUS_TABLE).map(|bytes| decode(&bytes))
    }

    /// The names of all devices.
    pub(super) fn names(&self) -> io::Result<Vec<String>> {
        self.grow("", LIST_DEVICES, 0).map(|bytes| names(&bytes))
    }

    /// A call whose answer may be longer than the room for it.
    fn grow(&self, name: &str, command: u8, flags: u32) -> io::Result<Vec<u8>> {
        let mut room = 16 << 10;
        loop {
            let mut buffer = Buffer::new(name, room);
            buffer.put(OFF_FLAGS, &flags.to_ne_bytes());
            self.call(command, &mut buffer)?;
            if buffer.u32(OFF_FLAGS) & BUFFER_FULL == 0 {
                return Ok(buffer.bytes());
            }
            room *= 4;
            if room > MOST {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
        }
    }

    /// Waits until a device is open no more. One that is not there is fine.
    pub(super) fn unused(&self, name: &str) -> Result<(), HelperError> {
        let deadline = Instant::now() + REMOVAL;
        loop {
            let info = self.info(name).map_err(|e| failed(format!("look for {name}"), e))?;
            let open = info.map_or(0, |info| info.open);
            if open == 0 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(in_use(name, open));
            }
            std::thread::sleep(BETWEEN);
        }
    }

    /// Removes a device, and waits for others to let go of it. One that is not there is fine.
    pub(super) fn remove(&self, name: &str) -> Result<(), HelperError> {
        let deadline = Instant::now() + REMOVAL;
        loop {
            let mut buffer = Buffer::new(name, 0);
            buffer.put(OFF_EVENT, &UDEV_HANDS_OFF.to_ne_bytes());
            match self.call(DEV_REMOVE, &mut buffer) {
                Ok(()) => return Ok(()),
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(()),
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    if Instant::now() >= deadline {
                        let open = self.info(name).ok().flatten().map_or(0, |info| info.open);
                        return Err(in_use(name, open));
                    }
                    std::thread::sleep(BETWEEN);
                }
                Err(e) => return Err(failed(format!("remove the block device {name}"), e)),
            }
        }
    }
}

fn in_use(name: &str, open: u32) -> HelperError {
    let text = format!(
        "the block device {name} is still in use ({open} times) after {} s",
        REMOVAL.as_secs()
    );
    error(HelperCode::Conflict, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_as_the_kernel_reads_it() {
        let target = |start, kind, params: &str| Target {
            start,
            length: 8,
            kind,
            params: params.into(),
        };
        let table = encode(&[target(0, "linear", "7:3 0"), target(8, "zero", "")]);
        assert_eq!(table.len(), 48 + 48);
        assert_eq!((u64_at(&table, 0), u64_at(&table, 8)), (Some(0), Some(8)));
        assert_eq!((u32_at(&table, 16), u32_at(&table, 20)), (Some(0), Some(48)));
        assert_eq!(
            (text_at(&table, 24, 16), text_at(&table, 40, 8)),
            ("linear".into(), "7:3 0".into())
        );
        assert_eq!((u64_at(&table, 48), text_at(&table, 72, 16)), (Some(8), "zero".into()));
        assert_eq!(text_at(&table, 88, 8), "");
    }

    #[test]
    fn a_header_as_the_kernel_reads_it() {
        let mut buffer = Buffer::new("fc-00112233aabbccdd-root", 0);
        buffer.put(OFF_UUID, b"BANGER-x");
        let bytes = buffer.bytes();
        assert_eq!(bytes.len(), sys::DM_HEADER);
        assert_eq!(
            (u32_at(&bytes, 0), u32_at(&bytes, OFF_DATA_START)),
            (Some(4), Some(312))
        );
        assert_eq!(text_at(&bytes, OFF_NAME, LEN_NAME), "fc-00112233aabbccdd-root");
        assert_eq!(text_at(&bytes, OFF_UUID, LEN_UUID), "BANGER-x");
    }

    /// An answer: a header, then what the kernel writes behind it.
    fn answer(count: u32, data: &[u8]) -> Vec<u8> {
        let mut buffer = Buffer::new("x", data.len());
        buffer.put(OFF_TARGET_COUNT, &count.to_ne_bytes());
        buffer.put(sys::DM_HEADER, data);
        buffer.bytes()
    }

    #[test]
    fn status_and_lists_as_the_kernel_writes_them() {
        let mut data = encode(&[
            Target {
                start: 0,
                length: 8,
                kind: "snapshot",
                params: "16/4096 16".into(),
            },
            Target {
                start: 8,
                length: 8,
                kind: "zero",
                params: String::new(),
            },
        ]);
        let second = u32_at(&data, 20).unwrap() as usize;
        let end = data.len() as u32;
        data[second + 20..second + 24].copy_from_slice(&end.to_ne_bytes());
        let found = decode(&answer(2, &data));
        assert_eq!(
            found,
            [("snapshot".into(), "16/4096 16".into()), ("zero".into(), String::new())]
        );

        let mut list = Vec::new();
        for (name, next) in [("fc-a-root", 32u32), ("vg-home", 0)] {
            let begin = list.len();
            list.extend(64_771u64.to_ne_bytes());
            list.extend(next.to_ne_bytes());
            list.extend(name.as_bytes());
            list.resize(begin + 32, 0);
        }
        assert_eq!(names(&answer(0, &list)), ["fc-a-root", "vg-home"]);
        assert_eq!(names(&answer(0, &[0; 16])), [""; 0], "no devices");
    }

    #[test]
    fn an_answer_that_makes_no_sense_ends() {
        assert!(decode(&answer(u32::MAX, &[0xff; 64])).len() <= 2);
        assert!(decode(&[]).is_empty() && names(&[]).is_empty());
        let _ = names(&answer(0, &[0xff; 64]));
    }
}
